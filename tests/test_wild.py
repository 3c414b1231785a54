"""Key lists of files that real trainers wrote: understood whole, converted to every target and back, or refused clearly.

The lists hold names and shapes; the values here are noise that takes no memory, so full-size files cost nothing.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest

from lorasurgery.architectures import named
from lorasurgery.architectures.from_base import custom
from lorasurgery.errors import (
    NotAnAdapterError,
    NotRepresentableError,
    SurgeryError,
    UnknownArchitectureError,
)
from lorasurgery.files.read import parse
from lorasurgery.io.header import RawFile
from lorasurgery.io.sources import Region
from lorasurgery.io.tensors import Tensor, scalar, zeros
from lorasurgery.layouts.detect import detect
from lorasurgery.layouts.emit import emit
from lorasurgery.layouts.targets import LAYOUTS, layout
from lorasurgery.layouts.words import split_key
from lorasurgery.operations.conversion.convert import convert
from lorasurgery.operations.conversion.settled import settled

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorasurgery.adapter import Adapter

FOLDER = Path(__file__).parent / "fixtures" / "wild"
NAMES = sorted(path.name.removesuffix(".json.gz") for path in FOLDER.glob("*.json.gz"))
NOISE = np.random.default_rng(1).standard_normal(65521).astype("f2").tobytes()


@dataclass(frozen=True)
class Noise:
    """The same pseudo-random fp16 numbers whenever they are read, another stretch of them for every key."""

    seed: int

    def read(self, offset: int, length: int) -> bytes:
        start = (offset + 2 * self.seed) % len(NOISE)
        return (NOISE * ((start + length) // len(NOISE) + 1))[start : start + length]

    def read_into(self, offset: int, view: memoryview) -> None:
        view[:] = self.read(offset, len(view))

    def descriptor(self) -> None:
        """No file."""


@cache
def facts(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(gzip.decompress((FOLDER / f"{name}.json.gz").read_bytes()))
    return found


def noise(key: str, shape: list[int]) -> Tensor:
    if key.endswith(".alpha"):
        return scalar(4.0)
    return Tensor("F16", tuple(shape), (Region(Noise(zlib.crc32(key.encode()) % 65521), 0, 2 * prod(shape)),))


def raw(name: str) -> RawFile:
    own = facts(name)
    tensors = {key: noise(key, shape) for key, shape in own["keys"].items()}
    return RawFile(Path(f"{name}.safetensors"), tensors, own.get("metadata") or {})


def written(adapter: Adapter, target: str) -> dict[str, Tensor]:
    converted, report = convert(adapter, target)
    return emit(converted, layout(target), report).tensors


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes by key; alphas are a layout's own business."""
    return {key: tensor.shape for key, tensor in tensors.items() if not key.endswith(".alpha")}


class Known(NamedTuple):
    """What a complete list is."""

    architecture: str
    layout: str
    families: dict[str, int]
    left: tuple[str, ...] = ()
    refusals: dict[str, str] = {}  # noqa: RUF012  read only
    own: str = ""
    """The target that writes the layout the list is in, key for key; "" where none does."""
    added: tuple[str, ...] = ()
    """Members of fused weights the file does not train: fused they are rows of zeros, and split again modules of zeros."""


