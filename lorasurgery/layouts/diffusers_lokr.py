"""Which LoKr files fit the layers that Diffusers has PEFT make of them.

``_create_lokr_config`` (Diffusers 0.42.1) looks for one ``decompose_factor`` that gives the sizes of all modules, and takes one
rank from a module's w2, or else from its w1; PEFT 0.21 (``tuners/lokr/layer.py``) then decides by that rank which factors
are products.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.deltas.factorization import pefts_factorization
from lorasurgery.deltas.kronecker import Kronecker
from lorasurgery.errors import NotRepresentableError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from lorasurgery.adapter import Module
    from lorasurgery.deltas.delta import Delta


FUSED, UNFUSED = ("to_qkv", "to_added_qkv"), ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
"""What FLUX.2's blocks are made of once the loader has fused them, and what they no longer use then."""


AS_LORA = "--as lora (exact), with --lokr-rank N for a smaller file"


class Sizes(NamedTuple):
    """A module's factors."""

    name: str
    out: tuple[int, int]
    inputs: tuple[int, int]
    rank: int
    """What PEFT is told."""
    products: tuple[bool, bool]
    """Whether w1 and w2 are stored as products."""
    ranks: frozenset[int]
    """Of those products."""


def refuse_unfit(modules: Mapping[str, Module], path: Path | None) -> None:
    """Raises NotRepresentableError where Diffusers would not load the LoKr of a file as they are; ``modules``: as written."""
    deltas = {stem: module.delta for stem, module in modules.items()}
    if not any(isinstance(delta, Kronecker) for delta in deltas.values()):
        return
    others = [stem for stem, delta in deltas.items() if not isinstance(delta, Kronecker)]
    refusal, odd = unfit(deltas)
    reasons = (
        (others, "Diffusers takes a file with LoKr modules for LoKr alone, and this one is none"),
        (list(deltas) if refusal else [], f"Diffusers would refuse the file: {refusal}"),
        (odd, "Diffusers would make other factors for it: it takes one LoKr factor and rank for the whole file"),
        (unused(deltas), "Diffusers fuses q, k and v in the whole model where one module is fused, and this one is not"),
    )
    for found, why in reasons:
        if found:
            name = modules[found[0]].name
            raise NotRepresentableError(f"{name}: {why}", module=name, path=path, hint=AS_LORA)


def unused(names: Collection[str]) -> list[str]:
    """The modules without effect: split ones, once a fused one has made the loader fuse the whole model's.

    Source: Diffusers 0.42.1 ``_maybe_fuse_qkv_projections_for_lokr``.
    """
    if not any(name.endswith(FUSED) for name in names):
        return []
    return [name for name in names if name.rpartition(".")[2] in UNFUSED]


def unfit(deltas: Mapping[str, Delta | None]) -> tuple[str, list[str]]:
    """(why the file is refused, modules whose layers have other factors); empty for a file that fits.

    ``deltas``: by what the model calls each module.
    """
    sizes = sorted(_sizes(name, delta) for name, delta in deltas.items() if isinstance(delta, Kronecker))
    if not sizes:
        return "", []
    candidates = [*sorted({own.out[0] for own in sizes}), -1]
    if not any(all(_fits(own, factor) for own in sizes) for factor in candidates):
        return "ValueError: no one decompose_factor gives the factors of all its LoKr modules", []
    both = any(own.products[0] for own in sizes)
    common = Counter(own.rank for own in sizes).most_common(1)[0][0]
    others = {own.name: own.rank for own in sizes if own.rank != common}
    odd = [own.name for own in sizes if not _as_made(own, _told(own.name, others, common), both=both)]
    return "", odd


def _told(name: str, others: Mapping[str, int], common: int) -> int:
    """The rank PEFT gives a module: of the first name in ``rank_pattern`` that its own ends in (``get_pattern_key``)."""
    return next((rank for other, rank in others.items() if name == other or name.endswith(f".{other}")), common)


def _sizes(name: str, delta: Kronecker) -> Sizes:
    (out_l, in_m), (out_k, in_n) = delta.outer, (*delta.inner, 1)[:2]
    ranks = [factor.shape[1] for factor in (delta.w2_a, delta.w1_a) if factor is not None]
    products = (delta.w1 is None, delta.w2 is None)
    return Sizes(name, (out_l, out_k), (in_m, in_n), ranks[0] if ranks else max(out_k, in_n), products, frozenset(ranks))


def _fits(own: Sizes, factor: int) -> bool:
    sides = (own.out, own.inputs)
    return all(pefts_factorization(left * right, factor) == (left, right) for left, right in sides)


def _as_made(own: Sizes, rank: int, *, both: bool) -> bool:
    """Whether PEFT makes products of the factors that are stored as products, of that rank, and of no other."""
    first = both and rank < max(own.out[0], own.inputs[0]) / 2
    second = rank < max(own.out[1], own.inputs[1]) / 2
    return own.products == (first, second) and own.ranks <= {rank}
