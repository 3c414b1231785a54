"""Every kind of delta against the oracle: dense, cut, permuted, scaled, cast, stacked, made low-rank."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasurgery.deltas.base import CannotError, is_power_of_two, split_factor
from lorasurgery.deltas.full import Full, Opaque, stack_full
from lorasurgery.deltas.hadamard import Hadamard, stack_hadamard
from lorasurgery.deltas.kronecker import Kronecker, stack_kronecker
from lorasurgery.deltas.low_rank import LowRank, stack_low_rank
from lorasurgery.io.tensors import Tensor, of_bytes, zeros
from tests.builders import Builder
from tests.oracle import Parts, Raw, delta, model

if TYPE_CHECKING:
    from lorasurgery.deltas.delta import Delta

SHAPES = {"linear": (24, 18), "conv1": (24, 18, 1, 1), "conv3": (24, 18, 3, 3), "conv3d": (24, 18, 1, 2, 2)}
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{f"lora {s}": ("lora", s, {}) for s in SHAPES},
    "lora tucker": ("lora", "conv3", {"tucker": True}),
    "lora tucker 3d": ("lora", "conv3d", {"tucker": True}),
    **{f"loha {s}": ("loha", s, {}) for s in SHAPES},
    "loha tucker": ("loha", "conv3", {"tucker": True}),
    **{f"lokr {s} {a}{b}": ("lokr", s, {"blocks": 6, "whole1": a == "w", "whole2": b == "w"})
       for s in SHAPES for a in "wp" for b in "wp"},
    "lokr tucker": ("lokr", "conv3", {"blocks": 6, "tucker": True}),
    "full": ("full", "linear", {}),
    "full conv": ("full", "conv3", {}),
}  # fmt: skip
every_kind = pytest.mark.parametrize("kind", sorted(KINDS))


def tensor(value: Raw) -> Tensor:
    return of_bytes(value.dtype, value.shape, value.data)


def make(kind: str, *, dtype: str = "F32", seed: int = 0, rank: int = 3) -> tuple[Delta, Parts]:
    """A random delta of 24 rows, ours and the oracle's."""
    family, shape, how = KINDS[kind]
    builder = Builder.start(model("flux1-dev"), "comfyui", dtype, seed)
    size = SHAPES[shape]
    if family == "lora":
        slots = builder.low_rank(size, rank, **how)
        ours: Delta = LowRank(**{s: tensor(t) for s, t in slots.items()})
    elif family == "loha":
        slots = builder.hadamard(size, rank, **how)
        ours = Hadamard(**{s: tensor(t) for s, t in slots.items()})
    elif family == "lokr":
        slots = builder.kronecker(size, rank, **how)
        ours = Kronecker(**{s: tensor(t) for s, t in slots.items()})
    else:
        slots = {"diff": builder.random(*size)}
        ours = Full(tensor(slots["diff"]))
    return ours, Parts("x", family, slots)


def truth(parts: Parts, kind: str) -> np.ndarray:
    """The oracle's dense delta, flat."""
    return delta(parts, np.arange(math.prod(SHAPES[KINDS[kind][1]][1:])))


def flat(ours: Delta) -> np.ndarray:
    return ours.dense().reshape(ours.shape[0], -1)


def test_the_oracle_agrees_with_the_textbook() -> None:
    """np.kron and einsum, where the oracle takes columns one by one."""
    _, parts = make("lokr linear ww")
    f = {s: t.f64() for s, t in parts.slots.items()}
    np.testing.assert_allclose(truth(parts, "lokr linear ww"), np.kron(f["w1"], f["w2"]))
    _, parts = make("lora tucker")
    f = {s: t.f64() for s, t in parts.slots.items()}
    dense = np.einsum("ijkl,pi,jr->prkl", f["mid"], f["up"][:, :, 0, 0], f["down"][:, :, 0, 0])
    np.testing.assert_allclose(truth(parts, "lora tucker"), dense.reshape(24, -1), atol=1e-15)
    _, parts = make("lokr tucker")
    f = {s: t.f64() for s, t in parts.slots.items()}
    inner = np.einsum("ijkl,ip,jr->prkl", f["t2"], f["w2_a"], f["w2_b"])
    dense = np.einsum("ab,prkl->apbrkl", f["w1"], inner).reshape(24, -1)
    np.testing.assert_allclose(truth(parts, "lokr tucker"), dense, atol=1e-15)


