"""From singular values to ranks: the policy for each module, or one budget for all of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.errors import RequestError
from lorasurgery.linalg.policies import References, fill, kj, kj_length, kohya, kohya_length, per_cost, within
from lorasurgery.operations.conversion.options import DTYPES
from lorasurgery.operations.cut.families import dtype_of
from lorasurgery.operations.cut.options import KJ
from lorasurgery.operations.cut.subject import LINEAR
from lorasurgery.operations.cut.survey import named_rank, rank_asked

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lorasurgery.linalg.factors import Array
    from lorasurgery.linalg.policies import Recipe
    from lorasurgery.linalg.policies.budget import Indices
    from lorasurgery.operations.cut.base import BaseModel
    from lorasurgery.operations.cut.options import ResizeOptions
    from lorasurgery.operations.cut.subject import Subject

    Sizer = Callable[[Sequence["Choice"]], int]

MEBIBYTE = 1 << 20
ROUNDS = 20
"""Each takes off what the last one was too large by: a few bytes of the header, so two or three are enough."""
RESERVE = 1024
"""Bytes, or 1/512 of a small file, kept free for what a command notes in the metadata."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Which singular values of a module stay, and the rank that they are padded to."""

    kept: Indices
    rank: int
    untouched: bool = False
    """Nothing is cut: the module's own tensors stay (padded if ``rank`` is larger)."""


def choose(
    subjects: Sequence[Subject], options: ResizeOptions, base: BaseModel | None, size_of: Sizer
) -> tuple[list[Choice], float | None]:
    """A choice for each subject, and the global threshold where there is one.

    ``size_of`` gives the bytes of the file that a list of choices makes. Raises RequestError when a size cannot be met, or
    a recipe looks at a base model that is not given.
    """
    recipe = options.parsed_recipe()
    threshold: float | None = None
    if recipe is not None:
        scores = _recipe_scores(subjects, recipe, options, base)
        if recipe.size is None:
            kept, threshold = within(scores, recipe.threshold or 0.0), recipe.threshold
            kept = [k if k.size else _best(s, options.min_rank) for k, s in zip(kept, scores, strict=True)]
        else:
            kept, threshold = _by_size(subjects, scores, options, size_of, int(recipe.size * MEBIBYTE))
    elif options.size is not None:
        kept, threshold = _by_size(subjects, _file_scores(subjects, options), options, size_of, options.size)
    elif options.policy == "params":
        kept, threshold = _by_parameters(subjects, options)
    else:
        kept = [np.arange(_count(subject, options)) for subject in subjects]
    choices = [_choice(subject, own, options) for subject, own in zip(subjects, kept, strict=True)]
    if options.uniform and choices:
        largest = max(choice.rank for choice in choices)
        choices = [_at_rank(subject, c, largest) for subject, c in zip(subjects, choices, strict=True)]
    return choices, threshold


def fixed_choice(subject: Subject, options: ResizeOptions) -> Choice:
    """The choice for one module where the options name its rank."""
    return _choice(subject, np.arange(_count(subject, options)), options)


def cap_of(subject: Subject, options: ResizeOptions) -> int:
    """The most singular values a module may keep: what it has, and what the options allow."""
    asked = rank_asked(subject.module, subject.kind, options)
    return subject.limit if asked is None else min(subject.limit, asked)


def _count(subject: Subject, options: ResizeOptions) -> int:
    """How many singular values the policy keeps of one module."""
    cap = cap_of(subject, options)
    if options.is_fixed or named_rank(subject.module, options):
        return cap
    if options.compat is not None:
        limit = rank_asked(subject.module, subject.kind, options) or subject.length
        unscaled, param = subject.source.values, 1.0 if options.param is None else options.param
        if options.compat == KJ:
            length = kj_length(subject.sides, subject.old_rank or subject.length, linear=subject.kind == LINEAR)
            return min(kj(unscaled, options.policy or "", param, length=length, limit=limit), subject.limit)
        length = kohya_length(subject.sides, limit, lowrank=options.lowrank)
        return min(kohya(unscaled, options.policy or "", param, length=length, limit=limit), subject.limit)
    return max(min(options.rule(subject.values), cap), options.min_rank)


def _choice(subject: Subject, kept: Indices, options: ResizeOptions) -> Choice:
    """With padding up to the rank that was asked for, where that is allowed."""
    rank = len(kept)
    fixed = options.is_fixed or named_rank(subject.module, options)
    asked = rank_asked(subject.module, subject.kind, options) if fixed else None
    if options.grow and asked is not None and rank < asked:
        rank = max(rank, min(asked, subject.length))
    enough = subject.limit if subject.old_rank is None else subject.old_rank
    return _at_rank(subject, Choice(kept, len(kept), untouched=subject.may_stay and len(kept) >= enough), rank)


