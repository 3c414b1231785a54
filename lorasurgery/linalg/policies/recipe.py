"""Scores of singular values that know the base model, and the recipes that weigh them.

A recipe is written as in resize_lora: ``fro_ckpt=1,thr=-3.5``, ``spn_lora,params=0.5,size=32``. With the weights ``w_k``
normalised to sum 1, a singular value of the (scaled) change has the score

    ``log10 S_i + log10 rescale - sum_k w_k log10 ref_k``

=========== =====================================================================
``spn_lora`` the largest singular value of the module's own change, ``S_1``
``fro_lora`` its Frobenius norm, ``||S||_2``
``spn_ckpt`` the largest singular value of the base weight
``fro_ckpt`` the Frobenius norm of the base weight
``subspace`` ``|u_i^T W v_i|``: what the base weight does in the same direction
``params``   ``out + in*k*k``, the parameters of one rank
=========== =====================================================================

``thr`` keeps what scores above it, ``size`` (MiB) what fits, ``rescale`` multiplies the result.
Source: elias-gaeros/resize_lora ``resize_lora.py``, class ``ResizeRecipe`` (00f1af4, 2026-06).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lorasurgery.linalg.factors import AnyArray, Array

SCORES = ("spn_lora", "spn_ckpt", "subspace", "fro_lora", "fro_ckpt", "params")
OF_BASE = frozenset({"spn_ckpt", "subspace", "fro_ckpt"})
NEGLIGIBLE = 1e-6
"""Weights up to this count as none."""


@dataclass(frozen=True, slots=True)
class References:
    """What the scores of one module are measured against. The base model's are functions: they read its weight."""

    parameters: int
    """``out + in*k*k``"""
    spectral: Callable[[], float] | None = None
    frobenius: Callable[[], float] | None = None
    along: Callable[[], Array] | None = None
    """``u_i^T W v_i`` for every i"""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Weights (normalised to sum 1), the limit (a threshold, or a size in MiB), and the factor on the result."""

    weights: Mapping[str, float]
    threshold: float | None = None
    size: float | None = None
    rescale: float = 1.0

    @property
    def needs_base(self) -> bool:
        """Whether a score looks at the base model."""
        return any(self._uses(name) for name in OF_BASE)

    def _uses(self, name: str) -> bool:
        return abs(self.weights.get(name, 0.0)) > NEGLIGIBLE

    def scores(self, values: AnyArray, references: References) -> Array:
        """The score of each singular value (scaled, descending); ``-inf`` for zeros and for a module of zeros.

        Raises ``ValueError`` when a score needs the base weight and ``references`` has none.
        """
        spectrum = np.asarray(values, np.float64)
        if not np.max(spectrum, initial=0.0) > 0.0:
            return np.full(len(spectrum), -np.inf)
        with np.errstate(divide="ignore"):
            found: Array = np.log10(spectrum) + np.log10(self.rescale)
        for name in SCORES:
            if self._uses(name):
                with np.errstate(divide="ignore", invalid="ignore"):
                    found = found - self.weights[name] * np.log10(np.abs(_reference(name, spectrum, references)))
        found[spectrum == 0.0] = -np.inf
        return found


def _reference(name: str, spectrum: Array, references: References) -> Array:
    """``ref_k``, one number or one per singular value."""
    of_base = {"spn_ckpt": references.spectral, "fro_ckpt": references.frobenius, "subspace": references.along}
    if name in of_base:
        function = of_base[name]
        if function is None:
            raise ValueError(f"{name} looks at the base model, and there is none")
        return np.asarray(function(), np.float64)
    own = {"spn_lora": spectrum[0], "fro_lora": np.linalg.norm(spectrum), "params": references.parameters}
    return np.asarray(own[name], np.float64)


def parse_recipe(text: str) -> Recipe:
    """A recipe from its text; a score named without a number has weight 1.

    Raises ``ValueError`` for an unknown or repeated key, a value that is no number, no score, weights that sum to 0, and
    unless exactly one of ``thr`` and ``size`` is given.
    """
    given: dict[str, float] = {}
    for part in text.split(","):
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key not in (*SCORES, "thr", "size", "rescale"):
            raise ValueError(f"{key or 'nothing'} is none of {', '.join((*SCORES, 'thr', 'size', 'rescale'))}")
        if key in given:
            raise ValueError(f"{key} stands twice")
        if not value and key not in SCORES:
            raise ValueError(f"{key} needs a number")
        given[key] = _number(key, value) if value else 1.0
    total = sum(given.get(name, 0.0) for name in SCORES)
    if total == 0.0:
        raise ValueError(f"no score, or weights that sum to 0; the scores are {', '.join(SCORES)}")
    if ("thr" in given) == ("size" in given):
        raise ValueError("one of thr=SCORE and size=MIB says where to stop")
    if not given.get("rescale", 1.0) > 0.0 or not given.get("size", 1.0) > 0.0:
        raise ValueError("rescale and size must be positive")
    weights = {name: given[name] / total for name in SCORES if given.get(name)}
    return Recipe(weights, given.get("thr"), given.get("size"), given.get("rescale", 1.0))


def _number(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise ValueError(f"{key}={text} is no number") from error
    if not np.isfinite(value):
        raise ValueError(f"{key}={text} is not finite")
    return value
