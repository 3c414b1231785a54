"""The LoHa near a matrix: never worse than the best LoRA of its rank, and a true LoHa is found again."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasurgery.linalg import nearest_hadamard as module
from lorasurgery.linalg.nearest_hadamard import Arms, hadamard_error, hadamard_of_dense, hadamard_of_product, nearest_hadamard


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


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(("shape", "rank"), [((480, 640), 4), ((640, 480), 4)])
def test_a_loha_is_found_again(shape, rank, dense):
    rng = np.random.default_rng(rank)
    matrix = product(random_arms(rng, shape[0], shape[1], rank))
    u, values, vt = np.linalg.svd(matrix, full_matrices=False)
    of = hadamard_of_dense(matrix) if dense else hadamard_of_product(u[:, : rank**2] * values[: rank**2], vt[: rank**2])
    found = nearest_hadamard(of, rank)
    assert found.converged
    assert tail(matrix, rank) > 0.2 * np.sum(matrix**2)  # no LoRA of the rank comes near
    assert np.linalg.norm(matrix - product(found.arms)) < 1e-6 * np.linalg.norm(matrix)


def test_other_matrices_come_nearer_than_a_lora_of_the_rank():
    rng = np.random.default_rng(0)
    up, down = rng.standard_normal((96, 24)) * 0.9 ** np.arange(24), rng.standard_normal((24, 80))
    found = nearest_hadamard(hadamard_of_product(up, down), 4)
    assert found.error < 0.8 * found.lora_error


def test_the_error_never_rises():
    rng = np.random.default_rng(1)
    matrix = rng.standard_normal((40, 30))
    of = hadamard_of_dense(matrix)
    for start in of.starts(3, rng):
        run = module._Run(of, start)
        errors = [run.error]
        for _ in range(20):
            run.go(1, 0.0)
            errors.append(run.error)
        assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(errors))


def test_split_start_multiplies_to_the_matrix_at_full_rank():
    matrix = np.random.default_rng(2).standard_normal((12, 9))
    split = hadamard_of_dense(matrix).starts(9, np.random.default_rng(0))[-1]
    assert np.allclose(product(split), matrix, atol=1e-10)


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
