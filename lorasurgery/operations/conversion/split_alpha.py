"""sd-scripts' ``split_qkv`` defect: fused at saving with the rank times n, but the alpha of one part.

A file trained with ``split_qkv=True`` holds block-diagonal fused modules whose scale is 1/n of the rest of the file, so
every program applies them n times too weakly. Source: sd-scripts issue 2204, ``networks/lora_flux.py`` (2026-02).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from math import isclose
from typing import TYPE_CHECKING

from lorasurgery.adapter import Scale
from lorasurgery.architectures.table import DIFFUSERS
from lorasurgery.deltas.low_rank import LowRank, used_columns

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorasurgery.adapter import Adapter, Module
    from lorasurgery.architectures.table import Architecture
    from lorasurgery.report import Report


def check_split_alpha(modules: list[Module], adapter: Adapter, report: Report, *, fix: bool) -> list[Module]:
    """Warn about modules with the defect, or return them with the scale put right (``fix``).

    Only fused LoRA modules whose scale is exactly 1/n of the file's usual one are looked into; they have the defect
    when their up factor is block-diagonal over the n parts.
    """
    if adapter.layout != "sd-scripts":
        return modules
    cuts = _cuts(adapter.architecture)
    plain = (m for m in modules if not _parts(m, cuts) and isinstance(m.delta, LowRank))
    scales = Counter(round(m.scale.value, 9) for m in plain)
    if not scales:
        return modules
    usual = scales.most_common(1)[0][0]
    found: list[str] = []
    result = []
    for module in modules:
        parts = _parts(module, cuts)
        if parts and isclose(module.scale.value * len(parts), usual, rel_tol=1e-6) and _block_diagonal(module, parts):
            found.append(module.name)
            if fix:
                value = module.scale.value * len(parts)
                module = replace(module, scale=Scale(value, module.scale.source))  # noqa: PLW2901
        result.append(module)
    if found:
        what = "put right" if fix else "left as it is; --fix-split-alpha puts it right"
        report.warnings.append(
            f"{len(found)} fused modules (first: {found[0]}) have the alpha of one part, as sd-scripts' split_qkv saves "
            f"them, and act too weakly in every program: {what}"
        )
    return result


def _cuts(arch: Architecture) -> Mapping[str, list[tuple[int, int]]]:
    """Fused weight -> the row ranges of the modules Diffusers has for it."""
    found: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for spans in arch.namings[DIFFUSERS].values():
        if len(spans) == 1:
            found[spans[0].weight].append((spans[0].start, spans[0].stop))
    return {weight: ranges for weight, ranges in found.items() if len(ranges) > 1}


def _parts(module: Module, cuts: Mapping[str, list[tuple[int, int]]]) -> list[tuple[int, int]]:
    """The row ranges Diffusers cuts a whole fused module into; empty for every other module."""
    span = module.site.spans[0]
    ranges = cuts.get(span.weight, [])
    whole = len(module.site.spans) == 1 and span.start == 0 and bool(ranges) and span.stop == ranges[-1][1]
    return ranges if whole else []


def _block_diagonal(module: Module, parts: list[tuple[int, int]]) -> bool:
    delta = module.delta
    if not isinstance(delta, LowRank) or delta.mid is not None or delta.rank % len(parts):
        return False
    width = delta.rank // len(parts)
    blocks = [used_columns(delta.up, delta.up.rows([part])) for part in parts]
    return blocks == [(i * width, (i + 1) * width) for i in range(len(parts))]
