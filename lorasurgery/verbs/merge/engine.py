"""Merge: read the weights, bring the files to one granularity, and add up every module that more than one of them has."""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lorasurgery.adapter import Adapter, Leftover, written_in
from lorasurgery.architectures.table import DIFFUSERS
from lorasurgery.deltas.kronecker import Kronecker
from lorasurgery.errors import RequestError
from lorasurgery.files.alike import one_naming
from lorasurgery.io.tensors import same_values
from lorasurgery.layouts.peft_merge import merged_configs
from lorasurgery.layouts.targets import names_in, namings
from lorasurgery.metadata import FACTOR, FACTOR_KEY
from lorasurgery.operations.conversion.convert import convert
from lorasurgery.operations.conversion.options import DTYPES
from lorasurgery.operations.conversion.settled import settled
from lorasurgery.operations.conversion.split_alpha import check_split_alpha
from lorasurgery.report import Report
from lorasurgery.verbs.merge.align import aligned
from lorasurgery.verbs.merge.inputs import Weighted, leading, spelled_as, spelling_of, weighted
from lorasurgery.verbs.merge.merging import Merging
from lorasurgery.verbs.merge.metadata import merged_metadata
from lorasurgery.verbs.merge.methods import combine
from lorasurgery.verbs.merge.model import architecture_for
from lorasurgery.verbs.merge.options import MergeOptions
from lorasurgery.verbs.merge.report import MergeReport, SourceReport
from lorasurgery.verbs.merge.source import Source
from lorasurgery.verbs.merge.spec import parse_weight
from lorasurgery.verbs.merge.sums import Sums

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasurgery.ledger import Ledger


def merge(
    files: Sequence[Source | tuple[Adapter, float | str]], options: MergeOptions | None = None, target: str | None = None
) -> tuple[Adapter, MergeReport]:
    """The merged adapter, in the granularity of layout ``target`` (None: spelled as the first file is), and what was done.

    ``files``: adapters with their weights, as numbers or as the command line has them (``"0.7:te=0.5"``).
    Sums are exact up to rounding to the dtype, which is reported; tensors are computed when the result is saved, and
    tensors that stay as they are, are copied. Raises RequestError for options and files that do not fit together,
    NotRepresentableError for modules that cannot be added.
    """
    started = time.perf_counter()
    options = options or MergeOptions()
    options.check(len(files))
    sources = [own if isinstance(own, Source) else _source(*own) for own in files]
    alike = one_naming([source.adapter for source in sources])
    sources = [replace(source, adapter=adapter) for source, adapter in zip(sources, alike, strict=True)]
    arch = architecture_for(sources)
    writing = written_in(leading(alike), target)
    report = MergeReport(options.method, arch.key, writing.id)
    run = Merging(sources, options, arch, writing, report)
    result = _merged(run)
    report.seconds = time.perf_counter() - started
    return result, report


def _source(adapter: Adapter, weight: float | str) -> Source:
    parsed = parse_weight((weight if isinstance(weight, str) else repr(float(weight))).split(":"))
    return Source(adapter, parsed, adapter.path.name if adapter.path is not None else adapter.architecture.key)


def _merged(run: Merging) -> Adapter:
    _settle(run)
    run.sources = [_checked(run, source) for source in run.sources]
    files = [weighted(source, i, run.arch) for i, source in enumerate(run.sources)]
    _describe(run, files)
    names = names_in(namings(run.target, run.arch)[0], run.arch) or run.arch.namings[DIFFUSERS]
    sites = aligned(files, run.sources, run.arch, names, run.recorder)
    made = combine(run, sites, Sums(run))
    if not made:
        raise RequestError("nothing would be left: every weight is 0, the files cancel out, or nothing in them can be added")
    used = [bool(source.used) for source in run.report.sources]
    metadata, warnings = merged_metadata(run.sources, used, run.options.method, run.options.metadata)
    run.report.warnings += warnings
    first = leading([source.adapter for source in run.sources])
    spelling, homes = spelling_of([source.adapter for source in run.sources])
    adapter = Adapter(
        architecture=run.arch,
        modules={module.site: spelled_as(module, homes.get(module.site.component)) for module in made},
        metadata=metadata,
        layout=first.layout,
        spelling=spelling,
        leftovers=_leftovers(run),
        configs=_configs(run),
        operation=f"merge {run.options.method}",
    )
    run.report.ledgers = [_ledger(source, run) for source in run.sources]
    adapter = _without_factor(adapter)
    if run.target.own:  # modules of other files under the first one's names
        adapter, told = convert(adapter)
        told.losses = run.report.losses
    return adapter if run.options.resize is None or run.options.compat is not None else _resized(run, adapter)


