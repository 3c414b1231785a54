"""What ``lorasurgery ema`` does: read the checkpoints in order, average them, write the result."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lorasurgery.api import SaveOptions, save
from lorasurgery.cli.files import expanded
from lorasurgery.cli.render import announce
from lorasurgery.errors import RequestError, SurgeryError
from lorasurgery.files.opened import open_together, read_any, together
from lorasurgery.files.taken import Unparsed
from lorasurgery.io.finite import computed_bytes
from lorasurgery.io.header import RawFile
from lorasurgery.io.writer import LEGACY_HASH, MODEL_HASH, check_output, write_safetensors
from lorasurgery.ledger import Ledger
from lorasurgery.operations.conversion.convert import Options, convert
from lorasurgery.verbs.ema.ema import ema
from lorasurgery.verbs.ema.order import Ordered, in_order
from lorasurgery.version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lorasurgery.io.tensors import Tensor
    from lorasurgery.verbs.ema.ema import EmaOptions

PROVENANCE = "lorasurgery.merged_from"
"""As ``lorasurgery merge`` writes it."""


@dataclass(frozen=True, slots=True)
class EmaRequest:
    """The command line's options."""

    options: EmaOptions
    delta: bool = False
    rank: int | None = None
    sort: str = "steps"
    arch: str | None = None
    base: Path | None = None
    target: str | None = None
    dtype: str = "keep"
    force: bool = False
    strict: bool = False
    dry_run: bool = False
    measure: bool = False
    alpha: float | None = None


@dataclass(slots=True)
class Averaged:
    """The outcome."""

    output: Path | None
    paths: list[Path]
    by: str
    weights: tuple[float, ...]
    written: bool = False
    tensors: int = 0
    rounding: float = 0.0
    """Relative error of the changes that rounding made, where it is known (``--on delta``, ``--dtype``)."""
    distance: float | None = None
    """From the average of the changes, where it was asked for."""
    resize: dict[str, Any] | None = None
    dropped: list[tuple[str, str]] = field(default_factory=list)
    ledgers: list[tuple[str, Ledger]] = field(default_factory=list)
    """(file, where its keys ended) of the files that have a weight."""
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0


def run(paths: Sequence[Path], out: Path | None, request: EmaRequest) -> Averaged:
    """Average the checkpoints that ``paths`` mean; in a folder, what an earlier run wrote to ``out`` is none of them."""
    started = time.perf_counter()
    inputs = [file for path in paths for file in expanded(path) if file == path or not _is_earlier(file, out)]
    if len(inputs) < 2:
        raise RequestError(f"an average needs two checkpoints at least, not {len(inputs)}", hint="the files of one run")
    folders = [path for path in inputs if path.is_dir()]
    if folders and not request.delta:
        raise RequestError("a folder of PEFT", path=folders[0], hint="--on delta, or lorasurgery convert to files first")
    ordered = in_order([_raw(path) for path in inputs], request.sort)
    files = [file.path for file in ordered.files]
    done = Averaged(out, files, ordered.by, request.options.weights(len(files)))
    if out is not None and not request.dry_run:
        check_output(out, files if request.base is None else [*files, request.base], force=request.force)
    (_changes if request.delta else _tensors)(ordered, out, request, done)
    done.seconds = time.perf_counter() - started
    return done


def _is_earlier(file: Path, out: Path | None) -> bool:
    """Whether a file is the result of the same command before."""
    same = out is not None and out.exists() and file.samefile(out)
    return same and _raw(file).metadata.get("lorasurgery.operation", "").startswith("ema of ")


def _raw(path: Path) -> RawFile:
    """A file, or the metadata and name of a PEFT folder."""
    return RawFile(path, {}, {}) if path.is_dir() else read_any(path)


