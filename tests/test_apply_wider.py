"""apply: control LoRAs whose input layer is wider than the model's, as ComfyUI and Diffusers take them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lorasurgery.errors import BrokenModuleError, RequestError
from lorasurgery.models import open_model
from lorasurgery.verbs.apply import ApplyOptions, apply, read_source
from tests.applied import LINEAR1, NORM, PROJ, QKV, Added, Base, applied, assert_nearest, numbers, read, stem, stored
from tests.multiplied import base as unet_base
from tests.multiplied import save
from tests.oracle import Raw, raw, write

if TYPE_CHECKING:
    from pathlib import Path

    from tests.applied import Array

WIDE = (24, 128)
HEADER = 1000
"""Bytes that metadata of the result may take."""
SPELLINGS = ("comfyui", "bfl", "diffusers", "sd-scripts")
LAYOUTS = ("original", "comfyui", "all-in-one", "diffusers")


def control(adapter: Added, spelling: str) -> tuple[Array, Array]:
    """A control LoRA's change of img_in (128 columns) and of another weight."""
    names = {
        "comfyui": ("diffusion_model.img_in", f"diffusion_model.{PROJ}", "kohya"),
        "bfl": ("img_in", PROJ, "peft"),
        "diffusers": ("transformer.x_embedder", "transformer.transformer_blocks.0.attn.to_out.0", "peft"),
        "sd-scripts": (stem("img_in"), stem(PROJ), "kohya"),
    }[spelling]
    alpha = None if names[2] == "peft" else 5.0
    wide = adapter.lora(names[0], WIDE, 3, alpha, names[2])
    if spelling in {"comfyui", "sd-scripts"}:
        adapter.tensors[f"{names[0]}.reshape_weight"] = raw(WIDE, "I64")
    if spelling == "bfl":
        adapter.put(f"{NORM}.scale", 128)
    return wide, adapter.lora(names[1], (24, 24), 2, alpha, names[2])


def padded(weight: Array) -> Array:
    return np.concatenate([weight, np.zeros((24, 64))], axis=1)


