"""What `inspect` says about adapters: producers' files, wild lists, metadata, and everything that is suspicious."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.numpy import save_file

import lorasurgery
from lorasurgery.architectures import architectures
from lorasurgery.inspection import SCHEMA, Description, describe
from lorasurgery.inspection.training import tag_counts, training_summary, trigger_words, unfolded
from lorasurgery.operations.conversion.settled import undecided
from tests.headers import FLUX, HERE, fixture, hollow, lora

if TYPE_CHECKING:
    from pathlib import Path

PRODUCERS = sorted(
    p for p in (HERE / "producers").iterdir() if p.is_dir() or (p.suffix == ".safetensors" and ".truth." not in p.name)
)
WILD = sorted(p.name.removesuffix(".json.gz") for p in (HERE / "wild").glob("*.json.gz"))
STABLE = {
    "schema", "path", "kind", "summary", "container", "size", "architecture", "variant", "architecture_name", "candidates",
    "undecided", "coverage", "layout", "trainer", "families", "components", "rank", "alpha", "scale", "scale_sources", "dtype",
    "tensors", "parameters", "dora", "kernels", "tucker", "qkv", "lokr_factor", "metadata", "training", "triggers", "tags",
    "embeddings", "evidence", "unexplained", "warnings", "modules", "keys", "spectrum",
}  # fmt: skip


def codes(own: Description) -> set[str]:
    return {warning.code for warning in own.warnings}


def flux(tmp_path: Path, metadata: dict[str, str] | None = None, **how: Any) -> Description:
    return describe(hollow(tmp_path / "flux.safetensors", lora(FLUX), metadata, **how))


@pytest.mark.parametrize("path", PRODUCERS, ids=lambda p: p.name)
def test_producers_files_are_described_as_they_are_parsed(path: Path) -> None:
    own, adapter = describe(path), lorasurgery.load(path)
    assert (own.kind, own.coverage, own.unexplained) == ("adapter", 1.0, ())
    assert codes(own) <= ({"undecidable", "parse"} if path.name == "peft_raw.safetensors" else {"undecidable"})
    assert own.layout == adapter.layout
    assert own.architecture == adapter.architecture.id
    tied = [architectures()[key] for key, _ in adapter.candidates]
    assert own.undecided == undecided(tied, [module.name for _, module in adapter])
    by_name = {module.name: module for module in own.modules}
    assert len(by_name) == len(adapter)
    for _, module in adapter:
        row = by_name[module.name]
        assert row.scale == (module.scale.value if module.delta is not None else None)
        assert row.family == module.family or (row.family, module.family) == ("dylora", "lora")
        assert row.rank == (None if module.delta is None else module.delta.rank)
        assert row.dora == (None if module.magnitude is None else module.magnitude.axis)
    assert sum(m.bytes for m in own.modules) <= own.size
    made = own.to_json()
    assert made.keys() == STABLE
    assert made["schema"] == SCHEMA
    json.dumps(made, allow_nan=False)


@pytest.mark.parametrize("name", WILD)
def test_wild_lists_never_fail(name: str, tmp_path: Path) -> None:
    facts = fixture("wild", name)
    shapes = {key: [4, 4] if shape is None else shape for key, shape in facts["keys"].items()}
    own = describe(hollow(tmp_path / "wild.safetensors", shapes, facts.get("metadata")))
    json.dumps(own.to_json(), allow_nan=False)
    if name.startswith("handmade"):
        assert own.kind == "mangled-adapter"
        assert "expected lora_unet_down_blocks_0" in own.warnings[0].message
        return
    assert own.kind == "adapter"
    assert own.modules
    assert own.families
    if facts["complete"]:
        expected = facts["architecture"].replace("sd1.5", "sd1")
        assert (own.architecture, own.coverage) == (expected, 1.0)
        assert not codes(own) & {"broken-module", "unexplained", "undecidable", "unknown-architecture"}
        assert "text_encoder" not in own.components
    elif own.architecture == "unknown":
        assert codes(own) & {"unknown-architecture"}
        assert own.modules[0].weight is None


def test_dylora_is_told_by_its_metadata() -> None:
    own = describe(HERE / "producers" / "lycoris_dylora.safetensors")
    assert own.families == {"dylora": 5}
    assert own.trainer is not None
    assert own.trainer.name == "sd-scripts with LyCORIS"


def test_lokr_factor_agrees_or_not(tmp_path: Path) -> None:
    factor = describe(HERE / "samples" / "z_image_lokr.safetensors").lokr_factor
    assert factor is not None
    assert (factor.buffer, factor.metadata, factor.implied, factor.agree) == (-1, -1, (-1,), True)
    stem = "lycoris_transformer_blocks_0_attn_add_q_proj"
    shapes = {f"{stem}.lokr_w1": [16, 16], f"{stem}.lokr_w2": [192, 192]}
    for said, agree in (("16", True), ("8", False)):
        own = describe(hollow(tmp_path / "x.safetensors", shapes, {"ss_lokr_factor": said}))
        assert own.lokr_factor is not None
        assert (own.lokr_factor.implied, own.lokr_factor.agree) == ((16,), agree)
        assert ("lokr-factor" in codes(own)) is not agree
    shapes |= {"lokr_factor": []}
    own = describe(hollow(tmp_path / "x.safetensors", shapes, {"ss_lokr_factor": "16"}, scalars={"lokr_factor": 4}))
    assert own.lokr_factor is not None
    assert (own.lokr_factor.buffer, own.lokr_factor.agree) == (4, False)


@pytest.mark.parametrize(
    ("name", "factor"),
    [("lycoris_lokr", 8), ("lycoris_lokr_both", -1), ("lycoris_lokr_unbalanced", -1), ("lycoris_standalone", 16)],
)
def test_lokr_factor_is_implied_by_shapes(name: str, factor: int) -> None:
    own = describe(HERE / "producers" / f"{name}.safetensors").lokr_factor
    assert own is not None
    assert own.implied == (factor,)


def test_fused_and_split() -> None:
    assert describe(HERE / "producers" / "diffusers_z_image.safetensors").qkv == "split"
    assert describe(HERE / "producers" / "lycoris_lokr.safetensors").qkv is None


def test_metadata_that_names_another_model_is_flagged(tmp_path: Path) -> None:
    own = flux(tmp_path, {"ss_base_model_version": "sdxl_base_v1-0"})
    message = next(w.message for w in own.warnings if w.code == "base-model")
    assert "metadata says Stable Diffusion XL" in message
    assert "keys say FLUX.1;" in message
    assert not codes(flux(tmp_path, {"ss_base_model_version": "flux1", "modelspec.architecture": "flux-1-dev/lora"}))


def test_dim_and_alpha_that_are_not_the_tensors(tmp_path: Path) -> None:
    own = flux(tmp_path, {"ss_network_dim": "32", "ss_network_alpha": "16"})
    assert codes(own) == {"network-dim", "network-alpha"}
    assert not codes(flux(tmp_path, {"ss_network_dim": "8", "ss_network_alpha": "4"}))
    assert not codes(flux(tmp_path, {"ss_network_dim": "Dynamic", "ss_network_alpha": "None"}))


@pytest.mark.parametrize(("value", "code"), [(math.inf, "infinite-alpha"), (math.nan, "infinite-alpha"), (0.0, "zero-alpha")])
def test_alphas_that_are_none(value: float, code: str, tmp_path: Path) -> None:
    own = flux(tmp_path, scalars={"lora_unet_single_blocks_0_linear1.alpha": value})
    assert code in codes(own)
    assert own.architecture == "flux1"
    assert len(own.modules) == len(FLUX)
    odd = next(m for m in own.modules if m.name.endswith("linear1"))
    assert (odd.problem is None) == (value == 0.0)
    json.dumps(own.to_json(), allow_nan=False)


def test_two_spellings_of_one_weight(tmp_path: Path) -> None:
    stems = {**FLUX, "diffusion_model.double_blocks.0.img_attn.qkv": [9216, 3072]}
    own = describe(hollow(tmp_path / "x.safetensors", lora(stems)))
    assert "two-spellings" in codes(own)
    assert len(own.modules) == len(FLUX) + 1


def test_broken_modules_are_rows_with_a_reason(tmp_path: Path) -> None:
    shapes = lora(FLUX)
    del shapes["lora_unet_single_blocks_0_linear1.lora_up.weight"]
    shapes["lora_unet_single_blocks_37_linear2.lora_up.weight"] = [3071, 8]
    own = describe(hollow(tmp_path / "x.safetensors", shapes))
    problems = {m.name: m.problem for m in own.modules if m.problem}
    assert set(problems) == {"lora_unet_single_blocks_0_linear1", "lora_unet_single_blocks_37_linear2"}
    assert "FLUX.1 dev expects [3072, 15360]" in str(problems["lora_unet_single_blocks_37_linear2"])
    assert codes(own) == {"broken-module"}
    assert "2 modules are broken" in own.warnings[0].message


def test_keys_of_no_module_are_listed(tmp_path: Path) -> None:
    shapes = {**lora(FLUX), "mystery.tensor": [3], "bundle_emb.cat.clip_l": [2, 768], "lora_unet_nowhere.diff": [3]}
    own = describe(hollow(tmp_path / "x.safetensors", shapes))
    assert dict(own.unexplained).keys() == {"mystery.tensor"}
    assert [m.name for m in own.modules if m.weight == "nowhere"] == ["lora_unet_nowhere"]
    assert "own-names" in codes(own)
    assert own.embeddings == ("bundle_emb.cat.clip_l",)
    assert own.coverage == pytest.approx(6 / 7)


def test_split_qkv_alpha_is_suspected(tmp_path: Path) -> None:
    shapes = lora(FLUX, rank=8)
    for stem, parts in (("lora_unet_double_blocks_0_img_attn_qkv", 3), ("lora_unet_single_blocks_0_linear1", 4)):
        out, columns = FLUX[stem]
        shapes |= {f"{stem}.lora_down.weight": [8 * parts, columns], f"{stem}.lora_up.weight": [out, 8 * parts]}
    own = describe(hollow(tmp_path / "x.safetensors", shapes))
    assert "split-qkv-alpha" in codes(own)


def test_mixed_dtypes_hash_of_nothing_and_bad_json(tmp_path: Path) -> None:
    import numpy as np

    tensors = {k: np.ones(s, "f2" if "linear1" in k else "f4") for k, s in lora(FLUX, rank=1).items()}
    meta = {"sshs_model_hash": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", "ss_network_args": "{x"}
    save_file(tensors, tmp_path / "x.safetensors", meta)
    assert codes(describe(tmp_path / "x.safetensors")) == {"mixed-dtypes", "empty-hash", "bad-json"}


def test_two_adapters_in_one_file(tmp_path: Path) -> None:
    one = {f"base_model.model.blocks.0.self_attn.q.lora_{side}.{name}.weight": shape
           for name in ("default", "second") for side, shape in (("A", [4, 1536]), ("B", [1536, 4]))}  # fmt: skip
    own = describe(hollow(tmp_path / "x.safetensors", one))
    assert "duplicate" in codes(own)
    assert own.architecture == "wan"


def test_unknown_model_is_still_described(tmp_path: Path) -> None:
    stems = {f"lora_unet_strange_{i}_thing": [64, 32] for i in range(3)}
    own = describe(hollow(tmp_path / "x.safetensors", lora(stems)))
    assert (own.architecture, own.layout, own.coverage) == ("unknown", "sd-scripts", 0.0)
    assert own.families == {"lora": 3}
    assert own.rank.histogram == {"8": 3}
    assert [(m.block, m.kind, m.scale) for m in own.modules] == [(f"strange_{i}", "thing", 0.5) for i in range(3)]


METADATA = {
    "ss_base_model_version": "sdxl_base_v1-0", "ss_steps": "1600", "ss_epoch": "8", "ss_learning_rate": "0.0001",
    "ss_network_module": "networks.lora", "ss_network_dim": "16", "ss_cache_latents": "True", "ss_clip_skip": "None",
    "ss_output_name": "1234", "ss_session_id": "12345678901234567890", "ss_optimizer": "torch.optim.AdamW(weight_decay=0.1)",
    "ss_bucket_info": '{"buckets": {"0": {"resolution": [832, 1216], "count": 40}}, "mean_img_ar_error": 0.01}',
    "ss_tag_frequency": '{"10_cat": {" cat": 40, "sitting": 12}, "5_dog": {"dog": 3, "cat": 1}}',
    "ss_dataset_dirs": '{"10_cat": {"n_repeats": 10, "img_count": 40}}',
    "ss_training_started_at": "1700000000.5", "ss_training_finished_at": "1700003600.5",
    "modelspec.trigger_phrase": "a sks cat", "sshs_model_hash": "0123", "nested": "[" * 500 + "]" * 500,
    "ss_network_args": '{"conv_dim": "8", "odd": NaN}',
}  # fmt: skip


def test_metadata_is_typed_and_unfolded() -> None:
    typed = unfolded(METADATA)
    types = {key: entry["type"] for key, entry in typed.items()}
    assert types["ss_steps"] == "int"
    assert types["ss_learning_rate"] == "float"
    assert types["ss_cache_latents"] == "bool"
    assert types["ss_clip_skip"] == "null"
    assert types["ss_tag_frequency"] == "json"
    assert typed["ss_output_name"] == {"type": "string", "value": "1234"}
    assert typed["sshs_model_hash"] == {"type": "string", "value": "0123"}
    assert typed["ss_session_id"]["value"] == 12345678901234567890
    assert types["nested"] == "string"
    json.dumps(typed, allow_nan=False)


def test_training_summary_and_triggers() -> None:
    typed = unfolded(METADATA)
    summary = training_summary(typed)
    assert summary["base_model"] == "sdxl_base_v1-0"
    assert (summary["steps"], summary["seconds"]) == (1600, 3600)
    assert summary["buckets"] == {"832x1216": 40}
    assert summary["datasets"] == [{"name": "10_cat", "images": 40, "repeats": 10}]
    counts = tag_counts(typed)
    assert counts == [("cat", 41), ("sitting", 12), ("dog", 3)]
    found = trigger_words(typed, counts)
    assert (found["phrase"], found["output_name"]) == ("a sks cat", "1234")
    assert found["tags"][0] == {"tag": "cat", "count": 41}


def test_other_programs_metadata() -> None:
    typed = unfolded({
        "software": '{"name": "ai-toolkit", "version": "0.7.1"}', "training_info": '{"step": 2000, "epoch": 9}',
        "ot_config": '{"base_model_name": "x/y", "lora_rank": 16, "optimizer": {"optimizer": "ADAMW"}}',
    })  # fmt: skip
    summary = training_summary(typed)
    assert (summary["software"], summary["steps"], summary["optimizer"]) == ("ai-toolkit 0.7.1", 2000, "ADAMW")


@pytest.mark.parametrize(
    ("metadata", "name"),
    [
        ({"ss_network_module": "networks.lora_flux", "ss_v2": "False"}, "sd-scripts"),
        ({"ss_network_module": "networks.lora_qwen_image"}, "musubi-tuner"),
        ({"software": '{"name": "ai-toolkit"}'}, "ai-toolkit"),
        ({"ot_revision": "abc"}, "OneTrainer"),
        ({}, "sd-scripts or a relative"),
    ],
)
def test_trainers(metadata: dict[str, str], name: str, tmp_path: Path) -> None:
    own = flux(tmp_path, metadata)
    assert own.trainer is not None
    assert own.trainer.name == name
    assert own.trainer.evidence


def test_the_same_keys_give_the_same_answer_from_memory(tmp_path: Path) -> None:
    first = flux(tmp_path, {"ss_output_name": "a"})
    second = flux(tmp_path, {"ss_output_name": "b"})
    assert first.modules == second.modules
    assert first.triggers != second.triggers
    assert flux(tmp_path, scalars={"lora_unet_single_blocks_0_linear1.alpha": 2.0}).alpha.histogram == {"2": 1, "4": 5}
