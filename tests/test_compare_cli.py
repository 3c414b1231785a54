"""``lorasurgery compare`` as scripts use it: real files and their conversions, exit codes, JSON, the map, a base model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.edges import run
from tests.models.small import diffusers_arrays, save
from tests.oracle import raw, read, write

FIXTURES = Path(__file__).parent / "fixtures" / "producers"
SAMPLE = Path(__file__).parent / "fixtures" / "samples" / "z_image_lokr.safetensors"
BLOCK = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_"
Q = f"{BLOCK}attn1_to_q"


def compared(a: object, b: object, *more: object) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON."""
    outcome = run("compare", a, b, "--json", *more)
    assert outcome.err == ""
    return outcome.code, json.loads(outcome.out)


def converted(name: str, folder: Path, *how: object) -> Path:
    out = folder / f"{name}.safetensors"
    outcome = run("convert", FIXTURES / f"{name}.safetensors", out, *how)
    assert outcome.code == 0, outcome.err
    return out


@pytest.mark.parametrize(
    ("name", "how", "verdict"),
    [
        ("lycoris_loha", ("--target", "comfyui"), "identical"),
        ("lycoris_loha", ("--target", "diffusers", "--as", "lora"), "same"),
        ("lycoris_loha_tucker", ("--target", "comfyui", "--as", "lora"), "same"),
        ("lycoris_lokr", ("--target", "diffusers", "--as", "lora"), "same"),
        ("lycoris_lokr_both", ("--target", "comfyui", "--as", "full"), "same"),
        ("lycoris_lokr_tucker", ("--target", "comfyui", "--as", "lora"), "same"),
        ("lycoris_locon", ("--target", "diffusers"), "same"),
        ("lycoris_locon_tucker", ("--target", "diffusers"), "same"),
        ("lycoris_dora_out", ("--target", "diffusers"), "same"),
        ("lycoris_dora_in", ("--target", "comfyui"), "identical"),
        ("lycoris_full", ("--target", "comfyui", "--as", "lora"), "identical"),
        ("lycoris_norms", ("--target", "comfyui"), "identical"),
        ("lycoris_ia3", ("--target", "comfyui"), "identical"),
        ("diffusers_flux", ("--target", "comfyui"), "identical"),
        ("diffusers_z_image", ("--target", "comfyui", "--qkv", "fuse"), "identical"),
        ("diffusers_sd15_dora", ("--target", "sd-scripts"), "identical"),
        ("peft_raw", ("--target", "sd-scripts", "--dtype", "bf16"), "same"),
    ],
)
def test_a_conversion_is_the_same_adapter(tmp_path, name, how, verdict):
    code, found = compared(FIXTURES / f"{name}.safetensors", converted(name, tmp_path, *how))
    assert code == 0, found["verdict"]
    assert found["same"]
    assert found["verdict"].split(":")[0] == verdict
    worst = max(module["distance"] for module in found["modules"])
    assert worst <= (0.0 if verdict == "identical" else 2e-2)


@pytest.mark.parametrize("name", ["peft_lora", "peft_dora", "peft_lokr", "peft_loha", "peft_rslora", "peft_lora_bias"])
def test_a_peft_folder_and_its_conversion(tmp_path, name):
    out = tmp_path / "out.safetensors"
    assert run("convert", FIXTURES / name, out, "--target", "comfyui").code == 0
    code, found = compared(FIXTURES / name, out)
    assert (code, found["same"]) == (0, True), found["verdict"]
    assert found["a"]["layout"] == "peft" or found["a"]["path"].endswith(name)


def test_fused_lokr_and_its_parts(tmp_path):
    """q, k and v of a LoKr beside one LoRA cut to a few ranks: the distance is the error that the conversion reports."""
    source, cut = tmp_path / "source.safetensors", tmp_path / "cut.safetensors"
    assert run("prune", SAMPLE, source, "--keep", "re=layers_0_attention_to_[qkv]").code == 0
    told = run("convert", source, cut, "--target", "comfyui", "--qkv", "fuse", "--lokr-rank", "8", "--json")
    (change,) = json.loads(told.out)["changes"]
    code, found = compared(source, cut)
    assert (code, found["counts"]["different"]) == (1, 3)
    assert [module["part"] for module in found["modules"]] == [True] * 3
    assert found["distance"] == pytest.approx(change["error"], rel=1e-3)


