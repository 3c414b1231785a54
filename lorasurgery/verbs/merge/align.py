"""The modules of several files at one granularity: fused q, k and v in one file and split in another become one or the other.

Only weights that two files cut differently are touched. They are cut as the target's names do it; rows that a file does
not have are zeros, and what a family cannot be fused or split to exactly goes there through its exact low-rank form.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

from lorasurgery.adapter import Module, Scale
from lorasurgery.architectures.table import ORIGINAL
from lorasurgery.deltas.base import CannotError
from lorasurgery.deltas.low_rank import LowRank, stack_low_rank
from lorasurgery.errors import BrokenModuleError, NotRepresentableError
from lorasurgery.operations.conversion.fuse import stack_bias, stack_modules, take_rows, wide
from lorasurgery.operations.conversion.pieces import plan, targets_of
from lorasurgery.site import DENOISER, SECOND_DENOISER, Site

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from lorasurgery.architectures.table import Architecture, Spans
    from lorasurgery.deltas.base import Record
    from lorasurgery.operations.conversion.pieces import Target
    from lorasurgery.verbs.merge.inputs import Weighted
    from lorasurgery.verbs.merge.source import Source

    Recorder = Callable[[str], Record]


def aligned(
    files: Sequence[Sequence[Weighted]],
    sources: Sequence[Source],
    arch: Architecture,
    names: Mapping[str, Spans],
    recorder: Recorder,
) -> dict[Site, list[Weighted]]:
    """Site -> the module of every file that has it, in the order first met.

    ``names`` is the target's naming; ``recorder`` gives where the rounding errors of a module go. Raises
    NotRepresentableError for a module that would have to be cut or fused and cannot be, BrokenModuleError for a file that
    holds a row twice.
    """
    clashing = _clashing(files)
    by_weight = _covering(names, arch)
    found: dict[Site, list[Weighted]] = defaultdict(list)
    for own, source in zip(files, sources, strict=True):
        moved: dict[str, list[Weighted]] = defaultdict(list)
        for one in own:
            site = one.module.site
            if any((site.component, span.weight) in clashing for span in site.spans):
                moved[site.component].append(one)
            else:
                found[site].append(one)
        for component, modules in moved.items():
            for one in _recut(component, modules, by_weight, source, recorder):
                found[one.module.site].append(one)
    return found


def _clashing(files: Sequence[Sequence[Weighted]]) -> set[tuple[str, str]]:
    """(component, weight) of which two files hold overlapping rows, but not the same ones in the same order."""
    held: dict[tuple[str, str], set[Spans]] = defaultdict(set)
    for own in files:
        for one in own:
            for span in one.module.site.spans:
                held[one.module.site.component, span.weight].add(one.module.site.spans)
    return {place for place, cuts in held.items() if _overlap(cuts, place[1])}


def _overlap(cuts: set[Spans], weight: str) -> bool:
    """Whether two different cuts of a weight have rows in common."""
    rows = sorted((span.start, span.stop, cut) for cut in cuts for span in cut if span.weight == weight)
    reach, whose = 0, None
    for start, stop, cut in rows:
        if start < reach and cut != whose:
            return True
        if stop > reach:
            reach, whose = stop, cut
    return False


def _covering(names: Mapping[str, Spans], arch: Architecture) -> Mapping[str, list[Spans]]:
    """Original weight -> modules of the naming, where they have all of its rows; else the whole weight."""
    found, whole = targets_of(names), targets_of(arch.namings[ORIGINAL])

    def rows(modules: Sequence[Spans], weight: str) -> int:
        return sum(span.stop - span.start for spans in modules for span in spans if span.weight == weight)

    return {w: found[w] if rows(found.get(w, ()), w) == arch.shapes[w][0] else own for w, own in whole.items()}


def _recut(
    component: str, own: Sequence[Weighted], by_weight: Mapping[str, list[Spans]], source: Source, recorder: Recorder
) -> Iterator[Weighted]:
    """The modules of one file at the target's granularity."""
    if component not in (DENOISER, SECOND_DENOISER):
        yield from own
        return
    by_module = {id(one.module): one for one in own}
    try:
        targets = plan([one.module for one in own], by_weight)
    except ValueError as twice:
        raise BrokenModuleError(
            f"{twice}; programs add them up or pick one", key=own[0].original.name, path=source.adapter.path,
            hint="lorasurgery convert --drop REGEX, to leave one of them out",
        ) from twice  # fmt: skip
    for target in targets:
        head = by_module[id(target.sources[0])]
        module = _built(Site(component, target.spans), target, source, recorder(head.original.name))
        yield replace(head, module=module)


def _built(site: Site, target: Target, source: Source, record: Record) -> Module:
    head = target.sources[0]
    if target.is_rename:
        return replace(head, site=site)
    try:
        if len(target.pieces) == 1:
            return take_rows(replace(head, site=site), target.pieces[0].ranges, head.out)
        sources = wide([piece.source for piece in target.pieces])
        parts = [
            (None if s is None else take_rows(s, p.ranges, s.out), p.rows) for s, p in zip(sources, target.pieces, strict=True)
        ]
        return stack_modules(site, parts, record)
    except CannotError as reason:
        try:
            return _low_rank(site, target)
        except CannotError:
            raise NotRepresentableError(
                f"{head.name}: another file cuts this weight otherwise, and {reason.message}", module=head.name,
                path=source.adapter.path, hint="lorasurgery convert, to bring both files to one layout first",
            ) from reason  # fmt: skip


def _low_rank(site: Site, target: Target) -> Module:
    """Through the exact low-rank forms of the members, in float64; raises CannotError for what has none."""
    members: list[tuple[LowRank | None, int]] = []
    for piece in target.pieces:
        own = piece.source
        if own is not None and own.magnitude is not None:
            raise CannotError("its parts have DoRA magnitudes")
        delta = None if own is None else own.delta
        low = None if own is None or delta is None else delta.to_low_rank().times(own.scale.value).rows(piece.ranges)
        members.append((low, piece.rows))
    head = target.sources[0]
    scale = Scale(1.0, head.scale.source)
    return replace(head, site=site, delta=stack_low_rank(members), scale=scale, bias=stack_bias(target.pieces), extras={})