@every_kind
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_dense(kind: str, dtype: str) -> None:
    ours, parts = make(kind, dtype=dtype)
    assert ours.shape[0] == 24
    np.testing.assert_allclose(flat(ours), truth(parts, kind), rtol=1e-12, atol=1e-15)


RANGES = {
    "first block": [(0, 4)], "blocks": [(8, 20)], "swap": [(12, 24), (0, 12)], "inside a block": [(5, 7)],
    "odd": [(3, 9)], "all": [(0, 24)], "apart": [(4, 8), (20, 24)],
}  # fmt: skip


@every_kind
@pytest.mark.parametrize("name", sorted(RANGES))
def test_rows(kind: str, name: str) -> None:
    """Exact, or refused: only for a cut through the blocks of a LoKr."""
    ours, parts = make(kind, dtype="BF16")
    ranges = RANGES[name]
    try:
        cut = ours.rows(ranges)
    except CannotError:
        assert kind.startswith("lokr")
        assert name == "odd"
        return
    assert not (kind.startswith("lokr") and name == "odd")
    expected = np.concatenate([truth(parts, kind)[a:b] for a, b in ranges])
    assert cut.shape[0] == expected.shape[0]
    np.testing.assert_allclose(flat(cut), expected, rtol=1e-12, atol=1e-15)


@every_kind
@pytest.mark.parametrize("factor", [1.0, 0.5, 2.0**-9, 8.0, -4.0])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_power_of_two_is_folded_without_a_trace(kind: str, factor: float, dtype: str) -> None:
    lost: list[float] = []
    ours, parts = make(kind, dtype=dtype)
    scaled = ours.scaled(factor, lambda error, _: lost.append(error))
    small = dtype == "F16" and abs(factor) < 1  # the smallest fp16 numbers lose bits, and say so
    exact = truth(parts, kind) * factor
    error = float(np.linalg.norm(flat(scaled) - exact) / np.linalg.norm(exact))
    assert error < (2e-2 if small else 1e-12)
    assert any(lost) if error > 1e-12 else small or not any(lost)
    assert all(t.dtype == dtype for t in scaled.tensors.values())


@every_kind
@pytest.mark.parametrize("factor", [0.7, 3.0, 1 / 3])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_what_folding_costs_is_reported(kind: str, factor: float, dtype: str) -> None:
    lost: list[tuple[float, float]] = []
    ours, parts = make(kind, dtype=dtype, rank=6)
    scaled = ours.scaled(factor, lambda *entry: lost.append(entry))
    exact = truth(parts, kind) * factor
    true = float(np.linalg.norm(flat(scaled) - exact) / np.linalg.norm(exact))
    error, norm = (sum(column) for column in zip(*lost, strict=True))
    assert {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-23}[dtype] > true > 0
    measured = kind in ("full", "lora linear", "lora 3x3")  # others report the rounding of the one factor they fold into
    assert math.sqrt(error / norm) == pytest.approx(true, rel=1e-2 if measured else 0.6)


