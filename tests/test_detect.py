"""Which model a file is for: every table, models that none knows, variants, ties and their evidence."""

from __future__ import annotations

import gzip
import json
import re
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from lorasurgery.architectures import architectures
from lorasurgery.architectures import named as named_architectures
from lorasurgery.architectures.table import DIFFUSERS, ORIGINAL, SD_SCRIPTS, flat
from lorasurgery.cli.app import app
from lorasurgery.errors import RequestError, UnknownArchitectureError
from lorasurgery.layouts.detect import detect
from lorasurgery.layouts.evidence import names, of_no_table, said
from lorasurgery.layouts.foreign import known_unmangled as mended
from lorasurgery.layouts.targets import LAYOUTS, layout
from lorasurgery.operations.conversion.settled import differing

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lorasurgery.layouts.detect import Match

    Stems = dict[str, tuple[int, ...]]

FILE = Path(__file__).parent / "fixtures" / "reference" / "other_models.json.gz"
KIN = {
    "chroma_radiance": "chroma", "flex2": "flux1", "flux1_lite_8b": "flux1", "kolors": "sdxl", "sdxl_inpaint": "sdxl",
    "ssd_1b": "sdxl", "sd15_inpaint": "sd1", "hunyuan_video_i2v": "hunyuan-video", "hunyuan_video_15_sr": "hunyuan-video-1.5",
    "ltx2_3": "ltx2", "qwen_image_layered": "qwen-image", "z_image_omni": "z-image", "wan21_vace_14b": "wan",
    "wan21_vace_1_3b": "wan", "wan22_animate_14b": "wan", "wan21_humo_17b": "wan", "wan21_fun_control_14b": "wan",
    "wan21_fun_inp_1_3b": "wan", "wan22_s2v_14b": "wan", "wan22_dancer_14b": "wan",
}  # fmt: skip
"""Variants of known models, by what they are variants of; the others are models of their own."""
SAME_ATTENTION = {("bria_fibo", "flux1"), ("sana_0_6b", "pixart")}
"""Models whose attention has names, shapes and a depth that are a known model's: nothing in such a file tells them apart."""
PREFIXES = {"original": "diffusion_model.", "diffusers": "transformer."}
ATTENTION = re.compile(r"attn|attention|qkv|[._][qkvo]$")
NUMBERED = re.compile(r"(.*?)\.(\d+)\.")


@cache
def others() -> dict[str, dict[str, Stems]]:
    """Model -> naming -> module -> shape."""
    found: dict[str, dict[str, Stems]] = {}
    for model, namings in json.loads(gzip.decompress(FILE.read_bytes())).items():
        found[model] = {naming: dict(expanded(rows)) for naming, rows in namings.items()}
    return found


