"""What a conversion was told: strength from every source, text encoders, biases, norms, DoRA axes, options, refusals."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import numpy as np
import pytest

import lorasurgery
from lorasurgery.errors import DroppedKeysError, NotRepresentableError, RequestError
from tests.builders import Builder, Made, convert, factors, modules_of
from tests.oracle import (
    LAYOUTS,
    Parts,
    Raw,
    Reader,
    assert_same,
    delta,
    dense_deltas,
    fixture,
    model,
    modules,
    raw,
    relative_errors,
)

if TYPE_CHECKING:
    from pathlib import Path

FLUX, SWAPPED, LAST = "flux1-dev", "final_layer.adaLN_modulation.1", "joint_blocks.23.context_block.adaLN_modulation.1"


def small(layout: str, family: str = "lora", dtype: str = "BF16", *, alpha: float | None = 2.0, rank: int = 4) -> Builder:
    """One double block's projection and the last layer, whose halves are exchanged."""
    builder = Builder.start(model(FLUX), layout, dtype, 21)
    for weight in ("double_blocks.2.img_attn.proj", SWAPPED):
        for name in modules_of(model(FLUX), layout, weight):
            builder.add(name, family, rank=rank, alpha=alpha)
    return builder


# where the halves are exchanged -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["lora", "dora", "loha", "lokr", "full"])
@pytest.mark.parametrize(
    ("key", "weight"), [(FLUX, SWAPPED), ("sd3-medium", SWAPPED), ("sd3-medium", LAST), ("auraflow", "modF.1")]
)
def test_exchanged_halves(key: str, weight: str, family: str, tmp_path: Path) -> None:
    """On the output axis only, in every family, and back again."""
    of = model(key)
    builder = Builder.start(of, "sd-scripts", "BF16", 22)
    builder.add(weight, family, rank=4, alpha=1.0)
    output = convert(builder.made, "onetrainer", tmp_path)
    assert output.report.actions() == {"permuted": 1}
    assert_same(builder.made.meaning(), output.meaning())
    (before,), (after,) = (modules(t)[0].values() for t in (builder.made.tensors, output.tensors))
    for slot, tensor in before.slots.items():
        whole_rows = slot in ("down", "w1_b", "w2_b", "w2_a", "alpha") or (slot == "w2_a" and family == "lokr")
        if family != "loha" and whole_rows:
            assert after.slots[slot] == tensor, slot
    assert convert(output.as_made(), "sd-scripts", tmp_path).tensors == builder.made.tensors


def test_exchanged_halves_of_a_lokr_with_one_block_row(tmp_path: Path) -> None:
    builder = Builder.start(model(FLUX), "sd-scripts", "BF16", 22)
    builder.add(SWAPPED, "lokr", rank=4, alpha=1.0, blocks=1)
    output = convert(builder.made, "onetrainer", tmp_path)
    assert_same(builder.made.meaning(), output.meaning())


def test_exchanged_halves_cut_through_an_odd_number_of_blocks(tmp_path: Path) -> None:
    builder = Builder.start(model(FLUX), "sd-scripts", "BF16", 22)
    builder.add(SWAPPED, "lokr", rank=4, alpha=1.0, blocks=3)
    with pytest.raises(NotRepresentableError, match="blocks"):
        convert(builder.made, "onetrainer", tmp_path)


# DoRA ---------------------------------------------------------------------------------------------------------------------


def test_a_magnitude_per_column_survives_renames_and_permutations(tmp_path: Path) -> None:
    made = small("sd-scripts", "dora in").made
    for target in ("comfyui", "onetrainer", "lycoris", "other"):
        output = convert(made, target, tmp_path)
        assert_same(made.meaning(), output.meaning(), 2.0**-8 if target == "other" else 1e-12)
        assert sum(k.endswith(".dora_scale") for k in output.tensors) == 2


@pytest.mark.parametrize("target", ["diffusers", "peft"])
def test_a_magnitude_per_column_is_refused_or_listed(target: str, tmp_path: Path) -> None:
    made = small("sd-scripts", "dora in").made
    with pytest.raises(NotRepresentableError, match="per output row") as refused:
        convert(made, target, tmp_path)
    assert "--lossy" in str(refused.value)
    output = convert(made, target, tmp_path, lossy=True)
    assert len(output.report.dropped) == 2
    assert not output.report.exact
    before, after = made.meaning(), output.meaning()
    before.magnitudes.clear()
    assert_same(before, after)


