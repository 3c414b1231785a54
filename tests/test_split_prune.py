"""``lorasurgery split`` and ``prune``: bytes that stay, parts that make the whole, models that lack modules, scales."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lorasurgery
from lorasurgery.cli.advice import before
from lorasurgery.errors import RequestError
from lorasurgery.operations.select.parts import WAYS, split
from lorasurgery.verbs.prune import PruneOptions, prune
from tests.builders import Builder, meaning, read_output
from tests.edges import refused, run
from tests.oracle import Meaning, Tensors, assert_same, model, raw, read, write

FIXTURES = Path(__file__).parent / "fixtures" / "producers"
LOHA, LOKR, DORA, FLUX, NORMS, SD15 = (
    FIXTURES / f"{name}.safetensors"
    for name in ("lycoris_loha", "lycoris_lokr", "lycoris_dora_out", "diffusers_flux", "lycoris_norms", "diffusers_sd15")
)


def told(*args: object) -> dict[str, Any]:
    """The JSON of a run that works."""
    outcome = run(*args, "--json")
    assert outcome.code == 0, outcome.err
    found: dict[str, Any] = json.loads(outcome.out)
    return found


# split --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize("source", [LOHA, LOKR, DORA, NORMS])
def test_parts_hold_every_tensor_once(tmp_path, source, by):
    report = told("split", source, "--by", by, "-o", tmp_path / "part")
    found: Tensors = {}
    for part in report["parts"]:
        assert part["written"]
        tensors, metadata = read(part["output"])
        assert not set(tensors) & set(found)
        found |= tensors
        assert metadata["lorasurgery.operation"] == f"split by {by}: {part['part']}"
    assert found == read(source)[0]
    assert sum(part["modules"] for part in report["parts"]) == report["modules"] == 8 or source != LOHA


def test_split_then_merge_gives_the_file_back(tmp_path):
    report = told("split", LOHA, "--by", "component", "-o", tmp_path / "part")
    assert [Path(part["output"]).name for part in report["parts"]] == ["part-te.safetensors", "part-unet.safetensors"]
    whole = tmp_path / "whole.safetensors"
    assert run("merge", *(part["output"] for part in report["parts"]), "-o", whole).code == 0
    assert read(whole)[0] == read(LOHA)[0]


def test_names_of_parts():
    adapter = lorasurgery.load(FLUX)
    assert list(split(adapter, "component")) == ["te1", "transformer"]
    assert "double_blocks.0" in split(adapter, "block")
    assert "rest" in split(lorasurgery.load(made_flux()), "block")
    assert "te1.self_attn.out_proj" in split(adapter, "kind")
    assert list(split(lorasurgery.load(NORMS), "family")) == ["lora", "norm"]
    with pytest.raises(RequestError, match="--by is"):
        split(adapter, "size")


_MADE: dict[str, Path] = {}


def made_flux() -> Path:
    return _MADE["flux"]


@pytest.fixture(autouse=True, scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A FLUX adapter in sd-scripts layout: what Chroma has, and what it has not."""
    own = Builder.start(model("flux1-dev"), "sd-scripts", "BF16", 3)
    for name in (
        "double_blocks.0.img_attn.proj",
        "single_blocks.37.linear2",
        "double_blocks.3.img_mod.lin",
        "img_in",
        "vector_in.in_layer",
    ):
        own.add(name, "lora", rank=2, alpha=3.0)
    own.add_encoder("clip_l", "text_model.encoder.layers.0.mlp.fc1", "lora", rank=2, alpha=1.0)
    own.made.metadata |= {"ss_base_model_version": "flux1", "modelspec.architecture": "flux-1-dev/lora", "ss_network_dim": "2"}
    _MADE["flux"] = own.made.save(tmp_path_factory.mktemp("flux"))


def test_unknown_keys_go_with_the_first_part_and_are_listed(tmp_path):
    tensors, metadata = read(LOHA)
    write(tmp_path / "in.safetensors", {**tensors, "mystery.tensor": raw([1.0], "F32")}, metadata)
    report = told("split", tmp_path / "in.safetensors", "--by", "component", "-o", tmp_path / "part")
    assert [part["carried"] for part in report["parts"]] == [["mystery.tensor"], []]
    first, second = (read(part["output"])[0] for part in report["parts"])
    assert "mystery.tensor" in first
    assert "mystery.tensor" not in second
    text = run("split", tmp_path / "in.safetensors", "--by", "component", "--dry-run").out
    assert "carried: mystery.tensor" in text
    assert "(not written)" in text


