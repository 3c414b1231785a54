"""Read, write: the two ends of every command."""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from lorasurgery.architectures import named
from lorasurgery.errors import BrokenModuleError, DroppedKeysError, RequestError
from lorasurgery.io.finite import blamed, computed_bytes, first_bad, not_finite
from lorasurgery.io.header import read_safetensors
from lorasurgery.io.peft_folder import is_peft_folder, whole_folder, write_peft_folder
from lorasurgery.io.sniff import TORCH_SUFFIXES
from lorasurgery.io.writer import MODEL_HASH, check_output, write_safetensors
from lorasurgery.layouts.emit import Emitted, emit, reshape_weight
from lorasurgery.layouts.parse import FLAGS, parse
from lorasurgery.layouts.peft_keys import is_carried, is_harmless
from lorasurgery.layouts.peft_read import read_peft
from lorasurgery.layouts.scales import GIVEN, HEADER_KEY
from lorasurgery.layouts.targets import Layout
from lorasurgery.layouts.targets import layout as layout_named
from lorasurgery.metadata import FACTOR, converted, with_lokr_factor
from lorasurgery.surgery.convert import Options, convert

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorasurgery.adapter import Adapter
    from lorasurgery.architectures.table import Architecture
    from lorasurgery.io.header import RawFile
    from lorasurgery.layouts.scales import PeftConfig
    from lorasurgery.report import Report

KNOWN_TOP_LEVEL = (FACTOR, *FLAGS)


def load(path: str | Path, *, arch: str | None = None, base: str | Path | None = None, alpha: float | None = None) -> Adapter:
    """Read an adapter: safetensors, a PyTorch file (weights only), or a PEFT folder.

    ``arch`` overrides detection (``flux1`` or a variant such as ``flux1-schnell``); ``base`` is a checkpoint whose
    header supplies names and shapes; ``alpha`` is what the file was trained at, where nothing in it says so. Tensors stay
    on disk. Raises SurgeryError for anything that is no adapter.
    """
    path = Path(path)
    if alpha is not None and not (isfinite(alpha) and alpha):
        raise RequestError(f"{GIVEN} is a number other than 0, not {alpha:g}", path=path)
    among: tuple[Architecture, ...] | None = None if arch is None else named(arch)
    if base is not None:
        from lorasurgery.models import open_model

        among = (open_model(base).architecture,)
    raw, configs = read_unparsed(path)
    adapter = parse(raw, among=among, configs=configs, alpha=alpha)
    if alpha is not None and not any(module.scale.source == GIVEN for _, module in adapter):
        raise RequestError(f"{GIVEN}: the file says its scales itself", path=path, hint=f"no {GIVEN}")
    return adapter


def read_unparsed(path: Path) -> tuple[RawFile, dict[str, PeftConfig] | None]:
    """The tensors of a file or a PEFT folder, and the folder's configurations by component (None for a file).

    The weights in a PEFT folder stand for the folder.
    """
    path = whole_folder(path)
    if path.is_dir() and is_peft_folder(path):
        return read_peft(path)
    return read_any(path), None


def read_any(path: Path) -> RawFile:
    """A file's tensors, still on disk for safetensors, in memory for PyTorch's formats."""
    if path.suffix.lower() in TORCH_SUFFIXES:
        from lorasurgery.io.torchfile import read_torch

        return read_torch(path)
    return read_safetensors(path)


@dataclass(frozen=True, slots=True)
class SaveOptions:
    """How :func:`save` writes."""

    alpha: str | None = None
    """``keep``, ``fold`` or ``header``; None is the layout's own way."""
    prefix: str = "diffusion_model"
    """For the layout ``other``."""
    lokr_factor: int | None = None
    """Overrides the file's own LoKr factor."""
    strict: bool = False
    """Raise instead of leaving anything out."""
    force: bool = False
    """Replace an existing output."""
    dry_run: bool = False
    """Do everything but write."""


