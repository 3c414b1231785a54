"""Converting and then checking never disagree: what is called exact loads completely, or convert says that it does not."""

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


def disagreement(name: str, target: str, folder: Path) -> str | None:
    """What a program says of a conversion that was called exact and did not say it; None where there is nothing."""
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
    if not results or any(r.complete for r in results):
        return None
    told = " ".join(report.warnings)
    said = (f"{own.consumer.name} {own.consumer.version}: {own.verdict.partition(':')[0]}" for own in results)
    return next((text for text in said if text not in told), None)


@pytest.mark.parametrize("target", PROGRAMS)
def test_what_convert_calls_exact_loads_completely(target: str, tmp_path: Path) -> None:
    found = {
        (name, target): verdict for name in FILES if (verdict := disagreement(name, target, tmp_path)) is not None
    }  # fmt: skip
    assert found == {}