def orders(path: Path) -> tuple[list[str], list[str]]:
    """A file's keys as the header has them and as their data lies."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    header.pop("__metadata__")
    return list(header), sorted(header, key=lambda key: header[key]["data_offsets"])


def img_in(tensors: dict[str, Any], layout: str) -> Any:
    prefix = {"comfyui": "diffusion_model.", "all-in-one": "model.diffusion_model."}.get(layout, "")
    return tensors["x_embedder.weight" if layout == "diffusers" else f"{prefix}img_in.weight"]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_weight_grows_by_zeros_before_the_change(tmp_path: Path, spelling: str, layout: str) -> None:
    base, adapter = Base.make("BF16"), Added("F32")
    wide, proj = control(adapter, spelling)
    path = base.save(tmp_path / "m.safetensors", layout)
    out, report = applied(tmp_path, path, (adapter, 0.7), verify=True)
    before, after = read(path), read(out)
    assert report.unmatched == []
    assert orders(path) == orders(out)
    assert_nearest(img_in(after, layout), padded(base.weights["img_in"]) + 0.7 * wide)
    changed = {key for key in before if before[key] != after[key]}
    assert len(changed) == (3 if spelling == "bfl" else 2)
    if layout == "original":
        assert_nearest(after[f"{PROJ}.weight"], base.weights[PROJ] + 0.7 * proj)
    assert any("[24, 128] now, it was [24, 64]" in text for text in report.warnings)
    assert {own.tensor for own in report.verified} >= {name for name in changed if name.endswith(("weight", "scale"))}
    assert sum(own.wrong for own in report.verified) == 0
    assert abs(report.bytes - out.stat().st_size) < HEADER


def test_a_pytorch_file_grows_too(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    base, adapter = Base.make("F32"), Added("F32")
    wide, _ = control(adapter, "comfyui")
    torch.save({key: torch.from_numpy(own.f64()).float() for key, own in base.tensors("original").items()}, tmp_path / "m.pt")
    out, report = applied(tmp_path, tmp_path / "m.pt", (adapter, 0.7), verify=True)
    assert_nearest(read(out)["img_in.weight"], padded(base.weights["img_in"]) + 0.7 * wide)
    assert read(out)["txt_in.weight"] == stored(base.weights["txt_in"], "F32")
    assert sum(own.wrong for own in report.verified) == 0


def test_a_style_on_the_same_layer_changes_the_first_columns_whatever_the_order(tmp_path: Path) -> None:
    base, adapter, style = Base.make("F32"), Added("F32"), Added("F32", seed=4)
    wide, _ = control(adapter, "comfyui")
    narrow = style.lora(stem("img_in"), (24, 64), 4, 2.0)
    path = base.save(tmp_path / "m.safetensors")
    exact = padded(base.weights["img_in"] + 0.5 * narrow) + 0.7 * wide
    for order in (((adapter, 0.7), (style, 0.5)), ((style, 0.5), (adapter, 0.7))):
        out, report = applied(tmp_path, path, *order, verify=True)
        assert_nearest(read(out)["img_in.weight"], exact)
        assert sum(own.wrong for own in report.verified) == 0


def test_a_dora_on_the_first_columns_sees_only_them(tmp_path: Path) -> None:
    base, adapter, style = Base.make("F32"), Added("F32"), Added("F32", seed=4)
    wide, _ = control(adapter, "comfyui")
    narrow = style.lora(stem("img_in"), (24, 64), 4, 2.0)
    magnitude = style.put(f"{stem('img_in')}.dora_scale", 1, 64, at=2.0)
    changed = base.weights["img_in"] + narrow
    exact = padded(changed * magnitude / np.linalg.norm(changed, axis=0, keepdims=True)) + wide
    out, report = applied(tmp_path, base.save(tmp_path / "m.safetensors"), (style, 1.0), (adapter, 1.0), verify=True)
    assert_nearest(read(out)["img_in.weight"], exact)
    assert sum(own.wrong for own in report.verified) == 0


def test_fp8_with_one_scale_grows_and_scales_of_columns_are_refused(tmp_path: Path) -> None:
    base, adapter = Base.make("BF16", size=0.02), Added("F32", size=0.05)
    wide, _ = control(adapter, "comfyui")
    scale = np.abs(base.weights["img_in"]).max() * 4 / 448
    for shape, fits in (((), True), ((24, 1), True), ((24, 4, 1), False)):
        each = np.full(shape, scale)
        base.extra = {
            "img_in.weight": stored(base.weights["img_in"] / scale, "F8_E4M3"), "img_in.weight_scale": raw(each, "F32"),
            "scaled_fp8": stored(np.zeros(2), "F8_E4M3"),
        }  # fmt: skip
        old = numbers(base.extra["img_in.weight"]) * raw(scale, "F32").item()
        out, report = applied(tmp_path, base.save(tmp_path / "m.safetensors"), (adapter, 1.0), verify=True)
        after = read(out)["img_in.weight"]
        if fits:
            new = read(out)["img_in.weight_scale"].f64().reshape(-1, 1)
            assert_nearest(after, (padded(old) + wide) / new)
            assert sum(own.wrong for own in report.verified) == 0
        else:
            assert after == base.extra["img_in.weight"]
            assert any("blocks of columns" in reason for _, _, reason in report.unmatched)


def test_convolutions_grow_by_channels(tmp_path: Path) -> None:
    path = save(tmp_path / "m.safetensors", unet_base())
    adapter, name = Added("F32"), "down_blocks.0.resnets.0.conv1"
    wide = adapter.lora(f"lora_unet_{name.replace('.', '_')}", (320, 330, 3, 3), 2, 1.0)
    adapter.tensors[f"lora_unet_{name.replace('.', '_')}.reshape_weight"] = raw((320, 330, 3, 3), "I64")
    opened = open_model(path, arch="sd1")
    source = read_source(adapter.save(tmp_path / "a.safetensors"), opened.architecture)
    report = apply(opened, [source], tmp_path / "o.safetensors", ApplyOptions(verify=True))
    exact = np.pad(unet_base()[f"{name}.weight"].astype("f8"), ((0, 0), (0, 10), (0, 0), (0, 0))) + wide
    np.testing.assert_allclose(read(tmp_path / "o.safetensors")[f"{name}.weight"].f64(), exact, rtol=0, atol=3e-7)
    assert [own.wrong for own in report.verified] == [0]


def test_out_again_the_width_stays(tmp_path: Path) -> None:
    base, adapter = Base.make("F32"), Added("F32")
    control(adapter, "comfyui")
    path = base.save(tmp_path / "m.safetensors")
    baked, _ = applied(tmp_path, path, (adapter, 0.7))
    baked = baked.rename(tmp_path / "baked.safetensors")
    out, report = applied(tmp_path, baked, (adapter, 0.7), unapply=True)
    np.testing.assert_allclose(numbers(read(out)["img_in.weight"]), padded(base.weights["img_in"]), rtol=0, atol=1e-6)
    assert any("stays [24, 128]" in text for text in report.warnings)
    with pytest.raises(RequestError, match="it is not in this model"):
        applied(tmp_path, path, (adapter, 0.7), unapply=True)


def test_a_width_that_nothing_asks_for_is_an_error(tmp_path: Path) -> None:
    base, adapter = Base.make("F32"), Added("F32")
    adapter.lora(stem(PROJ), (24, 24), 3, 1.0)
    adapter.lora(stem(LINEAR1), (168, 24), 3, 1.0)
    adapter.lora(stem(QKV), (72, 30), 3, 1.0)
    with pytest.raises(BrokenModuleError, match=r"\[72, 30\]"):
        applied(tmp_path, base.save(tmp_path / "m.safetensors"), (adapter, 1.0))


def folder_with(tmp_path: Path, base: Base, config: dict[str, Any]) -> Path:
    """A Diffusers model in two shards."""
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = base.tensors("diffusers")
    names = [f"diffusion_pytorch_model-{i:05}-of-00002.safetensors" for i in (1, 2)]
    where = {key: names[i % 2] for i, key in enumerate(tensors)}
    for name in names:
        write(folder / name, {key: tensors[key] for key, own in where.items() if own == name})
    total = sum(len(own.data) for own in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_folders_configuration_and_index_say_the_new_width(tmp_path: Path) -> None:
    base, adapter = Base.make("BF16"), Added("F32")
    wide, _ = control(adapter, "diffusers")
    folder = folder_with(tmp_path, base, {"_class_name": "FluxTransformer2DModel", "in_channels": 64, "num_layers": 19})
    opened = open_model(folder)
    source = read_source(adapter.save(tmp_path / "a.safetensors"), opened.architecture)
    apply(opened, [source], tmp_path / "out", ApplyOptions())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = {"_class_name": "FluxTransformer2DModel", "in_channels": 128, "num_layers": 19, "out_channels": 64}
    assert config == expected
    index = json.loads((tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    tensors: dict[str, Raw] = {}
    for name in set(index["weight_map"].values()):
        tensors |= read(tmp_path / "out" / name)
    assert index["metadata"]["total_size"] == sum(len(own.data) for own in tensors.values())
    assert_nearest(tensors["x_embedder.weight"], padded(base.weights["img_in"]) + wide)


def test_a_configuration_that_would_lie_is_an_error(tmp_path: Path) -> None:
    adapter = Added("F32")
    control(adapter, "diffusers")
    opened = open_model(folder_with(tmp_path, Base.make("BF16"), {"in_channels": 16}))
    source = read_source(adapter.save(tmp_path / "a.safetensors"), opened.architecture)
    with pytest.raises(RequestError, match=r"nothing in config\.json says 64"):
        apply(opened, [source], tmp_path / "out", ApplyOptions())
    assert not (tmp_path / "out").exists()