@pytest.mark.parametrize(("source", "target", "weight"), [
    ("comfyui", "onetrainer", "double_blocks.2.img_attn.qkv"), ("onetrainer", "sd-scripts", "double_blocks.2.img_attn.qkv"),
])  # fmt: skip
def test_a_magnitude_per_column_couples_the_rows(source: str, target: str, weight: str, tmp_path: Path) -> None:
    builder = Builder.start(model(FLUX), source, "BF16", 23)
    for name in modules_of(model(FLUX), source, weight):
        builder.add(name, "dora in", rank=2, alpha=1.0)
    with pytest.raises(NotRepresentableError, match="per input column"):
        convert(builder.made, target, tmp_path)
    output = convert(builder.made, target, tmp_path, lossy=True)
    assert output.report.dropped
    before = builder.made.meaning()
    before.magnitudes.clear()
    assert_same(before, output.meaning())


def test_half_a_dora_is_not_fused(tmp_path: Path) -> None:
    builder = Builder.start(model(FLUX), "onetrainer", "BF16", 24)
    for name, family in zip(
        modules_of(model(FLUX), "onetrainer", "double_blocks.2.img_attn.qkv"), ("dora", "lora", "dora"), strict=True
    ):
        builder.add(name, family, rank=2, alpha=1.0)
    with pytest.raises(NotRepresentableError, match="only some of its parts"):
        convert(builder.made, "sd-scripts", tmp_path)
    split = convert(builder.made, "comfyui", tmp_path)  # which reads the split names
    assert_same(builder.made.meaning(), split.meaning())


# strength -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [t for t in LAYOUTS if t != "peft"])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_configurations(target: str, rslora: bool, tmp_path: Path) -> None:
    """Defaults, rank_pattern, alpha_pattern as a regular expression, the root of the rank."""
    builder = small("peft", dtype="F32", alpha=None)
    builder.add("transformer_blocks.4.ff.net.2", "lora", rank=9)
    builder.add("single_transformer_blocks.4.proj_out", "lora", rank=4)
    builder.made.configs[""] = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 2, "use_rslora": rslora,
        "rank_pattern": {"transformer_blocks.4.ff.net.2": 9},
        "alpha_pattern": {r"single_transformer_blocks\.\d+\.proj_out": 12, "ff.net.2": 3},
    }  # fmt: skip
    before = builder.made.meaning()
    output = convert(builder.made, target, tmp_path)
    assert_same(before, output.meaning(), 1e-6)
    parts = {p.stem.replace("_", "."): p for p in modules(output.tensors)[0].values()}
    assert len(parts) == 4
    if target == "comfyui" and not rslora:
        alphas = sorted(round(p.slots["alpha"].item(), 4) for p in parts.values() if "alpha" in p.slots)
        assert alphas == [2.0, 2.0, 3.0, 12.0]


def test_the_header_of_a_diffusers_file_counts(tmp_path: Path) -> None:
    builder = small("diffusers", alpha=None)
    fields = {"transformer.r": 4, "transformer.lora_alpha": 16, "transformer.alpha_pattern": {"norm_out.linear": 1}}
    builder.made.metadata["lora_adapter_metadata"] = json.dumps(fields)
    before = builder.made.meaning()
    output = convert(builder.made, "comfyui", tmp_path)
    assert_same(before, output.meaning())
    assert "lora_adapter_metadata" not in output.metadata
    again = convert(output.as_made(), "diffusers", tmp_path, alpha="header")
    assert_same(before, again.meaning())
    assert factors(again.tensors) == factors(builder.made.tensors)


def test_the_forks_rslora_flag(tmp_path: Path) -> None:
    builder = small("sd-scripts", dtype="F32", alpha=6.0, rank=3)
    builder.made.tensors["use_rslora_flag"] = Raw("BOOL", (), b"\1")
    before = builder.made.meaning()
    for target in ("comfyui", "sd-scripts", "diffusers"):
        output = convert(builder.made, target, tmp_path)
        assert_same(before, output.meaning(), 1e-6)
    plain = small("sd-scripts", dtype="F32", alpha=6.0, rank=3).made.meaning()
    assert max(relative_errors(plain, before).values()) == pytest.approx(math.sqrt(3) - 1)