def _at_rank(subject: Subject, choice: Choice, rank: int) -> Choice:
    """The same singular values, padded; only a plain LoRA's own tensors can be."""
    if not choice.rank or rank == choice.rank or (choice.untouched and subject.old_rank is None):
        return choice
    delta = subject.module.delta
    plain = isinstance(delta, LowRank) and delta.mid is None and subject.module.magnitude is None
    return replace(choice, rank=rank, untouched=choice.untouched and plain)


def _best(scores: Array, count: int) -> Indices:
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def _capped(scores: Array, cap: int) -> Array:
    """All but the ``cap`` best out of the running."""
    if cap >= len(scores):
        return scores
    return np.where(np.isin(np.arange(len(scores)), _best(scores, cap)), scores, -np.inf)


def _file_scores(subjects: Sequence[Subject], options: ResizeOptions) -> list[Array]:
    """Squared error that a byte (or a parameter: the same within one dtype) saves."""
    found = []
    for subject in subjects:
        with_zeros = np.where(subject.values > 0.0, per_cost(subject.values, cost_of(subject, options)), -np.inf)
        found.append(_capped(with_zeros, cap_of(subject, options)))
    return found


def _recipe_scores(subjects: Sequence[Subject], recipe: Recipe, options: ResizeOptions, base: BaseModel | None) -> list[Array]:
    if recipe.needs_base and base is None:
        raise RequestError(f"the recipe {options.recipe!r} looks at the base model", hint="the base model's file or folder")
    found = []
    for subject in subjects:
        references = References(subject.per_rank)
        if base is not None and recipe.needs_base:
            references = base.references(subject)
        found.append(_capped(recipe.scores(subject.values, references), cap_of(subject, options)))
    return found


def cost_of(subject: Subject, options: ResizeOptions) -> int:
    """Bytes of one rank in the result."""
    delta = subject.module.delta
    assert delta is not None  # noqa: S101  what has no delta is no subject
    return subject.bytes_per_rank(dtype_of(delta, DTYPES.get(options.dtype, "keep")))


def _by_parameters(subjects: Sequence[Subject], options: ResizeOptions) -> tuple[list[Indices], float]:
    """At most this share of the parameters that the subjects have now."""
    now = sum(t.size for s in subjects if s.module.delta is not None for t in s.module.delta.tensors.values())
    costs = [float(subject.per_rank) for subject in subjects]
    floors = [options.min_rank] * len(subjects)
    try:
        return fill(_file_scores(subjects, options), costs, now * (options.param or 1.0), floors)
    except ValueError as error:
        raise RequestError(f"{options.param:.2%} of {now} parameters are too few: {error}", hint="min rank 0") from error


def _by_size(
    subjects: Sequence[Subject], scores: Sequence[Array], options: ResizeOptions, size_of: Sizer, target: int
) -> tuple[list[Indices], float]:
    """The best that fits into ``target`` bytes. What the header adds with the ranks is measured and taken off again."""
    costs = [float(cost_of(subject, options)) for subject in subjects]
    floors = [options.min_rank] * len(subjects)
    goal = target - min(RESERVE, target // 512)

    def excess(kept: Sequence[Indices]) -> int:
        return size_of([_choice(s, k, options) for s, k in zip(subjects, kept, strict=True)]) - goal

    least = [_best(own, floor) for own, floor in zip(scores, floors, strict=True)]
    over = excess(least)
    if over > 0:
        raise RequestError(
            f"the smallest file there is has {over + goal} bytes, {target} were asked for",
            hint=f"a size from {with_reserve(over + goal)} bytes on" + ("" if options.min_rank == 0 else ", or min rank 0"),
        )
    kept, threshold, budget = least, float("inf"), _spent(least, costs) - over
    for _ in range(ROUNDS):
        kept, threshold = fill(scores, costs, budget, floors)
        over = excess(kept)
        if over <= 0:
            return kept, threshold
        budget = _spent(kept, costs) - over
    return least, float("inf")


def with_reserve(size: int) -> int:
    """The size to ask for so that a file of ``size`` bytes fits."""
    return size + min(RESERVE, size // 511 + 1)


def _spent(kept: Sequence[Indices], costs: Sequence[float]) -> float:
    return sum(cost * len(own) for cost, own in zip(costs, kept, strict=True))