def expanded(rows: list[list[object]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, shape, *runs in rows:
        for start, stop in runs[0] if runs else [(0, 1)]:  # type: ignore[attr-defined]
            for i in range(start, stop):
                yield str(name).format(i), tuple(shape)  # type: ignore[arg-type]


def spelled(modules: Mapping[str, tuple[int, ...]], prefix: str) -> Stems:
    return {prefix + (name if prefix.endswith(".") else flat(name)): shape for name, shape in modules.items()}


def subsets(modules: Stems) -> Iterator[tuple[str, Stems]]:
    """The whole model, its attention, and all of the first block of its longest stack."""
    yield "full", modules
    blocks: dict[str, set[int]] = {}
    for name in modules:
        if match := NUMBERED.match(name):
            blocks.setdefault(match[1], set()).add(int(match[2]))
    if not blocks:
        return
    top = max(blocks, key=lambda stack: len(blocks[stack]))
    yield "attention", {n: s for n, s in modules.items() if ATTENTION.search(n) and NUMBERED.match(n)} or modules
    yield "first block", {n: s for n, s in modules.items() if n.startswith(f"{top}.{min(blocks[top])}.")}


def found(stems: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str] | None = None) -> tuple[str, Match | None]:
    try:
        best, _ = detect(stems, metadata or {})
    except UnknownArchitectureError:
        return "unknown", None
    return best.architecture.id, best


@pytest.mark.parametrize("model", sorted(json.loads(gzip.decompress(FILE.read_bytes()))))
def test_no_model_is_taken_for_another(model: str) -> None:
    """A file for a model that no table knows is taken for a known one only where nothing at all tells them apart."""
    for naming, modules in others()[model].items():
        for prefix in (PREFIXES[naming], "lora_unet_"):
            if (model, naming, prefix) == ("hunyuan_video_i2v", "diffusers", "lora_unet_"):
                continue  # so musubi-tuner spells FramePack
            for subset, own in subsets(modules):
                name, best = found(spelled(own, prefix))
                case = (model, naming, prefix, subset, name, best)
                if model in KIN and subset == "full":
                    assert name == KIN[model], case
                elif model not in KIN and (subset == "full" or (model, name) not in SAME_ATTENTION):
                    assert best is None or (subset == "first block" and best.fitting == best.total), case


@pytest.mark.parametrize("key", sorted(architectures()))
def test_every_model_is_itself(key: str) -> None:
    """Whole, its attention, its first block, in every spelling its trainers write: its own table is among the answers."""
    arch = architectures()[key]
    for naming, prefix in ((ORIGINAL, "diffusion_model."), (DIFFUSERS, f"{arch.denoiser}."), (SD_SCRIPTS, "lora_unet_")):
        modules = {n: arch.module_shape(spans) for n, spans in arch.namings[naming].items()}
        for subset, own in subsets({name: shape for name, shape in modules.items() if len(shape) > 1}):
            if prefix == "diffusion_model." and not arch.has_comfyui:
                continue
            best, ties = detect(spelled(own, prefix), {})
            assert key in {m.architecture.key for m in (best, *ties)}, (key, prefix, subset, best)
            assert best.fitting == best.total
            said = {"ss_base_model_version": arch.metadata_names[0]} if arch.metadata_names else {}
            told, _ = detect(spelled(own, prefix), said)
            assert told.architecture.id == arch.id or not said


@pytest.mark.parametrize(
    "model", ["wan21_fun_control_14b", "sdxl_inpaint", "sd15_inpaint", "kolors", "flex2", "hunyuan_video_i2v"]
)
def test_a_widened_first_layer_is_a_misfit(model: str) -> None:
    (naming, modules), *_ = others()[model].items()
    best, _ = detect(spelled(modules, PREFIXES[naming]), {})
    assert len(best.misfits) == 1
    assert "1 another shape (first: " in best.evidence[0]


def test_what_is_unknown_says_what_is_nearest() -> None:
    attention = {f"transformer.transformer_blocks.{i}.attn1.to_{p}": (3072, 3072) for i in range(42) for p in "qkv"}
    with pytest.raises(UnknownArchitectureError) as caught:
        detect(attention, {})
    assert "nearest: Mochi 1, 126 of 126 modules" in str(caught.value)
    assert "Its blocks end at 41, Mochi 1's at 47" in str(caught.value)
    assert "--arch mochi" in str(caught.value.hint)
    assert found(attention, {"lorasurgery.architecture": "mochi"})[0] == "mochi"
    part = {stem: shape for stem, shape in attention.items() if ".0." in stem or ".40." in stem}
    assert found(part)[0] == "mochi"


def test_own_modules_leave_a_model_itself() -> None:
    wan = {f"diffusion_model.blocks.0.{p}": (5120, 5120) for p in ("self_attn.q", "self_attn.k", "self_attn.v", "cross_attn.q")}
    for name in ("vace_blocks.0.self_attn.q", "blocks.0.extra", "before_proj", "blocks.0.self_attn.to_gate_logits"):
        assert found({**wan, f"diffusion_model.{name}": (5120, 5120)})[0] == "wan"


def test_deeper_derivatives_of_a_common_model() -> None:
    deeper = {f"diffusion_model.blocks.{i}.self_attn.{p}_proj": (2048, 2048) for i in range(40) for p in "qkv"}
    name, best = found(deeper)
    assert name == "anima"
    assert best is not None
    assert best.unexplained == 36


# ties ---------------------------------------------------------------------------------------------------------------------


def named(key: str, naming: str, prefix: str, pattern: str) -> Stems:
    """The modules of a table whose names in one naming have the pattern."""
    arch = architectures()[key]
    names = {n: arch.module_shape(spans) for n, spans in arch.namings[naming].items() if re.search(pattern, n)}
    return spelled({name: shape for name, shape in names.items() if len(shape) > 1}, prefix)


def tied(stems: Stems, target: str) -> tuple[str, ...]:
    best, ties = detect(stems, {})
    return differing([m.architecture for m in (best, *ties)], list(stems), [layout(target)])


@pytest.mark.parametrize("target", LAYOUTS)
def test_nothing_is_asked_where_results_are_the_same(target: str) -> None:
    anima = named("anima", ORIGINAL, "lora_unet_", r"^blocks")
    hunyuan = named("hunyuan-video", DIFFUSERS, "transformer.", r"^(single_)?transformer_blocks.*attn\.to_")
    assert not tied(anima, target)
    assert bool(tied(hunyuan, target)) == (target in ("sd-scripts", "other"))  # musubi-tuner trains the two under other names
    flux = named("flux1-dev", ORIGINAL, "lora_unet_", "attn|linear")
    assert not tied(flux, target)
    assert not tied({**flux, "lora_unet_of_no_model": (8, 8)}, target)


def test_the_spelling_of_a_trainer() -> None:
    framepack = named("framepack", DIFFUSERS, "lora_unet_", r"^(single_)?transformer_blocks")
    best, ties = detect(framepack, {})
    assert (best.architecture.id, ties) == ("framepack", [])
    assert "spelled as the trainers of FramePack" in best.evidence[1]
    best, ties = detect({"lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (640, 640)}, {})
    assert (best.architecture.id, ties) == ("sdxl", [])


def test_whole_stacks() -> None:
    """The highest block of each touched stack is its last, whatever is missing in between."""
    for (double, single), expected in {(18, 37): "flux1", (19, 39): "hunyuan-video"}.items():
        blocks = [*(f"transformer_blocks.{i}" for i in (3, double)), *(f"single_transformer_blocks.{i}" for i in (7, single))]
        name, best = found({f"transformer.{block}.attn.to_q": (3072, 3072) for block in blocks})
        assert name == expected
        assert best is not None
        assert str(single) in " ".join(best.evidence) or expected == "hunyuan-video"


def test_the_likelier_model_is_first() -> None:
    qwen = {f"transformer.transformer_blocks.0.attn.{p}": (3072, 3072) for p in ("to_q", "to_k", "add_q_proj", "to_add_out")}
    best, ties = detect(qwen, {})
    assert best.architecture.id == "qwen-image"
    assert "flux1-dev" in [m.architecture.key for m in ties]
    assert "Qwen-Image is likelier" in best.evidence[-1]
    single = {f"transformer.single_transformer_blocks.0.attn.to_{p}": (3072, 3072) for p in "qkv"}
    assert found(single)[0] == "flux1"
    assert all(arch.usage > 0 for arch in architectures().values())


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("flux.1", "flux1"), ("flux.1_kontext", "flux1"), ("flux2", "flux2"), ("flux2_klein_4b", "flux2"),
        ("zimage", "z-image"), ("wan_2.1", "wan"), ("wan_2.2_14b", "wan"), ("wan_2.2_5b", "wan"), ("hidream_i1", "hidream"),
        ("ltx2", "ltx2"), ("sd_1.5", "sd1"), ("sd_2.1", "sd2"), ("sdxl_1.0", "sdxl"), ("sd_3", "sd3"), ("pixart", "pixart"),
        ("auraflow", "auraflow"), ("chroma", "chroma"), ("qwen_image", "qwen-image"), ("framepack", "framepack"),
        ("Flux.1-dev/lora", "flux1"), ("Chroma1/lora", "chroma"), ("hidream-i1/lora", "hidream"), ("Anima/lora", "anima"),
    ],
)  # fmt: skip
def test_names_that_trainers_write(value: str, expected: str) -> None:

    for key in ("ss_base_model_version", "modelspec.architecture"):
        called = said({key: value})
        assert {arch.id for arch in architectures().values() if names(arch, called)} == {expected}


def test_metadata_decides() -> None:
    shared = {f"transformer.transformer_blocks.0.attn.to_{p}": (3072, 3072) for p in "qkv"}
    for value, expected in (("flux.1", "flux1"), ("hunyuan_video", "hunyuan-video"), ("qwen_image", "qwen-image")):
        best, ties = detect(shared, {"ss_base_model_version": value})
        assert (best.architecture.id, {m.architecture.id for m in ties} - {expected}) == (expected, set())
        assert f"ss_base_model_version is {value}" in best.evidence[1]


# names ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("lora_unet_unet_down_blocks_0_attentions_0_proj_in", "lora_unet_down_blocks_0_attentions_0_proj_in"),
        ("unet.unet.conv_in", "unet.conv_in"),
        ("lora_unet_transformer_transformer_blocks_0_attn_to_q", "lora_unet_transformer_blocks_0_attn_to_q"),
        ("lora_unet_single_transformer_blocks_1_attn_to_k_", "lora_unet_single_transformer_blocks_1_attn_to_k"),
        ("lora_unet_transformer_blocks_0_attn_to_q", ""),
        ("transformer.transformer_blocks.0.attn.to_q", ""),
        ("lora_transformer_transformer_blocks_0_attn_to_q", ""),
    ],
)
def test_mangled_names(stem: str, expected: str) -> None:
    assert mended(stem) == expected


