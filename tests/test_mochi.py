"""Mochi's own files: bare names, ``.lora_A`` and ``.lora_B`` without ``.weight``, no alpha."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

import lorasurgery

if TYPE_CHECKING:
    from pathlib import Path

SHAPES = {
    "blocks.0.attn.qkv_x": (9216, 3072),
    "blocks.0.attn.qkv_y": (9216, 1536),
    "blocks.3.mlp_x.w1": (16384, 3072),
    "blocks.47.mod_y": (1536, 3072),
    "final_layer.mod": (6144, 3072),
}


def test_official_files_become_diffusers_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {}
    for name, (rows, width) in SHAPES.items():
        tensors[f"{name}.lora_A"] = torch.randn(4, width).bfloat16()
        tensors[f"{name}.lora_B"] = torch.randn(rows, 4).bfloat16()
    source = tmp_path / "mochi.safetensors"
    save_file(tensors, source)
    adapter = lorasurgery.load(source)
    assert (adapter.architecture.key, adapter.layout) == ("mochi", "bare")
    result, report = lorasurgery.convert(adapter, "diffusers")
    lorasurgery.save(result, tmp_path / "out.safetensors", report=report)
    assert report.exact
    out = load_file(tmp_path / "out.safetensors")

    def delta(name: str) -> torch.Tensor:
        key = f"transformer.{name}"
        return out[f"{key}.lora_B.weight"].double() @ out[f"{key}.lora_A.weight"].double()

    def truth(name: str) -> torch.Tensor:
        return tensors[f"{name}.lora_B"].double() @ tensors[f"{name}.lora_A"].double()

    for fused, parts in (("x", "attn1.to_{}"), ("y", "attn1.add_{}_proj")):
        for part, expected in zip("qkv", truth(f"blocks.0.attn.qkv_{fused}").chunk(3), strict=True):
            assert torch.equal(delta(f"transformer_blocks.0.{parts.format(part)}"), expected)
    first, second = truth("blocks.3.mlp_x.w1").chunk(2)
    assert torch.equal(delta("transformer_blocks.3.ff.net.0.proj"), torch.cat([second, first]))
    first, second = truth("final_layer.mod").chunk(2)
    assert torch.equal(delta("norm_out.linear"), torch.cat([second, first]))
    assert torch.equal(delta("transformer_blocks.47.norm1_context.linear_1"), truth("blocks.47.mod_y"))
    assert len(out) == 2 * 9
