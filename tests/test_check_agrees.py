"""Converting and then checking for the same program never disagree: what is called exact loads completely, or is named here."""

from __future__ import annotations

from pathlib import Path

import pytest

import lorasurgery
from lorasurgery.checking.consumers import consumer
from lorasurgery.checking.engine import verdict_of
from lorasurgery.checking.subject import read_subject
from lorasurgery.errors import SurgeryError

FIXTURES = Path(__file__).parent / "fixtures"
PROGRAMS = {
    "comfyui": ("comfyui",), "diffusers": ("diffusers",), "peft": ("peft",), "onetrainer": ("onetrainer",),
    "lycoris": ("lycoris",), "sd-scripts": ("sd-scripts", "musubi"),
}  # fmt: skip
"""Layout -> the programs that it is written for; where there are two, either may be the one that trains the model."""
FILES = sorted(
    path.relative_to(FIXTURES).as_posix()
    for folder in ("producers", "samples", "wild")
    for path in (FIXTURES / folder).iterdir()
    if ".truth." not in path.name and path.suffix in {"", ".safetensors"}
)
NOT_YET: dict[str, tuple[str, ...]] = {
    "comfyui": (
        "producers/diffusers_sd15_dora.safetensors",
        "producers/lycoris_dora_out.safetensors",
        "producers/lycoris_ia3.safetensors",
        "producers/lycoris_lokr_dora.safetensors",
        "producers/lycoris_lokr_tucker.safetensors",
        "producers/peft_dora",
        "producers/peft_lokr_tucker",
    ),
    "onetrainer": (
        "producers/lycoris_full.safetensors",
        "producers/lycoris_ia3.safetensors",
        "producers/lycoris_locon_tucker.safetensors",
        "producers/lycoris_norms.safetensors",
        "producers/peft_lora_bias",
    ),
    "lycoris": (
        "producers/diffusers_flux.safetensors",
        "producers/diffusers_sdxl.safetensors",
        "producers/lycoris_locon.safetensors",
        "producers/lycoris_loha.safetensors",
        "producers/lycoris_lokr.safetensors",
    ),
    "sd-scripts": (
        "producers/diffusers_sd15_dora.safetensors",
        "producers/lycoris_dora_in.safetensors",
        "producers/lycoris_dora_out.safetensors",
        "producers/lycoris_full.safetensors",
        "producers/lycoris_ia3.safetensors",
        "producers/lycoris_locon_tucker.safetensors",
        "producers/lycoris_loha.safetensors",
        "producers/lycoris_loha_tucker.safetensors",
        "producers/lycoris_lokr.safetensors",
        "producers/lycoris_lokr_both.safetensors",
        "producers/lycoris_lokr_dora.safetensors",
        "producers/lycoris_lokr_tucker.safetensors",
        "producers/lycoris_lokr_unbalanced.safetensors",
        "producers/lycoris_lokr_whole.safetensors",
        "producers/lycoris_norms.safetensors",
        "producers/peft_dora",
        "producers/peft_loha",
        "producers/peft_loha_tucker",
        "producers/peft_lokr",
        "producers/peft_lokr_both",
        "producers/peft_lokr_tucker",
        "producers/peft_lora_bias",
    ),
}
"""Layout -> files whose conversion is called exact and does not load completely."""


def disagreement(name: str, target: str, folder: Path) -> str | None:
    """What a program says of a conversion that was called exact; None where they agree or there is no such conversion."""
    try:
        adapter = lorasurgery.load(FIXTURES / name)
        converted, report = lorasurgery.convert(adapter, target)
        out = folder / (f"out-{target}" if target == "peft" else f"out-{target}.safetensors")
        report = lorasurgery.save(converted, out, report=report, options=lorasurgery.SaveOptions(force=True))
    except SurgeryError:
        return None
    if not report.exact:
        return None
    arch = adapter.architecture
    results = [
        verdict_of(read_subject(out, arch=arch.key), own)[0]
        for own in map(consumer, PROGRAMS[target]) if own.models.get(arch.id, own.default)
    ]  # fmt: skip
    return None if not results or any(r.complete for r in results) else results[0].verdict


@pytest.mark.parametrize("target", PROGRAMS)
def test_what_convert_calls_exact_loads_completely(target: str, tmp_path: Path) -> None:
    found = {
        (name, target): verdict for name in FILES if (verdict := disagreement(name, target, tmp_path)) is not None
    }  # fmt: skip
    assert {key: verdict for key, verdict in found.items() if key[0] not in NOT_YET.get(target, ())} == {}
