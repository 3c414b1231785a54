"""The architecture tables against the names, shapes and row orders read from the real models."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lorasurgery.architectures import architectures, named
from lorasurgery.architectures.table import (
    DIFFUSERS,
    NAMINGS,
    ORIGINAL,
    SD_SCRIPTS,
    Architecture,
    Block,
    Row,
    Span,
    Spans,
    block,
    flat,
    name_pattern,
    row,
)
from lorasurgery.architectures.text_encoders import TEXT_ENCODERS
from lorasurgery.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

FIXTURES = Path(__file__).parent / "fixtures" / "reference"

REFERENCES = {
    "sd1": "sd15",
    "sd2": "sd21",
    "sdxl": "sdxl",
    "sd3-medium": "sd3_medium",
    "sd3-3.5-medium": "sd35_medium",
    "sd3-3.5-large": "sd35_large",
    "flux1-dev": "flux1_dev",
    "flux1-schnell": "flux1_schnell",
    "flux2-dev": "flux2_dev",
    "flux2-klein-9b": "flux2_klein_9b",
    "flux2-klein-4b": "flux2_klein_4b",
    "chroma": "chroma",
    "z-image": "z_image",
    "lumina2": "lumina2",
    "qwen-image": "qwen_image",
    "wan-2.1-t2v-14b": "wan21_t2v_14b",
    "wan-2.1-t2v-1.3b": "wan21_t2v_1_3b",
    "wan-2.1-i2v-14b": "wan21_i2v_14b",
    "wan-2.2-i2v-14b": "wan22_i2v_14b",
    "wan-2.2-ti2v-5b": "wan22_ti2v_5b",
    "hunyuan-video": "hunyuan_video",
    "hunyuan-video-1.5": "hunyuan_video_15",
    "hunyuan-image": "hunyuan_image_21",
    "framepack": "framepack",
    "ltx-video-2b": "ltx_video",
    "ltx2": "ltx2",
    "hidream": "hidream",
    "kandinsky5-lite": "kandinsky5",
    "cosmos-predict2-2b": "cosmos_predict2_2b",
    "anima": "anima",
    "auraflow": "auraflow",
}
WITHOUT_REFERENCE = {
    "flux1-fill",
    "flux1-control",
    "ltx-video-13b",
    "kandinsky5-pro",
    "kandinsky5-image",
    "cosmos-predict2-14b",
    "cosmos-predict2-2b-video",
    "cosmos-predict2-14b-video",
    "mochi",
    "pixart-sigma",
    "pixart-alpha",
}
# The reference builds the Diffusers class at its default size, or without a part that is a component of its own.
OTHER_DIFFUSERS_SHAPE = {
    "lumina2": ("time_caption_embed.caption_embedder.1",),
    "cosmos-predict2-2b": ("patch_embed.proj",),
}
NOT_IN_DIFFUSERS_REFERENCE = {"hunyuan-image": "context_embedder_2.", "ltx2": "connectors."}
# ComfyUI 2026-05 cuts every qkv in equal thirds, which Lumina 2's is not.
WRONG_SLICES = {"lumina2"}

Ranges = list[list[Any]]


@cache
def fixture(stem: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(gzip.decompress((FIXTURES / f"{stem}.json.gz").read_bytes()))
    return loaded


def reference(key: str) -> dict[str, Any]:
    return fixture(REFERENCES[key])


def key_map(key: str) -> Mapping[str, list[Any]]:
    """ComfyUI's key base names: each to its weight, and where it is a part, to axis, first row, rows and function."""
    found: Mapping[str, list[Any]] = fixture("comfyui_key_maps")[REFERENCES[key]]
    return found


def shapes_of(arch: Architecture, naming: str) -> dict[str, list[int]]:
    return {name: list(arch.module_shape(spans)) for name, spans in arch.namings[naming].items()}


