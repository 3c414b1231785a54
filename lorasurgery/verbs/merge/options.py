"""What a merge may do."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from types import MappingProxyType
from typing import TYPE_CHECKING

from lorasurgery.errors import RequestError
from lorasurgery.operations.conversion.options import DTYPES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorasurgery.operations.cut import ResizeOptions

SUM = "sum"
FACTORED = (SUM, "average", "slerp", "model-stock", "orthogonal", "remove")
"""Methods that need no matrix larger than the factors."""
DENSE = ("ties", "dare", "dare-ties", "della", "breadcrumbs", "magnitude-prune", "sce")
"""Methods that look at every element, one module at a time."""
METHODS = (*FACTORED, *DENSE)
PEFT, KOHYA, KOHYA_CONCAT = "peft", "kohya", "kohya-concat"
COMPATS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {PEFT: (SUM, "ties", "magnitude-prune"), KOHYA: (SUM,), KOHYA_CONCAT: (SUM,)}
)
"""Whose results can be reproduced, and for which methods."""
MERGE, FIRST, STRIP = "merge", "first", "strip"
MAJORITIES = ("total", "frequency")


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """What :func:`merge` may do."""

    method: str = SUM
    compat: str | None = None
    """``peft``, ``kohya`` or ``kohya-concat``: another program's numbers, faults included."""
    t: float = 0.5
    """Of ``slerp``: 0 is the first file, 1 the second."""
    density: float = 0.5
    """Share of the elements that pruning methods keep; of ``sce``, that are looked at."""
    gamma: float = 0.01
    """Of ``breadcrumbs``: share of the largest elements that is dropped."""
    epsilon: float = 0.15
    """Of ``della``: how far the probability to stay spreads around the density."""
    majority: str = "total"
    """How signs are elected: by the sum of the values (``total``) or of their signs (``frequency``)."""
    factor: float = 1.0
    """Multiplies the result (lambda)."""
    seed: int = 0
    as_full: bool = False
    """Let dense methods give full differences; the command line writes those of all methods."""
    as_lokr: bool = False
    """Make of LoKr modules the nearest LoKr to their sum; the command line makes LoKr of the others, too."""
    lokr_factor: int | None = None
    """LyCORIS' factor of those; None: the files' own."""
    resize: ResizeOptions | None = None
    """Recompress the result."""
    metadata: str = MERGE
    """``merge``: what the files agree on, and the trigger words of all; ``first``: the first file's; ``strip``: neither."""
    dtype: str = "keep"
    """``keep``: each module's own where its files agree, else the first file's."""
    drop_nonlinear: bool = False
    """Leave out modules that cannot be added (DoRA and families that multiply the base) and list them; what other files
    have there stays."""
    fix_split_alpha: bool = False
    """Multiply the scale of fused modules written by sd-scripts' ``split_qkv`` by the number of parts."""

    def check(self, files: int) -> None:
        """Raises RequestError for values out of range and options that contradict each other."""
        choices = (
            ("method", self.method, METHODS), ("compat", self.compat, (None, *COMPATS)),
            ("metadata", self.metadata, (MERGE, FIRST, STRIP)), ("dtype", self.dtype, ("keep", *DTYPES)),
            ("majority", self.majority, MAJORITIES),
        )  # fmt: skip
        for name, value, allowed in choices:
            if value not in allowed:
                raise RequestError(f"{name} is one of {', '.join(str(a) for a in allowed if a)}, not {value}")
        if files < 1:
            raise RequestError("nothing to merge", hint="two files or more, each with its weight")
        self._check_numbers()
        self._check_method(files)

    def _check_numbers(self) -> None:
        ranges = (("t", self.t, 0.0, 1.0), ("gamma", self.gamma, 0.0, 1.0), ("epsilon", self.epsilon, 0.0, 1.0))
        for name, value, low, high in ranges:
            if not low <= value <= high:
                raise RequestError(f"{name} lies between {low:g} and {high:g}, not {value:g}")
        if not isfinite(self.factor):
            raise RequestError(f"lambda is a finite number, not {self.factor:g}")
        if self.seed < 0:
            raise RequestError(f"a seed is at least 0, not {self.seed}")
        if not 0.0 < self.density <= 1.0:
            raise RequestError(f"the density lies in (0, 1], not {self.density:g}")
        if self.method == "della" and not (self.density - self.epsilon / 2 > 0.0 and self.density + self.epsilon / 2 <= 1.0):
            raise RequestError(
                f"della's probabilities, {self.density:g} +- {self.epsilon / 2:g}, leave (0, 1]", hint="a smaller epsilon"
            )
        if self.method == "breadcrumbs" and self.density + self.gamma > 1.0:
            raise RequestError(f"breadcrumbs drops {self.gamma:g} and keeps {self.density:g}: more than there is")

    def _check_method(self, files: int) -> None:
        if self.method == "slerp" and files != 2:
            raise RequestError(f"slerp goes from one file to another, not over {files}", hint="average")
        if self.method in ("orthogonal", "remove", "model-stock") and files < 2:
            raise RequestError(f"{self.method} needs at least two files")
        if self.compat is not None:
            self._check_compat(self.compat)
        if self.as_full and self.resize is not None:
            raise RequestError("a full difference has no rank to cut", hint="one of the two")
        self._check_lokr()
        if self.method in DENSE and not self.as_full and self.resize is None and self.compat is None:
            raise RequestError(
                f"{self.method} changes single elements, and the result has full rank",
                hint="a rank, a policy or a size to recompress it to, or --as full",
            )

    def _check_lokr(self) -> None:
        """One family, and its own numbers."""
        if self.as_lokr and (self.resize is not None or self.as_full or self.compat is not None):
            raise RequestError(
                "the nearest LoKr has no rank, is no full difference and no other program's result",
                hint="as LoKr alone; resizing it afterwards cuts w2",
            )
        factor = self.lokr_factor
        if factor is not None and not (self.as_lokr and (factor > 0 or factor == -1)):
            raise RequestError("a factor is a number from 1 up, or -1 for balanced factors, of a result as LoKr")

    def _check_compat(self, compat: str) -> None:
        """What the other program does not have cannot be reproduced."""
        if self.method not in COMPATS[compat]:
            raise RequestError(
                f"{compat}'s results can be reproduced for {', '.join(COMPATS[compat])}, not for {self.method}",
                hint="no --compat",
            )
        if self.factor != 1.0:
            raise RequestError(f"{compat} has no factor for the whole result", hint="the weights times that factor")
        cut = self.resize
        svd = cut is not None and cut == type(cut)(rank=cut.rank, as_lora=cut.as_lora) and self.method == SUM
        if cut is not None and not (compat == PEFT and svd):
            raise RequestError(
                f"no result of {compat} to reproduce: of all cuts only PEFT's svd is known, a sum with one rank",
                hint="--compat peft with --rank alone, or no --compat; lorasurgery resize can cut the result afterwards",
            )