def test_no_alpha_means_one(tmp_path: Path) -> None:
    made = small("comfyui", alpha=None).made
    output = convert(made, "sd-scripts", tmp_path)
    assert_same(made.meaning(), output.meaning())
    assert {t.item() for k, t in output.tensors.items() if k.endswith("alpha")} == {4.0}


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_folding(dtype: str, tmp_path: Path) -> None:
    exact = convert(small("comfyui", dtype=dtype).made, "comfyui", tmp_path, alpha="fold")  # 2 / 4
    assert exact.report.exact or dtype == "F16"
    assert_same(small("comfyui", dtype=dtype).made.meaning(), exact.meaning(), 1e-4 if dtype == "F16" else 1e-12)
    assert not any(k.endswith("alpha") for k in exact.tensors)
    made = small("comfyui", dtype=dtype, alpha=2.5).made
    rounded = convert(made, "comfyui", tmp_path, alpha="fold")
    true = max(relative_errors(made.meaning(), rounded.meaning()).values())
    assert 0 < true < {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-23}[dtype]
    assert rounded.report.losses.total() == pytest.approx(true, rel=0.05)
    assert not rounded.report.exact


def test_a_strength_a_layout_cannot_carry_is_refused(tmp_path: Path) -> None:
    for target, way in (("diffusers", "keep"), ("comfyui", "header"), ("peft", "keep")):
        with pytest.raises(RequestError, match="--alpha"):
            convert(small("comfyui").made, target, tmp_path, alpha=way)


# sd-scripts' split_qkv ----------------------------------------------------------------------------------------------------


def split_qkv_file() -> tuple[Made, Made]:
    """The trained parts, and the file with the defect: fused, the rank three times as big, the alpha of one part."""
    parts = Builder.start(model(FLUX), "onetrainer", "BF16", 25)
    for name in (*modules_of(model(FLUX), "onetrainer", "double_blocks.2.img_attn.qkv"), "transformer_blocks.2.attn.to_out.0"):
        parts.add(name, "lora", rank=4, alpha=2.0)
    return parts.made, parts.made


def test_the_alpha_defect_of_split_qkv(tmp_path: Path) -> None:
    parts, _ = split_qkv_file()
    broken = convert(parts, "sd-scripts", tmp_path).as_made()
    broken.tensors["lora_unet_double_blocks_2_img_attn_qkv.alpha"] = raw(2.0, "BF16")
    left = convert(broken, "comfyui", tmp_path)
    assert any("--fix-split-alpha" in w for w in left.report.warnings)
    assert_same(broken.meaning(), left.meaning())
    mended = convert(broken, "comfyui", tmp_path, fix_split_alpha=True)
    assert_same(parts.meaning(), mended.meaning())
    back = convert(broken, "onetrainer", tmp_path, fix_split_alpha=True)
    assert factors(back.tensors) == factors(parts.tensors)


def test_a_healthy_fused_file_is_not_suspected(tmp_path: Path) -> None:
    parts, _ = split_qkv_file()
    fused = convert(parts, "sd-scripts", tmp_path).as_made()
    assert not convert(fused, "comfyui", tmp_path).report.warnings


# to LoRA ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["comfyui", "diffusers", "sd-scripts", "peft"])
@pytest.mark.parametrize("family", ["loha", "lokr", "full"])
def test_as_lora_is_exact(family: str, target: str, tmp_path: Path) -> None:
    builder = Builder.start(model("sd1"), "sd-scripts", "F32", 26)
    for weight in ("time_embed.0", "input_blocks.1.1.proj_in", "input_blocks.1.0.in_layers.2"):
        shape = model("sd1").shapes[weight]
        if family == "full" and math.prod(shape) > 10**6:
            continue
        builder.add(modules_of(model("sd1"), "sd-scripts", weight)[0], family, rank=2, alpha=1.5)
    made = builder.made
    if target in ("diffusers", "peft") and (family != "lokr" or target == "diffusers") and (family, target) != ("loha", "peft"):
        with pytest.raises(NotRepresentableError, match="--as lora"):
            convert(made, target, tmp_path)
    output = convert(made, target, tmp_path, as_lora=True)
    assert_same(made.meaning(), output.meaning(), 3e-7)
    assert set(output.report.families()) == {"lora"}


