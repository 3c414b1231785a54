"""PEFT's folders: one text encoder's, several components', and merges of configurations."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import lorasurgery
from lorasurgery.errors import RequestError
from lorasurgery.io.header import read_safetensors
from lorasurgery.layouts.peft_merge import merged_configs
from tests.edges import run
from tests.oracle import raw, write

if TYPE_CHECKING:
    from pathlib import Path

PREFIX = "base_model.model."
CONFIG = {"peft_type": "LORA", "r": 3, "lora_alpha": 7, "task_type": "FEATURE_EXTRACTION", "base_model_name_or_path": "a/b"}
SIZES = {"clip_l": 768, "clip_g": 1280, "clip_h": 1024}


def factors(stem: str, out: int, inside: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng([seed, out, inside])
    return {
        f"{stem}.lora_A.weight": raw(rng.standard_normal((3, inside)), "F32"),
        f"{stem}.lora_B.weight": raw(rng.standard_normal((out, 3)), "BF16"),
    }


def folder(path: Path, tensors: dict[str, Any], config: dict[str, Any] | None = None) -> Path:
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps(CONFIG if config is None else config))
    write(path / "adapter_model.safetensors", tensors)
    return path


def encoder(path: Path, table: str, root: str = "text_model.") -> Path:
    width = SIZES[table]
    tensors: dict[str, Any] = {}
    for i in range(2):
        tensors |= factors(f"{PREFIX}{root}encoder.layers.{i}.self_attn.q_proj", width, width, i)
        tensors |= factors(f"{PREFIX}{root}encoder.layers.{i}.mlp.fc1", 4 * width, width, i)
    return folder(path, tensors)


@pytest.mark.parametrize("root", ["", "text_model."])
@pytest.mark.parametrize(
    ("table", "arch", "prefix"),
    [
        ("clip_l", "sdxl", "lora_te1_"),
        ("clip_g", "sdxl", "lora_te2_"),
        ("clip_h", "sd2", "lora_te_"),
        ("clip_l", "flux1", "lora_te1_"),
    ],
)
def test_a_text_encoder_of_its_own(root: str, table: str, arch: str, prefix: str, tmp_path: Path) -> None:
    source = encoder(tmp_path / "in", table, root)
    adapter = lorasurgery.load(source, arch=arch)
    assert {site.component for site, _ in adapter} == {table}
    assert {module.scale.value for _, module in adapter} == {7 / 3}
    assert (adapter.layout, adapter.leftovers) == ("peft", ())
    result, report = lorasurgery.convert(adapter, "sd-scripts")
    lorasurgery.save(result, tmp_path / "out.safetensors", report=report)
    keys = header(tmp_path / "out.safetensors")
    assert all(key.startswith(f"{prefix}text_model_encoder_layers_") for key in keys)
    assert report.exact
    assert lorasurgery.load(source).architecture.id


@pytest.mark.parametrize("verb", ["split", "merge", "prune", "convert"])
def test_a_text_encoder_with_trained_biases(verb: str, tmp_path: Path) -> None:
    """They are modules beside the factors, and none of them hides which encoder it is."""
    width, layer = SIZES["clip_l"], f"{PREFIX}text_model.encoder.layers.0"
    biases = {f"{layer}.self_attn.q_proj.base_layer.bias": 1.0, f"{layer}.layer_norm1.bias": 2.0}
    whole = {key: raw(np.full(width, value), "BF16") for key, value in biases.items()}
    tensors = factors(f"{layer}.self_attn.q_proj", width, width) | whole
    source, out = folder(tmp_path / "in", tensors, CONFIG | {"bias": "all"}), tmp_path / "out"
    adapter = lorasurgery.load(source)
    assert {site.component for site, _ in adapter} == {"clip_l"}
    assert (sorted(module.family for _, module in adapter), adapter.leftovers) == (["lora", "set", "set"], ())
    arguments = {
        "split": ("split", str(source), "--by", "component", "-o", str(out)),
        "merge": ("merge", str(source), "-o", str(out)),
        "prune": ("prune", str(source), "--negate", "-o", str(out)),
        "convert": ("convert", str(source), str(out), "--target", "sd-scripts", "--arch", "sdxl"),
    }
    code, _, err = run(*arguments[verb])
    if verb in ("prune", "convert"):
        assert (code, ".bias" in err, list(tmp_path.glob("out*"))) == (1, True, []), err
        return
    assert code == 0, err
    made = next(tmp_path.glob("out*"))
    assert header(made / "adapter_model.safetensors") == header(source / "adapter_model.safetensors")
    assert json.loads((made / "adapter_config.json").read_text())["bias"] == "all"


@pytest.mark.parametrize("root", ["", "text_model."])
@pytest.mark.parametrize("verb", ["split", "prune", "merge"])
def test_verbs_keep_its_names_and_its_configuration(root: str, verb: str, tmp_path: Path) -> None:
    source = encoder(tmp_path / "in", "clip_l", root)
    out = tmp_path / "out"
    arguments = {
        "split": ("split", str(source), "--by", "component", "-o", str(out)),
        "prune": ("prune", str(source), "--negate", "-o", str(out)),
        "merge": ("merge", str(source), "-o", str(out)),
    }
    code, _, err = run(*arguments[verb])
    assert code == 0, err
    made = next(tmp_path.glob("out*"))
    assert header(made / "adapter_model.safetensors") == header(source / "adapter_model.safetensors")
    config = json.loads((made / "adapter_config.json").read_text())
    assert (config["task_type"], config["base_model_name_or_path"], config["r"]) == ("FEATURE_EXTRACTION", "a/b", 3)
    again, before = lorasurgery.load(made), lorasurgery.load(source)
    sign = -1.0 if verb == "prune" else 1.0
    for site, module in before:
        np.testing.assert_allclose(again.modules[site].dense(), sign * module.dense(), rtol=1e-12)


def header(path: Path) -> set[str]:
    return set(read_safetensors(path).tensors)


def test_what_is_written_without_the_denoiser_is_readable(tmp_path: Path) -> None:
    """Our own ``--target peft --drop unet``."""
    stem = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
    unet = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    tensors: dict[str, Any] = {}
    for own, width in ((stem, 768), (unet, 640)):
        tensors |= {
            f"{own}.lora_down.weight": raw(np.ones((2, width)), "F16"),
            f"{own}.lora_up.weight": raw(np.ones((width, 2)), "F16"),
        }
        tensors[f"{own}.alpha"] = raw(np.array(5.0), "F32")
    write(tmp_path / "a.safetensors", tensors)
    code, _, err = run(
        "convert",
        str(tmp_path / "a.safetensors"),
        str(tmp_path / "out"),
        "--target",
        "peft",
        "--drop",
        "unet",
        "--arch",
        "sdxl",
    )
    assert code == 0, err
    ((site, module),) = lorasurgery.load(tmp_path / "out")
    assert (site.component, module.scale.value) == ("clip_l", 2.5)


def test_folders_of_several_components_keep_what_each_says(tmp_path: Path) -> None:
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    saved = {f"{PREFIX}conv_in.weight": raw(np.ones((320, 4, 3, 3)), "F32"), f"{PREFIX}conv_in.bias": raw(np.ones(320), "F32")}
    unet = folder(
        tmp_path / "in" / "unet",
        factors(PREFIX + name, 640, 640) | saved,
        {**CONFIG, "lora_alpha": 5, "modules_to_save": ["conv_in"]},
    )
    te = encoder(tmp_path / "in" / "text_encoder", "clip_l", "")
    adapter = lorasurgery.load(tmp_path / "in", arch="sdxl")
    assert {module.family for _, module in adapter} == {"lora", "set"}
    result, report = lorasurgery.convert(adapter, "peft")
    lorasurgery.save(result, tmp_path / "out", report=report)
    assert report.exact
    for before, after in ((unet, tmp_path / "out" / "unet"), (te, tmp_path / "out" / "text_encoder")):
        assert header(after / "adapter_model.safetensors") == header(before / "adapter_model.safetensors")
        old, new = (json.loads((path / "adapter_config.json").read_text()) for path in (before, after))
        assert {key: new[key] for key in old} == old


def test_configurations_of_several_files() -> None:
    one = {
        "": {"peft_type": "LORA", "task_type": "CAUSAL_LM", "modules_to_save": ["head"], "bias": "none", "lora_dropout": 0.1}
    }
    two = {"": {"peft_type": "LORA", "revision": "main", "modules_to_save": ["norm"], "bias": "lora_only", "lora_dropout": 0.2}}
    found, told = merged_configs([("a", one), ("b", two)])
    assert found[""]["modules_to_save"] == ["head", "norm"]
    assert (found[""]["task_type"], found[""]["revision"], found[""]["bias"]) == ("CAUSAL_LM", "main", "lora_only")
    assert told == ["lora_dropout is 0.1 in a, 0.2 in b; the first is kept"]
    assert one[""]["modules_to_save"] == ["head"]


@pytest.mark.parametrize("field", ["oft_block_size", "coft", "use_cayley_neumann", "num_cayley_neumann_terms"])
def test_rotations_that_are_made_differently_are_not_one_adapter(field: str) -> None:
    files = [(name, {"": {"peft_type": "OFT", field: value}}) for name, value in (("a", 4), ("b", 8))]
    with pytest.raises(RequestError, match=field):
        merged_configs(files)


OWN: dict[str, dict[str, tuple[int, ...]]] = {
    "OFT": {"oft_R.weight": (40, 28)},
    "BOFT": {"boft_R": (1, 80, 4, 4), "boft_s": (320, 1)},
    "IA3": {"ia3_l": (320, 1)},
    "MISS": {"miss_block": (4, 320)},
}


@pytest.mark.parametrize("kind", OWN)
def test_peft_reads_what_it_wrote(kind: str, tmp_path: Path) -> None:
    stem = f"{PREFIX}down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{stem}.{slot}": raw(np.ones(shape), "F32") for slot, shape in OWN[kind].items()}
    config = {"peft_type": kind, "feedforward_modules": []} if kind == "IA3" else {"peft_type": kind}
    source = folder(tmp_path / "in", tensors, config)
    code, text, err = run("check", str(source), "--for", "peft", "--arch", "sd1", "--json")
    assert code == 0, text + err
    code, text, err = run("prune", str(source), "--arch", "sd1", "--keep", "unet", "-o", str(tmp_path / "out"))
    assert code == 0, err
    assert header(tmp_path / "out" / "adapter_model.safetensors") == set(tensors)