def save(
    adapter: Adapter,
    path: str | Path,
    *,
    layout: str | None = None,
    options: SaveOptions | None = None,
    report: Report | None = None,
) -> Report:
    """Write an adapter, converting it first when ``layout`` is not the one it is in.

    Nothing appears at ``path`` until the file is complete. Returns the report, rounding errors included.
    Raises what :func:`lorasurgery.convert` raises, OutputExistsError, BrokenModuleError for NaN and infinity among the
    values that are computed (under ``strict`` among all), and DroppedKeysError under ``strict``.
    """
    path, options = Path(path), options or SaveOptions()
    started = time.perf_counter()
    if report is None:
        adapter, report = convert(adapter, layout or adapter.layout, Options(prefix=options.prefix))
    target = layout_named(adapter.layout)
    report.output = str(path)
    if not options.dry_run:
        check_output(path, [Path(report.input)] if report.input else [], force=options.force)
    emitted = emit(adapter, target, report, alpha=options.alpha, prefix=options.prefix)
    if not emitted.written:
        raise DroppedKeysError(
            f"nothing would be left: {report.dropped[0][1] if report.dropped else 'the file has no modules'}",
            keys=[key for key, _ in report.dropped],
            path=report.input or None,
            hint="a target that holds these modules, such as comfyui",
        )
    _leftovers(adapter, target, emitted, report)
    if options.strict:
        _refuse_dropped(report)
    try:
        _check_values(emitted, options)
        metadata = _metadata(adapter, target, emitted, report, options)
        write = _write_peft if target.id == "peft" else _write_file
        if not options.dry_run:
            write(path, adapter, emitted, metadata)
    except BrokenModuleError as error:
        raise (blamed(error, Path(report.input)) if report.input else error) from error
    report.written = not options.dry_run
    report.seconds += time.perf_counter() - started
    return report


def _refuse_dropped(report: Report) -> None:
    """``--strict``: what ``--drop`` names may go, nothing else."""
    dropped = [(key, reason) for key, reason in report.dropped if not reason.startswith("--drop")]
    if dropped:
        raise DroppedKeysError(
            f"--strict: {len(dropped)} keys would be left out, first {dropped[0][0]} ({dropped[0][1]})",
            keys=[key for key, _ in dropped],
            path=report.input or None,
            hint="without --strict, or --drop REGEX for what you mean to leave out",
        )


def _check_values(emitted: Emitted, options: SaveOptions) -> None:
    """``strict``: stored values too must be finite; ``dry_run``: compute what the writer would, so that the report is true."""
    if options.strict:
        bad = first_bad(emitted.tensors)
        if bad is not None:
            raise not_finite(bad, None)
    if options.dry_run:
        for name, tensor in emitted.tensors.items():
            if tensor.compute is not None:
                computed_bytes(name, tensor)


def _leftovers(adapter: Adapter, target: Layout, emitted: Emitted, report: Report) -> None:
    """Keys no module holds: copied where the reader ignores what it does not know, listed either way."""
    for left in adapter.leftovers:
        if left.key in KNOWN_TOP_LEVEL or is_harmless(left.key):
            continue
        pefts = target.id == "peft" and bool(adapter.configs) and is_carried(left.key, adapter.configs)
        if (target.carries_unknown or pefts) and left.key not in emitted.tensors:
            emitted.tensors[left.key] = left.tensor
            report.carried.append((left.key, left.reason))
        else:
            report.dropped.append((left.key, f"{left.reason}, and {target.reader} refuses unknown keys"))


def _metadata(adapter: Adapter, target: Layout, emitted: Emitted, report: Report, options: SaveOptions) -> dict[str, str]:
    """The result's metadata; the LoKr factor's buffer joins the tensors, and ComfyUI's ``reshape_weight``."""
    if target.id == "comfyui":
        _widen(adapter, emitted)
    metadata = converted(adapter, adapter.metadata, emitted.written, source_layout=report.source_layout, target=target.id)
    report.warnings += with_lokr_factor(
        adapter, metadata, emitted.tensors, explicit=options.lokr_factor, buffer=target.carries_unknown
    )
    if report.scale_written == "header" and target.id != "peft":
        from lorasurgery.layouts.peft_config import header_metadata

        metadata[HEADER_KEY] = header_metadata(emitted.written, adapter.architecture, adapter.configs)
    return metadata


def _write_file(path: Path, adapter: Adapter, emitted: Emitted, metadata: Mapping[str, str]) -> None:
    hashes = MODEL_HASH in adapter.metadata or adapter.layout == "sd-scripts"
    write_safetensors(path, emitted.tensors, metadata, hashes=hashes)


def _widen(adapter: Adapter, emitted: Emitted) -> None:
    """ComfyUI pads a base weight that is narrower than the adapter's when it finds ``reshape_weight``."""
    arch = adapter.architecture
    for one in emitted.written:
        weight = one.module.site.spans[0].weight
        if weight in arch.widened and f"{one.stem}.reshape_weight" not in emitted.tensors:
            emitted.tensors[f"{one.stem}.reshape_weight"] = reshape_weight(arch.shapes[weight])


def _write_peft(path: Path, adapter: Adapter, emitted: Emitted, metadata: Mapping[str, str]) -> None:
    from lorasurgery.layouts.peft_write import peft_parts

    parts = {
        component: (dict(part.config), {name: emitted.tensors[key] for name, key in part.names.items()})
        for component, part in peft_parts(adapter, emitted).items()
    }
    write_peft_folder(path, parts, metadata)