def test_the_lokr_factor_stays_with_lokr(tmp_path):
    tensors, metadata = read(LOKR)
    loha = {k: t for k, t in read(LOHA)[0].items() if "resnets" in k}
    kept = {k: t for k, t in tensors.items() if "resnets" not in k}
    write(tmp_path / "in.safetensors", {**kept, **loha, "lokr_factor": raw(8, "I64")}, metadata)
    told("split", tmp_path / "in.safetensors", "--by", "family", "-o", tmp_path / "part")
    assert read(tmp_path / "part-lokr.safetensors")[0]["lokr_factor"].item() == 8
    assert "lokr_factor" not in read(tmp_path / "part-loha.safetensors")[0]


def test_many_files_folders_and_peft(tmp_path):
    outcome = run(
        "split", LOHA, FIXTURES / "peft_lokr", tmp_path / "none.safetensors", "--out-dir", tmp_path / "parts", "--json"
    )
    assert outcome.code == 3
    lines = [json.loads(line) for line in outcome.out.splitlines()]
    assert "error" in lines[2]
    names = sorted(path.name for path in (tmp_path / "parts").iterdir())
    assert names == ["lycoris_loha-te.safetensors", "lycoris_loha-unet.safetensors", "peft_lokr-unet"]
    assert (tmp_path / "parts" / "peft_lokr-unet" / "adapter_config.json").is_file()


def test_the_two_experts_of_wan_come_apart(tmp_path):
    """Diffusers' names for both in one file; each keeps its own."""
    tensors = read(FIXTURES / "diffusers_wan.safetensors")[0]
    both = {**tensors, **{key.replace("transformer.", "transformer_2.", 1): tensor for key, tensor in tensors.items()}}
    source = tmp_path / "both.safetensors"
    write(source, both, {})
    report = told("split", source, "--by", "component", "-o", tmp_path / "part")
    assert [part["part"] for part in report["parts"]] == ["transformer", "transformer_2"]
    assert [read(part["output"])[0] for part in report["parts"]] == [
        tensors, {key.replace("transformer.", "transformer_2.", 1): tensor for key, tensor in tensors.items()}
    ]  # fmt: skip
    parts = told("split", source, "--by", "component", "-o", tmp_path / "named", "--target", "diffusers")
    assert "second expert" in parts["warnings"][0]
    assert [read(part["output"])[0] for part in parts["parts"]] == [tensors, tensors]
    whole = ["prune", source, tmp_path / "x.safetensors", "--scale", "2"]
    refused(tmp_path, [*whole, "--target", "diffusers"], "two experts", "--keep transformer_1")
    assert told(*whole)["modules"]["output"] == 8
    assert told("prune", source, tmp_path / "y.safetensors", "--drop", "transformer_1")["modules"]["output"] == 4


def test_split_refuses(tmp_path):
    refused(tmp_path, ["split", LOHA], "-o PREFIX", code=2)
    refused(tmp_path, ["split", LOHA, "-o", "x", "--out-dir", tmp_path], "one place", code=2)
    refused(tmp_path, ["split", LOHA, LOKR, "-o", tmp_path / "x"], "--out-dir", code=2)
    refused(tmp_path, ["split", LOHA, "-o", tmp_path / "x", "--by", "size"], "--by is", code=2)
    refused(tmp_path, ["split", LOHA, "-o", tmp_path / "x", "--target", "nowhere"], "no layout is called nowhere", code=2)
    (tmp_path / "x-unet.safetensors").write_bytes(b"x")
    refused(tmp_path, ["split", LOHA, "-o", tmp_path / "x"], "exists", "--force")


def test_all_parts_or_none(tmp_path, monkeypatch):
    import lorasurgery.cli.part_file as writing

    saved = []

    def save(adapter, path, **how):
        saved.append(path)
        if len(saved) == 2:
            raise OSError(28, "No space left on device", str(path))
        return lorasurgery.save(adapter, path, **how)

    monkeypatch.setattr(writing, "save", save)
    refused(tmp_path, ["split", LOHA, "-o", tmp_path / "x"], "x-unet.safetensors: No space left")
    assert len(saved) == 2


@pytest.mark.parametrize("command", [["split", "-o"], ["prune", "--keep", "unet", "-o"]])
def test_options_of_convert_are_called_so(tmp_path, command):
    text = refused(tmp_path, [command[0], LOKR, *command[1:], tmp_path / "x", "--target", "diffusers"], "does not load LoKr")
    assert "Try: lorasurgery convert before this, with --as lora" in text


def test_advice_before_an_option_of_convert():
    hint = "an earlier checkpoint of the training run, or --drop REGEX to leave the module out"
    assert before(hint) == hint.replace("--drop", "lorasurgery convert before this, with --drop")
    assert before("a smaller weight") == "a smaller weight"
    assert before("without --strict, or --drop REGEX for what you mean to leave out") == "without --strict"


