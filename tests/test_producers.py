"""Files written by the real PEFT, Diffusers and LyCORIS: read completely, with the deltas their producers compute.

``scripts/make_fixtures.py`` writes them, and beside each the producer's own account of its deltas (tests/probes.py).
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import load_file

import lorasurgery
from lorasurgery.deltas.kronecker import Kronecker
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.errors import NotRepresentableError
from lorasurgery.layouts.targets import LAYOUTS
from tests.probes import bilinear, probes

if TYPE_CHECKING:
    from lorasurgery.adapter import Adapter, Module
    from lorasurgery.site import Site

HERE = Path(__file__).parent / "fixtures"
PRODUCERS = HERE / "producers"
TRUTH = ".truth.safetensors"
FILES = {
    p.name: p for p in sorted(PRODUCERS.iterdir()) if p.is_dir() or (p.suffix == ".safetensors" and TRUTH not in p.name)
} | {"z_image_lokr.safetensors": HERE / "samples" / "z_image_lokr.safetensors"}
ARCH = {"lycoris_standalone.safetensors": "flux1"}
"""Its five modules have the same names and shapes in HunyuanVideo."""

FAMILIES = {
    "peft_dora": {"dora"}, "peft_ia3": {"ia3"}, "peft_loha": {"loha"}, "peft_loha_tucker": {"loha"},
    "peft_lokr": {"lokr"}, "peft_lokr_both": {"lokr"}, "peft_lokr_tucker": {"lokr"},
    "peft_miss": {"miss"}, "peft_miss_mini": {"miss"},
    "diffusers_sd15_dora.safetensors": {"dora"}, "lycoris_dora_in.safetensors": {"dora"},
    "lycoris_dora_out.safetensors": {"dora"}, "lycoris_full.safetensors": {"full"}, "lycoris_ia3.safetensors": {"ia3"},
    "lycoris_loha.safetensors": {"loha"}, "lycoris_loha_tucker.safetensors": {"loha"},
    "lycoris_lokr.safetensors": {"lokr"}, "lycoris_lokr_both.safetensors": {"lokr"},
    "lycoris_lokr_dora.safetensors": {"lokr"}, "lycoris_lokr_tucker.safetensors": {"lokr"},
    "lycoris_lokr_unbalanced.safetensors": {"lokr"}, "lycoris_lokr_whole.safetensors": {"lokr"},
    "lycoris_norms.safetensors": {"lora", "norm"}, "lycoris_standalone.safetensors": {"lokr"},
    "z_image_lokr.safetensors": {"lokr"},
}  # fmt: skip
"""Every other file is plain LoRA."""

ONLY_PEFT_HOLDS = {name for name, own in FAMILIES.items() if own in ({"loha"}, {"lokr"}, {"miss"})} - {
    "lycoris_lokr_dora.safetensors"
}
MISS = {name for name, own in FAMILIES.items() if own == {"miss"}}
ONLY_FOR_PEFT = MISS | {"peft_ia3"}
"""Which only PEFT loads."""
WITHOUT_SCALE = "peft_raw.safetensors"
"""PEFT's weights alone: their scale stands in the configuration that is not there."""
REFUSED = {
    **dict.fromkeys(("sd-scripts", "comfyui", "other", "lycoris", "onetrainer"), ONLY_FOR_PEFT),
    "diffusers": {n for n, own in FAMILIES.items() if not own <= {"lora", "dora"}} - {"z_image_lokr.safetensors"}
    | {"lycoris_dora_in.safetensors"},  # Diffusers loads LoKr of Z-Image
    "peft": {n for n, own in FAMILIES.items() if not own <= {"lora", "dora"}} - ONLY_PEFT_HOLDS - {"peft_ia3"}
    | {
        "lycoris_dora_in.safetensors",  # PEFT's magnitude is per output row
        "lycoris_lokr_unbalanced.safetensors",  # PEFT's w1 always has the smaller dimensions
    },
}  # fmt: skip
EPSILON = {"F32": 1e-6, "F16": 2e-3, "BF16": 2e-2}
"""What folding a scale into one factor of this dtype may cost, relative to the largest probe."""


@cache
def adapter(name: str) -> Adapter:
    return lorasurgery.load(FILES[name], arch=ARCH.get(name))


@cache
def truth(name: str) -> dict[str, np.ndarray]:
    path = PRODUCERS / (name.removesuffix(".safetensors") + TRUTH)
    return load_file(path) if path.exists() else {}


def close(measured: np.ndarray, expected: np.ndarray, relative: float) -> bool:
    return bool(np.abs(measured - expected).max() <= relative * np.abs(expected).max())


def measured(module: Module) -> np.ndarray:
    """The probes of a module's delta; of large ones from the factors, which takes a thousandth of the time."""
    delta, scale = module.delta, module.scale.value
    if isinstance(delta, LowRank) and delta.mid is None:
        up, down = delta.up.f64().reshape(delta.up.shape[0], -1), delta.down.f64().reshape(delta.rank, -1)
        return scale * (probes(up.shape[0], 0).T @ up) @ (down @ probes(down.shape[1], 1))
    if isinstance(delta, Kronecker) and len(delta.shape) == 2:
        outer, inner = delta.outer_array(), delta.inner_array()
        left = probes(delta.shape[0], 0).reshape(*(len(f) for f in (outer, inner)), -1)
        right = probes(delta.shape[1], 1).reshape(outer.shape[1], inner.shape[1], -1)
        half = np.einsum("pmi,pn->mni", np.einsum("opi,om->pmi", left, outer), inner)
        return scale * np.einsum("mni,mnj->ij", half, right)
    return bilinear(module.dense())


def weights(own: Adapter) -> dict[Site, np.ndarray]:
    """The probes of every module that adds to a weight."""
    return {site: measured(module) for site, module in own if module.delta is not None and module.family != "ia3"}


