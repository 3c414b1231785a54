"""Apply: match the adapters to the model, write the model with their changes, and say what was done."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from typing import TYPE_CHECKING

from lorasurgery.errors import DroppedKeysError, RequestError
from lorasurgery.io.sniff import TORCH_SUFFIXES
from lorasurgery.io.writer import check_output
from lorasurgery.linalg.threads import map_threads
from lorasurgery.operations.onto.options import ApplyOptions
from lorasurgery.operations.onto.widen import check_width, rewritten
from lorasurgery.verbs.apply.folder import WEIGHTS, check_folder, companions, replacing_folder
from lorasurgery.verbs.apply.lycoris import compare
from lorasurgery.verbs.apply.match import match
from lorasurgery.verbs.apply.produce import Producer
from lorasurgery.verbs.apply.provenance import marked
from lorasurgery.verbs.apply.report import ApplyReport, Used
from lorasurgery.verbs.apply.twice import stored_twice
from lorasurgery.verbs.apply.verify import verify
from lorasurgery.verbs.apply.writing import Writing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from lorasurgery.models import Model
    from lorasurgery.operations.onto.plan import Plan
    from lorasurgery.operations.onto.source import Source
    from lorasurgery.verbs.apply.tally import Tally

MOST_WORKERS = 8
"""Processes are one more: one of them waits for its turn to write."""
OTHER_FORMATS = WEIGHTS - {".safetensors"}
"""Ends of names by which programs take a file for what it would not be."""


def apply(
    model: Model,
    sources: Sequence[Source],
    out: Path,
    options: ApplyOptions | None = None,
    *,
    force: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ApplyReport:
    """Write ``model`` with the adapters in it (or out of it) to ``out``, a file for a file and a folder for a folder.

    Each tensor is read, changed and written once; the others are copied byte for byte, and keys keep their order.
    ``progress`` is told (bytes done, bytes in all), from any thread. Raises RequestError when nothing matches or the model
    is GGUF, OutputExistsError, NotRepresentableError for a module that cannot be applied or taken out,
    BrokenModuleError for NaN, infinity and values out of range, DroppedKeysError under ``strict``.
    """
    started, options = time.perf_counter(), options or ApplyOptions()
    options.check()
    _refuse(model, out)
    plan = match(model, sources)
    report = _begun(model, sources, plan, out, options)
    if options.strict:
        _refuse_unmatched(plan)
    producer = Producer(model, plan, options)
    workers = options.workers or min(os.cpu_count() or 1, MOST_WORKERS) + options.fork
    if dry_run:
        with producer.tools.running():
            report.tensors = map_threads(lambda own: producer.make(own, None, _nowhere), list(plan.changes.values()), workers)
    else:
        writing = Writing(model, plan, producer, workers, fork=options.fork).told(progress)
        write = _file if model.path.is_file() and not model.path.name.endswith(".json") else _folder
        report.tensors = write(model, sources, out, writing, report, force=force)
        report.written, report.bytes = True, writing.total
    report.seconds = time.perf_counter() - started
    if options.verify and report.written:
        report.verified = verify(model, sources, out, options)
        if not report.verified:
            report.warnings.append("--verify has compared nothing: it has no formula for any of the changes")
    if options.prefer_lycoris:
        report.lycoris = compare(model, plan, options)
    return report


def _refuse_unmatched(plan: Plan) -> None:
    """``--strict``: raises DroppedKeysError when a key of an adapter matches no weight."""
    if plan.unmatched:
        path, key, reason = plan.unmatched[0]
        raise DroppedKeysError(
            f"--strict: {len(plan.unmatched)} keys match no weight, first {key} ({reason})",
            keys=[own for _, own, _ in plan.unmatched], path=path, hint="without --strict",
        )  # fmt: skip


def _nowhere(_: bytes) -> None:
    """A dry run's scales."""