def test_different_adapters_and_the_text(tmp_path):
    a, b = FIXTURES / "lycoris_locon.safetensors", FIXTURES / "lycoris_lokr.safetensors"
    outcome = run("compare", a, b, "--top", "2")
    assert outcome.code == 1
    lines = outcome.out.splitlines()
    assert lines[0].startswith("different: 8 of 8 modules differ (distance of the whole ")
    assert "A         lycoris_locon.safetensors: sd1, sd-scripts, 8 modules" in outcome.out
    assert "clip_l: distance of each module" in outcome.out
    assert "(lora / lokr)" in outcome.out
    assert lines[-1] == "  ... and 6 more (--verbose shows all)"
    assert sum("(lora / lokr)" in line for line in run("compare", a, b, "--verbose").out.splitlines()) == 8
    same = run("compare", a, a)
    assert (same.code, same.out.splitlines()[0]) == (0, "identical: the 8 modules change exactly the same in both")
    assert "distance of each" not in same.out


def test_json_has_everything():
    code, found = compared(FIXTURES / "lycoris_locon.safetensors", FIXTURES / "lycoris_norms.safetensors", "--tolerance", "0.1")
    assert code == 1
    assert set(found) == {
        "a", "b", "base", "tolerance", "schema", "same", "verdict", "distance", "cosine", "strength", "norm", "overlap",
        "counts", "leftovers", "modules", "warnings", "seconds",
    }  # fmt: skip
    assert (found["schema"], found["tolerance"]) == (1, 0.1)
    assert found["counts"]["only b"] == 2
    module = found["modules"][0]
    assert set(module) == {
        "component", "weight", "rows", "status", "a", "b", "distance", "cosine", "norm_a", "norm_b", "inner", "left", "right",
        "vectors", "tolerance", "part", "note",
    }  # fmt: skip
    distances = [own["distance"] for own in found["modules"]]
    assert distances == sorted(distances, reverse=True)


def test_exit_codes_of_a_real_process(tmp_path):
    """0 the same, 1 different, 2 not comparable: whatever stands on stdout."""
    a, b = FIXTURES / "lycoris_locon.safetensors", FIXTURES / "lycoris_lokr.safetensors"
    (tmp_path / "broken.safetensors").write_bytes(b"no header")
    for arguments, code in (
        ([a, a], 0), ([a, b], 1), ([a, tmp_path / "none.safetensors"], 2), ([tmp_path / "broken.safetensors", a], 2),
        ([a, b, "--tolerance", "2"], 2), ([a], 2),
    ):  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "lorasurgery", "compare", *map(str, arguments)], capture_output=True, text=True, check=False
        )
        assert done.returncode == code, (arguments, done.stderr)
        assert bool(done.stderr) is (code == 2)
        assert bool(done.stdout) is (code != 2)


