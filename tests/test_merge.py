"""Sums of adapters against dense float64 sums of what their files say."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lorasurgery
from lorasurgery.errors import NotRepresentableError, RequestError
from lorasurgery.files.alike import one_architecture
from lorasurgery.operations.conversion.convert import Options, convert
from lorasurgery.operations.cut import ResizeOptions
from lorasurgery.verbs.merge import MergeOptions, Source, merge, parse_weight
from tests.builders import Builder, meaning, read_output
from tests.oracle import Meaning, assert_same, model, raw, relative_errors

if TYPE_CHECKING:
    from pathlib import Path

    from lorasurgery.adapter import Adapter


SDXL, FLUX, Z = model("sdxl"), model("flux1-dev"), model("z-image")
TO_Q = "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
TO_OUT = "input_blocks.4.1.transformer_blocks.0.attn1.to_out.0"
TO_K = "input_blocks.4.1.transformer_blocks.0.attn2.to_k"
CONV = "input_blocks.4.0.in_layers.2"
MID = "middle_block.1.transformer_blocks.0.attn1.to_q"
ENCODER = "text_model.encoder.layers.0.self_attn.q_proj"


def loaded(builder: Builder, folder: Path, arch: str | None = None) -> Adapter:
    """What the file of a builder is read as."""
    home = folder / f"in{len(list(folder.iterdir()))}"
    home.mkdir()
    return lorasurgery.load(builder.made.save(home), arch=arch or builder.made.of.key)


def source(adapter: Adapter, weight: str = "1", name: str = "file") -> Source:
    return Source(adapter, parse_weight(weight.split(":")), name)


class Result:
    """A merge, written and read again."""

    def __init__(self, sources: list[Source], folder: Path, target: str | None = None, **how: Any) -> None:
        options = {key: how.pop(key) for key in list(how) if key in ("as_lora", "qkv")}
        target = target or sources[0].adapter.layout
        self.of = model(sources[0].adapter.architecture.key)
        self.adapter, self.report = merge(sources, MergeOptions(**how), target)
        converted, writing = convert(self.adapter, target, Options(dtype=how.get("dtype", "keep"), **options))
        self.path = folder / f"out{len(list(folder.iterdir()))}{'' if target == 'peft' else '.safetensors'}"
        self.writing = lorasurgery.save(converted, self.path, report=writing)
        self.tensors, self.metadata, configs = read_output(self.path)
        self.meaning = meaning(self.tensors, self.metadata, self.of, target, configs)

    @property
    def actions(self) -> dict[str, int]:
        return self.report.actions()


def weighted(*terms: tuple[Meaning, float]) -> Meaning:
    """The sum of what files say, each times its weight."""
    total = Meaning({}, {}, {}, [])
    for one, weight in terms:
        for kind in ("deltas", "biases"):
            there = getattr(total, kind)
            for name, values in getattr(one, kind).items():
                there[name] = there.get(name, 0.0) + weight * values
    return total


def error(result: Result, truth: Meaning) -> float:
    return max(relative_errors(truth, result.meaning).values())


def two(dtypes: tuple[str, str] = ("F32", "F32"), layouts: tuple[str, str] = ("sd-scripts", "sd-scripts")) -> list[Builder]:
    """Two SDXL files with different ranks, alphas and modules: linear, convolution, text encoder."""
    first, second = (Builder.start(SDXL, lay, dt, seed) for seed, (lay, dt) in enumerate(zip(layouts, dtypes, strict=True)))
    for own, rank, alpha in ((first, 4, 3.0), (second, 6, 1.0)):
        names = {TO_Q: TO_Q, CONV: CONV}
        if own.made.layout in ("diffusers", "lycoris", "onetrainer", "peft"):
            names = {TO_Q: "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", CONV: "down_blocks.1.resnets.0.conv1"}
        own.add(names[TO_Q], "lora", rank=rank, alpha=alpha)
        own.add(names[CONV], "lora", rank=rank + 1, alpha=alpha / 2)
    first.add(TO_K, "lora", rank=3, alpha=2.0)
    return [first, second]


@pytest.mark.parametrize("weights", [("1", "1"), ("0.7", "-0.4"), ("-2", "0.5"), ("0", "1"), ("1", "0")])
def test_the_sum_is_that_of_the_changes(tmp_path: Path, weights: tuple[str, str]) -> None:
    builders = two()
    result = Result([source(loaded(b, tmp_path), w) for b, w in zip(builders, weights, strict=True)], tmp_path)
    truth = weighted(*((b.made.meaning(), float(w)) for b, w in zip(builders, weights, strict=True)))
    assert error(result, truth) < 3e-7
    assert len(result.report.sources) == 2
    if "0" not in weights:
        ranks = {t.shape[1] for key, t in result.tensors.items() if key.endswith("lora_up.weight")}
        assert ranks == {10, 12, 3}  # 4 + 6, 5 + 7, one file's own


def test_scales_that_differ_by_powers_of_two_are_exact_in_any_dtype(tmp_path: Path) -> None:
    first, second = (Builder.start(SDXL, "sd-scripts", "BF16", seed) for seed in (0, 1))
    first.add(TO_Q, "lora", rank=4, alpha=3.0)
    second.add(TO_Q, "lora", rank=8, alpha=3.0)
    result = Result([source(loaded(first, tmp_path), "1"), source(loaded(second, tmp_path), "-0.5")], tmp_path)
    truth = weighted((first.made.meaning(), 1.0), (second.made.meaning(), -0.5))
    assert_same(truth, result.meaning, 1e-15)
    assert not result.report.losses.entries
    assert not result.writing.losses.entries
    stem = first.stem(TO_Q)
    downs = [b.made.tensors[f"{stem}.lora_down.weight"].data for b in (first, second)]
    assert result.tensors[f"{stem}.lora_down.weight"].data == b"".join(downs)


def test_other_scales_are_multiplied_in_once_and_alpha_is_the_rank(tmp_path: Path) -> None:
    builders = two(("BF16", "BF16"))
    result = Result([source(loaded(b, tmp_path), w) for b, w in zip(builders, ("0.7", "0.9"), strict=True)], tmp_path)
    truth = weighted((builders[0].made.meaning(), 0.7), (builders[1].made.meaning(), 0.9))
    stem = builders[0].stem(TO_Q)
    assert result.tensors[f"{stem}.alpha"].f64() == 10.0
    measured = relative_errors(truth, result.meaning)[TO_Q]
    reported = result.report.losses.relative()[stem]
    assert 0 < measured < 4e-3
    assert reported == pytest.approx(measured, rel=0.3)  # the oracle looks at some columns


def test_a_module_of_one_file_is_copied_or_only_scaled(tmp_path: Path) -> None:
    builders = two(("BF16", "F16"))
    result = Result([source(loaded(b, tmp_path), w) for b, w in zip(builders, ("0.3", "1"), strict=True)], tmp_path)
    stem = builders[0].stem(TO_K)
    for part in ("lora_up", "lora_down"):
        assert result.tensors[f"{stem}.{part}.weight"] == builders[0].made.tensors[f"{stem}.{part}.weight"]
    assert result.tensors[f"{stem}.alpha"].f64() == pytest.approx(0.3 * 2.0, rel=1e-7)
    assert result.actions == {"side by side": 2, "scaled": 1}


def test_weight_1_alone_changes_no_byte(tmp_path: Path) -> None:
    (only, _) = two(("BF16", "BF16"))
    result = Result([source(loaded(only, tmp_path))], tmp_path)
    assert result.tensors == only.made.tensors
    assert result.actions == {"kept": 3}


@pytest.mark.parametrize("layouts", [("sd-scripts", "diffusers"), ("diffusers", "sd-scripts"), ("onetrainer", "comfyui")])
@pytest.mark.parametrize("target", ["sd-scripts", "comfyui", "diffusers"])
def test_layouts_mix(tmp_path: Path, layouts: tuple[str, str], target: str) -> None:
    first, second = (Builder.start(SDXL, layout, "F32", seed) for seed, layout in enumerate(layouts))
    for own, rank in ((first, 4), (second, 6)):
        diffusers = own.made.layout in ("diffusers", "onetrainer")
        alpha = None if own.made.layout == "diffusers" else 3.0
        prefix = "down_blocks.1.attentions.0" if diffusers else "input_blocks.4.1"
        own.add(f"{prefix}.transformer_blocks.0.attn1.to_q", "lora", rank=rank, alpha=alpha)
    result = Result([source(loaded(first, tmp_path), "0.5"), source(loaded(second, tmp_path), "2")], tmp_path, target)
    truth = weighted((first.made.meaning(), 0.5), (second.made.meaning(), 2.0))
    assert error(result, truth) < 3e-7


def flux_qkv(layout: str, seed: int, rank: int, *, members: str = "qkv", alpha: float = 3.0, dtype: str = "F32") -> Builder:
    """A FLUX attention, fused or as three modules; and a final layer, whose halves Diffusers has the other way round."""
    own = Builder.start(FLUX, layout, dtype, seed)
    if layout == "diffusers":
        for i, member in enumerate(members):
            own.add(f"transformer_blocks.0.attn.to_{member}", "lora", rank=rank + i, alpha=None)
        own.add("norm_out.linear", "lora", rank=rank, alpha=None)
    else:
        own.add("double_blocks.0.img_attn.qkv", "lora", rank=rank, alpha=alpha)
        own.add("final_layer.adaLN_modulation.1", "lora", rank=rank, alpha=alpha)
    return own


@pytest.mark.parametrize("target", ["sd-scripts", "diffusers"])
@pytest.mark.parametrize("members", ["qkv", "qv", "k"])
def test_fused_and_split_meet_at_one_granularity(tmp_path: Path, target: str, members: str) -> None:
    fused, split = flux_qkv("sd-scripts", 0, 4), flux_qkv("diffusers", 1, 3, members=members)
    truth = weighted((fused.made.meaning(), 0.5), (split.made.meaning(), -1.5))
    for order in ((0, 1), (1, 0)):
        pair = [source(loaded(fused, tmp_path), "0.5"), source(loaded(split, tmp_path), "-1.5")]
        result = Result([pair[i] for i in order], tmp_path, target)
        assert error(result, truth) < 3e-7
        names = {key.split(".lora")[0].removesuffix(".alpha") for key in result.tensors}
        assert any(name.endswith("attn.to_q" if target == "diffusers" else "img_attn_qkv") for name in names)


def test_parts_may_have_other_weights_than_the_whole(tmp_path: Path) -> None:
    fused, split = flux_qkv("sd-scripts", 0, 4), flux_qkv("diffusers", 1, 3)
    pair = [
        source(loaded(fused, tmp_path)),
        source(loaded(split, tmp_path), "1:re=to_k:0:norm_out=0".replace(":norm_out=0", "")),
    ]
    result = Result(pair, tmp_path)
    del split.made.tensors["transformer.transformer_blocks.0.attn.to_k.lora_A.weight"]
    del split.made.tensors["transformer.transformer_blocks.0.attn.to_k.lora_B.weight"]
    assert error(result, weighted((fused.made.meaning(), 1.0), (split.made.meaning(), 1.0))) < 3e-7


FAMILIES = ("lora", "loha", "lokr", "full")


@pytest.mark.parametrize("pair", [(a, b) for a in FAMILIES for b in FAMILIES])
def test_families_mix(tmp_path: Path, pair: tuple[str, str]) -> None:
    builders = []
    for seed, family in enumerate(pair):
        own = Builder.start(SDXL, "sd-scripts", "F32", seed)
        own.add(TO_K, family, rank=4, alpha=3.0)
        builders.append(own)
    result = Result([source(loaded(b, tmp_path), w) for b, w in zip(builders, ("0.6", "-1.25"), strict=True)], tmp_path)
    truth = weighted((builders[0].made.meaning(), 0.6), (builders[1].made.meaning(), -1.25))
    assert error(result, truth) < 1e-6
    family = result.report.modules[0].family
    assert family == ("full" if "full" in pair else "lora")


@pytest.mark.parametrize(
    ("family", "how"), [("lora", {"tucker": True}), ("loha", {}), ("loha", {"tucker": True}), ("lokr", {}), ("full", {})]
)
def test_convolutions_of_every_family_are_added(tmp_path: Path, family: str, how: dict[str, Any]) -> None:
    first, second = (Builder.start(SDXL, "sd-scripts", "F32", seed) for seed in (0, 1))
    first.add(CONV, family, rank=4, alpha=3.0, **how)
    second.add(CONV, "lora", rank=4, alpha=1.0)
    result = Result([source(loaded(first, tmp_path), "0.6"), source(loaded(second, tmp_path), "2")], tmp_path)
    assert error(result, weighted((first.made.meaning(), 0.6), (second.made.meaning(), 2.0))) < 1e-6


@pytest.mark.parametrize(
    ("family", "shared"), [("lokr", "lokr_w1"), ("lokr", "lokr_w2"), ("loha", "hada_w2_a"), ("lora", "lora_down.weight")]
)
def test_what_differs_in_one_factor_keeps_its_structure(tmp_path: Path, family: str, shared: str) -> None:
    """Files that share all factors but one, as trainings with a frozen factor leave them."""
    first, second = (Builder.start(SDXL, "sd-scripts", "F32", seed) for seed in (0, 1))
    how = {"whole2": True} if family == "lokr" else {}
    for own in (first, second):
        own.add(TO_K, family, rank=4, alpha=3.0, **how)
    stem = first.stem(TO_K)
    slots = [key for key in first.made.tensors if not key.endswith(".alpha")]
    kept = f"{stem}.{shared}"
    differing = next(key for key in slots if key != kept)
    for key in slots:
        if key != differing:
            second.made.tensors[key] = first.made.tensors[key]
    result = Result([source(loaded(first, tmp_path), "0.6"), source(loaded(second, tmp_path), "2")], tmp_path)
    assert error(result, weighted((first.made.meaning(), 0.6), (second.made.meaning(), 2.0))) < 1e-6
    assert result.report.modules[0].family == family
    assert {key: t.shape for key, t in result.tensors.items()} == {key: t.shape for key, t in first.made.tensors.items()}


def test_a_file_twice_is_the_file_with_the_sum_of_the_weights(tmp_path: Path) -> None:
    (only, _) = two(("BF16", "BF16"))
    adapter = loaded(only, tmp_path)
    result = Result([source(adapter, "0.25"), source(adapter, "0.75")], tmp_path)
    assert {k: t for k, t in result.tensors.items() if not k.endswith(".alpha")} == {
        k: t for k, t in only.made.tensors.items() if not k.endswith(".alpha")
    }
    assert error(result, only.made.meaning()) < 1e-7


def test_what_cancels_is_left_out(tmp_path: Path) -> None:
    builders = two()
    adapter = loaded(builders[0], tmp_path)
    with pytest.raises(RequestError, match="cancel out"):
        merge([source(adapter, "1"), source(adapter, "-1")])
    result = Result(
        [source(adapter, "1:in=0"), source(adapter, "-1:in=0"), source(loaded(builders[1], tmp_path), "1")], tmp_path
    )
    assert error(result, builders[1].made.meaning()) < 1e-7


@pytest.mark.parametrize("target", ["sd-scripts", "diffusers"])
def test_a_rank_beyond_both_sides_becomes_a_full_difference_or_is_reduced(tmp_path: Path, target: str) -> None:
    narrow = "time_embed.0"  # (1280, 320)
    builders = [Builder.start(SDXL, "sd-scripts", "F32", seed) for seed in (0, 1)]
    for own in builders:
        own.add(narrow, "lora", rank=200, alpha=30.0)
    result = Result([source(loaded(b, tmp_path)) for b in builders], tmp_path, target)
    assert error(result, weighted(*((b.made.meaning(), 1.0) for b in builders))) < 1e-6
    module = result.report.modules[0]
    assert (module.family, module.rank) == (("full", None) if target == "sd-scripts" else ("lora", 320))


def test_norms_and_biases_are_added(tmp_path: Path) -> None:
    builders = [Builder.start(SDXL, "sd-scripts", "F32", seed) for seed in (0, 1)]
    for own in builders:
        stem = own.add(TO_OUT, "lora", rank=4, alpha=3.0)
        own.made.tensors[f"{stem}.diff_b"] = own.random(640)
        norm = "lora_unet_input_blocks_4_1_transformer_blocks_0_norm1"
        own.made.tensors[f"{norm}.w_norm"], own.made.tensors[f"{norm}.b_norm"] = own.random(640), own.random(640)
    result = Result([source(loaded(b, tmp_path), w) for b, w in zip(builders, ("0.6", "-2"), strict=True)], tmp_path)
    for key in (k for k in builders[0].made.tensors if k.rsplit(".", 1)[1] in ("diff_b", "w_norm", "b_norm")):
        truth = 0.6 * builders[0].made.tensors[key].f64() - 2.0 * builders[1].made.tensors[key].f64()
        assert np.allclose(result.tensors[key].f64(), truth, rtol=1e-6, atol=1e-7), key


def dora(folder: Path) -> Adapter:
    own = Builder.start(SDXL, "sd-scripts", "F32", 0)
    own.add(TO_Q, "dora", rank=4, alpha=3.0)
    own.add(TO_K, "lora", rank=4, alpha=3.0)
    return loaded(own, folder)


def test_dora_is_kept_alone_and_never_added(tmp_path: Path) -> None:
    (_, other) = two()
    del other.made.tensors["lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_up.weight"]
    del other.made.tensors["lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight"]
    del other.made.tensors["lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.alpha"]
    result = Result([source(dora(tmp_path)), source(loaded(other, tmp_path), "0.5")], tmp_path)
    assert any(key.endswith("dora_scale") for key in result.tensors)
    with pytest.raises(NotRepresentableError, match="magnitude") as refusal:
        merge([source(dora(tmp_path), "0.5"), source(loaded(other, tmp_path))])
    assert "--dora fold" in str(refusal.value.hint)
    (_, both) = two()
    with pytest.raises(NotRepresentableError, match="neither be scaled nor added"):
        merge([source(dora(tmp_path)), source(loaded(both, tmp_path))])
    dropped = Result([source(dora(tmp_path)), source(loaded(both, tmp_path))], tmp_path, drop_nonlinear=True)
    assert len(dropped.report.dropped) == 1
    assert not any(key.endswith("dora_scale") for key in dropped.tensors)
    key = f"{both.stem(TO_Q)}.lora_up.weight"
    assert dropped.tensors[key] == both.made.tensors[key]  # what the other file has there stays as it is


def test_oft_is_kept_alone_and_never_added(tmp_path: Path) -> None:
    own = Builder.start(SDXL, "sd-scripts", "F32", 0)
    stem = own.stem(TO_Q)
    own.made.tensors[f"{stem}.oft_blocks"] = own.random(4, 160, 160)
    adapter = loaded(own, tmp_path)
    (_, other) = two()
    with pytest.raises(NotRepresentableError, match="OFT"):
        merge([source(adapter), source(loaded(other, tmp_path))])
    with pytest.raises(NotRepresentableError, match="OFT"):
        merge([source(adapter, "0.5")])


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_a_full_difference_as_lora_is_rounded_only_to_the_dtype_that_is_asked_for(tmp_path: Path, dtype: str) -> None:
    own = Builder.start(SDXL, "sd-scripts", dtype, 0)
    own.add(TO_Q, "full")
    result = Result([source(loaded(own, tmp_path), "0.7")], tmp_path, dtype="fp32", as_lora=True)
    assert error(result, weighted((own.made.meaning(), 0.7))) < 1e-7
    kept = Result([source(loaded(own, tmp_path), "0.7")], tmp_path, as_lora=True)
    off = error(kept, weighted((own.made.meaning(), 0.7)))
    assert kept.writing.losses.total() == pytest.approx(off, rel=0.3)  # and what it costs is told


def test_parts_are_rounded_once_where_they_are_fused(tmp_path: Path) -> None:
    parts, whole = (flux_qkv("diffusers", 0, 4, dtype="BF16"), flux_qkv("comfyui", 1, 2, dtype="BF16"))
    adapters = [loaded(parts, tmp_path), loaded(whole, tmp_path)]
    words = "1:re=to_q$:0.7:re=to_k$:0.3:re=to_v$:-1.1"
    result = Result([source(adapters[0], words), source(adapters[1], "0.9")], tmp_path, "comfyui", dtype="fp32")
    alone = Result([source(adapters[0], words)], tmp_path, "comfyui", dtype="fp32")
    for found in (result, alone):
        assert found.report.losses.total() + found.writing.losses.total() < 1e-6


def test_the_layout_is_that_of_the_first_file_with_more_than_text_encoders(tmp_path: Path) -> None:
    encoder, denoiser = Builder.start(SDXL, "sd-scripts", "F32", 0), Builder.start(SDXL, "onetrainer", "F32", 1)
    encoder.add_encoder("clip_l", ENCODER, "lora", rank=2, alpha=1.0)
    denoiser.add("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "lora", rank=2, alpha=1.0)
    adapters = [loaded(encoder, tmp_path), loaded(denoiser, tmp_path)]
    assert merge([source(own) for own in adapters])[1].layout == adapters[1].layout == "onetrainer"
    assert merge([source(own) for own in adapters], target="sd-scripts")[1].layout == "sd-scripts"


def test_an_average_divides_by_the_weights_that_the_modules_have(tmp_path: Path) -> None:
    first, second = two(layouts=("sd-scripts", "onetrainer"))
    first.made.tensors = {key: tensor for key, tensor in first.made.tensors.items() if "attn2" not in key}
    sources = [source(loaded(first, tmp_path)), source(loaded(second, tmp_path), "2:re=down_blocks:3")]
    result = Result(sources, tmp_path, method="average")
    truth = weighted((first.made.meaning(), 0.25), (second.made.meaning(), 0.75))
    assert error(result, truth) < 3e-7


def test_variants_of_one_model_merge_and_models_do_not(tmp_path: Path) -> None:
    dev, schnell = flux_qkv("sd-scripts", 0, 4), flux_qkv("sd-scripts", 1, 3)
    dev.add("guidance_in.in_layer", "lora", rank=2, alpha=1.0)
    pair = [source(loaded(schnell, tmp_path, "flux1-schnell"), "1"), source(loaded(dev, tmp_path, "flux1-dev"), "0.5")]
    adapter, report = merge(pair)
    assert report.architecture == "flux1-dev"
    assert len(adapter) == 3
    other = Builder.start(SDXL, "sd-scripts", "F32", 0)
    other.add(TO_Q, "lora", rank=4, alpha=3.0)
    with pytest.raises(RequestError, match=r"is for FLUX\.1 dev, .* for Stable Diffusion XL"):
        one_architecture([pair[1].adapter, loaded(other, tmp_path)], lambda i, arch: pair[i].adapter)


def test_sizes_of_one_model_do_not_merge(tmp_path: Path) -> None:
    small, large = (Builder.start(model(key), "diffusers", "F32", 0) for key in ("flux2-klein-4b", "flux2-klein-9b"))
    for own in (small, large):
        own.add("transformer_blocks.0.attn.to_q", "lora", rank=2)
    with pytest.raises(RequestError, match="does not fit"):
        merge([source(loaded(small, tmp_path)), source(loaded(large, tmp_path))])


def test_files_that_fit_several_models_are_taken_for_the_one_that_fits_all(tmp_path: Path) -> None:
    vague, certain = Builder.start(FLUX, "sd-scripts", "F32", 0), Builder.start(model("chroma"), "sd-scripts", "F32", 1)
    vague.add("double_blocks.0.img_attn.qkv", "lora", rank=2, alpha=1.0)
    certain.add("distilled_guidance_layer.in_proj", "lora", rank=2, alpha=1.0)
    paths = []
    for own in (vague, certain):
        (home := tmp_path / own.made.of.key).mkdir()
        paths.append(own.made.save(home))
    plain = [lorasurgery.load(path) for path in paths]
    assert [a.architecture.id for a in plain] == ["flux1", "chroma"]
    again = one_architecture(plain, lambda i, arch: lorasurgery.load(paths[i], arch=arch))
    assert [a.architecture.id for a in again] == ["chroma", "chroma"]
    assert len(merge([source(a) for a in again])[0]) == 2


def test_dtype_is_the_files_own_or_the_first_ones(tmp_path: Path) -> None:
    builders = two(("BF16", "F16"))
    pair = [source(loaded(b, tmp_path), w) for b, w in zip(builders, ("0.7", "1"), strict=True)]
    result = Result(pair, tmp_path)
    assert {t.dtype for key, t in result.tensors.items() if not key.endswith("alpha")} == {"BF16"}
    truth = weighted((builders[0].made.meaning(), 0.7), (builders[1].made.meaning(), 1.0))
    assert 1e-4 < error(result, truth) < 5e-3
    exact = Result(pair, tmp_path, dtype="fp32")
    assert error(exact, truth) < 1e-6
    assert {t.dtype for key, t in exact.tensors.items() if not key.endswith("alpha")} == {"F32"}


def test_recompression_is_the_optimum_of_the_sum(tmp_path: Path) -> None:
    builders = two(("F16", "F16"))
    pair = [source(loaded(b, tmp_path), w) for b, w in zip(builders, ("0.7", "-0.4"), strict=True)]
    result = Result(pair, tmp_path, resize=ResizeOptions(rank=5), dtype="fp32")
    stem = builders[0].stem(TO_Q)
    assert result.tensors[f"{stem}.lora_down.weight"].shape[0] == 5
    whole = sum(
        w * alpha / rank * up.f64() @ down.f64()
        for (up, down, rank, alpha), w in zip(
            ((b.made.tensors[f"{stem}.lora_up.weight"], b.made.tensors[f"{stem}.lora_down.weight"], r, a)
             for b, r, a in zip(builders, (4, 6), (3.0, 1.0), strict=True)), (0.7, -0.4), strict=True,
        )
    )  # fmt: skip
    values = np.linalg.svd(whole, compute_uv=False)
    best = np.sqrt((values[5:] ** 2).sum()) / np.linalg.norm(values)
    made = result.tensors[f"{stem}.lora_up.weight"].f64() @ result.tensors[f"{stem}.lora_down.weight"].f64()
    made *= result.tensors[f"{stem}.alpha"].f64() / 5
    assert np.linalg.norm(made - whole) / np.linalg.norm(whole) <= best * 1.0001
    assert result.report.resize is not None
    reported = next(m for m in result.report.resize.modules if m.name == stem)
    assert reported.relative_error == pytest.approx(best, rel=1e-4)


def test_recompression_leaves_dora_alone(tmp_path: Path) -> None:
    own = Builder.start(SDXL, "sd-scripts", "F32", 0)
    own.add(MID, "lora", rank=6, alpha=3.0)
    result = Result([source(dora(tmp_path)), source(loaded(own, tmp_path))], tmp_path, resize=ResizeOptions(rank=2))
    ranks = {key: t.shape[0] for key, t in result.tensors.items() if key.endswith("lora_down.weight")}
    assert sorted(ranks.values()) == [2, 2, 4]


def test_weights_by_component_and_block(tmp_path: Path) -> None:
    own = Builder.start(SDXL, "sd-scripts", "F32", 0)
    for name in (TO_Q, MID, "output_blocks.3.0.skip_connection", "time_embed.0"):
        own.add(name, "lora", rank=2, alpha=3.0)
    own.add_encoder("clip_l", ENCODER, "lora", rank=2, alpha=3.0)
    own.add_encoder("clip_g", ENCODER, "lora", rank=2, alpha=3.0)
    _, report = merge([source(loaded(own, tmp_path), "0.5:te=0.25:te2=2:mid=3:out=3:0.125")])
    assert {m.name.split("_attn")[0].split("_self")[0]: m.weights[0] for m in report.modules} == {
        "lora_unet_input_blocks_4_1_transformer_blocks_0": 0.5,
        "lora_unet_middle_block_1_transformer_blocks_0": 3.0,
        "lora_unet_output_blocks_3_0_skip_connection": 0.125,
        "lora_unet_time_embed_0": 0.5,
        "lora_te1_text_model_encoder_layers_0": 0.25,
        "lora_te2_text_model_encoder_layers_0": 2.0,
    }


def test_a_block_from_one_file_and_another_from_a_second(tmp_path: Path) -> None:
    builders = [Builder.start(FLUX, "comfyui", "BF16", seed) for seed in (0, 1)]
    for own in builders:
        for block in ("double_blocks.0", "double_blocks.12"):
            own.add(f"{block}.img_attn.proj", "lora", rank=2, alpha=2.0)
    weights = ("0:double=0-9:1", "0:double=10-18:1")
    result = Result([source(loaded(b, tmp_path), w) for b, w in zip(builders, weights, strict=True)], tmp_path)
    for own, block in zip(builders, ("double_blocks.0", "double_blocks.12"), strict=True):
        there = {key: t for key, t in result.tensors.items() if f"{block}." in key}
        assert there == {key: t for key, t in own.made.tensors.items() if f"{block}." in key}


def test_weights_that_concern_nothing_are_told(tmp_path: Path) -> None:
    (own, _) = two()
    _, report = merge([source(loaded(own, tmp_path), "1:te=0.5", "a")])
    assert "a: the weight of te concerns no module of it" in report.warnings


def test_dyn_takes_the_first_ranks_with_the_scale_of_all(tmp_path: Path) -> None:
    own = Builder.start(SDXL, "sd-scripts", "F32", 0)
    stem = own.add(TO_Q, "lora", rank=6, alpha=3.0)
    result = Result([source(loaded(own, tmp_path), "1:dyn=2")], tmp_path)
    up, down = (own.made.tensors[f"{stem}.lora_{part}.weight"].f64() for part in ("up", "down"))
    made = result.tensors[f"{stem}.lora_up.weight"].f64() @ result.tensors[f"{stem}.lora_down.weight"].f64()
    assert np.allclose(made * result.tensors[f"{stem}.alpha"].f64() / 2, 0.5 * up[:, :2] @ down[:2], rtol=1e-6)


def test_metadata_says_where_everything_came_from(tmp_path: Path) -> None:
    builders = two()
    builders[0].made.metadata |= {
        "ss_base_model_version": "sdxl_base_v1-0", "ss_tag_frequency": json.dumps({"1_cat": {"cat": 3, "red": 1}}),
        "modelspec.trigger_phrase": "sks cat, fluffy", "ss_output_name": "cats", "ss_network_dim": "4", "sshs_model_hash": "aa",
        "ss_learning_rate": "1e-4", "ss_seed": "1", "ss_network_args": json.dumps({"conv_dim": "4", "preset": "full"}),
    }  # fmt: skip
    builders[1].made.metadata |= {
        "ss_base_model_version": "sdxl_base_v1-0", "ss_tag_frequency": json.dumps({"1_cat": {"cat": 2}, "1_dog": {"dog": 9}}),
        "modelspec.trigger_phrase": "zwx dog, fluffy", "ss_output_name": "dogs", "ss_learning_rate": "1e-4", "ss_seed": "2",
    }  # fmt: skip
    pair = [source(loaded(b, tmp_path), w, f"{n}.safetensors") for b, w, n in zip(builders, ("0.5", "2"), "ab", strict=True)]
    found = Result(pair, tmp_path).metadata
    assert json.loads(found["ss_tag_frequency"]) == {"1_cat": {"cat": 5, "red": 1}, "1_dog": {"dog": 9}}
    assert found["modelspec.trigger_phrase"] == "sks cat, fluffy, zwx dog"
    assert found["ss_learning_rate"] == "1e-4"
    assert "ss_seed" not in found
    assert found["modelspec.merged_from"] == "cats, dogs"
    origin = json.loads(found["lorasurgery.merged_from"])
    assert [row["file"] for row in origin["files"]] == ["a.safetensors", "b.safetensors"]
    assert [row["weight"] for row in origin["files"]] == ["0.5", "2"]
    assert origin["files"][0]["hash"] == {"sshs_model_hash": "aa"}
    assert found["lorasurgery.operation"] == "merge sum"
    assert found["ss_network_dim"] == "Dynamic"  # 10, 12 and 3
    assert json.loads(found["ss_network_args"]) == {"preset": "full"}
    assert found["sshs_model_hash"] != "aa"
    first = Result(pair, tmp_path, metadata="first").metadata
    assert first["ss_seed"] == "1"
    assert json.loads(first["ss_tag_frequency"]) == {"1_cat": {"cat": 3, "red": 1}}
    without = Result([pair[0], source(pair[1].adapter, "0", "b.safetensors")], tmp_path).metadata
    assert without["modelspec.trigger_phrase"] == "sks cat, fluffy"
    assert [row["file"] for row in json.loads(without["lorasurgery.merged_from"])["files"]] == [
        "a.safetensors",
        "b.safetensors",
    ]
    stripped = Result(pair, tmp_path, metadata="strip").metadata
    assert not {"ss_tag_frequency", "lorasurgery.merged_from", "ss_learning_rate"} & set(stripped)


def test_the_defect_of_split_qkv_is_told_and_put_right(tmp_path: Path) -> None:
    """sd-scripts fuses three trainings of rank 2 with the alpha of one; every program then applies a third."""
    own = Builder.start(FLUX, "sd-scripts", "F32", 0)
    own.add("double_blocks.0.img_attn.proj", "lora", rank=2, alpha=2.0)
    stem = own.add("double_blocks.0.img_attn.qkv", "lora", rank=6, alpha=2.0)
    up = own.made.tensors[f"{stem}.lora_up.weight"].f64()
    for i in range(3):
        up[3072 * i : 3072 * (i + 1), [j for j in range(6) if j // 2 != i]] = 0.0
    own.made.tensors[f"{stem}.lora_up.weight"] = raw(up, "F32")
    adapter = loaded(own, tmp_path)
    as_it_is, report = merge([(adapter, 1.0)])
    assert any("split_qkv" in text for text in report.warnings)
    mended, _ = merge([(adapter, "1")], MergeOptions(fix_split_alpha=True))
    scales = [{m.name: m.scale.value for m in a.modules.values()}[stem] for a in (as_it_is, mended)]
    assert scales[1] == pytest.approx(3 * scales[0])


def test_unknown_keys_are_carried_once(tmp_path: Path) -> None:
    builders = two()
    for seed, own in enumerate(builders):
        own.made.tensors["bundle_emb.cat.string_to_param.*"] = raw([seed, 1.0], "F32")
    result = Result([source(loaded(b, tmp_path), "1", n) for b, n in zip(builders, "ab", strict=True)], tmp_path)
    kept = result.tensors["bundle_emb.cat.string_to_param.*"]
    assert kept == builders[0].made.tensors["bundle_emb.cat.string_to_param.*"]
    assert any("another file's was kept" in reason for _, reason in result.report.dropped)


def test_the_same_request_gives_the_same_bytes(tmp_path: Path) -> None:
    builders = two(("BF16", "F16"))
    adapters = [loaded(b, tmp_path) for b in builders]
    runs = [Result([source(a, "0.7") for a in adapters], tmp_path).path.read_bytes() for _ in range(2)]
    assert runs[0] == runs[1]


@settings(max_examples=15)
@given(
    weights=st.lists(st.sampled_from([-1.5, -0.3, 0.0, 0.25, 0.7, 1.0, 2.0]), min_size=3, max_size=3),
    layouts=st.lists(st.sampled_from(["sd-scripts", "diffusers", "comfyui"]), min_size=3, max_size=3),
    target=st.sampled_from(["sd-scripts", "diffusers"]),
    seed=st.integers(0, 1000),
)
def test_sums_are_linear_and_do_not_depend_on_the_order(
    tmp_path_factory: pytest.TempPathFactory, weights: list[float], layouts: list[str], target: str, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("merge")
    builders = []
    rng = np.random.default_rng(seed)
    for i, layout in enumerate(layouts):
        own = Builder.start(Z, layout, "F32", seed + i)
        split = layout != "comfyui"
        names = [f"layers.0.attention.to_{c}" for c in rng.permutation(list("qkv"))[: rng.integers(1, 4)]] if split else []
        for name in names or ["layers.0.attention.qkv"]:
            own.add(name, "lora", rank=int(rng.integers(1, 4)), alpha=None if layout == "diffusers" else 2.5)
        builders.append(own)
    if not any(weights):
        return
    sources = [source(loaded(b, folder), str(w)) for b, w in zip(builders, weights, strict=True)]
    truth = weighted(*((b.made.meaning(), w) for b, w in zip(builders, weights, strict=True)))
    size = max(float(np.linalg.norm(v)) for b in builders for v in b.made.meaning().deltas.values())
    for arranged in (sources, [sources[i] for i in rng.permutation(3)]):
        result = Result(arranged, folder, target)
        for weight in {**truth.deltas, **result.meaning.deltas}:
            one, other = truth.deltas.get(weight, 0.0), result.meaning.deltas.get(weight, 0.0)
            assert np.linalg.norm(np.asarray(one - other)) <= 1e-6 * size


SAID = {
    "reference_downscale_factor": ("2", "4"), "ss_reference_downscale_factor": ("1", "2"),
    "reference_temporal_scale_factor": ("1", "8"), "modelspec.prediction_type": ("epsilon", "v"), "ss_v2": ("True", "False"),
    "ss_base_model_version": ("sdxl_base_v1-0", "flux1"),
}  # fmt: skip


@pytest.mark.parametrize("policy", ["merge", "first", "strip"])
@pytest.mark.parametrize(("key", "values"), SAID.items())
@pytest.mark.parametrize("which", ["first", "second", "both alike", "both", "second at weight 0"])
def test_what_programs_load_a_file_by_survives(
    tmp_path: Path, policy: str, key: str, values: tuple[str, str], which: str
) -> None:
    files = []
    for number, name in enumerate(("a.safetensors", "b.safetensors")):
        own = Builder.start(SDXL, "sd-scripts", "F32", number)
        own.add(TO_Q, "lora", rank=2)
        says = which.startswith(("both", ("first", "second")[number]))
        own.made.metadata |= {"ss_network_module": "networks.lora", "note": name}
        if says:
            own.made.metadata[key] = values[0] if which == "both alike" else values[number]
        files.append(source(loaded(own, tmp_path), "0" if (number, which) == (1, "second at weight 0") else "1", name))
    result = Result(files, tmp_path, metadata=policy)
    told = [text for text in result.report.warnings if text.startswith(f"{key} is ")]
    if which == "second at weight 0":
        assert result.metadata.get(key) != values[1]
        assert not told
        return
    assert result.metadata[key] == values[1 if which == "second" else 0]
    assert bool(told) == (which == "both")
    if told:
        assert all(word in told[0] for word in (*values, "a.safetensors", "b.safetensors"))
