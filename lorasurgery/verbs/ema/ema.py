"""Post-hoc EMA: one adapter from the checkpoints of a training run, each with a weight that falls with its age.

``E_0 = first file``, ``E_i = b_i E_(i-1) + (1 - b_i) T_i``. Either ``b_i`` goes linearly from ``beta`` to ``beta2`` over the
files, or it follows the power function of Karras et al. 2023 (EDM2, arXiv 2312.02696): ``b_t = (1 - 1/t)^(g + 1)``, where
the width ``sigma_rel`` is the standard deviation of the averaging profile relative to the length of the run,
``sigma_rel^2 = (g + 1) / ((g + 2)^2 (g + 3))`` (their section 3.1).

As musubi-tuner's ``lora_post_hoc_ema.py`` (2026-06) the average is of the tensors, element by element, in float32 and
rounded once, bit for bit the same. That is not the average of the changes, for products of averages have cross terms;
``lorasurgery ema --on delta`` gives that one.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isclose, sqrt
from typing import TYPE_CHECKING

from lorasurgery.errors import BrokenModuleError, RequestError
from lorasurgery.io.dtypes import FLOATS, numpy_dtype
from lorasurgery.io.tensors import computed, same_values

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorasurgery.io.header import RawFile
    from lorasurgery.io.tensors import Array, Tensor

WIDEST_GAMMA = (sqrt(5.0) - 3.0) / 2.0
"""Where ``(g + 1) / ((g + 2)^2 (g + 3))`` is largest: -0.382."""
ALPHA = ".alpha"


def sigma_of(gamma: float) -> float:
    """The relative width of the power function ``t^gamma``: ``sqrt((g + 1) / ((g + 2)^2 (g + 3)))``."""
    return sqrt((gamma + 1.0) / (gamma + 3.0)) / (gamma + 2.0)


WIDEST = sigma_of(WIDEST_GAMMA)
"""0.3003: no power function is wider. A plain average has 1 / sqrt(12) = 0.2887."""


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the power function of this width, by bisection on the branch where a larger one is narrower.

    ``np.roots`` with the condition that the root be real and not negative, as musubi-tuner has it, finds nothing from
    0.2887 on; exponents down to -0.382 (width 0.3003) are as good. Raises RequestError for a width that none has.
    """
    if not 0.0 < sigma_rel <= round(WIDEST, 4):
        raise RequestError(
            f"no power function has a relative width of {sigma_rel:g}: they lie above 0 and go up to {WIDEST:.4f} "
            "(0.2887 is the plain average of all files)",
            hint="--sigma-rel 0.05 to 0.3, or --beta",
        )
    sigma_rel = min(sigma_rel, WIDEST)
    low, high = WIDEST_GAMMA, 1.0
    while sigma_of(high) > sigma_rel:
        low, high = high, 2.0 * high
    while True:
        middle = (low + high) / 2.0
        if middle in (low, high):
            return middle
        if sigma_of(middle) > sigma_rel:
            low = middle
        else:
            high = middle


@dataclass(frozen=True, slots=True)
class EmaOptions:
    """How the weights fall. The defaults are musubi-tuner's."""

    beta: float = 0.95
    """What is kept of the average at each file."""
    beta2: float | None = None
    """At the last file, going there linearly; None: ``beta``."""
    sigma_rel: float | None = None
    """A power function of this relative width in place of both."""
    keep_first: bool = False
    """With ``sigma_rel``: count files from 1. Else the first one counts as step 0, and its weight is 0."""

    def check(self) -> None:
        """Raises RequestError for values out of range."""
        for name, value in (("beta", self.beta), ("beta2", self.beta2)):
            if value is not None and not 0.0 <= value <= 1.0:
                raise RequestError(f"{name} lies between 0 and 1, not {value}", hint="0.9 to 0.999")
        if self.keep_first and self.sigma_rel is None:
            raise RequestError("only a power function leaves the first file out", hint="--keep-first with --sigma-rel")
        if self.sigma_rel is not None:
            gamma_of(self.sigma_rel)

    def betas(self, files: int) -> tuple[float, ...]:
        """What is kept of the average at each file after the first."""
        steps = files - 1
        if self.sigma_rel is not None:
            power = gamma_of(self.sigma_rel) + 1.0
            return tuple((1 - 1 / (i + 1 + self.keep_first)) ** power for i in range(steps))
        last = self.beta if self.beta2 is None else self.beta2
        return tuple(self.beta + (last - self.beta) * (i / (steps - 1)) if steps > 1 else self.beta for i in range(steps))

    def weights(self, files: int) -> tuple[float, ...]:
        """Every file's share of the result; they sum to 1."""
        betas = self.betas(files)
        shares = [1.0]
        for beta in betas:
            shares = [share * beta for share in shares] + [1.0 - beta]
        return tuple(shares)

    @property
    def way(self) -> str:
        """In a few words."""
        if self.sigma_rel is not None:
            return f"sigma_rel {self.sigma_rel:g} (gamma {gamma_of(self.sigma_rel):.4f})"
        return f"beta {self.beta:g}" + ("" if self.beta2 in (None, self.beta) else f" to {self.beta2:g}")


