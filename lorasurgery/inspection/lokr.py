"""The LoKr factor: what the file says, and which factors its shapes allow.

LyCORIS splits every dimension by ``factorization(dim, factor)`` and gives w1 the small parts; ``unbalanced_factorization``
exchanges those of the output. Source: LyCORIS 3.3 ``functional/general.py`` and ``modules/lokr.py``.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from lorasurgery.inspection.description import LokrFactor
from lorasurgery.layouts.module import FACTOR

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasurgery.inspection.description import ModuleInfo
    from lorasurgery.io.header import RawFile

AUTOMATIC = -1
FACTOR_KEY = "ss_lokr_factor"


def lokr_factor(raw: RawFile, modules: Sequence[ModuleInfo]) -> LokrFactor | None:
    """None for a file without LoKr modules and without a factor."""
    buffer, text = raw.tensors.get(FACTOR), raw.metadata.get(FACTOR_KEY, "")
    kronecker = [module for module in modules if module.outer is not None]
    if not kronecker and buffer is None and not text:
        return None
    stored = round(buffer.item()) if buffer is not None and buffer.size == 1 else None
    said = int(text) if text.lstrip("-").isdecimal() else None
    implied = _implied({(module.shape[:2], module.kernel, module.outer) for module in kronecker if module.outer})
    values = {value for value in (stored, said) if value is not None}
    agree = None
    if values and implied:
        agree = len(values) == 1 and all(_consistent(value, kronecker) for value in values)
    outer = Counter("x".join(map(str, module.outer)) for module in kronecker if module.outer)
    return LokrFactor(stored, said, implied, agree, dict(outer.most_common()))


Shaped = tuple[tuple[int, ...], tuple[int, ...], "tuple[int, int]"]


def _implied(shapes: set[Shaped]) -> tuple[int, ...]:
    """The factors that give every w1 its shape, the automatic one first."""
    if not shapes:
        return ()
    tried = [AUTOMATIC, *sorted({number for _, _, outer in shapes for number in outer})]
    return tuple(factor for factor in tried if all(_gives(factor, *shape) for shape in shapes))


def _consistent(factor: int, modules: Sequence[ModuleInfo]) -> bool:
    return all(_gives(factor, m.shape[:2], m.kernel, m.outer) for m in modules if m.outer is not None)


def _gives(factor: int, shape: tuple[int, ...], kernel: tuple[int, ...], outer: tuple[int, int]) -> bool:
    """Whether a factor gives a delta of ``shape`` (out, in) a w1 of shape ``outer``, balanced or not."""
    out, columns = shape[0], shape[1]
    for size in kernel if len(shape) == 2 else ():  # a flat convolution's columns hold its kernel
        columns = columns // size if columns % (outer[1] * size) == 0 else columns
    if factor == 0 or factor < AUTOMATIC:
        return False
    from lorasurgery.deltas.factorization import factorization

    rows, across = factorization(out, factor), factorization(columns, factor)
    return outer[0] in rows and outer[1] == across[0]
