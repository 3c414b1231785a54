"""The LoHa near a matrix: never worse than the best LoRA of its rank, and a true LoHa is found again."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasurgery.linalg.hadamard_run import Run
from lorasurgery.linalg.hadamard_segre import closed_form, points_needed
from lorasurgery.linalg.hadamard_starts import SPREADS, beside_ones, split, starts_worth, with_room
from lorasurgery.linalg.hadamard_sweep import Arms, sweep
from lorasurgery.linalg.hadamard_target import hadamard_of_dense, hadamard_of_product
from lorasurgery.linalg.nearest_hadamard import hadamard_error, nearest_hadamard


def product(arms):
    """The LoHa, restated."""
    return (arms.w1_a @ arms.w1_b) * (arms.w2_a @ arms.w2_b)


def random_arms(rng, out, width, rank):
    return Arms(*(rng.standard_normal(size) for size in ((out, rank), (rank, width)) * 2))


def tail(matrix, rank):
    """The squared error of the best LoRA."""
    return float(np.sum(np.linalg.svd(matrix, compute_uv=False)[rank:] ** 2))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 20), st.integers(2, 20), st.integers(1, 6), st.integers(1, 4), st.booleans())
def test_never_worse_than_the_best_lora_and_the_error_is_true(seed, out, width, inner, rank, dense):
    rng = np.random.default_rng(seed)
    up, down = rng.standard_normal((out, inner)) * 0.5 ** np.arange(inner), rng.standard_normal((inner, width))
    matrix = up @ down
    of = hadamard_of_dense(matrix) if dense else hadamard_of_product(up, down)
    found = nearest_hadamard(of, rank)
    norm = np.sum(matrix**2)
    assert found.error == pytest.approx(np.sum((matrix - product(found.arms)) ** 2), abs=1e-12 * norm)
    assert found.lora_error == pytest.approx(tail(matrix, rank), abs=1e-12 * norm)
    assert found.error <= found.lora_error + 1e-12 * norm
    assert hadamard_error(of, found.arms) == pytest.approx(found.error, abs=1e-12 * norm)


def relative(matrix, arms):
    return np.linalg.norm(matrix - product(arms)) / np.linalg.norm(matrix)


def as_product(matrix, rank):
    u, values, vt = np.linalg.svd(matrix, full_matrices=False)
    return hadamard_of_product(u[:, : rank**2] * values[: rank**2], vt[: rank**2])


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(
    ("shape", "rank"),
    [((24, 24), 1), ((24, 30), 2), ((96, 200), 2), ((40, 36), 3), ((128, 64), 4), ((64, 128), 4), ((230, 160), 5)],
)
def test_a_loha_is_found_again(shape, rank, dense):
    """By the closed form, of whichever side is long enough for it; scaled as alpha / rank does."""
    rng = np.random.default_rng(rank)
    matrix = product(random_arms(rng, shape[0], shape[1], rank)) * (0.5 / rank)
    found = nearest_hadamard(hadamard_of_dense(matrix) if dense else as_product(matrix, rank), rank)
    assert found.converged
    assert rank == 1 or tail(matrix, rank) > 0.1 * np.sum(matrix**2)  # no LoRA of the rank comes near
    assert relative(matrix, found.arms) < 1e-8


@pytest.mark.parametrize(("shape", "rank"), [((320, 480), 8), ((480, 320), 6)])
def test_a_larger_loha_is_found_again_by_sweeps(shape, rank):
    matrix = product(random_arms(np.random.default_rng(rank), shape[0], shape[1], rank))
    found = nearest_hadamard(as_product(matrix, rank), rank)
    assert relative(matrix, found.arms) < 1e-6


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_a_rounded_loha_is_found_to_the_rounding(rank):
    matrix = product(random_arms(np.random.default_rng(7), 128, 140, rank)).astype(ml_dtypes.bfloat16).astype(np.float64)
    assert relative(matrix, nearest_hadamard(hadamard_of_dense(matrix), rank).arms) < 2.0**-9


@pytest.mark.parametrize("rank", [2, 4])
def test_a_loha_beside_noise_is_found_to_the_noise(rank):
    rng = np.random.default_rng(8)
    loha = product(random_arms(rng, 160, 200, rank))
    noise = rng.standard_normal(loha.shape) * (0.2 * np.std(loha))
    found = nearest_hadamard(hadamard_of_dense(loha + noise), rank)
    assert found.error < np.sum(noise**2)
    assert np.linalg.norm(product(found.arms) - loha) < 0.1 * np.linalg.norm(loha)


def test_a_loha_of_a_smaller_rank_is_found_again():
    matrix = product(random_arms(np.random.default_rng(9), 128, 120, 3))
    assert relative(matrix, nearest_hadamard(hadamard_of_dense(matrix), 5).arms) < 1e-6


def test_a_lora_that_looks_like_a_loha_is_no_worse_off():
    """Rank 16: there is a gap behind its singular values too, but it is no LoHa of rank 4."""
    rng = np.random.default_rng(10)
    up, down = rng.standard_normal((128, 16)), rng.standard_normal((16, 120))
    found = nearest_hadamard(hadamard_of_product(up, down), 4)
    assert 0.05 * np.sum((up @ down) ** 2) < found.error < 0.8 * found.lora_error


def test_zero_rows_and_columns_stay_zero():
    matrix = product(random_arms(np.random.default_rng(11), 140, 130, 4))
    matrix[3:9] = 0.0
    matrix[:, 100:] = 0.0
    found = nearest_hadamard(hadamard_of_dense(matrix), 4)
    assert relative(matrix, found.arms) < 1e-6


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_size_does_not_matter(size):
    matrix = np.random.default_rng(12).standard_normal((40, 30))
    here, there = (nearest_hadamard(hadamard_of_dense(matrix * own), 3) for own in (1.0, size))
    assert there.error / size**2 == pytest.approx(here.error, rel=0.1)
    assert np.sum((matrix * size - product(there.arms)) ** 2) == pytest.approx(there.error, rel=1e-6)


def test_the_same_seed_gives_the_same_arms():
    of = hadamard_of_dense(np.random.default_rng(13).standard_normal((120, 130)))
    one, other, third = (nearest_hadamard(of, 4, seed=seed) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(one.arms, other.arms, strict=True))
    assert not np.array_equal(one.arms.w1_a, third.arms.w1_a)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("rank", [2, 3, 4])
def test_the_closed_form_needs_no_sweep(rank, turned):
    shape = (points_needed(rank) + 5, rank**2 + 2)
    out, width = shape[::-1] if turned else shape
    matrix = product(random_arms(np.random.default_rng(rank), out, width, rank))
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    found = closed_form(hadamard_of_dense(matrix), u[:, : rank**2], vt[: rank**2].T, rank, np.random.default_rng(0))
    assert len(found) == 2  # the other side is too short
    assert min(relative(matrix, arms) for arms in found) < 1e-5


def test_the_error_is_true_where_arms_cancel():
    """The best LoHa may lie at infinity: arms grow and cancel, here by 1e9."""
    rng = np.random.default_rng(16)
    one = random_arms(rng, 600, 8, 2)
    mixed = np.array([[1e9, 1e9], [1e9, 1e9 + 1.0]])
    arms = one._replace(w1_a=one.w1_a @ mixed, w1_b=np.linalg.solve(mixed, one.w1_b))
    matrix = rng.standard_normal((600, 8))
    for of in (hadamard_of_dense(matrix), hadamard_of_product(matrix, np.eye(8))):
        assert hadamard_error(of, arms) == pytest.approx(np.sum((matrix - product(arms)) ** 2), rel=1e-9)


def test_room_leaves_the_product():
    rng = np.random.default_rng(14)
    arms = random_arms(rng, 9, 8, 2)
    wider = with_room(arms, 5, rng)
    assert [arm.shape for arm in wider] == [(9, 5), (5, 8)] * 2
    assert np.allclose(product(wider), product(arms))


def test_dear_sweeps_have_fewer_starts():
    assert [starts_worth((size, size), rank) for size, rank in ((64, 4), (1280, 4), (1280, 16), (9999, 64))] == [12, 6, 2, 2]


def test_other_matrices_come_nearer_than_a_lora_of_the_rank():
    rng = np.random.default_rng(0)
    up, down = rng.standard_normal((96, 24)) * 0.9 ** np.arange(24), rng.standard_normal((24, 80))
    found = nearest_hadamard(hadamard_of_product(up, down), 4)
    assert found.error < 0.8 * found.lora_error


@pytest.mark.parametrize("spread", SPREADS[:4])
def test_the_error_never_rises(spread):
    rng = np.random.default_rng(1)
    matrix = rng.standard_normal((40, 30))
    of = hadamard_of_dense(matrix)
    run = Run(of, beside_ones(of.leading(3), 3, rng, spread))
    errors = [hadamard_error(of, run.arms)]
    for _ in range(20):
        run.go(1, 0.0)
        errors.append(run.error)
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(errors))
    assert errors[-1] == pytest.approx(np.sum((matrix - product(run.arms)) ** 2), rel=1e-12)


@pytest.mark.parametrize("fast", [False, True])
def test_a_sweep_is_least_squares_over_each_arm(fast):
    """Restated entry by entry: row i of an arm solves a problem whose columns are the other arm's weights."""
    rng = np.random.default_rng(15)
    matrix, arms = rng.standard_normal((7, 9)), random_arms(rng, 7, 9, 3)
    found, error = sweep(hadamard_of_dense(matrix), arms, fast=fast)

    def best(target, weights, basis):
        rows = [np.linalg.lstsq((basis * own).T, row, rcond=None)[0] for row, own in zip(target, weights, strict=True)]
        return np.array(rows)

    p, q, r, s = arms
    p = best(matrix, r @ s, q)
    r = best(matrix, p @ q, s)
    q = best(matrix.T, (r @ s).T, p.T).T
    s = best(matrix.T, (p @ q).T, r.T).T
    assert np.allclose(product(found), (p @ q) * (r @ s), rtol=1e-3 if fast else 1e-6, atol=1e-4 if fast else 1e-7)
    assert error == pytest.approx(np.sum((matrix - product(found)) ** 2), rel=1e-4 if fast else 1e-8)


def test_split_start_multiplies_to_the_matrix_at_full_rank():
    matrix = np.random.default_rng(2).standard_normal((12, 9))
    assert np.allclose(product(split(matrix, 9)), matrix, atol=1e-10)


def test_zeros_small_sides_and_bad_input():
    zero = nearest_hadamard(hadamard_of_dense(np.zeros((6, 5))), 2)
    assert zero.error == 0.0
    assert not product(zero.arms).any()
    one = nearest_hadamard(hadamard_of_product(np.ones((4, 1)), np.ones((1, 3))), 3)
    assert np.allclose(product(one.arms), 1.0)
    with pytest.raises(ValueError, match="rank"):
        nearest_hadamard(hadamard_of_dense(np.eye(3)), 0)
    with pytest.raises(ValueError, match="NaN"):
        hadamard_of_dense(np.array([[np.nan]]))