# what is not a matrix -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["sd1", "sd2", "sdxl", "sd3-medium", FLUX])
def test_text_encoders(key: str, tmp_path: Path) -> None:
    of = model(key)
    for source in ("sd-scripts", "comfyui", "onetrainer"):
        builder = Builder.start(of, source, "BF16", 27)
        builder.add(modules_of(of, source, min(of.shapes))[0], "lora", rank=2, alpha=1.0)
        for table, *_ in of.encoders:
            names = [n for n in fixture("text_encoders")[table] if n.endswith(("q_proj", "fc2", "SelfAttention.o"))]
            for name in (names[0], names[-1]):
                builder.add_encoder(table, name, "lora", rank=3, alpha=1.5)
        for target in ("sd-scripts", "comfyui", "onetrainer", "lycoris"):
            output = convert(builder.made, target, tmp_path)
            assert_same(builder.made.meaning(), output.meaning())
            assert not output.meaning().unknown
        back = convert(convert(builder.made, "comfyui", tmp_path).as_made(), source, tmp_path)
        assert back.tensors == builder.made.tensors or modules_of(of, source, min(of.shapes)) != [min(of.shapes)]


@pytest.mark.parametrize("key", ["sd1", "sdxl", "sd3-medium"])
def test_clip_goes_to_diffusers(key: str, tmp_path: Path) -> None:
    of = model(key)
    builder = Builder.start(of, "sd-scripts", "F32", 27)
    builder.add(modules_of(of, "sd-scripts", min(of.shapes))[0], "lora", rank=2, alpha=2.0)
    for table, *_ in of.encoders[:2]:
        builder.add_encoder(table, "text_model.encoder.layers.3.self_attn.q_proj", "lora", rank=3, alpha=1.5)
    for alpha in ("fold", "header"):
        output = convert(builder.made, "diffusers", tmp_path, alpha=alpha)
        assert sum(k.startswith("text_encoder") for k in output.tensors) == 2 * len(of.encoders[:2])
        if alpha == "fold":
            assert_same(builder.made.meaning(), output.meaning())
        back = convert(output.as_made(), "sd-scripts", tmp_path)
        assert_same(builder.made.meaning(), back.meaning(), 1e-7)


def biased(layout: str) -> Made:
    builder = small(layout, alpha=None if layout in ("diffusers", "peft") else 2.0)
    for stem, parts in modules(builder.made.tensors)[0].items():
        ending = "lora_B.bias" if layout in ("diffusers", "peft") else "diff_b"
        builder.made.tensors[f"{stem}.{ending}"] = builder.random(parts.slots["up"].shape[0])
    if layout == "peft":
        builder.made.configs[""] = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "lora_bias": True}
    return builder.made


@pytest.mark.parametrize("source", ["comfyui", "sd-scripts", "peft", "diffusers"])
@pytest.mark.parametrize("target", LAYOUTS)
def test_biases(source: str, target: str, tmp_path: Path) -> None:
    """PEFT scales lora_B's bias with its weight, the others' is added as it is; its halves are exchanged too."""
    made = biased(source)
    output = convert(made, target, tmp_path)
    assert len(output.meaning().biases) == 2
    assert_same(made.meaning(), output.meaning(), 1e-12)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("target", ["sd-scripts", "comfyui", "diffusers"])
def test_a_bias_of_16_bits_times_its_scale_is_not_rounded_to_16_bits(dtype: str, target: str, tmp_path: Path) -> None:
    of = model(FLUX)
    builder = Builder.start(of, "peft", dtype, 31)
    stem = builder.add(modules_of(of, "peft", "double_blocks.2.img_attn.proj")[0], "lora", rank=7, alpha=3.0)
    builder.made.tensors[f"{stem}.lora_B.bias"] = builder.random(3072)
    builder.made.configs[""] = {"peft_type": "LORA", "r": 7, "lora_alpha": 3, "lora_bias": True}
    assert builder.made.tensors[f"{stem}.lora_B.bias"].dtype == dtype
    output = convert(builder.made, target, tmp_path)
    assert_same(builder.made.meaning(), output.meaning(), {"BF16": 3e-3, "F16": 4e-4}[dtype])
    (ours,), (theirs,) = (list(own.meaning().biases.values()) for own in (output, builder.made))
    assert np.linalg.norm(ours - theirs) < 1e-7 * np.linalg.norm(theirs)