# prune --------------------------------------------------------------------------------------------------------------------


def test_keep_and_drop_leave_the_rest_as_it_is(tmp_path):
    out = tmp_path / "out.safetensors"
    report = told("prune", LOHA, out, "--drop", "te", "--drop", "re=ff")
    tensors = read(LOHA)[0]
    assert read(out)[0] == {k: t for k, t in tensors.items() if not k.startswith("lora_te") and "_ff_" not in k}
    assert {row["reason"] for row in report["pruned"]} == {"--drop te", "--drop re=ff"}
    assert report["modules"] == {"input": 8, "output": 4}
    told("prune", LOHA, out, "--keep", "unet", "--keep", "te", "--drop", "in=1", "--force")
    assert all(key.startswith("lora_te") for key in read(out)[0])
    told("prune", NORMS, out, "--keep", "family=norm", "--force")
    assert all(key.endswith(("w_norm", "b_norm")) for key in read(out)[0])


def test_metadata_are_true_again(tmp_path):
    out = tmp_path / "out.safetensors"
    own = Builder.start(model("sd1"), "sd-scripts", "F16", 3)
    own.add("down_blocks.0.attentions.0.proj_in", "lora", rank=4, alpha=1.0)
    own.add("down_blocks.0.resnets.0.conv1", "lora", rank=2, alpha=2.0)
    own.made.metadata |= {
        "ss_network_dim": "Dynamic",
        "ss_network_alpha": "Dynamic",
        "sshs_model_hash": "0" * 64,
        "ss_tag_frequency": "{}",
    }
    source = own.made.save(tmp_path)
    told("prune", source, out, "--drop", "re=resnets")
    metadata = read(out)[1]
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "1.0")
    assert metadata["sshs_model_hash"] != "0" * 64
    assert metadata["ss_tag_frequency"] == "{}"
    assert metadata["lorasurgery.operation"] == "prune: drop re=resnets"


def test_prune_for_another_model(tmp_path):
    out = tmp_path / "out.safetensors"
    report = told("prune", made_flux(), out, "--prune-for", "chroma")
    before, (after, metadata) = read(made_flux())[0], read(out)
    kept = ("double_blocks_0_img_attn_proj", "single_blocks_37_linear2", "img_in")
    assert after == {k: t for k, t in before.items() if any(name in k for name in kept)}
    reasons = {row["name"].removeprefix("lora_unet_"): row["reason"] for row in report["pruned"]}
    assert reasons == {
        "double_blocks_3_img_mod_lin": "Chroma has no double_blocks.3.img_mod.lin",
        "vector_in_in_layer": "Chroma has no vector_in.in_layer",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": "Chroma has no clip_l",
    }
    assert report["architecture"] == {"from": "flux1-dev", "to": "chroma"}
    assert metadata["ss_base_model_version"] == "chroma"
    assert "modelspec.architecture" not in metadata
    assert lorasurgery.load(out).architecture.key == "chroma"
    assert len(report["warnings"]) == 2


def test_prune_for_a_models_file_with_other_shapes(tmp_path):
    """A base model whose img_in is wider, as control models have it."""
    shapes = model("flux1-dev").shapes
    tensors = {
        f"{name}.weight": raw(np.zeros(shape if name != "img_in" else (3072, 128)), "F16")
        for name, shape in shapes.items()
        if name in ("img_in", "single_blocks.37.linear2")
    }
    write(tmp_path / "base.safetensors", tensors, {})
    report = told(
        "prune", made_flux(), tmp_path / "out.safetensors", "--prune-for", tmp_path / "base.safetensors", "--arch", "flux1-dev"
    )
    reasons = {row["name"]: row["reason"] for row in report["pruned"]}
    assert "[3072, 128]" in reasons["lora_unet_img_in"]
    assert "lora_unet_single_blocks_37_linear2" not in reasons


def test_prune_for_refuses_to_leave_nothing(tmp_path):
    refused(
        tmp_path,
        ["prune", made_flux(), tmp_path / "x.safetensors", "--prune-for", "wan"],
        "nothing would be left of the 6 modules",
        code=2,
    )
    refused(tmp_path, ["prune", LOHA, tmp_path / "x.safetensors", "--prune-for", "nomodel"], "nomodel", code=2)


def means(path: Path, of: str, layout: str) -> Meaning:
    return meaning(*read_output(path)[:2], model(of), layout, read_output(path)[2])


