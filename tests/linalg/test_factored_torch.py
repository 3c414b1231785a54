"""Batches of factored SVDs on a torch device against dense float64 SVDs by numpy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from lorasurgery.linalg.factored_torch import batched_cores, batched_svd, checked_device, on_device

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]


def batch(seed, count, out, width, rank, steep=1.2):
    rng = np.random.default_rng(seed)
    up = rng.standard_normal((count, out, rank)) * steep ** -np.arange(rank)
    return up, rng.standard_normal((count, rank, width))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("needed", [None, 3])
@pytest.mark.parametrize(("out", "width", "rank"), [(40, 30, 6), (12, 50, 12), (5, 9, 1)])
def test_cores_are_the_dense_svds(out, width, rank, needed, device):
    up, down = batch(0, 5, out, width, rank)
    place = checked_device(device)
    found = batched_cores(on_device(up, place), on_device(down, place), needed)
    assert bool(found.accurate.all())
    kept = min(needed or rank, rank)
    for i in range(5):
        matrix = up[i] @ down[i]
        values = np.linalg.svd(matrix, compute_uv=False)
        np.testing.assert_allclose(found.values[i].cpu().numpy()[:kept], values[:kept], rtol=1e-6)
        left, right = up[i] @ found.left[i].cpu().numpy(), found.right[i].cpu().numpy() @ down[i]
        np.testing.assert_allclose(left.T @ left, np.eye(kept), atol=1e-6)
        np.testing.assert_allclose(right @ right.T, np.eye(kept), atol=1e-6)
        best = np.sqrt(np.sum(values[kept:] ** 2))
        cut = (left * found.values[i].cpu().numpy()[:kept]) @ right
        assert np.linalg.norm(matrix - cut) <= best * 1.0001 + 1e-9 * values[0]


@pytest.mark.parametrize("device", DEVICES)
def test_hard_products_are_seen_and_qr_is_right(device):
    place = checked_device(device)
    up, down = batch(1, 4, 30, 20, 8)
    up[1, :, 7] = up[1, :, 6] * (1 + 1e-12)  # dependent columns
    up[2] = 0.0
    up[3, 0, 0] = np.nan
    found = batched_cores(on_device(up, place), on_device(down, place), None)
    assert found.accurate.tolist() == [True, False, True, False]
    assert not np.isfinite(float(found.bounds[3]))
    assert not bool(found.values[2].any() or found.left[2].any() or found.right[2].any())
    u, values, vt = (part.cpu().numpy() for part in batched_svd(on_device(up[:3], place), on_device(down[:3], place)))
    for i in range(3):
        matrix = up[i] @ down[i]
        np.testing.assert_allclose((u[i] * values[i]) @ vt[i], matrix, atol=1e-12 * (1 + np.abs(matrix).max()))
        np.testing.assert_allclose(values[i], np.linalg.svd(matrix, compute_uv=False)[:8], atol=1e-12 * (1 + values[i][0]))


def test_more_rank_than_sides_is_left_to_qr():
    up, down = batch(2, 2, 4, 5, 9)
    found = batched_cores(torch.from_numpy(up), torch.from_numpy(down), None)
    assert not bool(found.accurate.any())
    assert batched_svd(torch.from_numpy(up), torch.from_numpy(down))[1].shape == (2, 4)


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_every_dtype_arrives_exactly(dtype):
    array = np.random.default_rng(3).standard_normal((3, 4)).astype(dtype)
    found = on_device(array, torch.device("cpu"))
    assert found.dtype == torch.float64
    np.testing.assert_array_equal(found.numpy(), array.astype(np.float64))


@pytest.mark.parametrize("name", ["tpu9", "cuda:99", "meta!"])
def test_a_device_that_is_not_there_says_so(name):
    with pytest.raises(ValueError, match="torch has no device"):
        checked_device(name)