def test_biases_are_cut_and_stacked(tmp_path: Path) -> None:
    builder = Builder.start(model(FLUX), "onetrainer", "F32", 28)
    q, k, v = modules_of(model(FLUX), "onetrainer", "double_blocks.2.img_attn.qkv")
    for name in (q, k, v):
        stem = builder.add(name, "lora", rank=2, alpha=1.0)
        if name != k:
            builder.made.tensors[f"{stem}.diff_b"] = builder.random(3072)
    fused = convert(builder.made, "comfyui", tmp_path)
    assert_same(builder.made.meaning(), fused.meaning())
    assert_same(builder.made.meaning(), convert(fused.as_made(), "lycoris", tmp_path).meaning())


def test_norms_and_full_differences(tmp_path: Path) -> None:
    builder = small("sd-scripts")
    builder.add("vector_in.in_layer", "full")
    builder.made.tensors["lora_unet_double_blocks_0_img_attn_norm_query_norm.w_norm"] = builder.random(128)
    made = builder.made
    for target in ("comfyui", "onetrainer", "lycoris", "other"):
        output = convert(made, target, tmp_path, **({"alpha": "keep"} if target == "other" else {}))
        assert output.report.families() == {"lora": 2, "full": 1, "norm": 1}
        assert set(made.tensors.values()) - set(output.tensors.values()) <= {  # the exchanged halves
            made.tensors["lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"]
        }
        back = convert(output.as_made(), "sd-scripts", tmp_path)
        assert back.tensors == made.tensors
    with pytest.raises(NotRepresentableError):
        convert(made, "diffusers", tmp_path)
    lossy = convert(made, "diffusers", tmp_path, lossy=True, as_lora=True)
    assert [reason for _, reason in lossy.report.dropped] == ["Diffusers does not load NORM modules"]


@pytest.mark.parametrize("family", ["lora", "loha", "lokr"])
@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize(("key", "weight"), [("sd1", "input_blocks.1.0.in_layers.2"), ("wan-2.1-t2v-1.3b", "patch_embedding")])
def test_convolutions(key: str, weight: str, tucker: bool, family: str, tmp_path: Path) -> None:
    """3x3 and 5-D; a Tucker core is folded where the words have no place for it."""
    of = model(key)
    builder = Builder.start(of, "sd-scripts", "F32", 29)
    builder.add(modules_of(of, "sd-scripts", weight)[0], family, rank=3, alpha=1.0, tucker=tucker)
    for target in ("comfyui", "lycoris", "other", "diffusers"):
        if family != "lora" and target == "diffusers":
            continue
        output = convert(builder.made, target, tmp_path)
        assert_same(builder.made.meaning(), output.meaning(), 3e-7)


# options ------------------------------------------------------------------------------------------------------------------


def everything() -> Builder:
    """A denoiser, a text encoder, and keys that belong to nothing."""
    builder = small("sd-scripts")
    builder.add_encoder("clip_l", "text_model.encoder.layers.3.mlp.fc1", "lora", rank=2, alpha=1.0)
    builder.made.tensors["bundle_emb.style.clip_l"] = builder.random(2, 768)
    builder.made.tensors["lora_unet_double_blocks_99_img_attn_proj.alpha"] = raw(1.0, "F32")
    builder.made.tensors["lora_unet_double_blocks_99_img_attn_proj.lora_up.weight"] = builder.random(3072, 2)
    builder.made.tensors["lora_unet_double_blocks_99_img_attn_proj.lora_down.weight"] = builder.random(2, 3072)
    return builder


@pytest.mark.parametrize("target", LAYOUTS)
def test_every_key_is_used_harmless_or_lost(target: str, tmp_path: Path) -> None:
    """A module that the table does not have goes where its name is known, and a learned token where it is read."""
    made = everything().made
    drop = ("te",) if target == "peft" else ()
    own = {k for k in made.tensors if "99" in k}
    if target != "sd-scripts":
        with pytest.raises(NotRepresentableError, match=r"double_blocks_99|bundle_emb"):
            convert(made, target, tmp_path, drop=drop)
    output = convert(made, target, tmp_path, drop=drop, lossy=True)
    ledger = output.report.ledger
    assert ledger is not None
    parts = [set(ledger.used), set(ledger.harmless), set(ledger.lost)]
    assert set().union(*parts) == made.tensors.keys()
    assert sum(map(len, parts)) == len(made.tensors)
    assert own <= (parts[0] if target == "sd-scripts" else parts[2])
    assert ("bundle_emb.style.clip_l" in parts[0]) == (target in ("sd-scripts", "onetrainer"))
    assert all(output.tensors[k] == made.tensors[k] for k, _ in output.report.carried)
    assert len(output.report.changes) == 3 - (target == "peft") + (target == "sd-scripts")
    assert output.report.exact == (not ledger.lost and not output.report.losses.entries)
    if ledger.lost.keys() - {k for k in made.tensors if k.startswith("lora_te")}:
        with pytest.raises(DroppedKeysError, match="--strict"):
            convert(made, target, tmp_path, strict=True, drop=drop, lossy=True)


