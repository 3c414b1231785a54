"""How many singular values to keep: rules for one module, budgets over all modules, and scores that know the base model.

Every rule takes descending, non-negative singular values and counts exactly: it returns how many of them to keep, 0 for a
spectrum of zeros. That a module keeps at least rank 1 is the caller's business.
"""

from lorasurgery.linalg.policies.budget import fill, per_cost, within
from lorasurgery.linalg.policies.compat import kj, kj_length, kohya, kohya_length
from lorasurgery.linalg.policies.local import (
    absolute_threshold,
    energy,
    fixed,
    knee,
    relative_error,
    sv_cumulative,
    sv_fro,
    sv_ratio,
)
from lorasurgery.linalg.policies.recipe import Recipe, References, parse_recipe

__all__ = [
    "Recipe",
    "References",
    "absolute_threshold",
    "energy",
    "fill",
    "fixed",
    "kj",
    "kj_length",
    "knee",
    "kohya",
    "kohya_length",
    "parse_recipe",
    "per_cost",
    "relative_error",
    "sv_cumulative",
    "sv_fro",
    "sv_ratio",
    "within",
]