def matrices(shapes: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """Without the one-dimensional weights, which the references leave out."""
    return {name: shape for name, shape in shapes.items() if len(shape) > 1}


def in_terms_of(arch: Architecture, naming: str, spans: Spans) -> Ranges:
    """``spans`` as ranges of the modules of another naming: ``[module, first row, rows]``."""
    found: Ranges = []
    for weight, start, stop in spans:
        for name, (own, *more) in inverse(arch.key, naming)[weight]:
            low, high = max(start, own.start), min(stop, own.stop)
            if low < high:
                assert not more, f"{name} is not one range of {weight}"
                found.append([name, low - own.start, high - low])
    return found


@cache
def inverse(key: str, naming: str) -> dict[str, list[tuple[str, Spans]]]:
    found: dict[str, list[tuple[str, Spans]]] = {}
    for name, spans in architectures()[key].namings[naming].items():
        found.setdefault(spans[0].weight, []).append((name, spans))
    return found


def whole(arch: Architecture, weight: str) -> Spans:
    return (Span(weight, 0, arch.shapes[weight][0]),)


def meaning(arch: Architecture, target: list[Any]) -> Spans:
    """The spans that a target of ComfyUI's key map stands for."""
    path, part, function = [*target, None, None][:3]
    weight = path.removeprefix("diffusion_model.").removesuffix(".weight")
    rows = arch.shapes[weight][0]
    if function is not None:
        assert function == "swap_scale_shift"
        assert part is None
        return (Span(weight, rows // 2, rows), Span(weight, 0, rows // 2))
    if part is None:
        return whole(arch, weight)
    axis, start, length = part
    assert axis == 0
    return (Span(weight, start, start + length),)


every_table = pytest.mark.parametrize("key", sorted(architectures()))
every_reference = pytest.mark.parametrize("key", sorted(REFERENCES))
every_comfyui = pytest.mark.parametrize("key", sorted(k for k in REFERENCES if architectures()[k].has_comfyui))


def test_every_table_is_known_here() -> None:
    assert set(architectures()) == set(REFERENCES) | WITHOUT_REFERENCE


def test_the_commonest_variant_is_first() -> None:
    assert [t.variant for t in named("flux1")] == ["dev", "schnell", "fill", "control"]
    assert [t.variant for t in named("wan")][:3] == ["2.1-t2v-14b", "2.2-i2v-14b", "2.1-i2v-14b"]
    assert [t.key for t in named("sd3-3.5-large")] == ["sd3-3.5-large"]


def test_unknown_name_is_refused() -> None:
    with pytest.raises(RequestError, match="flux9"):
        named("flux9")


@every_reference
def test_original_shapes(key: str) -> None:
    arch, expected = architectures()[key], reference(key)
    original = {name: list(shape) for name, shape in arch.shapes.items() if name not in dict(arch.beside)}
    assert matrices(original) == expected["comfyui" if arch.has_comfyui else "diffusers"]


@every_table
def test_diffusers_shapes_and_norms(key: str) -> None:
    arch = architectures()[key]
    beside = {name for name, spans in arch.namings[DIFFUSERS].items() if spans[0].weight in dict(arch.beside)}
    ours = {name: shape for name, shape in shapes_of(arch, DIFFUSERS).items() if name not in beside}
    assert ours == fixture("diffusers_shapes")[key]


@pytest.mark.parametrize("key", sorted(k for k in REFERENCES if k != "anima"))
def test_diffusers_reference_shapes(key: str) -> None:
    expected = reference(key)["diffusers"]
    found = matrices(shapes_of(architectures()[key], DIFFUSERS))
    extra = NOT_IN_DIFFUSERS_REFERENCE.get(key)
    assert {n for n in found if n not in expected} == {n for n in found if extra is not None and n.startswith(extra)}
    different = tuple(n for n in expected if found.get(n) != expected[n])
    assert different == OTHER_DIFFUSERS_SHAPE.get(key, ())


def from_original(arch: Architecture, naming: str) -> dict[str, Ranges]:
    return {
        name: in_terms_of(arch, ORIGINAL, spans)
        for name, spans in arch.namings[naming].items()
        if len(arch.module_shape(spans)) > 1
    }


@pytest.mark.parametrize("key", sorted(k for k in REFERENCES if "diffusers_from_comfyui" in reference(k)))
def test_diffusers_from_original(key: str) -> None:
    extra = NOT_IN_DIFFUSERS_REFERENCE.get(key)
    found = from_original(architectures()[key], DIFFUSERS)
    kept = {n: ranges for n, ranges in found.items() if extra is None or not n.startswith(extra)}
    assert kept == reference(key)["diffusers_from_comfyui"]


HUNYUAN = ("hunyuan-image", "hunyuan-video", "hunyuan-video-1.5")


@pytest.mark.parametrize("key", HUNYUAN)
def test_sd_scripts_own_names(key: str) -> None:
    arch, expected = architectures()[key], reference(key)
    assert arch.sd_scripts == SD_SCRIPTS
    assert matrices(shapes_of(arch, SD_SCRIPTS)) == expected["sd_scripts"]
    original = {name: in_terms_of(arch, SD_SCRIPTS, whole(arch, name)) for name, shape in arch.shapes.items() if len(shape) > 1}
    assert original == expected["comfyui_from_sd_scripts"]
    diffusers = {
        name: in_terms_of(arch, SD_SCRIPTS, spans)
        for name, spans in arch.namings[DIFFUSERS].items()
        if len(arch.module_shape(spans)) > 1 and not name.startswith("context_embedder_2.")
    }
    assert diffusers == {
        name: ranges
        for name, ranges in expected["diffusers_from_sd_scripts"].items()
        if not name.startswith("context_embedder_2.")
    }


@pytest.mark.parametrize("key", sorted(set(REFERENCES) - set(HUNYUAN)))
def test_sd_scripts_naming(key: str) -> None:
    arch = architectures()[key]
    same_as = {"same as comfyui": ORIGINAL, "same as diffusers": DIFFUSERS}[reference(key)["sd_scripts"]]
    assert arch.namings[SD_SCRIPTS] == arch.namings[same_as]


@every_table
def test_names_are_distinct_when_flattened(key: str) -> None:
    arch = architectures()[key]
    for names in (*arch.namings.values(), arch.alias_names):
        assert len({flat(name) for name in names}) == len(names)


@every_table
@pytest.mark.parametrize("spell", [str, flat])
def test_no_name_has_two_meanings(key: str, spell: Callable[[str], str]) -> None:
    arch = architectures()[key]
    meanings: dict[str, Spans] = {}
    for names in (*(arch.namings[n] for n in NAMINGS), arch.alias_names):
        for name, spans in names.items():
            assert meanings.setdefault(spell(name), spans) == spans, name


@every_table
def test_every_naming_covers_every_row_once(key: str) -> None:
    arch = architectures()[key]
    for naming in NAMINGS:
        covered: dict[str, list[tuple[int, int]]] = {}
        for spans in arch.namings[naming].values():
            for weight, start, stop in spans:
                covered.setdefault(weight, []).append((start, stop))
        assert covered.keys() == arch.shapes.keys()
        for weight, parts in covered.items():
            assert sorted(parts) == pieces(arch.shapes[weight][0], [start for start, _ in parts]), weight


def pieces(rows: int, starts: list[int]) -> list[tuple[int, int]]:
    """Rows 0 to ``rows`` cut at ``starts``."""
    cuts = [*sorted(starts), rows]
    assert cuts[0] == 0
    return list(pairwise(cuts))


@every_table
def test_patterns_cover_every_name(key: str) -> None:
    arch = architectures()[key]
    for names in (*arch.namings.values(), arch.alias_names):
        assert {name_pattern(name) for name in names} <= arch.patterns


@every_comfyui
def test_comfyui_takes_the_original_names(key: str) -> None:
    arch, accepted = architectures()[key], key_map(key)
    for name in (n for n in arch.shapes if n not in dict(arch.beside)):
        target = [f"diffusion_model.{name}.weight"]
        assert accepted.get(f"diffusion_model.{name}") == target
        assert accepted.get(f"lora_unet_{flat(name)}") == target


@every_comfyui
def test_no_weight_of_comfyui_is_left_out(key: str) -> None:
    arch = architectures()[key]
    weights = {
        name.removeprefix("diffusion_model.")
        for name, target in key_map(key).items()
        if name.startswith("diffusion_model.") and target == [f"{name}.weight"]
    }
    # aliases that ComfyUI makes of a neighbour's names and that lead to no weight
    weights -= {name for name in weights if "adaLN_modulation.0" in name and key in ("lumina2", "z-image")}
    assert weights <= arch.shapes.keys()


@every_comfyui
def test_comfyui_takes_the_split_names(key: str) -> None:
    arch, accepted = architectures()[key], key_map(key)
    sliced = {n: s for n, s in arch.namings[DIFFUSERS].items() if s != whole(arch, s[0].weight)}
    if arch.comfyui_split is None:
        assert not sliced or key in {*HUNYUAN, *WRONG_SLICES}
        return
    assert arch.comfyui_split in ("diffusion_model.", "transformer.")
    for name, spans in sliced.items():
        target = accepted.get(f"{arch.comfyui_split}{name}")
        assert target is not None, name
        assert meaning(arch, target) == spans, name


@every_comfyui
def test_comfyui_means_the_same_by_diffusers_names(key: str) -> None:
    arch, accepted = architectures()[key], key_map(key)
    prefixes = ("transformer.", "diffusion_model.", "") if arch.denoiser == "transformer" else ("unet.", "")
    spellings: list[tuple[str, Callable[[str], str]]] = [(prefix, str) for prefix in prefixes]
    spellings += [("lora_unet_", flat), ("lycoris_", flat), ("lora_transformer_", flat)]
    for prefix, spell in spellings:
        for name, spans in arch.namings[DIFFUSERS].items():
            target = accepted.get(f"{prefix}{spell(name)}")
            if target is not None and key not in WRONG_SLICES:
                assert meaning(arch, target) == spans, f"{prefix}{name}"


@pytest.mark.parametrize("key", ["sd1", "sd2", "sdxl"])
def test_comfyui_takes_every_unet_name_flattened(key: str) -> None:
    arch, accepted = architectures()[key], key_map(key)
    names = arch.namings[DIFFUSERS]
    lacking = {name for name in names if f"lora_unet_{flat(name)}" not in accepted}
    assert not lacking


@pytest.mark.parametrize("key", ["sd1", "sd2", "sdxl"])
def test_attention_processors_of_old_files(key: str) -> None:
    arch, accepted = architectures()[key], key_map(key)
    attention = [n for n in arch.namings[DIFFUSERS] if ".attn1." in n or ".attn2." in n]
    assert len(arch.alias_names) == len(attention)
    for alias, spans in arch.alias_names.items():
        assert meaning(arch, accepted[f"unet.{alias}"]) == spans


@pytest.mark.parametrize("key", ["hunyuan-video", "hunyuan-video-1.5"])
def test_comfyui_takes_tencents_fused_names(key: str) -> None:
    arch, accepted = architectures()[key], key_map(key)
    fused = {**arch.namings[SD_SCRIPTS], **arch.alias_names}
    taken = {name: spans for name, spans in fused.items() if f"transformer.{name}" in accepted}
    assert "double_blocks.0.img_attn_qkv" in taken
    assert all(meaning(arch, accepted[f"transformer.{name}"]) == spans for name, spans in taken.items())


def test_xlabs_aliases() -> None:
    names = architectures()["flux1-dev"].alias_names
    assert names["double_blocks.18.processor.qkv_lora2"] == (Span("double_blocks.18.txt_attn.qkv", 0, 9216),)
    assert names["single_blocks.37.processor.proj"] == (Span("single_blocks.37.linear2", 0, 3072),)
    assert names["single_blocks.37.processor.qkv"] == (Span("single_blocks.37.linear1", 0, 9216),)


@every_table
def test_every_alias_leads_somewhere(key: str) -> None:
    arch = architectures()[key]
    for alias, _ in arch.aliases:
        assert alias.format(i=0) in arch.alias_names


def test_components_of_their_own() -> None:
    for key, prefix in (("anima", "llm_adapter."), ("ltx2", "connectors.")):
        arch = architectures()[key]
        assert arch.diffusers_roots[0][0] == prefix
        assert any(name.startswith(prefix) for name in arch.namings[DIFFUSERS])


@every_table
def test_text_encoders_of_a_model(key: str) -> None:
    encoders = architectures()[key].encoders
    assert all(e.table in TEXT_ENCODERS for e in encoders)
    for prefixes in ([e.sd_scripts for e in encoders], [e.diffusers for e in encoders], [e.comfyui for e in encoders]):
        assert len(set(prefixes)) == len(encoders)


def test_text_encoder_shapes() -> None:
    expected = fixture("text_encoders")
    layers = {k: {m: list(s) for m, s in table.shapes.items() if len(s) > 1} for k, table in TEXT_ENCODERS.items()}
    assert layers == expected
    assert all(name == table.id for name, table in TEXT_ENCODERS.items())
    for table in TEXT_ENCODERS.values():
        assert len({flat(name) for name in table.shapes}) == len(table.shapes)
        assert {name_pattern(name) for name in table.shapes} <= table.patterns


def test_metadata_names_belong_to_one_family() -> None:
    owners: dict[str, str] = {}
    for arch in architectures().values():
        for name in arch.metadata_names:
            assert owners.setdefault(name, arch.id) == arch.id


def test_tables_load_without_torch() -> None:
    code = (
        "import sys; from lorasurgery.architectures import architectures; "
        "[a.patterns for a in architectures().values()]; "
        "assert not {'torch', 'numpy', 'diffusers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def table_of(*rows: Row | Block) -> Architecture:
    return Architecture(id="made-up", variant="", name="made up", source="this test", rows=rows)


def test_two_weights_of_one_name_are_refused() -> None:
    table = table_of(block("a", (row("x", (2, 2), "y"), row("y", (2, 2)))))
    with pytest.raises(ValueError, match=r"a\.y"):
        _ = [table.namings[naming] for naming in table.namings]


def test_parts_must_sum_to_their_row() -> None:
    table = table_of(row("qkv", (6, 2), (("q", 2), ("k", 2), ("v", 1))))
    with pytest.raises(ValueError, match="qkv"):
        _ = [table.namings[naming] for naming in table.namings]