def test_only_known_names_are_called_mangled() -> None:
    for stem, mangled in (("lora_unet_transformer_blocks_0_x_to_q", False), ("lora_unet_double_blocks_1_img_attn_qkv_", True)):
        with pytest.raises(UnknownArchitectureError) as caught:
            detect({stem: (64, 64)}, {})
        assert ("mangled" in str(caught.value)) == mangled


def test_many_unknown_names_cost_little() -> None:
    blocks = {n: s for n, s in others()["ltx2_3"]["original"].items() if n.startswith("transformer_blocks.")}
    stems = spelled(blocks, "diffusion_model.")
    assert len(stems) == 1632
    detect({stem: shape for stem, shape in stems.items() if ".0." in stem}, {})  # the tables are expanded once
    started = time.process_time()
    best, _ = detect(stems, {})
    assert time.process_time() - started < 0.3
    assert best.unexplained == 288


# what somebody says ---------------------------------------------------------------------------------------------------------


WAN_PART = {f"diffusion_model.blocks.0.self_attn.{p}": (5120, 5120) for p in "qk"}
STRANGERS = {f"diffusion_model.extra.{i}.proj": (64, 64) for i in range(6)}


def test_a_told_model_holds_as_long_as_one_module_is_its_own() -> None:
    stems: Stems = {**WAN_PART, **STRANGERS}
    assert found(stems)[0] == "unknown"
    best, _ = detect(stems, {}, among=named_architectures("wan"))
    assert (best.architecture.id, best.fitting, best.unexplained) == ("wan", 2, 6)
    with pytest.raises(UnknownArchitectureError, match=r"none of its 8 modules has a name and shape of FLUX\.1") as caught:
        detect(stems, {}, among=named_architectures("flux1"))
    assert "Nearest is Wan 2.1 and 2.2 T2V 14B, 2 of 8 modules" in str(caught.value)
    assert caught.value.hint == "--arch wan, or no --arch"
    with pytest.raises(UnknownArchitectureError) as caught:
        detect(STRANGERS, {}, among=named_architectures("flux1"))
    assert "--base MODEL" in str(caught.value.hint)