def _checked(run: Merging, source: Source) -> Source:
    """The file; modules with the alpha of one part, as sd-scripts' ``split_qkv`` saves them, are told of or put right."""
    told, fix = Report(), run.options.fix_split_alpha
    modules = check_split_alpha(list(source.adapter.modules.values()), source.adapter, told, fix=fix)
    run.report.warnings += [f"{source.name}: {text}" for text in told.warnings]
    return replace(source, adapter=replace(source.adapter, modules={m.site: m for m in modules})) if fix else source


def _describe(run: Merging, files: Sequence[Sequence[Weighted]]) -> None:
    """The files in the report, and weights that concern no module in its warnings."""
    for source, used in zip(run.sources, files, strict=True):
        own = source.adapter
        modules = list(own.modules.values())
        families = dict(Counter(m.family for m in modules))
        run.report.sources.append(
            SourceReport(source.name, own.layout, own.architecture.key, str(source.weight), len(modules), len(used), families)
        )
        run.report.warnings += [f"{source.name}: {text}" for text in own.warnings]
        for rule in source.weight.unused(run.arch, modules):
            run.report.warnings.append(f"{source.name}: the weight of {rule} concerns no module of it")


def _leftovers(run: Merging) -> tuple[Leftover, ...]:
    """Keys that no table explains, of every file that is used; of one key in two files, the first file's."""
    found: dict[str, Leftover] = {}
    for source, own in zip(run.sources, run.report.sources, strict=True):
        for left in source.adapter.leftovers if own.used else ():
            first = found.setdefault(left.key, left)
            if first is not left and left.state != "harmless" and not same_values(first.tensor, left.tensor):
                run.report.dropped.append((f"{source.name}: {left.key}", "another file's was kept"))
    return tuple(found.values())


def _ledger(source: Source, run: Merging) -> Ledger:
    """Where every key of a file ended."""
    start = f"{source.name}: "
    gone = [(name.removeprefix(start), why) for name, why in run.report.dropped if name.startswith(start)]
    return source.adapter.ledger.without(gone)


def _configs(run: Merging) -> dict[str, dict[str, Any]]:
    """What PEFT's configurations of the files that are used say together."""
    used = [source for source, own in zip(run.sources, run.report.sources, strict=True) if own.used]
    found, told = merged_configs([(source.name, source.adapter.configs) for source in used])
    run.report.warnings += told
    return found


def _without_factor(adapter: Adapter) -> Adapter:
    """Without the LoKr factor where no LoKr is left."""
    if any(isinstance(module.delta, Kronecker) for module in adapter.modules.values()):
        return adapter
    metadata = {key: value for key, value in adapter.metadata.items() if key != FACTOR_KEY}
    return replace(adapter, metadata=metadata, leftovers=tuple(left for left in adapter.leftovers if left.key != FACTOR))


def _settle(run: Merging) -> None:
    """Raise UnknownArchitectureError where every file could be for another model as well, with another result."""
    own = [source.adapter for source in run.sources]
    if run.target.own:
        return
    common = set.intersection(*({key for key, _ in adapter.candidates} for adapter in own))
    for adapter in own:
        left = tuple(candidate for candidate in adapter.candidates if candidate[0] in common)
        settled(replace(adapter, candidates=left), run.target)


def _resized(run: Merging, adapter: Adapter) -> Adapter:
    """Cut as ``resize`` cuts, full differences too; modules with a DoRA magnitude stay: they cannot be cut without the base."""
    from lorasurgery.operations.cut import resize

    options = run.options.resize
    assert options is not None  # noqa: S101  the caller has looked
    dora = [re.escape(module.name) for module in adapter.modules.values() if module.magnitude is not None]
    exclude = (*options.exclude, *([f"^({'|'.join(dora)})$"] if dora else []))
    dtype = run.options.dtype if run.options.dtype != "keep" else {v: k for k, v in DTYPES.items()}.get(run.dtype, "fp32")
    as_lora = options.as_lora or "full" not in run.target.holds  # what a dense sum may not stay
    options = replace(
        options, exclude=exclude, dtype=dtype, layout=None if run.target.own else run.target.id, text_encoders=True,
        full=True, as_lora=as_lora,
    )  # fmt: skip
    result, run.report.resize = resize(adapter, options)
    return result