def times(found: Meaning, factor: float) -> Meaning:
    return Meaning({w: d * factor for w, d in found.deltas.items()}, {}, {w: b * factor for w, b in found.biases.items()}, [])


@pytest.mark.parametrize(
    ("words", "factor"),
    [(("--scale", "0.5"), 0.5), (("--scale", "0.7"), 0.7), (("--negate",), -1.0), (("--negate", "--scale", "3"), -3.0)],
)
@pytest.mark.parametrize("family", ["lora", "loha", "lokr", "full"])
def test_scales_are_exact_where_alpha_is(tmp_path, words, factor, family):
    own = Builder.start(model("sd1"), "sd-scripts", "F16", 3)
    stem = own.add("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", family, rank=4, alpha=3.0)
    if family == "full":
        own.made.tensors[f"{stem}.diff_b"] = own.random(320)
    source, out = own.made.save(tmp_path), tmp_path / "out.safetensors"
    report = told("prune", source, out, *words)
    exact = family != "full" or abs(factor) in (0.5, 1.0)
    # An alpha in fp32 holds 0.7 * 3 to 6e-8; a full difference has none, and is rounded to fp16.
    assert_same(times(own.made.meaning(), factor), means(out, "sd1", "sd-scripts"), 1e-7 if exact else 1e-3)
    assert (report["rounding"] < 1e-7) is exact  # but for subnormal numbers
    if family != "full":
        same = [k for k in own.made.tensors if not k.endswith((".alpha", "up.weight", "w1_a", "w1"))]
        assert all(read(out)[0][k] == own.made.tensors[k] for k in same)


def test_a_scale_without_alpha_is_folded_and_its_rounding_reported(tmp_path):
    out = tmp_path / "out.safetensors"
    assert told("prune", SD15, out, "--scale", "0.25")["output"] == str(out)
    half = told("prune", out, tmp_path / "half.safetensors", "--scale", "0.5")
    assert half["rounding"] < 1e-7  # but for subnormal numbers
    odd = told("prune", out, tmp_path / "odd.safetensors", "--scale", "0.7", "--target", "diffusers")
    assert 1e-5 < odd["rounding"] < 3e-3
    a, b = (lorasurgery.load(path) for path in (out, tmp_path / "odd.safetensors"))
    errors = [np.linalg.norm(0.7 * a.modules[s].dense() - m.dense()) / np.linalg.norm(0.7 * a.modules[s].dense()) for s, m in b]
    assert math.sqrt(np.mean(np.square(errors))) == pytest.approx(odd["rounding"], rel=0.5)


def test_where_the_scale_went_is_told(tmp_path):
    line = "  scale    x {}, in {}"
    half = run("prune", LOHA, tmp_path / "half.safetensors", "--scale", "0.5").out
    assert line.format("0.5", "alpha, exact") in half
    odd = run("prune", LOHA, tmp_path / "odd.safetensors", "--scale", "0.7").out
    assert re.search(re.escape(line.format("0.7", "alpha, to ")) + r"\d\.\de-08", odd)
    assert line.format("-0.7", "the factors, to ") in run("prune", SD15, "--scale", "0.7", "--negate", "--dry-run").out


def test_what_depends_on_the_base_is_not_scaled(tmp_path):
    refused(tmp_path, ["prune", DORA, tmp_path / "x.safetensors", "--scale", "0.5"], "DoRA", "--drop family=dora")
    refused(
        tmp_path,
        ["prune", FIXTURES / "lycoris_ia3.safetensors", tmp_path / "x.safetensors", "--negate"],
        "IA3",
        "--drop family=ia3",
    )


def test_prune_refuses(tmp_path):
    out = tmp_path / "x.safetensors"
    refused(tmp_path, ["prune", LOHA, out], "nothing to do", code=2)
    refused(tmp_path, ["prune", LOHA, out, "--scale", "0"], "other than 0", code=2)
    refused(tmp_path, ["prune", LOHA, out, "--scale", "nan"], "other than 0", code=2)
    refused(tmp_path, ["prune", LOHA, out, "--drop", "double=0"], "double", code=2)
    refused(tmp_path, ["prune", LOHA, out, "--drop", "re=("], "regular expression", code=2)
    refused(tmp_path, ["prune", LOHA, out, "--keep", "re=nothing"], "nothing would be left", code=2)
    refused(tmp_path, ["prune", LOHA, LOHA, "--drop", "te"], "the output is the input")


def test_a_selection_without_modules_is_told(tmp_path):
    report = told("prune", LOHA, tmp_path / "x.safetensors", "--drop", "te", "--drop", "in=4-5")
    assert report["warnings"] == ["in=4-5 is no module of the file"]