def ema(files: Sequence[RawFile], options: EmaOptions | None = None) -> dict[str, Tensor]:
    """The average of the files' tensors, the first file the oldest, in the first one's keys and dtypes.

    Alphas and integers must agree and are the first file's. Nothing is read yet but those: every tensor is computed when it
    is written, from one tensor of each file. Raises RequestError for options and for fewer than two files,
    BrokenModuleError for a key that a file lacks, or has in another shape or with another alpha.
    """
    options = options or EmaOptions()
    options.check()
    if len(files) < 2:
        raise RequestError("an average needs two checkpoints at least", hint="the files of one training run")
    betas = options.betas(len(files))
    return {key: _average([_of(file, key, files[0]) for file in files], key, betas, files) for key in _keys(files)}


def _keys(files: Sequence[RawFile]) -> Mapping[str, Tensor]:
    first = files[0].tensors
    for file in files[1:]:
        extra = next((key for key in file.tensors if key not in first), None)
        if extra is not None:
            raise _different(f"it has {extra}, which {files[0].path.name} has not", extra, file)
    return first


def _different(message: str, key: str, file: RawFile) -> BrokenModuleError:
    hint = "checkpoints of one training run; --on delta averages files of other ranks, alphas and modules"
    return BrokenModuleError(message, key=key, path=file.path, hint=hint)


def _of(file: RawFile, key: str, first: RawFile) -> Tensor:
    """A file's tensor, in the first file's shape."""
    found, like = file.tensors.get(key), first.tensors[key]
    if found is None:
        raise _different(f"it has no {key}, which {first.path.name} has", key, file)
    unlike = (found.dtype in FLOATS) != (like.dtype in FLOATS) and not key.endswith(ALPHA)
    if found.shape != like.shape or unlike:
        what, other = (f"{t.dtype} {list(t.shape)}" for t in (found, like))
        raise _different(f"{key} is {what}, in {first.path.name} {other}", key, file)
    return found


def _average(tensors: Sequence[Tensor], key: str, betas: Sequence[float], files: Sequence[RawFile]) -> Tensor:
    head = tensors[0]
    if key.endswith(ALPHA) or head.dtype not in FLOATS:
        for tensor, file in zip(tensors[1:], files[1:], strict=True):
            if not (_same_alpha(head, tensor) if key.endswith(ALPHA) else same_values(head, tensor)):
                raise _different(f"{key} is another number than in {files[0].path.name}", key, file)
        return head
    return computed(head.dtype, head.shape, lambda: averaged(tensors, betas))


def _same_alpha(first: Tensor, second: Tensor) -> bool:
    """``torch.allclose`` with its defaults, whatever the dtypes are."""
    if first.size != 1:
        return same_values(first, second)
    return isclose(first.item(), second.item(), rel_tol=1e-5, abs_tol=1e-8)


def averaged(tensors: Sequence[Tensor], betas: Sequence[float]) -> Array:
    """``E = b E + (1 - b) T`` one file after the other, in float32 (float64 for F64), rounded to the first one's dtype.

    Two tensors are in memory at a time.
    """
    import numpy as np

    work = np.dtype("float64" if tensors[0].dtype == "F64" else "float32")
    found = tensors[0].array().astype(work)
    for tensor, beta in zip(tensors[1:], betas, strict=True):
        value = tensor.array().astype(work)
        found *= work.type(beta)
        value *= work.type(1 - beta)
        found += value
    return found.astype(numpy_dtype(tensors[0].dtype))