@pytest.mark.parametrize(
    ("drop", "left"), [(("te",), 2), (("unet",), 1), (("double_blocks",), 2), ((r"fc1$", "final_layer"), 1)]
)
def test_drop(drop: tuple[str, ...], left: int, tmp_path: Path) -> None:
    builder = small("sd-scripts")
    builder.add_encoder("clip_l", "text_model.encoder.layers.3.mlp.fc1", "lora", rank=2, alpha=1.0)
    output = convert(builder.made, "comfyui", tmp_path, drop=drop)
    assert len(output.report.changes) == left
    assert len(output.report.dropped) == 3 - left
    assert len(modules(output.tensors)[0]) == left


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("family", ["lora", "loha", "lokr", "dora"])
@pytest.mark.parametrize("source", ["F32", "BF16", "F16"])
def test_dtype(source: str, family: str, dtype: str, tmp_path: Path) -> None:
    made = small("sd-scripts", family, source).made
    output = convert(made, "comfyui", tmp_path, dtype=dtype)
    short = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}[dtype]
    assert {t.dtype for t in factors(output.tensors).values()} == {short}
    before, after = made.meaning(), output.meaning()
    error = max(relative_errors(before, after).values())
    if (source, short) == ("BF16", "F16"):  # only the smallest numbers lose anything
        assert error < 1e-4
        return
    assert output.report.exact == (error == 0.0)
    assert (error == 0.0) == (dtype == "fp32" or short == source)
    if error:
        worst = output.report.worst()
        measured = family in ("lora", "dora")  # the others add up the roundings of their factors
        assert worst is not None
        assert worst[1] == pytest.approx(error, rel=0.2 if measured else 0.7)  # the truth is sampled


def test_a_dry_run_writes_nothing_and_tells_the_same(tmp_path: Path) -> None:
    made = small("sd-scripts", alpha=2.5).made
    (tmp_path / "x").mkdir()
    adapter = lorasurgery.load(made.save(tmp_path / "x"), arch=FLUX)
    result, report = lorasurgery.convert(adapter, "diffusers")
    out = tmp_path / "x" / "out.safetensors"
    lorasurgery.save(result, out, options=lorasurgery.SaveOptions(dry_run=True), report=report)
    assert not out.exists()
    written = convert(made, "diffusers", tmp_path).report
    assert report.losses.total() == pytest.approx(written.losses.total())
    assert [c.name for c in report.changes] == [c.name for c in written.changes]


def test_the_oracle_sees_a_wrong_file(tmp_path: Path) -> None:
    """Another scale, rows in another order, a factor exchanged, a module gone: each is noticed."""
    made = small("comfyui").made
    right = made.meaning()
    key = "diffusion_model.final_layer.adaLN_modulation.1"
    up = made.tensors[f"{key}.lora_up.weight"]
    half = len(up.data) // 2
    wrong = {
        "scale": {f"{key}.alpha": raw(2.001, "F32")},
        "rows": {f"{key}.lora_up.weight": Raw(up.dtype, up.shape, up.data[half:] + up.data[:half])},
        "one row": {f"{key}.lora_up.weight": Raw(up.dtype, up.shape, bytes(8) + up.data[8:])},
    }
    for change in wrong.values():
        with pytest.raises(AssertionError):
            assert_same(right, dense_deltas(made.tensors | change, model(FLUX), Reader("comfyui")), 1e-6)
    gone = {k: t for k, t in made.tensors.items() if not k.startswith(key)}
    with pytest.raises(AssertionError):
        assert_same(right, dense_deltas(gone, model(FLUX), Reader("comfyui")))
    assert np.any(delta(Parts("x", "lora", {"up": up, "down": made.tensors[f"{key}.lora_down.weight"]}), np.arange(3)))