def test_dry_runs_batches_and_layouts(tmp_path):
    text = run("prune", LOHA, "--drop", "te", "--dry-run").out
    assert text.splitlines()[0].endswith("lycoris_loha-pruned.safetensors (not written)")
    assert "pruned: lora_te_encoder_layers_0_self_attn_out_proj and 2 more: --drop te" in text
    outcome = run(
        "prune", LOHA, LOKR, "--keep", "unet", "--out-dir", tmp_path / "unet", "--target", "comfyui", "--dtype", "fp32"
    )
    assert outcome.code == 0, outcome.err
    for name in ("lycoris_loha", "lycoris_lokr"):
        tensors = read(tmp_path / "unet" / f"{name}.safetensors")[0]
        assert all(key.startswith("diffusion_model.") for key in tensors)
        assert {t.dtype for k, t in tensors.items() if not k.endswith("alpha")} == {"F32"}


def test_library():
    adapter, report = prune(lorasurgery.load(LOHA), PruneOptions(drop=("te",), scale=2.0))
    assert (len(adapter), len(report.dropped)) == (5, 3)
    assert {module.scale.value for module in adapter.modules.values()} == {1.5, 5.0}


# parts of modules -------------------------------------------------------------------------------------------------------------

_Q, _FFN, _NORM, _LONE = (f"diffusion_model.blocks.{n}" for n in ("0.self_attn.q", "1.ffn.0", "0.norm3", "1.self_attn.q"))
_KEYS = {
    f"{_Q}.lora_down.weight": (4, 5120), f"{_Q}.lora_up.weight": (5120, 4), f"{_Q}.diff_b": (5120,), f"{_LONE}.diff_b": (5120,),
    f"{_NORM}.diff": (5120,), f"{_NORM}.diff_b": (5120,), f"{_FFN}.lora_down.weight": (4, 5120),
    f"{_FFN}.lora_up.weight": (13824, 4), f"{_FFN}.alpha": (), f"{_FFN}.dora_scale": (13824, 1),
}  # fmt: skip


@pytest.mark.parametrize(
    ("drop", "gone"),
    [
        ("family=bias", r"diff_b$"), ("re=diff_b", r"diff_b$"), ("re=dora_scale", r"dora_scale$"), ("family=norm", r"norm3"),
        (r"re=norm3\.diff$", r"norm3\.diff$"), (r"re=norm3\.diff_b", r"norm3\.diff_b"), ("re=norm3", "norm3"),
        ("re=0.self_attn.q.lora", r"0\.self_attn\.q\.lora"), ("re=1.self_attn.q.diff", r"1\.self_attn\.q\.diff"),
        ("re=dora_scale|diff_b", r"dora_scale|diff_b"), ("re=lora_up", r"(?!)"), (r"re=alpha$", r"(?!)"),
    ],
)  # fmt: skip
def test_parts_of_modules_are_dropped(tmp_path, drop, gone):
    """Every key that the selection means goes, and no other; half of a change or an alpha alone is no part."""
    rng = np.random.default_rng(0)
    write(tmp_path / "in.safetensors", {key: raw(rng.standard_normal(shape), "F32") for key, shape in _KEYS.items()})
    result = told("prune", tmp_path / "in.safetensors", tmp_path / "out.safetensors", "--drop", drop)
    before, after = (read(tmp_path / name)[0] for name in ("in.safetensors", "out.safetensors"))
    assert after == {key: tensor for key, tensor in before.items() if not re.search(gone, key)}
    assert any("no module" in text for text in result["warnings"]) == (gone == "(?!)")


def test_what_replaces_a_part_of_the_model_is_not_scaled_in_silence(tmp_path):
    """PEFT's trained biases are the base's new ones, not changes."""
    rng, stem = np.random.default_rng(0), "base_model.model.blocks.0.self_attn.q"
    shapes = {f"{stem}.lora_A.weight": (4, 5120), f"{stem}.lora_B.weight": (5120, 4), f"{stem}.base_layer.bias": (5120,)}
    folder = tmp_path / "peft"
    folder.mkdir()
    tensors = {key: raw(rng.standard_normal(shape), "F32") for key, shape in shapes.items()}
    write(folder / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "lora_only", "target_modules": ["q"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    refused(
        tmp_path,
        ["prune", folder, tmp_path / "half", "--scale", "0.5"],
        "self_attn.q.bias: a replaced weight",
        "--drop family=set",
    )
    assert told("prune", folder, tmp_path / "some", "--scale", "0.5", "--drop", "family=set")["ledger"]["lost"]
    assert not told("prune", folder, tmp_path / "all", "--drop", "re=nothing")["ledger"]["lost"]