@cache
def source_weights(name: str) -> dict[Site, np.ndarray]:
    return weights(adapter(name))


@pytest.mark.parametrize("name", FILES)
def test_every_key_is_explained(name):
    found = adapter(name)
    assert {left.key for left in found.leftovers} <= {"lokr_factor"}
    assert {module.family for _, module in found} == FAMILIES.get(name, {"lora"})
    assert found.warnings == () or (name == WITHOUT_SCALE and "is not known" in found.warnings[0])


@pytest.mark.parametrize("name", [name for name in FILES if truth(name)])
def test_deltas_are_the_producers(name):
    left = dict(truth(name))
    for _, module in adapter(name):
        expected = left.pop(module.name)
        assert close(bilinear(module.dense()), expected, 1e-7), module.name
        assert close(measured(module), expected, 1e-7), module.name
        if module.bias is not None:
            assert close(bilinear(module.bias.f64()), left.pop(f"{module.name}|bias"), 1e-6), module.name
        if module.magnitude is not None:
            expected = left.pop(f"{module.name}|magnitude")
            assert close(bilinear(module.magnitude.tensor.f64().reshape(-1)), expected, 1e-12), module.name
    assert not left


def test_the_truths_are_not_trivial():
    for name in FILES:
        for key, expected in truth(name).items():
            assert np.abs(expected).max() > 1e-6, (name, key)


@pytest.mark.parametrize("axis", ["in", "out"])
def test_the_axis_of_a_magnitude(axis):
    found = adapter(f"lycoris_dora_{axis}.safetensors")
    assert {module.magnitude.axis for _, module in found if module.magnitude is not None} == {axis}


@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("name", FILES)
def test_there_and_back(name, target, tmp_path):
    source = adapter(name)
    if name in REFUSED.get(target, ()):
        with pytest.raises(NotRepresentableError) as refusal:
            lorasurgery.save(lorasurgery.convert(source, target)[0], tmp_path / "out", layout=target)
        assert refusal.value.module in {module.name for _, module in source}
        assert refusal.value.hint
        assert not list(tmp_path.iterdir())
        return
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    written, report = lorasurgery.convert(source, target)
    lorasurgery.save(written, there, report=report)
    assert not report.dropped
    between = lorasurgery.load(there, arch=source.architecture.key)
    assert not {left.key for left in between.leftovers} - {"lokr_factor"}
    home = source.layout if source.layout in LAYOUTS else "diffusers"
    if name in REFUSED.get(home, ()):
        home = "sd-scripts"
    returned, report = lorasurgery.convert(between, home)
    lorasurgery.save(returned, back, report=report)
    assert_same(name, lorasurgery.load(back, arch=source.architecture.key))


def assert_same(name: str, result: Adapter) -> None:
    """Equal deltas at equal sites, biases and magnitudes; what a fuse filled up is zero."""
    source, found = adapter(name), weights(result)
    dtypes = {t.dtype for _, m in source if m.delta is not None for t in m.delta.tensors.values()}
    relative = EPSILON[dtypes.intersection(EPSILON).pop()]
    for site, expected in source_weights(name).items():
        assert close(found.pop(site), expected, relative), site
    assert all(np.abs(extra).max() == 0 for extra in found.values())
    for site, module in source:
        same = result.modules[site]
        assert same.family == module.family
        if module.bias is not None:
            assert same.bias is not None
            np.testing.assert_allclose(same.bias.f64(), module.bias.f64(), rtol=relative)
        if module.magnitude is not None:
            assert same.magnitude is not None
            assert same.magnitude.axis == module.magnitude.axis
            np.testing.assert_array_equal(same.magnitude.tensor.f64().ravel(), module.magnitude.tensor.f64().ravel())


@pytest.mark.parametrize(
    "name", ["lycoris_lokr.safetensors", "lycoris_loha.safetensors", "peft_lokr", "peft_loha", *sorted(MISS)]
)
def test_as_lora_keeps_the_delta(name, tmp_path):
    source = adapter(name)
    written, report = lorasurgery.convert(source, "diffusers", lorasurgery.Options(as_lora=True))
    lorasurgery.save(written, tmp_path / "lora.safetensors", report=report)
    result = lorasurgery.load(tmp_path / "lora.safetensors")
    assert {module.family for _, module in result} == {"lora"}
    for site, expected in source_weights(name).items():
        assert close(measured(result.modules[site]), expected, 5e-3), site


def test_the_sample_keeps_its_factor(tmp_path):
    sample = adapter("z_image_lokr.safetensors")
    assert sample.lokr_factor == -1
    metadata = json.loads(FILES["z_image_lokr.safetensors"].read_bytes()[8:].split(b"}}", 1)[0] + b"}}")["__metadata__"]
    assert metadata["ss_lokr_factor"] == "-1"
    written, report = lorasurgery.convert(sample, "comfyui")
    lorasurgery.save(written, tmp_path / "out.safetensors", report=report)
    assert lorasurgery.load(tmp_path / "out.safetensors").lokr_factor == -1


@pytest.mark.parametrize("name", sorted(name for name, path in FILES.items() if path.is_dir()))
def test_the_weights_of_a_peft_folder_stand_for_the_folder(name: str) -> None:
    """Their scale is in the configuration beside them, and nowhere else."""
    from lorasurgery.inspection.describe import describe

    folder = FILES[name]
    file = folder / "adapter_model.safetensors"
    if not file.exists():  # a folder of folders
        return
    whole, alone = lorasurgery.load(folder), lorasurgery.load(file)
    assert {s: m.scale.value for s, m in whole} == {s: m.scale.value for s, m in alone}
    assert describe(folder)._replace(path="") == describe(file)._replace(path="")