@every_kind
def test_low_rank_form(kind: str) -> None:
    ours, parts = make(kind)
    low = ours.to_low_rank()
    assert isinstance(low, LowRank)
    assert low.shape[0] == 24
    np.testing.assert_allclose(flat(low), truth(parts, kind), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize(("kind", "rank"), [("lokr linear pp", 9), ("lokr linear wp", 18), ("loha linear", 9), ("full", 18)])
def test_low_rank_form_has_the_least_general_rank(kind: str, rank: int) -> None:
    assert make(kind)[0].to_low_rank().rank == rank


@every_kind
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_cast(kind: str, dtype: str) -> None:
    ours, parts = make(kind)
    cast = ours.cast(dtype)
    assert all(t.dtype == dtype for t in cast.tensors.values())
    worst = {"BF16": 2.0**-6, "F16": 2.0**-9, "F32": 1e-12}[dtype]
    exact = truth(parts, kind)
    assert np.linalg.norm(flat(cast) - exact) <= worst * np.linalg.norm(exact)


STACKS: dict[str, Any] = {"lora linear": stack_low_rank, "loha linear": stack_hadamard, "full": stack_full}


@pytest.mark.parametrize("kind", sorted(STACKS))
@pytest.mark.parametrize("present", [(1, 1, 1), (1, 0, 1), (0, 0, 1), (1, 1, 0)])
def test_stack_and_unstack(kind: str, present: tuple[int, ...]) -> None:
    """Members of unequal rank, some missing; the stack's rows give back every factor."""
    members = [make(kind, seed=i, rank=2 + i) if there else None for i, there in enumerate(present)]
    stacked = STACKS[kind]([(None if m is None else m[0], 24) for m in members])
    expected = np.concatenate([np.zeros((24, 18)) if m is None else truth(m[1], kind) for m in members])
    np.testing.assert_allclose(flat(stacked), expected, rtol=1e-12, atol=1e-15)
    for i, member in enumerate(members):
        if member is not None:
            part = stacked.rows([(24 * i, 24 * i + 24)])
            assert {s: t.tobytes() for s, t in part.tensors.items()} == {s: t.data for s, t in member[1].slots.items()}


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 99), st.booleans())
def test_kronecker_stacks(blocks: list[int], seed: int, shared: bool) -> None:
    """With one w2 for all, block rows of any number; with different ones, refused."""
    rng = np.random.default_rng(seed)
    builder = Builder.start(model("flux1-dev"), "comfyui", "F32", seed)
    inner = builder.random(4, 3)
    members = []
    for n in blocks:
        own = inner if shared else builder.random(4, 3)
        members.append(Kronecker(w1=tensor(builder.random(n, 5)), w2=tensor(own)))
    missing = int(rng.integers(0, len(blocks)))
    parts: list[tuple[Kronecker | None, int]] = [(m, n * 4) for m, n in zip(members, blocks, strict=True)]
    if len(blocks) > 1 and shared:
        parts[missing] = (None, parts[missing][1])
    if not shared and len(blocks) > 1:
        with pytest.raises(CannotError):
            stack_kronecker(parts)
        return
    stacked = stack_kronecker(parts)
    expected = np.concatenate([np.zeros((rows, 15)) if m is None else flat(m) for m, rows in parts])
    np.testing.assert_allclose(flat(stacked), expected)


def test_stacks_of_tucker_convolutions_are_refused() -> None:
    stacks: dict[str, Any] = {"lora tucker": stack_low_rank, "loha tucker": stack_hadamard}
    for kind, stack in stacks.items():
        with pytest.raises(CannotError, match="Tucker"):
            stack([(make(kind)[0], 24), (make(kind, seed=1)[0], 24)])


def test_what_multiplies_the_base_is_left_alone() -> None:
    rotation = Opaque("oft", ((".oft_blocks", zeros("F32", (2, 4, 4))),))
    for call in (rotation.dense, rotation.to_low_rank, lambda: rotation.rows([(0, 4)]), lambda: rotation.scaled(0.5)):
        with pytest.raises(CannotError):
            call()
    assert rotation.scaled(1.0) is rotation


@given(st.floats(2.0**-30, 2.0**30))
def test_split_factor(factor: float) -> None:
    remainder, exponent = split_factor(factor)
    assert remainder * 2.0**exponent == factor
    assert math.sqrt(0.5) <= remainder <= math.sqrt(2.0)
    assert is_power_of_two(2.0**exponent)
    assert is_power_of_two(factor) == (math.frexp(factor)[0] == 0.5)
