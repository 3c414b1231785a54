"""Factored SVD, truncation, norms and ranks against the dense float64 SVD of the product."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lorasurgery.linalg import low_rank
from lorasurgery.linalg.low_rank import (
    difference_norm,
    factored_svd,
    product_norm,
    rank_for_energy,
    relative_error,
    tail_error,
    truncate,
)


def factors(seed, out, width, rank, *, steep=1.0, dtype=np.float64):
    """Random factors; column i of up is scaled by steep^-i."""
    rng = np.random.default_rng(seed)
    up = rng.standard_normal((out, rank)) * float(steep) ** -np.arange(rank)
    return up.astype(dtype), rng.standard_normal((rank, width)).astype(dtype)


def dense_values(matrix):
    return np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)


def assert_is_svd(up, down):
    u, s, vt = factored_svd(up, down)
    dense = up.astype(np.float64) @ down.astype(np.float64)
    count = min(*dense.shape, up.shape[1])
    assert (u.shape, s.shape, vt.shape) == ((len(dense), count), (count,), (count, dense.shape[1]))
    floor = 1e-14 * np.linalg.norm(up.astype(np.float64)) * np.linalg.norm(down.astype(np.float64))
    np.testing.assert_allclose(s, dense_values(dense)[:count], rtol=1e-6, atol=floor)
    np.testing.assert_allclose(u * s @ vt, dense, atol=100 * floor + 1e-300)
    np.testing.assert_allclose(u.T @ u, np.eye(count), atol=2e-6)
    np.testing.assert_allclose(vt @ vt.T, np.eye(count), atol=2e-6)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 999),
    out=st.integers(1, 40),
    width=st.integers(1, 40),
    rank=st.integers(1, 12),
    steep=st.sampled_from([1.0, 2.0, 10.0, 100.0]),
)
@example(seed=0, out=3, width=30, rank=12, steep=1.0)  # rank above out
@example(seed=0, out=1, width=1, rank=1, steep=1.0)
def test_singular_values_of_any_shape_and_condition(seed, out, width, rank, steep):
    assert_is_svd(*factors(seed, out, width, rank, steep=steep))


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 9), st.floats(-2.0, 2.0))
def test_a_sum_of_products_by_concatenated_factors(seed, count, rank, weight):
    terms = [factors(seed + i, 20, 15, rank + i, steep=1.5) for i in range(count)]
    weights = [weight, *range(1, count)]
    up = np.hstack([w * u for w, (u, _) in zip(weights, terms, strict=True)])
    down = np.vstack([d for _, d in terms])
    dense = sum(w * u @ d for w, (u, d) in zip(weights, terms, strict=True))
    values = factored_svd(up, down)[1]
    bound = np.linalg.norm(up, 2) * np.linalg.norm(down, 2)
    np.testing.assert_allclose(values, dense_values(dense)[: len(values)], rtol=1e-6, atol=1e-14 * bound + 1e-300)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_stored_dtypes_are_read_exactly(dtype):
    assert_is_svd(*factors(3, 30, 20, 5, dtype=dtype))


def test_dependent_columns():
    up, down = factors(1, 40, 30, 6)
    up[:, 3] = up[:, 0]
    down[4] = down[1] * (1 + 1e-12)
    up[:, 4] = -up[:, 1]
    assert_is_svd(up, down)


def test_gram_route_is_taken_for_ordinary_factors_and_left_for_hard_ones():
    up, down = factors(0, 40, 30, 6)
    assert low_rank._gram_core(up, down, 6) is not None
    up, down = factors(0, 40, 30, 6, steep=100)
    assert low_rank._gram_core(up, down, 6) is None
    assert low_rank._gram_core(up, down, 2) is not None  # enough for the first two


@pytest.mark.parametrize("zero", ["up", "down", "both"])
def test_zero_modules(zero):
    up, down = factors(0, 20, 30, 4, dtype=np.float32)
    up, down = up * (zero == "down"), down * (zero == "up")
    u, s, vt = factored_svd(up, down)
    assert not s.any()
    assert np.isfinite(u).all()
    assert np.isfinite(vt).all()
    new_up, new_down, error = truncate(up, down, 2)
    assert (new_up.shape, new_down.shape, error) == ((20, 2), (2, 30), 0.0)
    assert not new_up.any()
    assert not new_down.any()
    assert product_norm(up, down) == difference_norm(up, down, up, down) == relative_error(up, down, up, down) == 0.0


@settings(max_examples=40)
@given(seed=st.integers(0, 999), rank=st.integers(1, 9), steep=st.sampled_from([1.0, 3.0, 30.0]))
def test_truncation_is_optimal_balanced_and_says_its_true_error(seed, rank, steep):
    up, down = factors(seed, 30, 24, 8, steep=steep)
    new_up, new_down, error = truncate(up, down, rank)
    dense, kept = up @ down, min(rank, 8)
    assert new_up.shape == (30, kept)
    assert error == pytest.approx(tail_error(dense_values(dense), kept), rel=1e-6, abs=1e-7)
    true = np.linalg.norm(dense - new_up @ new_down) / np.linalg.norm(dense)
    assert true == pytest.approx(error, rel=1e-6, abs=1e-7)
    np.testing.assert_allclose(np.linalg.norm(new_up, axis=0), np.linalg.norm(new_down, axis=1), rtol=1e-6)


def test_truncation_keeps_float32_for_narrow_input_and_float64_for_float64():
    for given_type, expected in [(np.float64, np.float64), (np.float32, np.float32), (np.float16, np.float32)]:
        up, down = factors(0, 9, 9, 4, dtype=given_type)
        new_up, new_down, _ = truncate(up, down, 2)
        assert new_up.dtype == new_down.dtype == expected


@settings(max_examples=30)
@given(seed=st.integers(0, 999), rank=st.integers(1, 50), other=st.integers(1, 50))
def test_norms(seed, rank, other):
    one, two = factors(seed, 30, 24, rank), factors(seed + 1, 30, 24, other)
    dense, dense_two = one[0] @ one[1], two[0] @ two[1]
    assert product_norm(*one) == pytest.approx(np.linalg.norm(dense), rel=1e-9)
    difference = np.linalg.norm(dense - dense_two)
    assert difference_norm(*one, *two) == pytest.approx(difference, rel=1e-9)
    assert relative_error(*one, *two) == pytest.approx(difference / np.linalg.norm(dense), rel=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_norm_of_a_product_that_cancels(seed):
    up, down = factors(seed, 30, 24, 1)
    nearly = -down + 1e-9 * np.random.default_rng(1).standard_normal(down.shape)
    expected = np.linalg.norm(up) * np.linalg.norm(down + nearly)  # the sum is exact
    assert product_norm(np.hstack([up, up]), np.vstack([down, nearly])) == pytest.approx(expected, rel=1e-5)


def test_difference_of_nearly_equal_products_does_not_cancel():
    up, down = factors(0, 300, 200, 8)
    change = 1e-12 * np.random.default_rng(1).standard_normal(up.shape)
    shifted = up + change
    expected = np.linalg.norm((shifted - up) @ down)  # shifted - up is exact
    assert difference_norm(up, down, shifted, down) == pytest.approx(expected, rel=1e-2)


def test_relative_error_of_a_zero_reference_is_infinite():
    up, down = factors(0, 6, 5, 2)
    assert relative_error(0 * up, down, up, down) == float("inf")


def exact_rank(values, energy):
    squares = [Fraction(float(value)) ** 2 for value in values]
    running, target = Fraction(0), Fraction(energy) * sum(squares)
    for count, square in enumerate([Fraction(0), *squares]):
        running += square
        if running >= target:
            return count
    raise AssertionError


@settings(max_examples=100)
@given(
    values=st.lists(st.floats(1e-12, 1e6), min_size=1, max_size=30).map(lambda v: np.array(sorted(v, reverse=True))),
    energy=st.floats(0.01, 1.0),
)
def test_rank_for_energy_is_the_smallest(values, energy):
    rank = rank_for_energy(values, energy)
    # a tie within 4 eps of the total counts as reached, so between the ranks of two neighbouring energies
    below = exact_rank(values, energy - 2e-15) if energy < 1 else exact_rank(values, energy)
    assert below <= rank <= exact_rank(values, energy)


@pytest.mark.parametrize(
    ("values", "energy", "rank"),
    [
        ([], 0.9, 0),
        ([0.0, 0.0], 0.9, 0),
        ([5.0], 0.01, 1),
        ([5.0], 1.0, 1),
        ([5.0, 0.0], 1.0, 1),
        ([1.0, 1e-9], 1.0, 2),
        ([1.0, 1e-9], 0.9999999, 1),
        ([2.0, 1.0], 0.8, 1),
        ([2.0, 1.0], 0.8000001, 2),
        ([1e-200, 1e-200], 0.5, 1),
        *[([0.1] * 10, tenths / 10, tenths) for tenths in range(1, 11)],
    ],
)
def test_rank_for_energy_cases(values, energy, rank):
    assert rank_for_energy(np.array(values), energy) == rank


@pytest.mark.parametrize("energy", [0.0, -0.1, 1.1, float("nan")])
def test_energy_out_of_range(energy):
    with pytest.raises(ValueError, match="energy must be"):
        rank_for_energy(np.ones(3), energy)


def test_bad_input_is_refused():
    up, down = factors(0, 6, 5, 2)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        truncate(up, down, 0)
    with pytest.raises(ValueError, match="are not"):
        factored_svd(up, down.T)
    with pytest.raises(ValueError, match="NaN or infinity"):
        factored_svd(up, np.full_like(down, np.nan))
    with pytest.raises(ValueError, match="differ in shape"):
        difference_norm(up, down, up[:5], down)