COMPLETE = {
    "cloneofsimo_analog_svd_rank4": Known("sd1", "cloneofsimo", {"lora": 192}),
    "cloneofsimo_lora_disney_pti": Known("sd1", "cloneofsimo", {"lora": 192}, left=("<s1>", "<s2>")),
    "diffusers_sd15_old_attnproc_lora": Known("sd1", "diffusers", {"lora": 128}),
    "diffusers_sd15_unet_lora_dotted": Known("sd1", "diffusers", {"lora": 128}),
    "invoke_flux_control_lora_format": Known(
        "flux1-control",
        "bfl",
        {"lora": 314, "set": 152},
        refusals={"peft": "does not load"},
    ),
    "invoke_flux_dora_onetrainer_format": Known(
        "flux1-dev",
        "onetrainer",
        {"dora": 506},
        refusals={
            "sd-scripts": "DoRA magnitude",
            "other": "DoRA magnitude",
            "diffusers": "DoRA magnitudes per output row",
            "peft": "DoRA magnitudes per output row",
        },
        own="onetrainer",
    ),
    "invoke_flux_lora_aitoolkit_format": Known("flux1-dev", "comfyui", {"lora": 228}, own="other"),
    "invoke_flux_lora_diffusers_base_model_format": Known("flux1-dev", "peft", {"lora": 381}, own="peft"),
    "invoke_flux_lora_diffusers_format": Known("flux1-dev", "diffusers", {"lora": 494}, own="diffusers"),
    "invoke_flux_lora_diffusers_no_proj_mlp_format": Known(
        "flux1-dev", "diffusers", {"lora": 342}, own="diffusers", added=("proj_mlp",)
    ),
    "invoke_flux_lora_kohya_format": Known("flux1-dev", "sd-scripts", {"lora": 304}, own="sd-scripts"),
    "invoke_flux_lora_kohya_with_te1_format": Known("flux1-dev", "sd-scripts", {"lora": 376}, own="sd-scripts"),
    "sdscripts_doc_flux_aitoolkit_diffusers": Known("flux1-dev", "diffusers", {"lora": 494}, own="diffusers"),
    "sdscripts_doc_flux_kohya": Known("flux1-dev", "sd-scripts", {"lora": 304}, own="sd-scripts"),
}
MANGLED = "handmade_sd15_lora_unet_unet_underscore_suffix"
PAIRS = [(name, target) for name in COMPLETE for target in LAYOUTS]


def test_every_list_is_tested() -> None:
    assert {name for name in NAMES if facts(name)["complete"]} == {*COMPLETE, MANGLED}
    assert {name for name in NAMES if not facts(name)["complete"]} == {*SHAPED, *BY_NAME}


@pytest.mark.parametrize("name", COMPLETE)
def test_complete_list_is_understood_whole(name: str) -> None:
    known = COMPLETE[name]
    adapter = parse(raw(name))
    assert adapter.architecture.key == known.architecture
    assert adapter.layout == known.layout
    assert Counter(module.family for _, module in adapter) == known.families
    assert tuple(left.key for left in adapter.leftovers) == known.left
    assert all("no such module" not in left.reason for left in adapter.leftovers)
    settled(adapter, layout("comfyui"))


@cache
def comfyui(name: str) -> dict[str, tuple[int, ...]]:
    return shapes(written(parse(raw(name)), "comfyui"))


@pytest.mark.parametrize(("name", "target"), PAIRS)
def test_complete_list_to_every_target_and_back(name: str, target: str) -> None:
    known = COMPLETE[name]
    adapter = parse(raw(name))
    if target in known.refusals:
        with pytest.raises(NotRepresentableError, match=known.refusals[target]) as caught:
            written(adapter, target)
        assert caught.value.module in str(caught.value)
        assert caught.value.hint
        return
    if adapter.leftovers and not layout(target).carries_unknown:  # learned tokens, which these take from no such file
        with pytest.raises(NotRepresentableError, match="learned token"):
            written(adapter, target)
        adapter = replace(adapter, leftovers=())
    there = written(adapter, target)
    back = parse(RawFile(Path("there.safetensors"), there, {}), among=named(known.architecture))
    assert not back.leftovers
    assert shapes(written(back, "comfyui")) == comfyui(name)
    if known.own:
        original = shapes(raw(name).tensors)
        renamed = {key.replace(".lora_down.", ".lora_A.").replace(".lora_up.", ".lora_B."): s for key, s in original.items()}
        result = written(back, known.own)
        returned = shapes(result)
        expected = original if returned.keys() & original.keys() else renamed
        extra = returned.keys() - expected.keys()
        assert {key: shape for key, shape in returned.items() if key not in extra} == expected
        assert {key.split(".")[-3] for key in extra} <= set(known.added)
        assert all(not result[key].array().any() for key in sorted(extra)[:8] if key.endswith("lora_B.weight"))


def test_control_lora_norms_are_written_as_replacements() -> None:
    """ComfyUI reads `set_weight`; BFL's `.scale` only in a file of BFL's own form."""
    tensors = written(parse(raw("invoke_flux_control_lora_format")), "comfyui")
    assert "diffusion_model.single_blocks.0.norm.key_norm.set_weight" in tensors
    assert not any(key.endswith(".scale") for key in tensors)