def test_shapes_count_before_names_alone() -> None:
    """A narrow model with a few of a wider one's modules is nearer to its own table than to the one with more names."""
    attention = {f"transformer.blocks.29.attn{n}.to_{p}": (1536, 1536) for n in (1, 2) for p in "qkv"}
    stems = {**attention, **{f"transformer.blocks.29.attn2.add_{p}_proj": (1536, 1536) for p in "kv"}}
    best, _ = detect(stems, {})
    assert (best.architecture.key, best.fitting, best.unexplained) == ("wan-2.1-t2v-1.3b", 6, 2)


def test_blocks_past_the_last_count_wherever_they_stand() -> None:
    newbie = others()["newbie_image"]["original"]
    last = {n: s for n, s in newbie.items() if n.startswith(("layers.35.", "noise_refiner.1.", "context_refiner.1."))}
    assert found(spelled(last, "diffusion_model."))[0] == "unknown"


def test_metadata_of_no_table_is_told() -> None:
    flux = architectures()["flux1-dev"]
    (told,) = of_no_table({"ss_base_model_version": "longcat_image"}, flux)
    assert told == "ss_base_model_version is longcat_image, which names no model known here; the keys are those of FLUX.1 dev"
    assert not of_no_table({"ss_base_model_version": "wan_2.1", "modelspec.architecture": "anything"}, flux)
    assert not of_no_table({}, flux)


