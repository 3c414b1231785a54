"""Extract: open both models, work on every pair, choose the ranks, write, report."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from lorasurgery.alerts import Alert, bytes_of
from lorasurgery.api import SaveOptions, refuse_lost, save
from lorasurgery.errors import BrokenModuleError, RequestError
from lorasurgery.interrupts import held
from lorasurgery.ledger import Ledger
from lorasurgery.report import Report
from lorasurgery.verbs.extract.inputs import check_devices, check_files, opened
from lorasurgery.verbs.extract.loaders import loader_notes
from lorasurgery.verbs.extract.meta import file_hash, metadata_of, operation
from lorasurgery.verbs.extract.options import ExtractOptions
from lorasurgery.verbs.extract.pairs import Pairs, pair_up
from lorasurgery.verbs.extract.report import SHOWN, ExtractReport, LeftOut, ModuleResult
from lorasurgery.verbs.extract.result import Assembled, assembled
from lorasurgery.verbs.extract.store import Store
from lorasurgery.verbs.extract.work import Done, Unit, jobs_of, run, units_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from concurrent.futures import Future

    from lorasurgery.architectures.table import Architecture
    from lorasurgery.models import Model
    from lorasurgery.verbs.extract.pair import Pair
    from lorasurgery.verbs.extract.store import Entry

    Progress = Callable[["Step"], None]

PARTIAL = ".partial"
"""Put after the output's name for the folder of what is finished."""


@dataclass(frozen=True, slots=True)
class Step:
    """How far an extraction is."""

    done: int
    """Elements of weights compared so far."""
    total: int
    name: str
    """What was just finished."""


@dataclass(frozen=True, slots=True)
class Running:
    """How an extraction is run; none of it changes the result."""

    resume: bool = False
    """Go on where an earlier run stopped."""
    force: bool = False
    """Replace an existing output, and forget what an earlier run had finished."""
    hashes: bool = True
    """Note the sha256 of both files, which takes reading them once more."""
    arch: str | None = None
    """Override the detection of both models."""
    only: str | None = None
    """Refuse models of any other architecture."""
    progress: Progress | None = None
    strict: bool = False
    """Raise DroppedKeysError where a tensor that changed is left out without having been excluded."""


def extract(
    base: str | Path,
    tuned: str | Path,
    output: str | Path,
    options: ExtractOptions | None = None,
    running: Running | None = None,
) -> ExtractReport:
    """Write to ``output`` what ``tuned`` is beyond ``base``.

    Matrices are compared one at a time, and what is finished is kept in ``output`` + ``.partial`` until the output is
    complete, so that an extraction that was stopped can go on. Raises RequestError for options and for models that do not
    belong together, OutputExistsError, FileFormatError and BrokenModuleError (NaN) for the models' files.
    """
    started = time.perf_counter()
    options, running = options or ExtractOptions(), running or Running()
    options.check()
    output = Path(output)
    check_files(output, (Path(base), Path(tuned)), force=running.force)
    models = opened(base, tuned, running.arch, running.only)
    check_devices(options)
    asked, options = options.target is not None, options.aimed(models)
    identity = _identity(models, options)
    options = options.on(models[0].architecture)
    pairs = pair_up(*models, options)
    with _hashing(models, wanted=running.hashes) as hashing:
        store = Store.open(partial(output), identity, resume=running.resume, force=running.force)
        try:
            resumed = _work(pairs.pairs, store, options, running.progress)
            hashes = {which: _hash(store, which, future) for which, future in hashing.items()}
            report, arch = _written(models, pairs, store, options, output, hashes, strict=running.strict)
            if not asked:
                report.warnings += loader_notes(output, models, arch, options.layout)
        except BrokenModuleError:  # a whole file, or other options, would be another extraction
            store.remove()
            raise
        finally:
            store.close(keep=any(entry.arrays for entry in store.entries.values()))
    store.remove()
    report.resumed, report.seconds = resumed, time.perf_counter() - started
    return report


def partial(output: Path) -> Path:
    """The folder of what is finished."""
    return output.with_name(output.name + PARTIAL)


def _identity(models: tuple[Model, Model], options: ExtractOptions) -> dict[str, Any]:
    """What must be the same for an extraction to go on: not what is decided or applied once every pair is finished."""
    cut = replace(
        options.cut, workers=None, alpha="rank", factors="balanced", dtype="keep", uniform=False, min_rank=1,
        size=None if options.cut.size is None else 1, recipe=None if options.cut.recipe is None else "spn_lora,thr=0",
    )  # fmt: skip
    chosen = asdict(replace(options, device="", jobs=None, spec=True, encoder_min_diff=None, cut=cut))
    return {"base": models[0].content, "tuned": models[1].content, "options": chosen}


@contextmanager
def _hashing(models: tuple[Model, Model], *, wanted: bool) -> Iterator[dict[str, Future[str]]]:
    """The hashes of both files, computed beside the work; sharded models and folders have none."""
    pool, stop = ThreadPoolExecutor(1), Event()
    named = zip(("base", "tuned"), models, strict=True)
    try:
        with held():
            hashes = {w: pool.submit(file_hash, m.files[0].path, stop) for w, m in named if wanted and len(m.files) == 1}
        yield hashes
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _hash(store: Store, which: str, future: Future[str]) -> str:
    """Of an earlier run, else of this one."""
    key = f"hash of {which}"
    if key not in store.entries:
        store.add(key, {"sha256": future.result()}, {})
    return str(store.entries[key].numbers["sha256"])


