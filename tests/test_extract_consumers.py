"""Diffusers loads what was extracted from its own models, and becomes the tuned model within the error that was told."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch

from lorasurgery.operations.cut import ResizeOptions
from lorasurgery.verbs.extract import ExtractOptions, Running, extract
from tests.edges import calm
from tests.models.small import CONFIGS, built, original_of, save
from tests.oracle import read

pytestmark = [pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")]
KEYS = ("flux1-dev", "z-image", "sd1", "sdxl", "qwen-image", "wan-2.1-t2v-1.3b", "sd3-3.5-medium")


def tuned_model(key):
    """The small model of the real class, and a tuned one: low-rank changes of matrices, noise, other biases and norms."""
    torch.manual_seed(3)
    base, tuned = built(key), copy.deepcopy(built(key))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.ndim > 1:
                width = math.prod(parameter.shape[1:])
                low = torch.randn(parameter.shape[0], 2) @ torch.randn(2, width)
                parameter.add_(0.1 * low.reshape(parameter.shape) + 0.01 * torch.randn(parameter.shape))
            elif parameter.ndim == 1:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return base, tuned


def difference(first, second):
    return sum(
        float(((a - b).detach().double() ** 2).sum()) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )


def arrays(model):
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("key", "mix"), [*((key, "diffusers") for key in KEYS), ("flux1-dev", "original base"), ("flux1-dev", "original tuned")]
)
def test_diffusers_becomes_the_tuned_model(key, mix, tmp_path):
    base, tuned = tuned_model(key)
    paths = [tmp_path / "base", tmp_path / "tuned"]
    for model, path in zip((base, tuned), paths, strict=True):
        model.save_pretrained(path)
    if mix != "diffusers":
        at = ("original base", "original tuned").index(mix)
        paths[at] = save(tmp_path / "original.safetensors", original_of(key, arrays((base, tuned)[at])))
    out = tmp_path / "out" / "lora.safetensors"
    options = ExtractOptions(cut=ResizeOptions(rank=4, dtype="fp32"), target="diffusers")
    report = extract(paths[0], paths[1], out, options, Running(hashes=False))
    loaded = copy.deepcopy(base)
    loaded.load_lora_adapter(
        str(out.parent), weight_name=out.name, prefix="unet" if "UNet" in CONFIGS[key][0] else "transformer"
    )
    loaded.fuse_lora()
    loaded.unload_lora()
    before, after = difference(base, tuned), difference(loaded, tuned)
    told = report.squared_error + before - report.squared  # original files here have no norms
    assert after < 0.2 * before
    assert math.isclose(after, told, rel_tol=2e-3)


@pytest.mark.parametrize("key", KEYS)
def test_two_folders_of_diffusers_give_a_file_that_it_loads(key, tmp_path):
    """No target is named: the file is Diffusers', and its own loader takes every key."""
    base, tuned = tuned_model(key)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    out = tmp_path / "out" / "lora.safetensors"
    options = ExtractOptions(cut=ResizeOptions(rank=4, dtype="fp32"))
    report = extract(tmp_path / "base", tmp_path / "tuned", out, options, Running(hashes=False))
    assert report.layouts[2] == "diffusers"
    assert calm(report.warnings) == []
    loaded = copy.deepcopy(base)
    prefix = "unet" if "UNet" in CONFIGS[key][0] else "transformer"
    loaded.load_lora_adapter(str(out.parent), weight_name=out.name, prefix=prefix)
    loaded.fuse_lora()
    loaded.unload_lora()
    before, after = difference(base, tuned), difference(loaded, tuned)
    assert math.isclose(after, report.squared_error + before - report.squared, rel_tol=2e-3)


def test_what_diffusers_does_not_load_is_said(tmp_path):
    """A family that it cannot hold is written for sd-scripts, and the report names everybody who refuses it."""
    base, tuned = tuned_model("sd1")
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    paths = tmp_path / "base", tmp_path / "tuned"
    options = ExtractOptions(cut=ResizeOptions(rank=4), family="lokr")
    report = extract(*paths, tmp_path / "lokr.safetensors", options, Running(hashes=False))
    assert report.layouts[2] == "sd-scripts"
    said = calm(report.to_json()["warnings"])
    assert any(text.startswith("Diffusers 0.42: nothing loads") for text in said)
    assert any(text.startswith("sd-scripts 2026-02: nothing loads: sd-scripts does not read .lokr_w1") for text in said)
    options = ExtractOptions(cut=ResizeOptions(rank=4), target="sd-scripts", small="none")
    assert calm(extract(*paths, tmp_path / "lora.safetensors", options, Running(hashes=False)).warnings) == []


@pytest.mark.parametrize("class_name", ["NewTransformer2DModel", "NewUNet2DModel", ""])
def test_a_folder_of_a_class_that_no_table_knows(class_name, tmp_path):
    """Diffusers' own folders give its names; transformers' folders, whose configuration has no such class, do not."""
    rng = np.random.default_rng(0)
    for name in ("base", "tuned"):
        save(tmp_path / name / "diffusion_pytorch_model.safetensors", {"odd.proj.weight": rng.standard_normal((8, 6))})
        (tmp_path / name / "config.json").write_text(json.dumps({"_class_name": class_name} if class_name else {}))
    out = tmp_path / "out.safetensors"
    extract(tmp_path / "base", tmp_path / "tuned", out, ExtractOptions(cut=ResizeOptions(rank=2)), Running(hashes=False))
    start = {"NewTransformer2DModel": "transformer.odd.proj", "NewUNet2DModel": "unet.odd.proj"}.get(class_name)
    assert {key.partition(".lora_")[0].removesuffix(".alpha") for key in read(out)[0]} == {start or "lora_unet_odd_proj"}
