"""Weights that a model's file holds twice: an embedding that its last layer shares, saved under both names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasurgery.io.tensors import same_values

if TYPE_CHECKING:
    from lorasurgery.io.tensors import Tensor
    from lorasurgery.models import Model
    from lorasurgery.operations.onto.plan import Plan


def stored_twice(model: Model, plan: Plan) -> list[str]:
    """A sentence for each matrix that changes while the same numbers under another name stay as they are.

    Whether the model uses one tensor for both is not in the file, so that nobody but its user knows what should become of
    the other one. Reads one row of the matrices that have a changed one's shape, and all of those that are alike there.
    """
    changed = {name: change.weight.tensor for name, change in plan.changes.items() if len(change.weight.tensor.shape) > 1}
    wanted = {(tensor.dtype, tensor.shape) for tensor in changed.values()}
    others: dict[bytes, list[tuple[str, Tensor]]] = {}
    for name, weight in model.weights.items():
        if name not in plan.changes and (weight.tensor.dtype, weight.tensor.shape) in wanted:
            others.setdefault(_row(weight.tensor), []).append((name, weight.tensor))
    found = []
    for name, tensor in changed.items():
        row = _row(tensor)
        if len(set(row)) > 2:
            twins = [other for other, own in others.get(row, []) if same_values(own, tensor)]
            found += [f"{name} is in the model a second time, as {other}, which stays as it is" for other in twins]
    return found


def _row(tensor: Tensor) -> bytes:
    return tensor.rows([(0, 1)]).tobytes()
