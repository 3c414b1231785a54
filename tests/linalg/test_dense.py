"""Randomised SVD of dense matrices, the subspace iteration below it, Khatri-Rao factors and worker threads."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasurgery.linalg import randomized, subspace
from lorasurgery.linalg.hadamard import khatri_rao
from lorasurgery.linalg.low_rank import rank_for_energy, tail_error
from lorasurgery.linalg.randomized import dense_svd
from lorasurgery.linalg.threads import map_threads

SPECTRA = {
    "flat": np.linspace(1.0, 0.5, 120),
    "slow": np.arange(1, 121) ** -0.8,
    "steep": 10.0 ** -np.arange(0, 12, 0.1),
    "rank 5": np.array([5.0, 4.0, 3.0, 2.0, 1.0]),
    "noisy rank 12": np.concatenate([np.linspace(2, 1, 12), np.full(108, 1e-3)]),
}


def with_spectrum(values, rows, columns, seed=0):
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((rows, len(values))))[0]
    right = np.linalg.qr(rng.standard_normal((columns, len(values))))[0]
    return (left * values) @ right.T


@pytest.fixture(params=["svd", "subspace"])
def route(request, monkeypatch):
    if request.param == "subspace":
        monkeypatch.setattr(randomized, "EXACT_SIZE", 0)
        monkeypatch.setattr(randomized, "SMALL_SHARE", 2)
        monkeypatch.setattr(subspace, "FIRST_RANK", 4)
        monkeypatch.setattr(subspace, "OVERSAMPLE", 8)
    return request.param


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("shape", [(200, 130), (130, 200)])
@pytest.mark.parametrize("rank", [1, 8, 16, 60])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dense_svd_by_rank(route, name, shape, rank, dtype):
    matrix = with_spectrum(SPECTRA[name], *shape).astype(dtype)
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    found = dense_svd(matrix, rank=rank, dtype=np.float64)
    assert found.rank <= rank
    true = np.linalg.norm(matrix - found.up @ found.down) / np.linalg.norm(matrix.astype(np.float64))
    assert found.relative_error == pytest.approx(true, rel=1e-5, abs=2e-7)
    assert found.relative_error == pytest.approx(tail_error(values, rank), rel=1e-4, abs=2e-6)
    np.testing.assert_allclose(np.linalg.norm(found.up, axis=0), np.linalg.norm(found.down, axis=1), rtol=1e-3)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("energy", [0.3, 0.9, 0.9999, 1 - 1e-8])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dense_svd_meets_an_energy(route, name, energy, dtype):
    matrix = with_spectrum(SPECTRA[name], 200, 130).astype(dtype)
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    expected = rank_for_energy(values, energy)
    found = dense_svd(matrix, energy=energy, dtype=np.float64)
    assert found.relative_error**2 <= (1 - energy) * (1 + 1e-6)
    assert found.rank in (expected, expected + 1)


def test_rank_and_energy_together_take_the_smaller(route):
    matrix = with_spectrum(SPECTRA["slow"], 200, 130)
    assert dense_svd(matrix, rank=7, energy=0.9999).rank == 7
    assert dense_svd(matrix, rank=16, energy=0.3).rank == rank_for_energy(SPECTRA["slow"], 0.3)


def test_no_request_keeps_the_numerical_rank(route):
    assert dense_svd(with_spectrum(SPECTRA["rank 5"], 200, 130)).rank == 5


def test_zero_and_bad_matrices():
    found = dense_svd(np.zeros((500, 450), np.float16), rank=4)
    assert (found.up.shape, found.down.shape, found.relative_error) == ((500, 1), (1, 450), 0.0)
    with pytest.raises(ValueError, match="not a finite matrix"):
        dense_svd(np.full((3, 3), np.nan), rank=1)
    with pytest.raises(ValueError, match="not a finite matrix"):
        dense_svd(np.ones((3, 3, 3)), rank=1)
    with pytest.raises(ValueError, match="energy must be"):
        dense_svd(np.ones((3, 3)), energy=2.0)


def test_half_precision_and_determinism(monkeypatch):
    monkeypatch.setattr(randomized, "EXACT_SIZE", 0)
    matrix = with_spectrum(SPECTRA["slow"], 200, 130).astype(np.float16)
    first, again = (dense_svd(matrix, rank=8, seed=1) for _ in range(2))
    np.testing.assert_array_equal(first.up, again.up)
    assert first.up.dtype == np.float32
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    assert first.relative_error == pytest.approx(tail_error(values, 8), rel=1e-4)


def recorded(gram):
    """``x -> gram @ x``, and the list of how many columns each call had."""
    calls = []

    def apply(x):
        calls.append(x.shape[1])
        return gram @ x

    return apply, calls


@pytest.mark.parametrize("name", SPECTRA)
def test_subspace_iteration_reaches_the_optimum(name):
    matrix = with_spectrum(SPECTRA[name], 400, 300)
    gram = matrix.T @ matrix
    counted, calls = recorded(gram)
    operator = subspace.Operator(counted, 300, float(np.trace(gram)))
    found = subspace.top_eigenpairs(operator, 10, seed=0)
    exact = np.linalg.eigvalsh(gram)[::-1]
    np.testing.assert_allclose(found.vectors.T @ found.vectors, np.eye(10), atol=1e-10)
    missing, optimum = operator.trace - found.values.sum(), operator.trace - exact[:10].sum()
    assert missing <= optimum * (1 + 1e-5) + 1e-12 * operator.trace
    assert len(calls) < 60


def test_hopeless_energies_end_after_the_first_try():
    counted, calls = recorded(np.eye(300))
    assert subspace.energy_eigenpairs(subspace.Operator(counted, 300, 300.0), 0.9, seed=0, limit=150) is None
    assert max(calls) <= 96


def test_orthonormal_of_dependent_columns():
    block = np.random.default_rng(0).standard_normal((50, 6))
    block[:, 3] = block[:, 0]
    block[:, 5] = 0.0
    basis = subspace.orthonormal(block)
    np.testing.assert_allclose(basis.T @ basis, np.eye(6), atol=1e-12)
    np.testing.assert_allclose(basis @ (basis.T @ block), block, atol=1e-10)


@settings(max_examples=30)
@given(
    r1=st.integers(1, 4),
    r2=st.integers(1, 4),
    kernel=st.sampled_from([(), (3, 3)]),
    seed=st.integers(0, 99),
)
def test_khatri_rao_is_the_elementwise_product_exactly(r1, r2, kernel, seed):
    rng = np.random.default_rng(seed)

    def whole_numbers(*size):
        return rng.integers(-9, 10, size).astype(np.float32)

    w1_a, w1_b = whole_numbers(7, r1), whole_numbers(r1, 5, *kernel)
    w2_a, w2_b = whole_numbers(7, r2), whole_numbers(r2, 5, *kernel)
    up, down = khatri_rao(w1_a, w1_b, w2_a, w2_b)
    assert (up.shape, down.shape) == ((7, r1 * r2), (r1 * r2, 5, *kernel))
    np.testing.assert_array_equal(np.tensordot(up, down, 1), np.tensordot(w1_a, w1_b, 1) * np.tensordot(w2_a, w2_b, 1))


def test_khatri_rao_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="elementwise product"):
        khatri_rao(np.ones((4, 2)), np.ones((2, 5)), np.ones((3, 2)), np.ones((2, 5)))
    with pytest.raises(ValueError, match="elementwise product"):
        khatri_rao(np.ones((4, 2)), np.ones((3, 5)), np.ones((4, 2)), np.ones((2, 5)))


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_keep_the_order(workers):
    def slow_first(number):
        time.sleep(0.02 if number == 0 else 0)
        return number * number

    assert map_threads(slow_first, range(20), workers) == [n * n for n in range(20)]
    assert map_threads(slow_first, [], workers) == []


def test_threads_run_at_the_same_time():
    barrier = threading.Barrier(2, timeout=10)
    assert sorted(map_threads(lambda _: barrier.wait(), range(2), 2)) == [0, 1]


@pytest.mark.parametrize("workers", [1, 2])
def test_threads_hold_blas_to_one_thread_each(workers):
    threadpoolctl = pytest.importorskip("threadpoolctl")

    def blas_threads(_):
        return max(pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas")

    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        assert map_threads(blas_threads, range(3), workers) == [1, 1, 1]
        assert blas_threads(None) == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_threads_raise_the_first_exception_and_drop_the_rest(workers):
    begun = []

    def fail_at_two(number):
        begun.append(number)
        time.sleep(0.005)
        if number == 2:
            raise KeyError(number)

    with pytest.raises(KeyError, match="2"):
        map_threads(fail_at_two, range(200), workers)
    assert len(begun) < 100


def test_no_workers_is_an_error():
    with pytest.raises(ValueError, match="workers"):
        map_threads(str, [1], 0)