def _work(pairs: Sequence[Pair], store: Store, options: ExtractOptions, progress: Progress | None) -> int:
    """Finish every pair; the number that were finished before."""
    before = sum(pair.id in store.entries for pair in pairs)
    units = [u for u in units_of(pairs, options) if any(p.id not in store.entries for p in u.pairs)]
    total = sum(prod(p.shape) for p in pairs)
    done = total - sum(prod(p.shape) for u in units for p in u.pairs)

    def keep(unit: Unit, results: list[Done]) -> None:
        nonlocal done
        for result in results:
            if result.id not in store.entries:
                store.add(result.id, result.numbers, result.arrays)
        done += sum(prod(p.shape) for p in unit.pairs)
        if progress is not None:
            progress(Step(done, total, unit.pairs[-1].name))

    run(units, options, jobs_of(pairs, options), keep)
    return before


def _written(
    models: tuple[Model, Model],
    pairs: Pairs,
    store: Store,
    options: ExtractOptions,
    output: Path,
    hashes: Mapping[str, str],
    *,
    strict: bool,
) -> tuple[ExtractReport, Architecture]:
    """The report, and the table with what was written beyond it."""
    base, tuned = models
    conv = any(p.kind == "conv" and not p.reason for p in pairs.pairs)
    metadata = metadata_of(base, tuned, options, output.stem, hashes, conv=conv)
    made = assembled(base.architecture, pairs.pairs, store, options, metadata)
    adapter = replace(made.adapter, operation=operation(options))
    if strict:
        refuse_lost(_ledger(pairs, store, made).lost, tuned.path)
    if not len(adapter):
        reasons = "; ".join(sorted(set(made.left_out.values()))) or "they have no weights in common"
        raise RequestError(f"nothing to extract: {reasons}", path=tuned.path, hint="another tuned model, or other patterns")
    writing = Report(architecture=base.architecture.key, source_layout=tuned.layout, target_layout=options.layout.id)
    writing.losses = made.resizing.losses
    save(adapter, output, options=SaveOptions(force=True), report=writing)
    report = _reported(models, pairs, store, made, options)
    report.output, report.written, report.size = str(output), True, bytes_of(output)
    report.dropped, report.losses = writing.dropped, writing.losses
    report.ledger = report.ledger.without(writing.dropped)
    resizing = [text for text in made.resizing.warnings if not isinstance(text, Alert)]  # of all modules below
    report.warnings += [*pairs.notes(options.cut), *resizing, *writing.warnings]
    report.warn()
    return report, adapter.architecture


def _ledger(pairs: Pairs, store: Store, made: Assembled) -> Ledger:
    """Every tensor of the tuned model: in the adapter, unchanged, or left out."""
    unchanged = {own.id for own in pairs.pairs if not store.entries[own.id].numbers["squared"]}
    used = {own.id: own.name for own in pairs.pairs if own.id not in made.left_out and own.id not in unchanged}
    lost = {key: why for key, why in made.left_out.items() if key not in unchanged}
    lost |= dict.fromkeys(pairs.only_tuned, "the base model has no such tensor")
    return Ledger(used, dict.fromkeys(sorted(unchanged), "it is the same in both models"), lost)


def _reported(
    models: tuple[Model, Model], pairs: Pairs, store: Store, made: Assembled, options: ExtractOptions
) -> ExtractReport:
    report = ExtractReport(
        base=str(models[0].path), tuned=str(models[1].path), architecture=models[0].architecture.key,
        layouts=(models[0].layout, models[1].layout, options.layout.id), operation=operation(options),
        only_base=pairs.only_base, only_tuned=pairs.only_tuned, ledger=_ledger(pairs, store, made),
    )  # fmt: skip
    for pair in pairs.pairs:
        entry = store.entries[pair.id]
        if pair.id in made.chosen:
            report.modules.append(_module(pair, entry, *made.chosen[pair.id], options))
        else:
            report.left_out.append(LeftOut(pair.id, pair.kind, made.left_out[pair.id], entry.numbers["squared"]))
    return report


def _module(pair: Pair, entry: Entry, rank: int | None, error: float, options: ExtractOptions) -> ModuleResult:
    values = entry.arrays["values"].f64() if "values" in entry.arrays else None
    family = pair.kind if pair.is_vector else "dora" if options.dora else options.family
    return ModuleResult(
        name=pair.id, component=pair.site.component, weight=pair.site.spans[0].weight, kind=pair.kind, family=family,
        shape=pair.shape, rank=rank, squared=entry.numbers["squared"], base_squared=entry.numbers["base_squared"],
        squared_error=error, values=() if values is None else tuple(values[:SHOWN].tolist()),
        complete=values is not None and len(values) == min(pair.shape[0], prod(pair.shape[1:])),
    )  # fmt: skip
