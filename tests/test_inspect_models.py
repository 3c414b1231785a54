"""What `inspect` says about files that are no adapters."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from lorasurgery.errors import FileFormatError
from lorasurgery.inspection import describe
from tests.headers import fixture, hollow

if TYPE_CHECKING:
    from pathlib import Path

MODELS = [
    ("flux1_dev", "flux1", "dev"), ("flux1_schnell", "flux1", "schnell"), ("chroma", "chroma", ""), ("sdxl", "sdxl", ""),
    ("sd15", "sd1", ""), ("sd21", "sd2", ""), ("sd35_large", "sd3", "3.5-large"), ("z_image", "z-image", ""),
    ("qwen_image", "qwen-image", ""), ("wan21_t2v_14b", "wan", "2.1-t2v-14b"), ("flux2_dev", "flux2", "dev"),
    ("ltx_video", "ltx-video", None), ("hunyuan_video", "hunyuan-video", ""), ("lumina2", "lumina2", ""),
]  # fmt: skip


def weights(name: str, naming: str, prefix: str = "") -> dict[str, list[int]]:
    return {f"{prefix}{module}.weight": shape for module, shape in fixture("reference", name)[naming].items()}


@pytest.mark.parametrize("naming", ["comfyui", "diffusers"])
@pytest.mark.parametrize(("name", "architecture", "variant"), MODELS)
def test_denoisers(name: str, architecture: str, variant: str | None, naming: str, tmp_path: Path) -> None:
    prefix = "model.diffusion_model." if naming == "comfyui" else ""
    own = describe(hollow(tmp_path / "m.safetensors", weights(name, naming, prefix)))
    assert (own.kind, own.architecture) == ("denoiser", architecture)
    assert variant is None or own.variant == variant
    assert own.coverage > 0.9
    assert not own.warnings


def test_whole_checkpoint(tmp_path: Path) -> None:
    shapes = weights("sdxl", "comfyui", "model.diffusion_model.")
    shapes |= {f"first_stage_model.decoder.up.{i}.weight": [4, 4] for i in range(8)}
    shapes |= {f"conditioner.embedders.0.layer.{i}.weight": [4, 4] for i in range(8)}
    own = describe(hollow(tmp_path / "m.safetensors", shapes))
    assert (own.kind, own.architecture) == ("checkpoint", "sdxl")
    assert own.components.keys() == {"denoiser", "vae", "text encoders"}
    assert own.summary == "a whole checkpoint of Stable Diffusion XL"


@pytest.mark.parametrize("table", ["clip_l", "clip_g", "t5_xxl", "qwen3_06b"])
def test_text_encoders(table: str, tmp_path: Path) -> None:
    shapes = {f"{name}.weight": shape for name, shape in fixture("reference", "text_encoders")[table].items()}
    own = describe(hollow(tmp_path / "m.safetensors", shapes))
    assert own.kind == "text-encoder"
    assert table in own.summary


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        (["lllite_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.down.0.weight"], "lllite"),
        (["control_model.input_blocks.0.0.weight"], "controlnet"),
        (["lora_controlnet"], "control-lora"),
        (["emb_params"], "embedding"),
        (["clip_l", "clip_g"], "embedding"),
        (["encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_out.weight"], "vae"),
        (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"], "ip-adapter"),
        (["transformer_blocks.0.qkv_proj.qweight", "transformer_blocks.0.qkv_proj.smooth_factor"], "svdquant"),
        (["some.layer.weight", "some.layer.bias"], "model"),
        (["a", "b"], "unknown"),
    ],
)
def test_other_kinds(keys: list[str], kind: str, tmp_path: Path) -> None:
    own = describe(hollow(tmp_path / "m.safetensors", {key: [4, 4] for key in keys}))
    assert own.kind == kind
    assert own.summary


def test_a_file_without_tensors(tmp_path: Path) -> None:
    assert describe(hollow(tmp_path / "m.safetensors", {})).kind == "empty"


def gguf(entries: list[tuple[str, str]]) -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    body = b"".join(text(key) + struct.pack("<I", 8) + text(value) for key, value in entries)
    return b"GGUF" + struct.pack("<IQQ", 3, 780, len(entries)) + body


def test_gguf(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf([("general.architecture", "flux"), ("general.name", "FLUX dev")]))
    own = describe(path)
    assert (own.kind, own.tensors) == ("gguf", 780)
    assert "FLUX dev" in own.summary
    for cut in range(24, len(path.read_bytes())):
        path.write_bytes(gguf([("general.architecture", "flux"), ("general.name", "FLUX dev")])[:cut])
        assert describe(path).kind == "gguf"
    path.write_bytes(b"GGUF\3")
    with pytest.raises(FileFormatError, match="truncated"):
        describe(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>401</html>", "an HTML page"),
        (b"PK\x03\x04rest", "rename it to .pt"),
        (b"\x80\x02}q\x00.", "pickle"),
        (b"", "empty"),
        (b"\x10\x00\x00", "truncated"),
        ((100_000_000_000).to_bytes(8, "little") + b"{}", "100000000000 bytes"),
    ],
)
def test_unreadable_files_say_what_they_are(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=says):
        describe(path)


def test_truncated_download_has_both_sizes(tmp_path: Path) -> None:
    path = hollow(tmp_path / "m.safetensors", {"a.lora_down.weight": [8, 64]})
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FileFormatError, match=f"describes {whole} bytes, the file has {whole - 100}"):
        describe(path)
