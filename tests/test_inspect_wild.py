"""What `inspect` says of the key lists of real trainers: the right model, layout and families, or an honest doubt."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from lorasurgery.inspection import describe
from tests.headers import HERE, fixture, hollow

if TYPE_CHECKING:
    from pathlib import Path

    from lorasurgery.inspection import Description

WILD = sorted(p.name.removesuffix(".json.gz") for p in (HERE / "wild").glob("*.json.gz"))
WHOLE = {
    "cloneofsimo_analog_svd_rank4": ("sd1", "cloneofsimo", {"lora": 192}, {"denoiser": 144, "clip_l": 48}),
    "cloneofsimo_lora_disney_pti": ("sd1", "cloneofsimo", {"lora": 192}, {"denoiser": 144, "clip_l": 48}),
    "diffusers_sd15_old_attnproc_lora": ("sd1", "diffusers", {"lora": 128}, {"denoiser": 128}),
    "diffusers_sd15_unet_lora_dotted": ("sd1", "diffusers", {"lora": 128}, {"denoiser": 128}),
    "invoke_flux_control_lora_format": ("flux1-control", "bfl", {"lora": 314, "set": 152}, {"denoiser": 466}),
    "invoke_flux_dora_onetrainer_format": ("flux1-dev", "onetrainer", {"dora": 506}, {}),
    "invoke_flux_lora_aitoolkit_format": ("flux1-dev", "comfyui", {"lora": 228}, {"denoiser": 228}),
    "invoke_flux_lora_diffusers_base_model_format": ("flux1-dev", "peft", {"lora": 381}, {"denoiser": 381}),
    "invoke_flux_lora_diffusers_format": ("flux1-dev", "diffusers", {"lora": 494}, {"denoiser": 494}),
    "invoke_flux_lora_diffusers_no_proj_mlp_format": ("flux1-dev", "diffusers", {"lora": 342}, {"denoiser": 342}),
    "invoke_flux_lora_kohya_format": ("flux1-dev", "sd-scripts", {"lora": 304}, {"denoiser": 304}),
    "invoke_flux_lora_kohya_with_te1_format": ("flux1-dev", "sd-scripts", {"lora": 376}, {"denoiser": 304, "clip_l": 72}),
    "sdscripts_doc_flux_aitoolkit_diffusers": ("flux1-dev", "diffusers", {"lora": 494}, {"denoiser": 494}),
    "sdscripts_doc_flux_kohya": ("flux1-dev", "sd-scripts", {"lora": 304}, {"denoiser": 304}),
}
"""Whole files: model, layout, families, components (where the source says them)."""
WORDS = {
    "lora": r"lora|\.(down|up)\.weight$", "dora": r"dora_scale|magnitude", "loha": r"\.hada_", "lokr": r"\.lokr_",
    "full": r"\.diff$", "set": r"_norm\.scale$|set_weight", "oft": r"\.oft_", "glora": r"\.[ab][12]\.weight$",
    "bias": r"\.diff_b$|\.bias$", "alpha": r"\.alpha$", "magnitude": r"\.dora_scale$|magnitude",
}  # fmt: skip
"""What the keys of a family have in them, said once more and by other means than the package's."""


def described(name: str, folder: Path) -> Description:
    facts = fixture("wild", name)
    shapes = {key: [4, 4] if shape is None else shape for key, shape in facts["keys"].items()}
    return describe(hollow(folder / "wild.safetensors", shapes, facts.get("metadata")))


def test_every_whole_file_has_its_line() -> None:
    whole = {name for name in WILD if fixture("wild", name)["complete"] and not name.startswith("handmade")}
    assert whole == WHOLE.keys()
    assert len(WILD) == 46


@pytest.mark.parametrize("name", WHOLE)
def test_whole_files(name: str, tmp_path: Path) -> None:
    own = described(name, tmp_path)
    model, layout, families, components = WHOLE[name]
    key = f"{own.architecture}-{own.variant}" if own.variant else own.architecture
    assert (key, own.layout, own.families) == (model, layout, families)
    assert not components or own.components == components
    guessed = any(
        key.startswith("base_model.model.") for key in fixture("wild", name)["keys"]
    )  # PEFT's, without its configuration
    warnings = [one for one in own.warnings if not (guessed and "is not known" in one.message)]
    assert (own.coverage, warnings, own.unexplained) == (1.0, [], ())


@pytest.mark.parametrize("name", sorted(set(WILD) - WHOLE.keys()))
def test_fragments_are_known_or_doubted(name: str, tmp_path: Path) -> None:
    own, keys = described(name, tmp_path), fixture("wild", name)["keys"]
    codes = {warning.code for warning in own.warnings}
    if own.kind == "mangled-adapter":
        assert name.startswith("handmade")
        return
    for family in own.families:
        assert any(re.search(WORDS[family], key) for key in keys), family
    if own.architecture == "unknown":
        assert "unknown-architecture" in codes
        assert own.coverage == 0.0
        return
    meant = fixture("wild", name)["architecture"].replace("_", "-")
    also = {own.architecture, *(key.split("-dev")[0] for key in own.undecided)}
    assert meant == "see file name" or meant in also
    assert own.coverage == 1.0 or codes & {"broken-module", "unexplained"}
    assert meant == own.architecture or codes & {"undecidable", "broken-module"}