def test_files_of_an_unknown_model_are_compared_by_their_names(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        f"lora_unet_mystery_{i}.lora_{side}.weight": raw(rng.standard_normal(shape), "F32")
        for i in range(2)
        for side, shape in (("up", (24, 3)), ("down", (3, 16)))
    }
    write(tmp_path / "a.safetensors", tensors, {})
    key = "lora_unet_mystery_1.lora_up.weight"
    write(tmp_path / "b.safetensors", {**tensors, key: raw(tensors[key].f64() * 0.5, "F32")}, {})
    code, found = compared(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert (code, found["counts"]["identical"], found["counts"]["different"]) == (1, 1, 1)
    assert found["modules"][0]["distance"] == pytest.approx(0.5)
    assert compared(tmp_path / "a.safetensors", tmp_path / "a.safetensors")[0] == 0


def test_layouts_of_an_unknown_model_need_its_base(tmp_path):
    """A FLUX.1 of other sizes: its names in two layouts are known from the base model only."""
    rng = np.random.default_rng(3)
    base, one, two = (tmp_path / f"{name}.safetensors" for name in ("base", "one", "two"))
    save(base, diffusers_arrays("flux1-dev"))
    name = "single_transformer_blocks.0.proj_mlp"
    out, width = diffusers_arrays("flux1-dev")[f"{name}.weight"].shape
    up, down = rng.standard_normal((out, 4)), rng.standard_normal((4, width))
    write(one, {f"transformer.{name}.lora_B.weight": raw(up, "F32"), f"transformer.{name}.lora_A.weight": raw(down, "F32")}, {})
    run("convert", one, two, "--target", "comfyui", "--base", base)
    assert "linear1" in next(iter(read(two)[0]))
    done = run("compare", one, two)
    assert done.code == 2
    assert "--base MODEL" in done.err
    assert compared(one, two, "--base", base)[0] == 0
    write(two, {k: raw(v.f64() * 1.1, "F32") if "up" in k else v for k, v in read(two)[0].items()}, {})
    assert compared(one, two, "--base", base)[0] == 1


def test_the_second_expert_of_wan_alone(tmp_path):
    source = FIXTURES / "diffusers_wan.safetensors"
    tensors, _ = read(source)
    write(tmp_path / "plain.safetensors", tensors, {})
    write(tmp_path / "second.safetensors", {k.replace("transformer.", "transformer_2.", 1): t for k, t in tensors.items()}, {})
    code, found = compared(tmp_path / "plain.safetensors", tmp_path / "second.safetensors")
    assert (code, found["counts"]["identical"]) == (0, 4)
    assert found["warnings"] == ["B is for Wan 2.2's second expert; it is compared with the other's modules"]


def base_model(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Some weights of SD 1's UNet, by their Diffusers names."""
    rng = np.random.default_rng(1)
    block = "down_blocks.0.attentions.0.transformer_blocks.0."
    shapes: dict[str, tuple[int, ...]] = {f"{block}attn1.to_q": (320, 320), f"{block}attn2.to_k": (320, 768)}
    shapes |= {f"{block}ff.net.0.proj": (2560, 320)}
    shapes |= {"down_blocks.0.attentions.0.proj_in": (320, 320, 1, 1), "down_blocks.0.resnets.0.conv1": (320, 320, 3, 3)}
    weights = {name: rng.standard_normal(shape).astype("f4") * 0.05 for name, shape in shapes.items()}
    write(path, {f"{name}.weight": raw(own, "F32") for name, own in weights.items()}, {})
    return weights


def test_with_the_base_model_a_dora_is_what_it_does_to_it(tmp_path):
    weights = base_model(tmp_path / "base.safetensors")
    dora = FIXTURES / "lycoris_dora_out.safetensors"
    tensors = read(dora)[0]
    # The same effect, written as full differences from the formula W' = m (W + s D) / ||W + s D||.
    full = {}
    for name, weight in weights.items():
        stem = "lora_unet_" + name.replace(".", "_")
        up, down = (tensors[f"{stem}.lora_{side}.weight"].f64() for side in ("up", "down"))
        rank = down.shape[0]
        scale = tensors[f"{stem}.alpha"].item() / rank
        flat = weight.reshape(len(weight), -1).astype("f8")
        new = flat + scale * up.reshape(-1, rank) @ down.reshape(rank, -1)
        new *= tensors[f"{stem}.dora_scale"].f64().reshape(-1, 1) / np.linalg.norm(new, axis=1, keepdims=True)
        full[f"{stem}.diff"] = raw((new - flat).reshape(weight.shape), "F32")
    write(tmp_path / "full.safetensors", full, {})
    code, plain = compared(dora, tmp_path / "full.safetensors")
    assert (code, plain["same"]) == (1, False)
    code, found = compared(dora, tmp_path / "full.safetensors", "--base", tmp_path / "base.safetensors")
    assert code == 0, found["verdict"]
    assert found["counts"]["same"] == 5
    assert max(module["distance"] for module in found["modules"]) < 1e-6
    assert all(module["vectors"] == {} for module in found["modules"])
    other = {**full, f"{Q}.diff": raw(full[f"{Q}.diff"].f64() * 1.1, "F32")}
    write(tmp_path / "other.safetensors", other, {})
    code, found = compared(dora, tmp_path / "other.safetensors", "--base", tmp_path / "base.safetensors")
    assert (code, found["counts"]["different"]) == (1, 1)
    assert found["modules"][0]["distance"] == pytest.approx(0.1 / 1.1, rel=1e-5)


def test_a_base_model_without_the_weight(tmp_path):
    write(
        tmp_path / "base.safetensors",
        {"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": raw(np.ones((320, 320)), "F32")},
        {},
    )
    dora = FIXTURES / "lycoris_dora_out.safetensors"
    outcome = run("compare", dora, dora, "--base", tmp_path / "base.safetensors")
    assert (outcome.code, outcome.out) == (2, "")
    assert "the base model has no rows" in outcome.err
