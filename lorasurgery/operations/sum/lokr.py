"""The sum of LoKr modules as one LoKr: exact where they share a factor, else the nearest."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from lorasurgery.deltas.base import CannotError
from lorasurgery.deltas.factorization import factorization
from lorasurgery.deltas.kronecker import Kronecker
from lorasurgery.io.tensors import of_array
from lorasurgery.linalg.kronecker_sum import error_of_sum, nearest_of_sum, norm_of_sum

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasurgery.operations.sum.adding import Adding, Term


def nearest_lokr(terms: Sequence[Term], how: Adding) -> Kronecker | None:
    """The nearest ``kron(w1, w2)`` to the sum, of scale 1; what it lacks is recorded.

    None where they are not all LoKr of the same two shapes, or another factor is asked for. Raises CannotError for NaN.
    """
    deltas = [term.delta for term in terms if isinstance(term.delta, Kronecker)]
    head = deltas[0] if len(deltas) == len(terms) else None
    if head is None or any((own.outer, own.inner) != (head.outer, head.inner) for own in deltas):
        return None
    if how.factor is not None and head.outer != _outer(head, how.factor):
        return None
    pairs = [(own.outer_array() * term.factor, own.inner_array()) for own, term in zip(deltas, terms, strict=True)]
    try:
        found = nearest_of_sum(pairs)
    except ValueError as error:
        raise CannotError(str(error)) from error
    w1, w2 = of_array(found.w1, how.dtype), of_array(found.w2, how.dtype)
    norm = norm_of_sum(pairs)
    how.record(error_of_sum(pairs, w1.f64(), w2.f64()) ** 2 * norm if norm else 0.0, norm)
    return Kronecker(w1=w1, w2=w2)


def _outer(delta: Kronecker, factor: int) -> tuple[int, int]:
    """w1's shape with LyCORIS' factor."""
    out, inputs = delta.shape[0], prod(delta.shape[1:]) // prod(delta.inner[2:])
    return factorization(out, factor)[0], factorization(inputs, factor)[0]
