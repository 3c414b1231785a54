"""Model files that are one text encoder: what is extracted from two of them, and what of an adapter goes into one."""

from __future__ import annotations

import json
import struct
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lorasurgery.errors import DroppedKeysError, RequestError
from lorasurgery.models import open_model, parameters
from lorasurgery.operations.cut import ResizeOptions
from lorasurgery.verbs.apply import ApplyOptions, ApplyReport, apply, read_source
from lorasurgery.verbs.extract import ExtractOptions, Running, extract
from lorasurgery.verbs.extract.dry import plan
from tests.applied import Added, assert_nearest, numbers, read, stored
from tests.headers import fixture
from tests.oracle import Raw, raw, write

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SPELLED = {
    "clip_l": ("lora_te1", "text_encoders.clip_l.transformer", "text_encoder"),
    "clip_g": ("lora_te2", "text_encoders.clip_g.transformer", "text_encoder_2"),
    "clip_h": ("lora_te", "text_encoders.clip_h.transformer", "text_encoder"),
    "t5_xxl": ("lora_te3", "text_encoders.t5xxl.transformer", None),
    "qwen3_06b": ("lora_te", "text_encoders.qwen3_06b.transformer.model", None),
    "gemma2_2b": ("lora_te", "text_encoders.gemma2_2b.transformer.model", None),
}
"""sd-scripts', ComfyUI's and Diffusers' prefixes; None where no pipeline of Diffusers loads an adapter of the encoder."""
SOME = "layers.1.self_attn.q_proj", "block.1.layer.0.SelfAttention.q"


def shapes_of(table: str) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape in fixture("reference", "text_encoders")[table].items()}