def _refuse(model: Model, out: Path) -> None:
    """Raises RequestError for models that are read but not written."""
    quantised = next((f.path for f in model.files if f.path.suffix.lower() == ".gguf"), None)
    if quantised is not None:
        raise RequestError(
            "a GGUF model is quantised in blocks, and a small change would be lost in them", path=quantised,
            hint="the bf16 or fp16 model, and quantise the result; or load the adapter beside the GGUF model",
        )  # fmt: skip
    pickled = next((f.path for f in model.files if f.path.suffix.lower() in TORCH_SUFFIXES), None)
    if pickled is not None and model.path.is_dir():
        raise RequestError(
            "the result is safetensors, and the model's files are in PyTorch's format", path=pickled,
            hint="the model in safetensors; of a single .ckpt the result can be written",
        )  # fmt: skip
    if model.path.is_file() and out.suffix.lower() in OTHER_FORMATS:
        raise RequestError("the result is safetensors, whatever its name", path=out, hint="an output that ends in .safetensors")


def _begun(model: Model, sources: Sequence[Source], plan: Plan, out: Path, options: ApplyOptions) -> ApplyReport:
    """The report before anything is computed; raises RequestError when no module of an adapter is used, or one does not fit."""
    report = ApplyReport(
        str(model.path), str(out), model.architecture.key, model.layout, undone=options.unapply, rounding=options.rounding,
        unmatched=list(plan.unmatched), untouched=len(model.weights) - len(plan.changes),
    )  # fmt: skip
    for source, used, left in zip(sources, plan.modules, plan.left_out, strict=True):
        placed = (own for change in plan.changes.values() for own in change.placed if own.source is source)
        gone = [(key, reason) for path, key, reason in plan.unmatched if path == source.path]
        report.ledgers.append(source.adapter.ledger.without(gone))
        families = Counter(module.family for module in {id(own.module): own.module for own in placed}.values())
        report.used.append(Used(source.path, source.text, source.adapter.layout, used, left, dict(families)))
        report.warnings += [f"{source.path}: {warning}" for warning in source.adapter.warnings]
        if not used and left:
            report.warnings.append(f"{source.path}: every weight is 0, nothing of it is applied")
        elif not used:
            reason = next((r for path, _, r in plan.unmatched if path == source.path), "it has no modules")
            raise RequestError(
                f"none of its modules belongs to {model.path}: {reason}", path=source.path,
                hint="the model it was trained on; for text encoders their own file, an all-in-one file, or a pipeline",
            )  # fmt: skip
    report.warnings += [*check_width(plan, undo=options.unapply), *stored_twice(model, plan)]
    return report


def _file(
    model: Model, sources: Sequence[Source], out: Path, writing: Writing, report: ApplyReport, *, force: bool
) -> list[Tally]:
    """A single file."""
    check_output(out, [model.path, *(own.adapter.path for own in sources if own.adapter.path is not None)], force=force)
    metadata, report.dropped_metadata = marked(model.files[0].raw.metadata, sources, undone=report.undone)
    return writing.file(model.files[0], out, metadata)


def _folder(
    model: Model, sources: Sequence[Source], out: Path, writing: Writing, report: ApplyReport, *, force: bool
) -> list[Tally]:
    """A folder of shards or a whole pipeline; everything else in it is copied."""
    index = None if model.path.is_dir() else model.path
    root = model.path if index is None else index.parent
    used = [file.path for file in model.files]
    copied, left = companions(root, used) if index is None else ([index], [])
    names = {path.relative_to(root).as_posix() for path in (*used, *copied)}
    check_folder(out, root, names, force=force)
    report.copied = [path.relative_to(root).as_posix() for path in copied]
    report.left_out = [(path.relative_to(root).as_posix(), "another version of weights that change") for path in left]
    tallies: list[Tally] = []
    with replacing_folder(out) as made:
        for file in model.files:
            metadata, dropped = marked(file.raw.metadata, sources, undone=report.undone)
            report.dropped_metadata += [key for key in dropped if key not in report.dropped_metadata]
            tallies += writing.file(file, made / file.path.relative_to(root), metadata)
        for path in copied:
            target = made / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            text = rewritten(path, writing.every_change())
            if text is None:
                shutil.copyfile(path, target)
            else:
                target.write_text(text, encoding="utf-8")
    return tallies
