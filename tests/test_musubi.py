"""musubi-tuner's own converter: the same names, shapes and deltas for the four models it converts correctly.

tests/fixtures/musubi_convert_lora.json.gz holds, for each model and family, the keys and shapes of an input file and of
what ``convert_lora.py --target other`` (musubi-tuner 30c658c, 2026-06) wrote for it. It folds the scale as its square
root into both factors, so values are compared as deltas.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorasurgery

FIXTURE = json.loads(gzip.decompress((Path(__file__).parent / "fixtures" / "musubi_convert_lora.json.gz").read_bytes()))


def random_file(shapes: dict[str, list[int]], path: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {
        key: torch.tensor(2.0).bfloat16() if key.endswith(".alpha") else torch.randn(shape).bfloat16()
        for key, shape in shapes.items()
    }
    save_file(tensors, path, metadata={"ss_network_module": "networks.lora"})
    return tensors


def convert(source: Path, target: str, name: str) -> Path:
    result, report = lorasurgery.convert(lorasurgery.load(source), target)
    out = source.with_name(name)
    lorasurgery.save(result, out, report=report)
    assert report.exact
    return out


@pytest.mark.parametrize("case", sorted(FIXTURE))
def test_other_is_what_musubi_writes(case: str, tmp_path: Path) -> None:
    source = tmp_path / "default.safetensors"
    before = random_file(FIXTURE[case]["default"], source)
    written = load_file(convert(source, "other", "other.safetensors"))
    expected = FIXTURE[case]["other"]
    assert {key: list(tensor.shape) for key, tensor in written.items()} == expected
    if case.endswith("lora"):
        stem = min(key.removesuffix(".alpha") for key in before if key.endswith(".alpha"))
        ours = next(
            (written[k], written[k.replace("lora_A", "lora_B")])
            for k in expected
            if k.endswith("lora_A.weight")
            and k.replace(".", "_").startswith(stem.replace("lora_unet", "diffusion_model") + "_lora")
        )
        scale = 2.0 / before[f"{stem}.lora_down.weight"].shape[0]
        truth = scale * before[f"{stem}.lora_up.weight"].double() @ before[f"{stem}.lora_down.weight"].double()
        torch.testing.assert_close(ours[1].double() @ ours[0].double(), truth, rtol=0, atol=0)


@pytest.mark.parametrize("case", sorted(FIXTURE))
def test_default_undoes_other(case: str, tmp_path: Path) -> None:
    source = tmp_path / "default.safetensors"
    before = random_file(FIXTURE[case]["default"], source)
    other = convert(source, "other", "other.safetensors")
    after = load_file(convert(other, "default", "back.safetensors"))
    assert set(after) == set(before)
    again = load_file(convert(tmp_path / "back.safetensors", "other", "again.safetensors"))
    first = load_file(other)
    assert set(first) == set(again)
    assert all(torch.equal(first[key], again[key]) for key in first)
