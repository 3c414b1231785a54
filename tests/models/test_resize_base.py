"""``resize`` beside a base model in every form that models are read in."""

from pathlib import Path

import numpy as np
import pytest

from lorasurgery import load
from lorasurgery.architectures.table import Span
from lorasurgery.operations.cut import ResizeOptions, open_base, resize
from lorasurgery.site import DENOISER, Site
from tests.models.small import built, diffusers_arrays, original_arrays, save, save_gguf
from tests.oracle import raw, write

KEY = "z-image"
MODULES = ("layers.0.attention.qkv", "layers.1.feed_forward.w1", "noise_refiner.0.attention.out")
RANK = 6


def single(folder: Path) -> Path:
    return save(folder / "one.safetensors", original_arrays(KEY), prefix="model.diffusion_model.")


def sharded_folder(folder: Path) -> Path:
    built(KEY).save_pretrained(folder / "transformer", max_shard_size="300KB")
    return folder / "transformer"


def index(folder: Path) -> Path:
    return next(sharded_folder(folder).glob("*.index.json"))


def in_gguf(folder: Path) -> Path:
    return save_gguf(folder / "model.gguf", original_arrays(KEY))


FORMS = {"single": single, "sharded folder": sharded_folder, "index": index, "gguf": in_gguf}


def lora(path):
    """A LoRA on three modules with spectra of their own; returns the singular values by module."""
    rng, tensors, spectra = np.random.default_rng(5), {}, {}
    for i, module in enumerate(MODULES):
        out, width = original_arrays(KEY)[f"{module}.weight"].shape
        up = rng.standard_normal((out, RANK)) * 3.0 ** (2 * i - np.arange(RANK))
        down = rng.standard_normal((RANK, width))
        for side, values in (("up", up), ("down", down)):
            tensors[f"diffusion_model.{module}.lora_{side}.weight"] = raw(values, "F32")
        tensors[f"diffusion_model.{module}.alpha"] = raw(2.0 + i, "F32")
        spectra[module] = np.linalg.svd((2.0 + i) / RANK * up @ down, compute_uv=False)[:RANK]
    write(path, tensors)
    return spectra


@pytest.mark.parametrize("form", FORMS)
def test_resize_measures_against_the_base(tmp_path, form):
    spectra = lora(tmp_path / "lora.safetensors")
    path = FORMS[form](tmp_path)
    adapter = load(tmp_path / "lora.safetensors", base=path)
    assert adapter.architecture.id == KEY
    base = open_base(path, adapter.architecture)
    weights = {module: original_arrays(KEY)[f"{module}.weight"].astype(np.float64) for module in MODULES}
    for module, weight in weights.items():
        site = Site(DENOISER, (Span(module, 0, len(weight)),))
        assert base.frobenius(site) == pytest.approx(np.linalg.norm(weight), rel=1e-6)
        assert base.spectral(site) == pytest.approx(np.linalg.norm(weight, 2), rel=1e-3)
    scores = {module: np.log10(s) - np.log10(np.linalg.norm(weights[module])) for module, s in spectra.items()}
    threshold = float(np.median(np.concatenate(list(scores.values())))) + 1e-3
    _, report = resize(adapter, ResizeOptions(recipe=f"fro_ckpt=1,thr={threshold!r}", min_rank=1), base)
    ranks = {m.name.removeprefix("diffusion_model."): m.new_rank for m in report.modules}
    assert ranks == {module: (own > threshold).sum() for module, own in scores.items()}
    assert len(set(ranks.values())) > 1


def test_a_slice_of_a_fused_weight_has_the_norm_of_its_rows(tmp_path):
    path = single(tmp_path)
    base = open_base(path, load_architecture(tmp_path, path))
    rows = diffusers_arrays(KEY)["layers.0.attention.to_k.weight"]
    site = Site(DENOISER, (Span("layers.0.attention.qkv", len(rows), 2 * len(rows)),))
    assert base.frobenius(site) == pytest.approx(np.linalg.norm(rows.astype(np.float64)), rel=1e-6)


def load_architecture(folder, path):
    lora(folder / "lora.safetensors")
    return load(folder / "lora.safetensors", base=path).architecture
