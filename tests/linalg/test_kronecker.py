"""Kronecker products and stacks of them against the dense matrix, which only the tests form."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasurgery.linalg import kronecker, kronecker_stack, subspace
from lorasurgery.linalg.kronecker import KroneckerPart, ZeroRows, stacked_kronecker_svd, to_low_rank
from lorasurgery.linalg.low_rank import rank_for_energy, tail_error

WIDTH = 24
FACTORINGS = [(1, 24), (2, 12), (4, 6), (6, 4), (12, 2), (24, 1)]


def dense(parts):
    """The stack, from its definition."""
    blocks: list[np.ndarray] = []
    for part in parts:
        if isinstance(part, ZeroRows):
            blocks.append(np.zeros((part.rows, blocks[0].shape[1] if blocks else WIDTH)))
            continue
        w1 = part.w1 if part.w1_b is None else part.w1.astype(np.float64) @ part.w1_b
        w2 = part.w2 if part.w2_b is None else part.w2.astype(np.float64) @ part.w2_b
        blocks.append(np.kron(w1.astype(np.float64), w2.astype(np.float64)))
    return np.vstack(blocks)


def random_part(rng, i1, i2, *, o1=3, o2=5, rank=2, product=False, full=False):
    w1, w1_b = rng.standard_normal((o1, i1)), None
    if product:
        w1, w1_b = rng.standard_normal((o1, 2)), rng.standard_normal((2, i1))
    if full:
        return KroneckerPart(w1, rng.standard_normal((o2, i2)), w1_b=w1_b)
    return KroneckerPart(w1, rng.standard_normal((o2, rank)), w1_b=w1_b, w2_b=rng.standard_normal((rank, i2)))


@st.composite
def stacks(draw):
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    parts = []
    for _ in range(draw(st.integers(1, 4))):
        i1, i2 = draw(st.sampled_from(FACTORINGS))
        sizes = {"o1": draw(st.integers(1, 5)), "o2": draw(st.integers(1, 6)), "rank": draw(st.integers(1, 3))}
        parts.append(random_part(rng, i1, i2, **sizes, product=draw(st.booleans()), full=draw(st.booleans())))
    if draw(st.booleans()):
        parts.insert(draw(st.integers(0, len(parts))), ZeroRows(draw(st.integers(1, 7))))
    return parts


def assert_optimal(parts, found, rank, *, excess=1e-5):
    """``found`` has this rank, its error is true, and within ``excess`` relative of the best possible."""
    matrix = dense(parts)
    values = np.linalg.svd(matrix, compute_uv=False)
    assert found.rank == rank
    assert found.up.shape == (len(matrix), rank)
    assert found.down.shape == (rank, matrix.shape[1])
    true = np.linalg.norm(matrix - found.up @ found.down) / np.linalg.norm(matrix)
    assert true == pytest.approx(found.relative_error, rel=1e-6, abs=2e-7)
    best = tail_error(values, rank)
    assert found.relative_error == pytest.approx(best, rel=excess, abs=2e-7)
    np.testing.assert_allclose(found.singular_values, values[:rank], rtol=100 * excess, atol=1e-6 * values[0])
    norms = np.linalg.norm(found.up, axis=0), np.linalg.norm(found.down, axis=1)
    np.testing.assert_allclose(*norms, rtol=1e-3, atol=1e-5 * np.sqrt(values[0]))


@settings(max_examples=60)
@given(parts=stacks(), rank=st.integers(1, 30), energy=st.sampled_from([None, 0.5, 0.9, 0.9999]))
def test_stacks_of_any_make(parts, rank, energy):
    values = np.linalg.svd(dense(parts), compute_uv=False)
    expected = min(rank, int(np.sum(values > 1e-6 * values[0])))
    if energy is not None:
        expected = min(expected, rank_for_energy(values, energy))
    assert_optimal(parts, stacked_kronecker_svd(parts, rank=rank, energy=energy, dtype=np.float64), expected)


@settings(max_examples=30)
@given(parts=stacks(), seed=st.integers(0, 99))
def test_operator_equals_the_dense_stack(parts, seed):
    rng, matrix, stack = np.random.default_rng(seed), dense(parts), kronecker_stack.kronecker_stack(parts)
    x, y = rng.standard_normal((matrix.shape[1], 2)), rng.standard_normal((stack.inner, 3))
    scale = {"atol": 1e-10 * np.linalg.norm(matrix)}
    np.testing.assert_allclose(stack.lift(stack.core(x)), matrix @ x, **scale)
    core = stack.core(np.eye(stack.width))
    np.testing.assert_allclose(stack.core_t(y), core.T @ y, **scale)
    np.testing.assert_allclose(stack.lift(y).T @ stack.lift(y), y.T @ y, atol=1e-10)
    scale["atol"] *= np.linalg.norm(matrix)
    np.testing.assert_allclose(stack.row_gram(), core @ core.T, **scale)
    np.testing.assert_allclose(stack.column_gram(), matrix.T @ matrix, **scale)
    assert stack.energy == pytest.approx(np.linalg.norm(matrix) ** 2, rel=1e-12)


def fused(rng, *, decay=0.0, full=False):
    """q, k, v of width 192, of 3 x 96 inner dimensions, or 3 x 192 where w2 is full."""

    def part():
        w1 = rng.standard_normal((12, 12)) * np.arange(1, 13) ** -decay
        if full:
            return KroneckerPart(w1, rng.standard_normal((16, 16)) * np.arange(1, 17) ** -decay)
        return KroneckerPart(w1, rng.standard_normal((16, 8)) * np.arange(1, 9) ** -decay, w2_b=rng.standard_normal((8, 16)))

    return [part(), part(), part()]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("decay", [0.0, 1.0, 3.0])
def test_implicit_route_by_rank(monkeypatch, full, decay):
    monkeypatch.setattr(kronecker, "EXACT_SIZE", 0)
    monkeypatch.setattr(kronecker, "exact_eigenpairs", lambda _: pytest.fail("the exact route was taken"))
    parts = fused(np.random.default_rng(5), full=full, decay=decay)
    assert_optimal(parts, stacked_kronecker_svd(parts, rank=10, dtype=np.float64), 10)


@pytest.mark.parametrize("by_rows", [False, True])
def test_implicit_route_by_energy_raises_the_rank_until_the_target_is_met(monkeypatch, by_rows):
    monkeypatch.setattr(kronecker, "EXACT_SIZE", 0)
    monkeypatch.setattr(kronecker, "SMALL_SHARE", 2)
    monkeypatch.setattr(subspace, "FIRST_RANK", 2)
    monkeypatch.setattr(kronecker, "exact_eigenpairs", lambda _: pytest.fail("the exact route was taken"))
    parts = fused(np.random.default_rng(5), full=not by_rows, decay=2.0)
    parts = parts[:1] if by_rows else parts  # 96 inner dimensions of 192, or 576
    values = np.linalg.svd(dense(parts), compute_uv=False)
    expected = rank_for_energy(values, 0.99)
    assert 4 < expected < 50
    found = stacked_kronecker_svd(parts, energy=0.99, dtype=np.float64)
    assert found.relative_error**2 <= 0.01
    assert found.rank in (expected, expected + 1)
    assert_optimal(parts, found, found.rank)


@pytest.mark.parametrize("full", [False, True])
def test_a_target_that_needs_a_high_rank_falls_back_to_the_exact_route(monkeypatch, full):
    calls = []

    def recorded(gram):
        calls.append(gram.shape)
        return subspace.exact_eigenpairs(gram)

    monkeypatch.setattr(kronecker, "EXACT_SIZE", 0)
    monkeypatch.setattr(kronecker, "exact_eigenpairs", recorded)
    parts = fused(np.random.default_rng(5), full=full)
    expected = rank_for_energy(np.linalg.svd(dense(parts), compute_uv=False), 0.9999)
    assert_optimal(parts, stacked_kronecker_svd(parts, energy=0.9999, dtype=np.float64), expected)
    assert calls == [(192, 192)]


def test_the_same_seed_gives_the_same_bits(monkeypatch):
    monkeypatch.setattr(kronecker, "EXACT_SIZE", 0)
    parts = fused(np.random.default_rng(5))
    first, again = (stacked_kronecker_svd(parts, rank=10, seed=3) for _ in range(2))
    other = stacked_kronecker_svd(parts, rank=10, seed=4)
    np.testing.assert_array_equal(first.up, again.up)
    np.testing.assert_array_equal(first.down, again.down)
    assert (first.up != other.up).any()
    assert first.relative_error == pytest.approx(other.relative_error, rel=1e-5)


def test_without_a_request_the_numerical_rank_is_kept_and_nothing_lost():
    rng = np.random.default_rng(0)
    parts = [random_part(rng, 4, 6), random_part(rng, 6, 4, rank=1)]  # ranks 3 * 2 and 3 * 1
    found = stacked_kronecker_svd(parts, dtype=np.float64)
    assert_optimal(parts, found, 9)
    assert found.relative_error < 1e-7


def test_dependent_members_add_no_rank():
    part = random_part(np.random.default_rng(0), 4, 6)
    doubled = KroneckerPart(2 * part.w1, part.w2, w2_b=part.w2_b)
    parts = [part, doubled, random_part(np.random.default_rng(1), 6, 4, rank=1)]  # ranks 3 * 2, the same ones, 3 * 1
    assert_optimal(parts, stacked_kronecker_svd(parts, dtype=np.float64), 9)


def test_missing_members_are_zero_rows_of_up():
    part = random_part(np.random.default_rng(0), 4, 6)
    found = stacked_kronecker_svd([ZeroRows(7), part, ZeroRows(2)], rank=3)
    assert found.up.dtype == found.down.dtype == np.float32
    assert not found.up[:7].any()
    assert not found.up[-2:].any()
    assert found.up[7:-2].any()


@pytest.mark.parametrize("request_", [{"rank": 8}, {"energy": 0.99}, {}])
def test_zero_modules(request_):
    part = KroneckerPart(np.zeros((3, 4)), np.ones((5, 2)), w2_b=np.ones((2, 6)))
    found = stacked_kronecker_svd([part, ZeroRows(4)], **request_)
    assert (found.up.shape, found.down.shape, found.relative_error) == ((19, 1), (1, 24), 0.0)
    assert not found.up.any()
    assert not found.down.any()


def test_one_zero_member_among_others():
    rng = np.random.default_rng(0)
    parts = [random_part(rng, 4, 6), KroneckerPart(np.zeros((3, 4)), np.ones((5, 6)))]
    assert_optimal(parts, stacked_kronecker_svd(parts, rank=2, dtype=np.float64), 2)


def test_bad_input_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="of one width"):
        stacked_kronecker_svd([random_part(rng, 4, 6), random_part(rng, 4, 5)], rank=2)
    with pytest.raises(ValueError, match="none"):
        stacked_kronecker_svd([ZeroRows(3)], rank=2)
    with pytest.raises(ValueError, match="finite"):
        stacked_kronecker_svd([KroneckerPart(np.full((2, 2), np.inf), np.ones((2, 2)))])
    with pytest.raises(ValueError, match="rank must be"):
        stacked_kronecker_svd([random_part(rng, 4, 6)], rank=0)


@pytest.mark.parametrize("w1_full", [False, True])
@pytest.mark.parametrize("w2_full", [False, True])
@pytest.mark.parametrize("kernel", [(), (3, 2)])
@pytest.mark.parametrize("shape", [(3, 4), (4, 3)])
def test_to_low_rank_is_the_kronecker_product(w1_full, w2_full, kernel, shape):
    rng = np.random.default_rng(0)
    out, width = shape

    def whole_numbers(*size):  # so that equality is exact
        return rng.integers(-9, 10, size).astype(np.float32)

    left1, right1 = whole_numbers(out, 2), whole_numbers(2, width)
    left2, right2 = whole_numbers(out + 2, 2), whole_numbers(2, width + 1, *kernel)
    w1, w2 = left1 @ right1, np.tensordot(left2, right2, 1)
    up, down = to_low_rank(*((w1, None) if w1_full else (left1, right1)), *((w2, None) if w2_full else (left2, right2)))
    ranks = (min(shape) if w1_full else 2) * ((out + 2 if kernel else min(w2.shape)) if w2_full else 2)
    assert up.shape == (out * (out + 2), ranks)
    assert down.shape == (ranks, width * (width + 1), *kernel)
    expected = np.kron(w1.reshape(out, width, *(1 for _ in kernel)), w2)
    np.testing.assert_array_equal(np.tensordot(up, down, 1), expected)


def test_to_low_rank_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="are not"):
        to_low_rank(np.ones((2, 3)), np.ones((2, 3)), np.ones((2, 2)), None)
    with pytest.raises(ValueError, match="w1 is a matrix"):
        to_low_rank(np.ones((2, 3, 3)), None, np.ones((2, 2)), None)
