"""The torch SVD of dense matrices to a rank, against numpy's in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasurgery.linalg.dense import full_spectrum, torch_threads, truncated, truncated_svd, truncated_svds
from lorasurgery.linalg.dense import power as power_iteration
from tests.linalg.dense.matrices import SPECTRA, baked, error, optimum, with_spectrum

SHAPES = {"square": (240, 240), "wide": (210, 330), "tall": (330, 210)}


@pytest.fixture(autouse=True)
def iterate(monkeypatch):
    """Small matrices go through the iteration too."""
    monkeypatch.setattr(truncated, "EXACT_SIZE", 0)
    monkeypatch.setattr(truncated, "EXACT_SHARE", 1)


def named(name, rows, columns, rank=16):
    if name == "baked":
        return baked(rows, columns, rank)
    if name == "noise":
        return np.random.default_rng(0).standard_normal((rows, columns))
    return with_spectrum(SPECTRA[name](min(rows, columns)), rows, columns)


def as_float32(matrix):
    return torch.from_numpy(matrix.astype(np.float32))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["baked", "noise", *SPECTRA])
def test_error_is_near_the_optimum_and_reported(name, shape):
    matrix = named(name, *SHAPES[shape])
    norm = np.linalg.norm(matrix)
    for rank in (1, 16, 40):
        found = truncated_svd(as_float32(matrix), rank)
        true, best = error(matrix, found), optimum(matrix, rank)
        assert not found.exact
        assert true <= best * 1.001 + 1e-6 * norm
        assert found.relative_error() == pytest.approx(true / norm, rel=1e-4, abs=1e-6)
        assert found.squared_norm == pytest.approx(norm**2, rel=1e-6)
        assert true / best - 1 <= max(1.3 * found.excess, 1e-4, 2e-6 * norm / best)
        assert found.excess <= 1e-3


@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-4, 1e-5])
def test_the_tolerance_is_met_and_costs(tolerance):
    matrix = torch.from_numpy(named("noise", 240, 240))
    loose, found = truncated_svd(matrix, 16, tolerance=0.5), truncated_svd(matrix, 16, tolerance=tolerance)
    assert error(matrix.numpy(), found) <= optimum(matrix.numpy(), 16) * (1 + tolerance)
    assert found.passes > loose.passes or tolerance == 1e-1


def test_easy_matrices_take_four_passes():
    assert truncated_svd(as_float32(named("steep", 300, 300)), 16).passes == 4


@settings(max_examples=60)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
    inner=st.integers(1, 20),
    rank=st.integers(1, 90),
    power=st.sampled_from([-30, -12, -8, 0, 8, 12, 30]),
    exact=st.booleans(),
    double=st.booleans(),
)
def test_any_shape_rank_and_scale(rows, columns, inner, rank, power, exact, double):
    rng = np.random.default_rng(rows * 100 + columns)
    matrix = rng.standard_normal((rows, inner)) @ rng.standard_normal((inner, columns))
    given_ = torch.from_numpy(matrix * 10.0**power).to(torch.float64 if double else torch.float32)
    found = truncated_svd(given_, rank, exact=exact)
    assert found.rank == min(rows, columns, rank)
    assert len(found.values) >= found.rank
    assert (np.diff(found.values) <= 0).all()
    unit = replace(found, u=found.u.double(), values=found.values / 10.0**power)
    scaled = error(given_.double().numpy() / 10.0**power, unit)
    norm = np.linalg.norm(matrix)
    assert scaled <= optimum(matrix, rank) * 1.001 + 2e-6 * norm
    assert found.relative_error() == pytest.approx(scaled / norm, abs=2e-6, rel=1e-4)
    for side in (found.u, found.v):
        gram = (side.T @ side).double().numpy()
        lengths = np.diag(gram)
        assert np.all((np.abs(lengths - 1) < 1e-4) | (lengths == 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_known_product_comes_back(dtype):
    rng = np.random.default_rng(3)
    matrix = torch.from_numpy(rng.standard_normal((260, 24)) @ rng.standard_normal((24, 300))).to(dtype)
    found = truncated_svd(matrix, 32)
    floor = 1e-6 if dtype == torch.float32 else 1e-13
    assert error(matrix.double().numpy(), found) <= floor * float(matrix.norm())
    assert found.relative_error() <= floor
    assert found.values[24:].max() == 0.0
    assert not found.u[:, 24:].any()
    assert not found.v[:, 24:].any()
    up, down = found.balanced(24)
    torch.testing.assert_close(up @ down, matrix, rtol=0, atol=floor * 100)
    assert (up.shape, down.shape) == ((260, 24), (24, 300))
    assert down.is_contiguous()


@pytest.mark.parametrize("inner", [1, 2, 7, 20])
def test_products_of_small_integers(inner):
    """Their columns are parallel to the last bit: there is no rounding to make independent ones of."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        matrix = rng.integers(-1, 2, (320, inner)) @ rng.integers(-1, 2, (inner, 256)) / 16.0
        found = truncated_svd(as_float32(matrix), 24)
        assert error(matrix, found) <= 4e-6 * np.linalg.norm(matrix)
        left = found.u[:, : np.linalg.matrix_rank(matrix)].double()
        assert (left.T @ left - torch.eye(left.shape[1])).abs().max() < 1e-5


