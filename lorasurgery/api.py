"""Read, write: the two ends of every command."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorasurgery.adapter import written_in
from lorasurgery.alerts import much_larger
from lorasurgery.checking.loading import loading_notes
from lorasurgery.errors import BrokenModuleError, DroppedKeysError, NotRepresentableError
from lorasurgery.files.blame import blamed
from lorasurgery.io.finite import computed_bytes, first_bad, not_finite
from lorasurgery.io.peft_folder import write_peft_folder
from lorasurgery.io.writer import MODEL_HASH, check_output, write_safetensors
from lorasurgery.layouts.emit import Emitted, emit, reshape_weight
from lorasurgery.layouts.module import TOP_LEVEL
from lorasurgery.layouts.numbered import with_ranks
from lorasurgery.layouts.peft_keys import is_carried
from lorasurgery.layouts.scales import HEADER_KEY
from lorasurgery.metadata import FACTOR, converted, with_lokr_factor
from lorasurgery.operations.conversion.convert import Options, convert

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lorasurgery.adapter import Adapter
    from lorasurgery.io.tensors import Tensor
    from lorasurgery.layouts.targets import Layout
    from lorasurgery.report import Report

ASKED = (
    "--drop", "--keep", "not in --keep", "--prune-for",
    "excluded", "unchanged", "changed by no more", "the policy keeps nothing",
)  # fmt: skip
"""How the reasons begin of what somebody asked to leave out."""


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
    inputs: tuple[Path, ...] = ()
    """All files that the result is made of, where they are not the report's ``input`` alone."""
    smaller: str = "--rank N or --energy 0.99 (after --as lora, where the result is full differences)"
    """What the warning of a large output advises."""
    announce: Callable[[str], None] | None = None
    """Told of an output much larger than its inputs before anything is computed or written."""


def save(
    adapter: Adapter,
    path: str | Path,
    *,
    layout: str | None = None,
    options: SaveOptions | None = None,
    report: Report | None = None,
) -> Report:
    """Write an adapter: in ``layout``, or (None) as the file that it was read from spells it.

    Nothing appears at ``path`` until the file is complete. Returns the report, rounding errors included.
    Raises what :func:`lorasurgery.convert` raises, OutputExistsError, BrokenModuleError for NaN and infinity among the
    values that are computed (under ``strict`` among all), and DroppedKeysError under ``strict``.
    """
    path, options = Path(path), options or SaveOptions()
    started = time.perf_counter()
    if report is None:
        adapter, report = convert(adapter, layout, Options(prefix=options.prefix))
    target = written_in(adapter)
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
    report.settle()
    if options.strict:
        refuse_lost(dict(report.dropped) if report.ledger is None else report.ledger.lost, report.input or None)
        _refuse_errors(report)
    report.warnings += loading_notes(emitted, adapter.architecture, target)
    _announce(emitted, options, report)
    try:
        _check_values(emitted, options)
        metadata = _metadata(adapter, target, emitted, report, options)
        write = _write_peft if target.folder else _write_file
        if not options.dry_run:
            write(path, adapter, emitted, metadata)
    except BrokenModuleError as error:
        raise blamed(error, [Path(report.input)] if report.input else []) from error
    report.warnings += report.losses.alerts()
    report.written = not options.dry_run
    report.seconds += time.perf_counter() - started
    return report


def refuse_lost(lost: Mapping[str, str], path: str | Path | None) -> None:
    """``--strict``: raises DroppedKeysError where an input's key is lost; what somebody asked to leave out may go."""
    gone = [(key, why) for key, why in lost.items() if not why.startswith(ASKED)]
    if gone:
        raise DroppedKeysError(
            f"--strict: {len(gone)} keys would be left out, first {gone[0][0]} ({gone[0][1]})",
            keys=[key for key, _ in gone],
            path=path,
            hint="without --strict, or --drop REGEX for what you mean to leave out",
        )


def _refuse_errors(report: Report) -> None:
    """``--strict``: no module may be off by more than a few percent, as far as that is known before it is written."""
    worst, loud = report.worst(), report.losses.alerts()
    if worst is not None and loud:
        raise NotRepresentableError(
            f"--strict: {loud[0]}", module=worst[0], path=report.input or None,
            hint="without --strict, or a larger --rank or --energy",
        )  # fmt: skip


def _announce(emitted: Emitted, options: SaveOptions, report: Report) -> None:
    """Say so before the work begins where the output will be much larger than its inputs."""
    inputs = options.inputs or ((Path(report.input),) if report.input else ())
    for text in much_larger(emitted.tensors.values(), inputs, options.smaller):
        report.warnings.append(text)
        if options.announce is not None:
            options.announce(text)


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
    """Keys no module holds: copied where the file keeps its spelling or its reader passes over them, and named."""
    for left in adapter.leftovers:
        top = left.key in TOP_LEVEL
        pefts = target.folder and bool(adapter.configs) and is_carried(left.key, adapter.configs)
        if (
            target.own or pefts or target.reads(left.key) or (target.carries_unknown and not top)
        ) and left.key not in emitted.tensors:
            emitted.tensors[left.key] = left.tensor
            report.carried.append((left.key, left.reason))
            if left.state == "kept" and not target.own and not target.reads(left.key):
                report.lose(left.key, f"{left.reason}; {target.reader} reads none from an adapter's file")


def _metadata(adapter: Adapter, target: Layout, emitted: Emitted, report: Report, options: SaveOptions) -> dict[str, str]:
    """The result's metadata; the LoKr factor's buffer joins the tensors, and ComfyUI's ``reshape_weight``."""
    if target.id == "comfyui" and not target.own:
        _widen(adapter, emitted)
    metadata = converted(adapter, adapter.metadata, emitted.written, source_layout=report.source_layout, target=target.id)
    report.warnings += with_lokr_factor(
        adapter, metadata, emitted.tensors, explicit=options.lokr_factor,
        buffer=takes_factor(target, emitted.tensors),
    )  # fmt: skip
    if report.scale_written == "header" and not target.folder:
        from lorasurgery.layouts.peft_config import header_metadata

        metadata[HEADER_KEY] = header_metadata(emitted.written, adapter.architecture, adapter.configs)
    return with_ranks(metadata, emitted.tensors)


def takes_factor(target: Layout, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the LoKr factor's buffer is written: where readers pass over it, and to a file's own spelling if it was there."""
    return FACTOR in tensors if target.own else target.carries_unknown or target.reads(FACTOR)


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