# what somebody meant ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("flux", "flux1 or flux2; "),
        ("wan2.1", "wan; "),
        ("Qwen_Image", "qwen-image; "),
        ("pixarts", "pixart; "),
        ("xyz", "one of anima"),
    ],
)
def test_the_name_that_was_meant_comes_first(text: str, first: str) -> None:
    with pytest.raises(RequestError) as caught:
        named_architectures(text)
    assert str(caught.value.hint).startswith(first)


WRAPPERS = ("", "pipe.dit.", "module.", "_orig_mod.")


@pytest.mark.parametrize("verb", ["convert", "resize", "prune", "merge"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_verb_asks_by_one_rule(wrapper: str, verb: str, tmp_path: Path) -> None:
    """FLUX.1's and HunyuanVideo's first attention: musubi-tuner's names differ, PEFT's do not."""
    names = [f"{wrapper or 'transformer.'}transformer_blocks.0.attn.{p}" for p in ("to_q", "to_k", "to_v")]
    names.append(f"{wrapper or 'transformer.'}single_transformer_blocks.0.attn.to_q")
    factor = np.full((1, 3072), 0.5, np.float32)
    source = tmp_path / "in.safetensors"
    save_file({f"{n}.lora_{x}.weight": factor if x == "A" else factor.T.copy() for n in names for x in "AB"}, source)
    how = {"resize": ["--rank", "1"], "prune": ["--scale", "0.5"]}.get(verb, [])
    asked: dict[str | None, bool] = {}
    for target in ("sd-scripts", "peft", None):
        if target is None and verb == "convert":
            continue
        out = tmp_path / ("folder" if target == "peft" else f"{target}.safetensors")
        command = [verb, str(source), *how, "-o", str(out), *(["--target", target] if target else [])]
        result = CliRunner().invoke(app, command)
        asked[target] = "equally well" in result.output
        assert asked[target] == bool(result.exit_code), result.output
    assert asked.pop(None, False) is False
    assert asked == {"sd-scripts": True, "peft": False}


@pytest.mark.parametrize("key", sorted(architectures()))
def test_unknown_modules_make_no_other_model(key: str) -> None:
    """One to five modules that no table has, beside a complete or a partial file: still it, or unknown, and no other model."""
    arch = architectures()[key]
    naming, prefix = (ORIGINAL, "diffusion_model.") if arch.has_comfyui else (DIFFUSERS, f"{arch.denoiser}.")
    modules = {n: shape for n, spans in arch.namings[naming].items() if len(shape := arch.module_shape(spans)) > 1}
    for subset, own in subsets(modules):
        first, ties = detect(spelled(own, prefix), {})
        plain = {match.architecture.id for match in (first, *ties)}
        inner = next(iter(own)).rpartition(".")[0]
        for extra in (1, 5):
            more = {f"{inner}.of_no_table_{i}" if i % 2 else f"of_no_table_{i}": (48, 40) for i in range(extra)}
            name, best = found(spelled({**own, **more}, prefix))
            assert name in {*plain, "unknown"}, (key, subset, extra, name)
            assert name != "unknown" or subset != "full", (key, subset, extra)
            assert best is None or best.unexplained == extra


def test_unknown_modules_of_the_last_block_say_that_it_is_there() -> None:
    """LTX-2.3's gates are in every block; an adapter that has nothing else in the last one is no shallower model's."""
    arch = architectures()["ltx2"]
    shapes = {
        f"diffusion_model.{name}": arch.module_shape(spans) for name, spans in arch.namings["original"].items()
        if re.search(r"transformer_blocks\.(\d|[123]\d|4[0-6])\.(audio_)?attn1\.to_[qkv]$", name)
    }  # fmt: skip
    with pytest.raises(UnknownArchitectureError, match="end at 46"):
        detect(shapes, {})
    shapes |= {f"diffusion_model.transformer_blocks.{i}.attn1.to_gate_logits": (32, 4096) for i in range(48)}
    found, ties = detect(shapes, {})
    assert (found.architecture.id, ties) == ("ltx2", [])