def sparse(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """A file of zeros in fp16 that takes no room on the disk."""
    header, at = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [at, at := at + 2 * prod(shape)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return path


def whole(folder: Path, table: str, prefix: str = "") -> Path:
    return sparse(folder / f"{table}.safetensors", {f"{prefix}{n}.weight": s for n, s in shapes_of(table).items()})


def linears(table: str) -> list[str]:
    """The names of its matrices but for those that are looked up."""
    looked_up = ("embedding", "embed_tokens", "shared", "attention_bias")
    return [name for name in shapes_of(table) if not any(word in name for word in looked_up)]


@pytest.mark.parametrize("table", SPELLED)
@pytest.mark.parametrize(("layout", "at"), [("sd-scripts", 0), ("comfyui", 1), ("diffusers", 2)])
def test_modules_are_spelled_as_the_encoder_s(table: str, layout: str, at: int, tmp_path: Path) -> None:
    first, second = whole(tmp_path, table), tmp_path / "tuned.safetensors"
    sparse(second, {f"{n}.weight": s for n, s in shapes_of(table).items()})
    prefix = SPELLED[table][at]
    options = ExtractOptions(cut=ResizeOptions(rank=1), target=layout)
    if prefix is None:
        with pytest.raises(RequestError, match="Diffusers has no name for it"):
            plan(first, second, options)
        return
    join = "_" if layout == "sd-scripts" else "."
    expected = {prefix + join + (n.replace(".", "_") if join == "_" else n) for n in linears(table)}
    assert {name for name, kind in plan(first, second, options).kinds.items() if kind == "linear"} == expected


def test_a_family_says_how_it_numbers_its_encoder(tmp_path: Path) -> None:
    file = whole(tmp_path, "clip_l")
    assert open_model(file, arch="sd1").architecture.encoders[0].sd_scripts == "lora_te"
    assert open_model(file, arch="flux1").component == "clip_l"
    with pytest.raises(RequestError, match="text encoder clip_l, which sd2 does not have"):
        open_model(file, arch="sd2")


@pytest.mark.parametrize("prefix", ["", "transformer.", "text_encoders.clip_l.transformer.", "text_encoder."])
def test_whatever_stands_before_the_names(prefix: str, tmp_path: Path) -> None:
    for start in ("", "text_model."):
        bare = {n.removeprefix("text_model."): s for n, s in shapes_of("clip_l").items()}
        model = open_model(sparse(tmp_path / "m.safetensors", {f"{prefix}{start}{n}.weight": s for n, s in bare.items()}))
        assert model.component == "clip_l"
        assert {w.place.spans[0].weight for w in model.weights.values() if w.place} == set(shapes_of("clip_l"))
        assert list(parameters(model)) == [f"{start}{n}.weight" for n in bare]


# numbers -----------------------------------------------------------------------------------------------------------------


def small_clip(start: str = "text_model.") -> dict[str, Raw]:
    """The self-attention and norms of CLIP-L in fp8: enough of it to be known; one layer has values."""
    rng, found = np.random.default_rng(0), {}
    zeros = stored(np.zeros((768, 768)), "F8_E4M3")
    for i in range(12):
        for number in (1, 2):
            found[f"{start}encoder.layers.{i}.layer_norm{number}.weight"] = raw(np.ones(768), "BF16")
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            name = f"{start}encoder.layers.{i}.self_attn.{part}"
            found[f"{name}.weight"] = raw(rng.integers(-8, 9, (768, 768)) / 16, "BF16") if i < 1 else zeros
    found[f"{start}final_layer_norm.weight"] = raw(np.ones(768), "BF16")
    return found


def test_what_is_extracted_is_the_difference(tmp_path: Path) -> None:
    base = small_clip()
    rng = np.random.default_rng(1)
    name = "text_model.encoder.layers.0.self_attn.k_proj"
    delta = np.outer(rng.integers(-1, 2, 768), rng.integers(-1, 2, 768)) / 16
    tuned = base | {f"{name}.weight": raw(base[f"{name}.weight"].f64() + delta, "BF16")}
    write(tmp_path / "clip_l.safetensors", base)
    write(tmp_path / "tuned.safetensors", tuned)
    out = tmp_path / "out.safetensors"
    options = ExtractOptions(cut=ResizeOptions(rank=1, dtype="fp32"))
    report = extract(tmp_path / "clip_l.safetensors", tmp_path / "tuned.safetensors", out, options, Running(hashes=False))
    found = read(out)
    stem = f"lora_te1_{name.replace('.', '_')}"
    assert {key.partition(".")[0] for key in found} == {stem}
    up, down = (found[f"{stem}.lora_{side}.weight"].f64() for side in ("up", "down"))
    np.testing.assert_allclose(up @ down, delta, atol=1e-6)
    assert report.warnings == []
    back = put_in(tmp_path / "clip_l.safetensors", out, tmp_path / "back.safetensors")
    again = numbers(read(tmp_path / "back.safetensors")[f"{name}.weight"])
    np.testing.assert_allclose(again, tuned[f"{name}.weight"].f64(), atol=1e-6)
    assert back.unmatched == []


def put_in(model: Path, adapter: Path, out: Path, arch: str | None = None, **how: Any) -> ApplyReport:
    opened = open_model(model, arch=arch)
    dry = bool(how.pop("dry_run", False))
    return apply(opened, [read_source(adapter, opened.architecture)], out, ApplyOptions(**how), dry_run=dry)


ADAPTERS = {
    "FLUX.1": ("lora_unet_double_blocks_0_img_attn_proj", (3072, 3072), "lora_te1"),
    "SDXL": ("lora_unet_input_blocks_4_1_proj_in", (640, 640), "lora_te1"),
    "SD 1": ("lora_unet_down_blocks_0_attentions_0_proj_in", (320, 320, 1, 1), "lora_te"),
    "Diffusers' FLUX.1": ("transformer.transformer_blocks.0.attn.to_out.0", (3072, 3072), "text_encoder"),
}


@pytest.mark.parametrize("model_start", ["text_model.", ""])
@pytest.mark.parametrize("own_start", ["text_model.", ""])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_encoder_s_part_of_an_adapter_goes_into_its_file(
    kind: str, own_start: str, model_start: str, tmp_path: Path
) -> None:
    denoiser, shape, prefix = ADAPTERS[kind]
    dotted = "." in denoiser
    module, layer = Added("F32"), "encoder.layers.0.self_attn.v_proj"
    stem = f"{prefix}.{own_start}{layer}" if dotted else f"{prefix}_{(own_start + layer).replace('.', '_')}"
    delta = module.lora(stem, (768, 768), 2, None if dotted else 1.0, "peft" if dotted else "kohya")
    module.lora(denoiser, shape, 1, None, "peft" if dotted else "kohya")
    adapter, base = module.save(tmp_path / "a.safetensors"), small_clip(model_start)
    write(tmp_path / "clip_l.safetensors", base)
    report = put_in(tmp_path / "clip_l.safetensors", adapter, tmp_path / "out.safetensors")
    key = f"{model_start}{layer}.weight"
    assert_nearest(read(tmp_path / "out.safetensors")[key], base[key].f64() + delta)
    assert {key.rpartition(".lora")[0] for _, key, _ in report.unmatched} == {denoiser}
    assert {reason for *_, reason in report.unmatched} == {"not for this file, which has no denoiser"}
    with pytest.raises(DroppedKeysError, match="not for this file"):
        put_in(tmp_path / "clip_l.safetensors", adapter, tmp_path / "strict.safetensors", strict=True)


@pytest.mark.parametrize(
    ("table", "stems"),
    [
        ("clip_g", ["lora_te2_text_model_encoder_layers_1_self_attn_q_proj",
                    "text_encoder_2.encoder.layers.1.self_attn.q_proj"]),
        ("clip_h", ["lora_te_text_model_encoder_layers_1_self_attn_q_proj"]),
        ("t5_xxl", ["lora_te3_encoder_block_1_layer_0_SelfAttention_q", "lora_te1_encoder_block_1_layer_0_SelfAttention_q",
                    "text_encoders.t5xxl.transformer.encoder.block.1.layer.0.SelfAttention.q"]),
        ("qwen3_06b", ["lora_te_layers_1_self_attn_q_proj"]),
        ("gemma2_2b", ["lora_te_layers_1_self_attn_q_proj"]),
    ],
)  # fmt: skip
def test_every_encoder_takes_its_part(table: str, stems: list[str], tmp_path: Path) -> None:
    model = whole(tmp_path, table)
    name = next(n for n in shapes_of(table) if n.endswith(SOME))
    for stem in stems:
        added = Added("F32")
        added.lora(stem, shapes_of(table)[name], 1, 1.0)
        report = put_in(model, added.save(tmp_path / "a.safetensors"), tmp_path / "no.safetensors", dry_run=True)
        assert [own.name for own in report.tensors] == [f"{name}.weight"]
        assert report.unmatched == []


def test_an_adapter_without_the_encoder_is_refused(tmp_path: Path) -> None:
    added = Added("F32")
    added.lora("lora_unet_double_blocks_0_img_attn_proj", (3072, 3072), 1, 1.0)
    with pytest.raises(RequestError, match=r"none of its modules belongs to .*no denoiser"):
        put_in(whole(tmp_path, "clip_l"), added.save(tmp_path / "a.safetensors"), tmp_path / "no.safetensors", dry_run=True)