def _tensors(ordered: Ordered, out: Path | None, request: EmaRequest, done: Averaged) -> None:
    """The average of the tensors, in the files' own keys unless another layout or dtype was asked for."""
    averaged = ema(ordered.files, request.options)
    last = ordered.files[-1]
    kept = {key: value for key, value in last.metadata.items() if key not in (MODEL_HASH, LEGACY_HASH)}
    kept = {"format": "pt", **kept, "lorasurgery.version": __version__, "lorasurgery.operation": _operation(request, done)}
    kept[PROVENANCE] = _provenance(ordered.files, request, done)
    done.tensors = len(averaged)
    used = [file.path.name for file, weight in zip(ordered.files, done.weights, strict=True) if weight]
    done.ledgers = [(name, Ledger({key: key for key in averaged})) for name in used]
    if request.measure:
        from lorasurgery.verbs.ema.distance import distance_from_changes

        done.distance = distance_from_changes(ordered.files, done.weights, averaged)
    if request.target is not None or request.dtype != "keep":
        source = together([Unparsed(RawFile(last.path, averaged, kept))], base=request.base)[0]
        marked = replace(source, operation=_operation(request, done))
        result, report = convert(marked, request.target, Options(dtype=request.dtype))
        save(result, out or last.path, options=_saving(request, done), report=report)
        done.written, done.rounding = report.written, report.losses.total()
        done.dropped, done.warnings = report.dropped, report.warnings
        done.ledgers = [(name, report.ledger or Ledger()) for name in used]
        return
    if request.dry_run or out is None:
        _computed(averaged)
        return
    hashes = MODEL_HASH in last.metadata or any(key.startswith("ss_") for key in last.metadata)
    write_safetensors(out, averaged, kept, hashes=hashes)
    done.written = True


def _computed(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.compute is not None:
            computed_bytes(name, tensor)


def _changes(ordered: Ordered, out: Path | None, request: EmaRequest, done: Averaged) -> None:
    """The weighted sum of what the files do, by the code of ``lorasurgery merge``."""
    from lorasurgery.operations.cut import ResizeOptions
    from lorasurgery.report import Report
    from lorasurgery.verbs.merge.engine import merge
    from lorasurgery.verbs.merge.options import MergeOptions
    from lorasurgery.verbs.merge.source import Source
    from lorasurgery.verbs.merge.weights import Weight

    used = [(file.path, weight) for file, weight in zip(ordered.files, done.weights, strict=True) if weight]
    adapters = open_together([path for path, _ in used], arch=request.arch, base=request.base, alpha=request.alpha)
    sources = [Source(own, Weight(weight), path.name) for own, (path, weight) in zip(adapters, used, strict=True)]
    cut = None if request.rank is None else ResizeOptions(rank=request.rank, dtype=request.dtype, text_encoders=True)
    result, merged = merge(sources, MergeOptions(resize=cut, dtype=request.dtype), request.target)
    last = {key: value for key, value in adapters[-1].metadata.items() if key not in (MODEL_HASH, LEGACY_HASH)}
    last[PROVENANCE] = _provenance(ordered.files, request, done)
    result = replace(result, metadata={**last, **_sizes(result.metadata)}, operation=_operation(request, done))
    report = Report.of(result, result.layout)
    if request.target is not None:
        try:
            result, report = convert(result, request.target)
        except SurgeryError as error:
            error.path = error.path or str(used[-1][0])
            raise
    save(result, out or used[-1][0], options=_saving(request, done), report=report)
    done.written, done.tensors = report.written, sum(len(m.delta.tensors) for m in result.modules.values() if m.delta)
    done.rounding = max(merged.losses.total(), report.losses.total())
    done.resize = None if merged.resize is None else merged.resize.to_json()
    done.ledgers = [
        (source.name, own.without([left for left in report.dropped if own.concerns(left[0])]))
        for source, own in zip(merged.sources, merged.ledgers, strict=True)
    ]
    done.dropped, done.warnings = [*merged.dropped, *report.dropped], [*merged.warnings, *report.warnings, *merged.alerts()]


def _sizes(metadata: Mapping[str, str]) -> dict[str, str]:
    """What a merge says of the network, where the last file's words may no longer hold."""
    return {key: value for key, value in metadata.items() if key.startswith("ss_network_")}


def _saving(request: EmaRequest, done: Averaged) -> SaveOptions:
    return SaveOptions(
        force=request.force, strict=request.strict, dry_run=request.dry_run, inputs=tuple(done.paths), announce=announce
    )


def _operation(request: EmaRequest, done: Averaged) -> str:
    return f"ema of {len(done.paths)} {'changes' if request.delta else 'files'}, {request.options.way}"


def _provenance(files: Sequence[RawFile], request: EmaRequest, done: Averaged) -> str:
    rows = []
    for file, weight in zip(files, done.weights, strict=True):
        own = {"hash": file.metadata[MODEL_HASH]} if MODEL_HASH in file.metadata else {}
        rows.append({"file": file.path.name, "weight": f"{weight:g}", **own})
    return json.dumps({"method": f"ema {request.options.way}", "files": rows})
