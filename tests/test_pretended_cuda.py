"""The code for GPUs and mps on devices that are only pretended: it gives the CPU's results."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lorasurgery.linalg.dense import truncated_svds
from lorasurgery.operations.cut import ResizeOptions, resize
from lorasurgery.verbs.extract import work
from tests.extracting import relative, said
from tests.pretended import Pretended, pretend
from tests.test_extract import falling, options, pair, taken
from tests.test_resize import check, dense, every
from tests.test_resize_device import mixed

SHAPES = {f"blocks.{i}.a": (220, 200) for i in range(6)} | {"b": (210, 30, 3, 3), "c": (30, 20), "d": (200, 220, 1, 1)}


def models(folder, dtype):
    """Two models of equal and unequal shapes, and their difference, which bf16 and fp16 hold as fp32 does."""
    rng = np.random.default_rng(3)
    base = {f"{name}.weight": np.zeros(shape) for name, shape in SHAPES.items()}
    tuned = {}
    for name, values in base.items():
        flat = (values.shape[0], math.prod(values.shape[1:]))
        change = falling(name, flat, rng) + 0.01 * rng.standard_normal(flat) / math.sqrt(flat[1])
        tuned[name] = torch.from_numpy(change.reshape(values.shape)).bfloat16().half().double().numpy()
    return pair(folder, base, tuned, dtype), tuned


class TestTheDevice:
    """What the tests below rely on."""

    def test_views_and_changes_in_place_are_seen_from_everywhere(self, monkeypatch):
        board = pretend(monkeypatch)
        whole = torch.zeros(4, 6).to("cuda")
        assert isinstance(whole, Pretended)
        assert whole.is_cuda
        turned, part = whole.T, whole[1:3]
        part += 1.0
        part[0, 2:4].copy_(torch.full((2,), 7.0))
        turned.addmm_(torch.ones(6, 1, device="cuda:0"), torch.ones(1, 4, device="cuda:0"))
        assert whole.tolist() == [[1.0] * 6, [2.0, 2.0, 8.0, 8.0, 2.0, 2.0], [2.0] * 6, [1.0] * 6]
        assert board.alive["cuda:0"] == 4 * 6 * 4
        del whole, turned
        assert board.alive["cuda:0"] == 4 * 6 * 4
        del part
        assert board.alive["cuda:0"] == 0

    def test_it_refuses_what_a_real_one_refuses(self, monkeypatch):
        pretend(monkeypatch, limit=100)
        there = torch.ones(3).to("cuda:0")
        for wrong in (lambda: there + torch.ones(3), lambda: there + torch.ones(3).to("cuda:1")):
            with pytest.raises(RuntimeError, match="same device"):
                wrong()
        with pytest.raises(TypeError, match="cuda:0"):
            there.numpy()
        with pytest.raises(TypeError, match="cuda:0"):
            np.asarray(there)
        with pytest.raises(torch.OutOfMemoryError):
            torch.ones(100).to("cuda")
        with pytest.raises(RuntimeError, match="ordinal"):
            torch.ones(1, device="cuda:2")
        assert (there + 1.0 + torch.tensor(1.0)).tolist() == [3.0] * 3

    def test_waits_are_counted(self, monkeypatch):
        board = pretend(monkeypatch)
        there = torch.ones(3).to("cuda")
        torch.empty(3, pin_memory=True).to("cuda", non_blocking=True)
        assert board.waits == 1
        total = there.sum()
        assert board.waits == 1
        assert float(total) == 3.0
        there.cpu()
        torch.linalg.eigh(torch.eye(2, device="cuda"))
        assert board.waits == 4

    def test_mps_has_no_float64(self, monkeypatch):
        pretend(monkeypatch, "mps")
        for wrong in (lambda: torch.ones(1).double().to("mps"), torch.ones(1).to("mps").double):
            with pytest.raises(TypeError, match="float64"):
                wrong()


RESIZES = [
    {"rank": 5, "conv_rank": 3}, {"rank": 5}, {"policy": "energy", "param": 0.9}, {"size": 40_000},
    {"policy": "sv_fro", "param": 0.8},
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("how", RESIZES)
def test_resize_is_that_of_numpy(how, dtype, monkeypatch):
    adapter = mixed(dtype).adapter()
    plain, first = resize(adapter, ResizeOptions(**how))
    wanted = [dense(one) for one in every(plain)]
    board = pretend(monkeypatch)
    if dtype == "F32":
        there, second = check(adapter, ResizeOptions(device="cuda", **how), rounding=1e-6)
    else:
        there, second = resize(adapter, ResizeOptions(device="cuda", **how))
    assert board.peak["cuda:0"] > 0
    assert [one.new_rank for one in first.modules] == [two.new_rank for two in second.modules]
    assert first.relative_error == pytest.approx(second.relative_error, rel=1e-6)
    for one, two in zip(wanted, every(there), strict=True):
        assert np.abs(one - dense(two)).max() <= (1e-5 if dtype == "F32" else 0.02) * max(np.abs(one).max(), 1e-30)
    assert board.alive["cuda:0"] == 0


EXTRACTS = [
    {"rank": 8}, {"rank": 8, "exact": True}, {"policy": "energy", "param": 0.9}, {"policy": "knee"},
    {"policy": "error", "param": 0.3, "exact": True}, {"rank": 8, "dora": True}, {"rank": 8, "tucker": True},
    {"rank": 8, "clamp_quantile": 0.99, "factors": "kohya"},
]  # fmt: skip


def both(folder, how, where, monkeypatch, dtype="F32", kind="cuda"):
    """What an extraction on the CPU and one elsewhere say, and what happened there."""
    paths, wanted = models(folder, dtype)
    one = taken(paths, folder / "cpu.safetensors", options(**how))
    first = said(folder / "cpu.safetensors", wanted)
    board = pretend(monkeypatch, kind)
    two = taken(paths, folder / "there.safetensors", options(device=where, **how))
    assert math.isclose(one.relative_error, two.relative_error, rel_tol=1e-3)
    assert not any(board.alive.values())
    return relative(said(folder / "there.safetensors", wanted), first), board


@pytest.mark.parametrize("how", EXTRACTS, ids=lambda how: " ".join(f"{k} {v}" for k, v in how.items()))
def test_extract_is_that_of_the_cpu(how, tmp_path, monkeypatch):
    off, board = both(tmp_path, how, "cuda", monkeypatch)
    assert off < 1e-4
    assert board.peak["cuda:0"] > 0


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_extract_of_16_bits_on_two_gpus(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(work, "BATCH_BYTES", 400_000)
    off, board = both(tmp_path, {"rank": 8}, "cuda:0,cuda:1", monkeypatch, dtype)
    assert off < 1e-4
    assert min(board.peak["cuda:0"], board.peak["cuda:1"]) > 0


@pytest.mark.parametrize("where", ["mps", "mps:0"])
@pytest.mark.parametrize(
    "how", [{"rank": 8}, {"rank": 8, "exact": True}, {"policy": "energy", "param": 0.9}, {"policy": "knee"}]
)
def test_extract_on_mps(how, where, tmp_path, monkeypatch):
    off, board = both(tmp_path, how, where, monkeypatch, kind="mps")
    assert off < 1e-4
    assert board.peak["mps:0"] > 0


@pytest.mark.parametrize(("kind", "double"), [("cuda", False), ("cuda", True), ("mps", False)])
@pytest.mark.parametrize("exact", [False, True])
def test_tiny_numbers_are_scaled_there(kind, double, exact, monkeypatch):
    rng = np.random.default_rng(2)
    batch = torch.from_numpy(np.stack([falling("", (230, 250), rng) * size for size in (1e-24, 1.0, 1e22)]))
    batch = batch if double else batch.float()
    wanted = truncated_svds(batch, 8, exact=exact)
    pretend(monkeypatch, kind)
    for one, two in zip(wanted, truncated_svds(batch.to(kind), 8, exact=exact), strict=True):
        np.testing.assert_allclose(one.values[:8], two.values[:8], rtol=1e-5)
        assert two.s.device.type == two.u.device.type == kind
