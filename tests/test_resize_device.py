"""Resize with its decompositions on a torch device: the same results as with numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.errors import BrokenModuleError, RequestError
from lorasurgery.io.tensors import of_array
from lorasurgery.operations.cut import ResizeOptions, device, resize
from tests.edges import run
from tests.test_resize import D, Maker, check, dense, every

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]


def mixed(dtype="F32"):
    make = Maker(dtype)
    for name in ("attn.out", "mlp.up", "mlp.down", "conv", "pointwise", "narrow", "attn.qkv"):
        make.lora(name, rank=9 if name == "mlp.down" else 12)
    zero = np.zeros((2 * D, 4), np.float32)
    return make.add("final.mod", LowRank(of_array(zero, dtype), make.tensor(4, D)), alpha=2.0)


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("how", [{"rank": 5, "conv_rank": 3}, {"policy": "energy", "param": 0.9}, {"size": 40_000}])
def test_every_module_is_the_best_of_its_rank(how, where):
    check(mixed().adapter(), ResizeOptions(device=where, **how), slack=1e-4, rounding=1e-6)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_the_results_are_those_of_numpy(dtype, monkeypatch):
    monkeypatch.setattr(device.Device, "batch_bytes", 1)
    adapter = mixed(dtype).adapter()
    plain, first = resize(adapter, ResizeOptions(rank=5))
    there, second = resize(adapter, ResizeOptions(rank=5, device="cpu"))
    assert first.relative_error == pytest.approx(second.relative_error, rel=1e-6)
    for one, two in zip(every(plain), every(there), strict=True):
        assert np.abs(dense(one) - dense(two)).max() <= 0.02 * max(np.abs(dense(one)).max(), 1e-30)


def test_hard_factors_and_other_families():
    make = mixed()
    rng = np.random.default_rng(0)
    up = rng.standard_normal((D, 8)).astype(np.float32)
    up[:, 7] = up[:, 6]
    make.add("attn.out", LowRank(of_array(up, "F32"), make.tensor(8, D)), alpha=1.0)
    make.add("mlp.up", make.low_rank((4 * D, D), 6).to_low_rank(), alpha=3.0)
    check(make.adapter(), ResizeOptions(policy="sv_fro", param=0.8, device="cpu"), rounding=1e-6)


def test_not_a_number_and_no_device_are_named():
    bad = Maker().lora("attn.out")
    bad.add("mlp.down", LowRank(of_array(np.full((D, 4), np.nan, np.float32), "F32"), bad.tensor(4, 4 * D)))
    with pytest.raises(BrokenModuleError, match=r"mlp\.down"):
        resize(bad.adapter(), ResizeOptions(rank=2, device="cpu"))
    with pytest.raises(RequestError, match="no device"):
        resize(Maker().lora("attn.out").adapter(), ResizeOptions(rank=2, device="cuda:99"))


def test_on_the_command_line(tmp_path):
    from tests.oracle import write
    from tests.test_resize_cli import made

    write(tmp_path / "in.safetensors", made(), {})
    asked = ("resize", tmp_path / "in.safetensors", tmp_path / "out.safetensors", "--rank", 4, "--force")
    assert run(*asked, "--device", "cpu").code == 0
    missing = run(*asked, "--device", "cuda:99")
    assert missing.code == 2
    assert "no --device" in missing.err
    theirs = ("--model", tmp_path / "in.safetensors", "--save_to", tmp_path / "old.safetensors", "--device", "cuda:99")
    assert run("resize", *theirs, "--new_rank", 4).code == 0