def test_mangled_list_gets_a_clear_message() -> None:
    with pytest.raises(NotAnAdapterError) as caught:
        parse(raw(MANGLED))
    first = "lora_unet_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k_lora_down.weight"
    assert f"256 of 256 have an adapter's words, but not at the end after a dot; first {first}" in str(caught.value)
    assert "expected lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k.lora_down.weight" in str(caught.value)
    mended = {
        re.sub(r"_lora_(down|up)\.weight$", r".lora_\1.weight", key).replace("lora_unet_unet_", "lora_unet_"): tensor
        for key, tensor in raw(MANGLED).tensors.items()
    }
    adapter = parse(RawFile(Path("mended.safetensors"), mended, {}))
    assert (adapter.architecture.key, len(adapter), adapter.leftovers) == ("sd1", 128, ())


# parts of files, with shapes ----------------------------------------------------------------------------------------------

SHAPED: dict[str, tuple[type[SurgeryError] | str, list[str]]] = {
    # real
    "invoke_flux_lora_xlabs_format": ("flux1-dev", ["flux1-schnell", "flux1-fill", "flux1-control"]),
    "invoke_krea2_lora_kohya_format": (UnknownArchitectureError, ["lora_unet_blocks_0_attn_gate", "--base MODEL"]),
    # three modules that several architectures have
    "invoke_qwen_image_lora_diffusers_format": ("ambiguous", ["qwen-image", "flux1-dev", "hunyuan-video"]),
    # shapes that no such model has, written by hand: the message names a module, its shape and the expected one
    "invoke_anima_lora_kohya_format": (UnknownArchitectureError, ["Anima, 8 of 11", "[2048, 2048]", "[256, 2048]"]),
    "invoke_anima_lora_kohya_with_te_format": (UnknownArchitectureError, ["Anima, 3 of 9", "[1024, 2816]", "[1024, 3072]"]),
    "invoke_anima_lora_lokr_format": (UnknownArchitectureError, ["Anima", "[16384, 16384]", "[2048, 1024]"]),
    "invoke_anima_lora_peft_format": (UnknownArchitectureError, ["cross_attn.k_proj", "[2048, 2048]", "[2048, 1024]"]),
    "invoke_flux_lokr_bfl_format": (UnknownArchitectureError, ["img_attn.proj", "[1024, 3072]", "[3072, 3072]"]),
    "invoke_qwen_image_lora_kohya_format": (UnknownArchitectureError, ["Qwen-Image", "[49152, 49152]", "[3072, 3072]"]),
}


@pytest.mark.parametrize("name", SHAPED)
def test_part_of_a_file(name: str) -> None:
    expected, texts = SHAPED[name]
    if isinstance(expected, str):
        adapter = parse(raw(name))
        assert not adapter.leftovers
        found = {key for key, _ in adapter.candidates}
        assert found >= set(texts)
        if expected != "ambiguous":
            assert adapter.architecture.key == expected
            settled(adapter, layout("comfyui"))
            return
        with pytest.raises(UnknownArchitectureError) as caught:
            convert(adapter, "comfyui")
        assert "--arch" in str(caught.value.hint)
        assert all(key in str(caught.value) for key in texts)
        chosen = parse(raw(name), among=named("qwen-image"))
        assert len(written(chosen, "comfyui")) == len(raw(name).tensors)
        return
    with pytest.raises(expected) as refusal:
        parse(raw(name))
    for text in (*texts, f"{name}.safetensors"):
        assert text in str(refusal.value)
    assert refusal.value.hint


# key strings without shapes: names alone ----------------------------------------------------------------------------------

BY_NAME: dict[str, tuple[str, int] | None] = {
    # architecture and how many modules it explains; None: no table, or keys of too many files at once
    "fixture_invokeai_test_anima_lora_conversion_utils": None,
    "fixture_invokeai_test_krea2_lora_config": None,
    "fixture_invokeai_test_krea2_lora_conversion_utils": None,
    "fixture_invokeai_test_peft_adapter_utils": None,
    "fixture_invokeai_test_qwen_image_lora_conversion_utils": None,
    "fixture_invokeai_test_sdxl_slider_lora_identification": ("sdxl", 7),
    "fixture_invokeai_test_wan_checkpoint_loader": ("wan-2.1-t2v-14b", 1),
    "fixture_invokeai_test_wan_lora_config": ("wan-2.1-t2v-14b", 13),
    "fixture_lycoris_wrapper": ("flux1-dev", 30),
    "fixture_mflux_test_ernie_lora_mapping": None,
    "fixture_mflux_test_flux2_lora_mapping": ("flux2-dev", 18),
    "fixture_mflux_test_ideogram4_lora_mapping": None,
    "fixture_mflux_test_krea2_lora_mapping": None,
    "fixture_resize_lora_test_key_mapper_support": None,
    "fixture_sdnext_test_anima_native_adapters": ("anima", 18),
    "fixture_sdnext_test_chroma_native_adapters": ("chroma", 20),
    "fixture_sdnext_test_ernie_native_adapters": None,
    "fixture_sdnext_test_flux2_native_adapters": ("flux2-dev", 18),
    "fixture_sdnext_test_krea2_native_adapters": None,
    "fixture_sdnext_test_zimage_native_adapters": ("z-image", 22),
    "fixture_simpletuner_test_extract_adapter_scripts": None,
    "fixture_simpletuner_test_lora_format": None,
}