def test_rank_and_error_of_fewer_columns():
    matrix = named("slow", 240, 300)
    found = truncated_svd(torch.from_numpy(matrix), 40)
    for rank in (0, 1, 20, 40):
        fewer = found.truncated(rank)
        assert fewer.rank == rank
        true = error(matrix, fewer)
        assert fewer.squared_error() == pytest.approx(true**2, rel=1e-6)
        assert found.relative_error(rank) == pytest.approx(true / np.linalg.norm(matrix), rel=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_exact_is_the_svd(shape):
    matrix = named("slower", *SHAPES[shape])
    found = truncated_svd(torch.from_numpy(matrix), 12, exact=True)
    expected = np.linalg.svd(matrix, compute_uv=False)
    assert (found.exact, found.passes, found.excess, len(found.values)) == (True, 0, 0.0, 210 if shape != "square" else 240)
    np.testing.assert_allclose(found.values, expected, atol=1e-10)
    np.testing.assert_allclose(full_spectrum(torch.from_numpy(matrix)), expected, atol=1e-10)
    assert error(matrix, found) == pytest.approx(optimum(matrix, 12), rel=1e-10)


def test_exact_sees_below_the_gram_matrix():
    matrix = with_spectrum(10.0 ** -np.arange(0, 12, 0.5), 60, 50)
    found = truncated_svd(torch.from_numpy(matrix), 20, exact=True)
    assert error(matrix, found) == pytest.approx(optimum(matrix, 20), rel=1e-3)


def test_large_ranks_and_small_matrices_are_exact(monkeypatch):
    monkeypatch.undo()
    assert truncated_svd(torch.randn(400, 300), 80).exact
    assert truncated_svd(torch.randn(150, 400), 4).exact
    assert not truncated_svd(torch.randn(400, 300), 8).exact


def test_what_does_not_converge_is_decomposed_whole(monkeypatch):
    monkeypatch.setattr(power_iteration, "MAX_ROUNDS", 2)
    matrix = named("noise", 200, 200)
    found = truncated_svd(torch.from_numpy(matrix), 16)
    assert found.exact
    assert error(matrix, found) == pytest.approx(optimum(matrix, 16), rel=1e-9)


def test_batched_is_single():
    shapes = ["noise", "steep", "slow", "baked"]
    matrices = [as_float32(named(name, 220, 300)) for name in shapes]
    batch = torch.stack([*matrices, torch.zeros(220, 300), 1e-30 * matrices[0]])
    alone = [truncated_svd(matrix, 16) for matrix in batch]
    together = truncated.batched(batch, 16, tolerance=1e-3, exact=False, seed=0)
    assert len({one.passes for one in alone}) > 2, "they should finish in different rounds"
    for one, other, same in zip(alone, together, truncated_svds(batch, 16), strict=True):
        assert torch.equal(one.u, same.u)
        assert torch.equal(one.v, same.v)
        assert other.passes == one.passes
        np.testing.assert_allclose(other.values[:16], one.values[:16], rtol=1e-5)
        products = [(found.u * found.s) @ found.v.T for found in (one, other)]
        assert float((products[0] - products[1]).norm()) <= 1e-3 * float(products[0].norm())
    assert [one.exact for one in truncated.batched(batch, 16, tolerance=1e-3, exact=True, seed=0)] == [True] * 6


def test_the_same_seed_gives_the_same_bits():
    matrix = as_float32(named("noise", 200, 260))
    first, again, other = (truncated_svd(matrix, 8, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first.u, again.u)
    assert torch.equal(first.v, again.v)
    assert not torch.equal(first.u, other.u)
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        np.testing.assert_allclose(truncated_svd(matrix, 8, seed=5).values, first.values, rtol=1e-5)
    assert torch.get_num_threads() == before


def test_the_input_may_lie_anyhow_and_stays():
    matrix = as_float32(named("slow", 200, 260))
    copy = matrix.clone()
    expected = truncated_svd(matrix, 8).values[:8]
    wide = torch.zeros(200, 520)
    wide[:, ::2] = matrix
    for same in (matrix.T.contiguous().T, wide[:, ::2], matrix.clone().requires_grad_()):
        found = truncated_svd(same, 8)
        assert not found.u.requires_grad
        np.testing.assert_allclose(found.values[:8], expected, rtol=1e-4)
    assert torch.equal(matrix, copy)


@pytest.mark.parametrize("exact", [False, True])
def test_zeros(exact):
    found = truncated_svd(torch.zeros(80, 90), 4, exact=exact)
    assert (found.rank, found.relative_error(), found.squared_norm, found.excess) == (4, 0.0, 0.0, 0.0)
    assert not found.s.any()
    assert not found.u.any()
    assert not found.v.any()
    assert not found.values.any()
    assert not full_spectrum(torch.zeros(8, 9)).any()


@pytest.mark.parametrize(
    ("matrix", "options", "words"),
    [
        (torch.full((5, 5), torch.nan), {}, "NaN"),
        (torch.tensor([[1.0, torch.inf]]), {}, "infinity"),
        (torch.zeros(0, 4), {}, "rows and columns"),
        (torch.zeros(4), {}, "rows and columns"),
        (torch.zeros(4, 4, dtype=torch.float16), {}, "float16"),
        (torch.full((4, 4), 1e200, dtype=torch.float64), {}, "no square"),
        (torch.ones(4, 4), {"rank": 0}, "rank"),
        (torch.ones(4, 4), {"tolerance": 0.0}, "tolerance"),
    ],
)
def test_refusals(matrix, options, words):
    with pytest.raises(ValueError, match=words):
        truncated_svd(matrix, **{"rank": 2, **options})


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["baked", "noise", *SPECTRA])
def test_a_gpu_finds_the_same(name):
    matrix = named(name, 400, 520)
    batch = torch.stack([as_float32(matrix), as_float32(matrix)])
    expected = truncated_svd(batch[0], 16)
    for found in truncated_svds(batch.cuda(), 16):
        assert found.u.is_cuda
        assert found.passes == expected.passes
        np.testing.assert_allclose(found.values[:16], expected.values[:16], rtol=1e-4)
        assert error(matrix, found) <= optimum(matrix, 16) * 1.001 + 1e-6 * np.linalg.norm(matrix)
    assert error(matrix, truncated_svd(batch[0].cuda(), 16, exact=True)) <= optimum(matrix, 16) * (1 + 1e-6)
    np.testing.assert_allclose(full_spectrum(batch[0].cuda()), full_spectrum(batch[0]), atol=1e-6)
