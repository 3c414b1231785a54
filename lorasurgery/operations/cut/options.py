"""What a resize may do."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.errors import RequestError
from lorasurgery.linalg.policies import (
    Recipe,
    absolute_threshold,
    energy,
    knee,
    parse_recipe,
    relative_error,
    sv_cumulative,
    sv_fro,
    sv_ratio,
)
from lorasurgery.operations.conversion.options import DTYPES
from lorasurgery.operations.cut.pick import picked
from lorasurgery.operations.cut.subject import CONV, POINTWISE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lorasurgery.architectures.table import Architecture
    from lorasurgery.linalg.factors import AnyArray
    from lorasurgery.operations.cut.pick import Pattern

RULES: Mapping[str, Callable[[AnyArray, float], int]] = {
    "sv_ratio": sv_ratio, "sv_cumulative": sv_cumulative, "sv_fro": sv_fro, "energy": energy,
    "threshold": absolute_threshold, "knee": knee, "error": relative_error,
}  # fmt: skip
"""Policies that look at one module at a time; ``params`` (share of parameters) looks at all."""
BY_KOHYA = frozenset({"sv_ratio", "sv_cumulative", "sv_fro"})
BY_KJ = BY_KOHYA | {"knee"}
KEEP_RATIO, BALANCED, KOHYA, KJ = "keep-ratio", "balanced", "kohya", "kj"
DORA = ("refuse", "recompute", "fold")


@dataclass(frozen=True, slots=True)
class ResizeOptions:
    """What :func:`resize` may do. At least one of rank, policy, size, recipe and ranks is needed."""

    rank: int | None = None
    """Of linear layers; with a policy, size or recipe, the cap."""
    conv_rank: int | None = None
    """Of convolutions with a kernel; None: ``rank``."""
    pointwise_rank: int | None = None
    """Of 1x1 convolutions; None: ``rank``, under ``compat="kohya"`` ``conv_rank`` as in sd-scripts."""
    policy: str | None = None
    """``sv_ratio``, ``sv_cumulative``, ``sv_fro``, ``energy``, ``threshold`` (of the scaled change), ``knee``, ``error``, or
    ``params`` (share of the parameters)."""
    param: float | None = None
    """The policy's parameter; the knee's sensitivity is 1 unless given."""
    compat: str | None = None
    """``kohya``: sd-scripts' counts; ``kj``: KJNodes'. See :mod:`lorasurgery.linalg.policies.compat`."""
    lowrank: bool = True
    """Under ``compat="kohya"``: of large matrices look at the first singular values only, as sd-scripts does unless its
    ``--svd_lowrank_niter`` is 0."""
    size: int | None = None
    """Bytes of the file that :func:`lorasurgery.save` writes: at most so many."""
    layout: str | None = None
    """The layout in which that is counted; None: the adapter's own."""
    recipe: str | None = None
    """As resize_lora: ``fro_ckpt=1,thr=-3.5``."""
    ranks: tuple[tuple[Pattern, int], ...] = ()
    """(modules, rank): the first that holds a module decides its rank; 0 leaves the module out. Modules are blocks or a
    component of the model, as :mod:`lorasurgery.operations.select.blocks` reads them (``double=0-18``), or a regular
    expression, looked for in the module's name in the file and in the model. A list with a rank for each block, as
    :func:`lorasurgery.operations.cut.block_ranks` gives it, stands back for ``conv_rank`` and ``pointwise_rank``."""
    include: tuple[Pattern, ...] = ()
    """Resize only these modules, named as in ``ranks``."""
    exclude: tuple[Pattern, ...] = ()
    """Leave these as they are."""
    as_lora: bool = False
    """Turn LoHa and LoKr into LoRA: the best approximation of their rank, which those families rarely have."""
    full: bool = False
    """Compress full differences into LoRA."""
    text_encoders: bool = False
    """Resize text encoders' modules too."""
    dora: str = "refuse"
    """``recompute`` the magnitude, or ``fold`` it into a plain LoRA; both need the base model."""
    min_rank: int = 1
    """0: leave out modules of which the policy keeps nothing, as resize_lora does."""
    grow: bool = False
    """Allow a rank above the old one (padded with zeros)."""
    uniform: bool = False
    """Pad every resized module with zeros to the largest new rank, for readers that want one rank."""
    alpha: str = KEEP_RATIO
    """``keep-ratio``: alpha / rank stays; ``rank``: alpha is the rank; a number: alpha is that. The effect never changes."""
    factors: str = BALANCED
    """``balanced``: sqrt(S) on both sides; ``kohya``: S in up, down has orthonormal rows."""
    dtype: str = "keep"
    """Of the whole result: ``keep``, ``fp32``, ``fp16``, ``bf16``."""
    workers: int | None = None
    """Threads; None: one for each core, at most 8."""
    device: str | None = None
    """A torch device (``cuda``, ``cuda:1``, ``cpu``) for the decompositions of LoRAs; None: numpy on the threads."""

    def on(self, arch: Architecture) -> ResizeOptions:
        """The options with blocks and components looked up in the architecture; raises RequestError for unknown ones."""
        if not (self.ranks or self.include or self.exclude):
            return self
        own = ((CONV, self.conv_rank), (POINTWISE, self.pointwise_rank))
        apart = frozenset(kind for kind, rank in own if rank is not None)
        return replace(
            self,
            ranks=tuple((picked(pattern, arch, apart), rank) for pattern, rank in self.ranks),
            include=tuple(picked(pattern, arch) for pattern in self.include),
            exclude=tuple(picked(pattern, arch) for pattern in self.exclude),
        )

    def parsed_recipe(self) -> Recipe | None:
        """The recipe; raises RequestError for one that cannot be read."""
        if self.recipe is None:
            return None
        try:
            return parse_recipe(self.recipe)
        except ValueError as error:
            raise RequestError(f"the recipe {self.recipe!r}: {error}", hint="fro_ckpt=1,thr=-3.5") from error

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """Everything that names modules."""
        return (*(pattern for pattern, _ in self.ranks), *self.include, *self.exclude)

    @property
    def is_fixed(self) -> bool:
        """Whether each module's rank is known before its singular values."""
        return self.policy is None and self.size is None and self.recipe is None

    @property
    def has_size(self) -> bool:
        """Whether the file's size decides."""
        recipe = self.parsed_recipe()
        return self.size is not None or (recipe is not None and recipe.size is not None)

    def check(self) -> None:
        """Raises RequestError for values out of range and options that contradict each other."""
        asked = [n for n, v in (("policy", self.policy), ("size", self.size), ("recipe", self.recipe)) if v is not None]
        if len(asked) > 1:
            raise RequestError(f"a {asked[0]} and a {asked[1]} both decide the ranks", hint="one of them")
        if not asked and self.rank is None and self.conv_rank is None and self.pointwise_rank is None and not self.ranks:
            raise RequestError("nothing says how far to cut", hint="a rank, a policy, a size or a recipe")
        for number in (self.rank, self.conv_rank, self.pointwise_rank):
            if number is not None and number < 1:
                raise RequestError(f"a rank must be at least 1, not {number}")
        if any(number < 0 for _, number in self.ranks):
            raise RequestError("a rank must be at least 1, or 0 to leave modules out")
        self._check_choices()
        self._check_policy()
        if self.uniform and self.has_size:
            raise RequestError("uniform would pad the file beyond its size", hint="a fixed rank")
        for pattern in self.patterns:
            if isinstance(pattern, str):
                _check_pattern(pattern)

    def _check_choices(self) -> None:
        choices = (
            ("factors", self.factors, (BALANCED, KOHYA)),
            ("dora", self.dora, DORA),
            ("dtype", self.dtype, ("keep", *DTYPES)),
            ("compat", self.compat, (None, KOHYA, KJ)),
            ("min_rank", self.min_rank, (0, 1)),
        )
        for name, value, allowed in choices:
            if value not in allowed:
                words = " or ".join(str(one) for one in allowed if one is not None)
                raise RequestError(f"{name.replace('_', ' ')} is {words}, not {value}")
        if self.alpha not in (KEEP_RATIO, "rank") and not _positive(self.alpha):
            raise RequestError(f"alpha is {KEEP_RATIO}, rank or a positive number, not {self.alpha}")
        if self.size is not None and self.size < 1:
            raise RequestError(f"a size of {self.size} bytes holds nothing")

    def _check_policy(self) -> None:
        if self.compat is not None and self.policy not in (BY_KOHYA if self.compat == KOHYA else BY_KJ):
            own = BY_KOHYA if self.compat == KOHYA else BY_KJ
            raise RequestError(f"compat {self.compat} is for the policies {', '.join(sorted(own))}")
        if self.policy is None:
            return
        if self.policy != "params" and self.policy not in RULES:
            raise RequestError(f"no policy is called {self.policy}", hint=f"one of {', '.join((*RULES, 'params'))}")
        if self.param is None and self.policy != "knee":
            raise RequestError(f"the policy {self.policy} needs a parameter", hint="a parameter")
        try:
            self.rule(_PROBE)
        except ValueError as error:
            raise RequestError(f"{self.policy}: {error}") from error

    def rule(self, values: AnyArray) -> int:
        """The count of the policy for one module (not for ``params``, of which only the parameter is checked)."""
        param = 1.0 if self.param is None else self.param
        return sv_cumulative(values, param) if self.policy == "params" else RULES[self.policy or "knee"](values, param)


_PROBE = np.array([2.0, 1.0])


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise RequestError(f"{pattern!r} is no regular expression ({error})") from error


def _positive(text: str) -> bool:
    try:
        return 0.0 < float(text) < float("inf")
    except ValueError:
        return False