def stems(name: str) -> list[str]:
    found = {key: split_key(key) for key in facts(name)["keys"]}
    assert all(found.values()), [key for key, split in found.items() if split is None]
    return list(dict.fromkeys(split.stem for split in found.values() if split is not None))


@pytest.mark.parametrize("name", BY_NAME)
def test_names_alone(name: str) -> None:
    expected = BY_NAME[name]
    modules = dict.fromkeys(stems(name))
    if expected is None:
        with pytest.raises(UnknownArchitectureError, match="no known architecture") as caught:
            detect(modules, {}, path=Path(name))
        assert name in str(caught.value)
        assert any(stem in str(caught.value) for stem in modules)
        assert "--base MODEL" in str(caught.value.hint)
        return
    best, ties = detect(modules, {})
    candidates = {m.architecture.key: m.fitting for m in (best, *ties)}
    assert candidates.get(expected[0]) == expected[1], candidates


# models no table knows ----------------------------------------------------------------------------------------------------

NATIVE = {
    "invoke_krea2_lora_kohya_format": r"^lora_unet_",
    "fixture_mflux_test_krea2_lora_mapping": r"^(base_model\.model\.)?(?=blocks|first|last|t)",
    "fixture_mflux_test_ernie_lora_mapping": r"^(diffusion_model\.|transformer\.)(?=layers|adaln|text)",
    "fixture_sdnext_test_ernie_native_adapters": r"^diffusion_model\.",
    "fixture_mflux_test_ideogram4_lora_mapping": r"^(diffusion_model\.|transformer\.)",
}
"""The keys that use the model's own module names, after this prefix."""
WORDS = re.compile(r"_(?=\d|attn|mlp|layerwise|refiner|linear|projector|w[qkvo]$|gate$|up$|down$)|(?<=\d)_")


def base_name(name: str, stem: str) -> str:
    """The module's name in the model."""
    body = re.sub(NATIVE[name], "", stem)
    return WORDS.sub(".", body) if stem.startswith("lora_unet_") else body


@pytest.mark.parametrize("name", NATIVE)
def test_models_without_a_table_work_with_a_base(name: str) -> None:
    own = list({base_name(name, stem): stem for stem in stems(name) if re.match(NATIVE[name], stem)}.values())
    assert own
    sizes = facts(name)["keys"]
    weights, tensors = {}, {}
    for stem in own:
        out, inp = ((sizes.get(f"{stem}.lora_{side}.weight") or [8, 8])[axis] for side, axis in (("up", 0), ("down", 1)))
        weights[f"{base_name(name, stem)}.weight"] = zeros("BF16", (out, inp))
        tensors[f"{stem}.lora_down.weight"] = noise(stem + "a", [2, inp])
        tensors[f"{stem}.lora_up.weight"] = noise(stem + "b", [out, 2])
    lora = RawFile(Path("lora.safetensors"), tensors, {})
    with pytest.raises(UnknownArchitectureError, match="no known architecture") as caught:
        parse(lora)
    assert "--base MODEL" in str(caught.value.hint)
    arch = custom({key.removesuffix(".weight"): tensor.shape for key, tensor in weights.items()}, Path("model.safetensors"))
    adapter = parse(lora, among=(arch,))
    assert len(adapter) == len(own)
    assert not adapter.leftovers
    expected = comfyui_names(weights)
    for target in LAYOUTS:
        back = parse(RawFile(Path("there.safetensors"), written(adapter, target), {}), among=(arch,))
        assert set(shapes(written(back, "comfyui"))) == expected


def comfyui_names(weights: Mapping[str, Tensor]) -> set[str]:
    return {f"diffusion_model.{name.removesuffix('.weight')}.lora_{side}.weight" for name in weights for side in ("down", "up")}
