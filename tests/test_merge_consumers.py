"""Merged files in the programs that load them: Diffusers and LyCORIS add the sum of what their own files add."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.torch import load_file

import lorasurgery
from lorasurgery.operations.conversion.convert import Options, convert
from lorasurgery.verbs.merge import MergeOptions, Source, merge, parse_weight
from tests.probes import bilinear
from tests.test_consumers import MODELS, all_deltas, assert_close, complaints, fixture, flat, loaded, lycoris_delta, truth

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["complaints"]  # a fixture

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters, an inconsistency:RuntimeWarning"),
]


def merged(files: dict[str, float], out: Path, target: str, **how: Any) -> Path:
    """Fixtures with their weights, merged in fp32."""
    sources = [Source(lorasurgery.load(fixture(n), arch="sd1"), parse_weight([str(w)]), n) for n, w in files.items()]
    adapter, _ = merge(sources, MergeOptions(dtype="fp32"), target)
    converted, report = convert(adapter, target, Options(dtype="fp32", **how))
    lorasurgery.save(converted, out, report=report)
    assert not report.dropped
    return out


def sums(files: dict[str, float]) -> dict[str, np.ndarray]:
    """What the libraries themselves added when they wrote the fixtures, times the weights."""
    found: dict[str, np.ndarray] = {}
    for name, weight in files.items():
        for module, value in truth(name).items():
            found[module] = found.get(module, 0.0) + weight * value
    return found


CASES = {
    "layouts and ranks": {"diffusers_sd15": 0.7, "lycoris_locon": -0.4, "peft_lora": 1.5},
    "families": {"diffusers_sd15": 0.7, "lycoris_loha": -0.4, "lycoris_lokr": 2.0, "peft_rslora": 0.5},
    "MiSS": {"peft_miss": 0.7, "peft_miss_mini": 2.0, "diffusers_sd15": -0.4},
    "whole LoKr, tucker": {"lycoris_lokr_whole": 0.7, "lycoris_locon_tucker": 0.5, "lycoris_loha_tucker": -1.0},
}


@pytest.mark.parametrize("case", CASES)
def test_diffusers_adds_the_sum(case: str, tmp_path: Path, complaints: list[str]) -> None:
    files = CASES[case]
    path = merged(files, tmp_path / "out.safetensors", "diffusers", as_lora=True)
    found, expected = all_deltas(loaded("sd15", path)), sums(files)
    size = max(float(np.abs(value).max()) for value in expected.values())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() <= 2e-6 * size, name
    assert not complaints


def test_lycoris_adds_the_sum(tmp_path: Path) -> None:
    from lycoris.modules import get_module, make_module

    files = {"lycoris_loha": 0.5, "lycoris_lokr": 0.25, "lycoris_full": -2.0, "lycoris_norms": 3.0}
    path = merged(files, tmp_path / "out.safetensors", "lycoris")
    tensors = load_file(path)
    names = {flat(n): m for part in (MODELS["sd15"](), MODELS["clip_l"]()) for n, m in part.named_modules()}
    found: dict[str, np.ndarray] = {}
    for stem in sorted({key.partition(".")[0] for key in tensors}):
        original = names[flat(stem)]
        original.to_empty(device="cpu")
        kind, parameters = get_module(tensors, stem)
        module: Any = make_module(kind, parameters, stem, original)
        found[flat(stem)] = lycoris_delta(module)
        if kind.__name__ == "FullModule" and f"{stem}.diff_b" in tensors:
            found[f"{flat(stem)}|bias"] = bilinear(module.bias.detach().numpy())
        if kind.__name__ == "NormModule":
            found[f"{flat(stem)}|bias"] = bilinear(module.b_norm.detach().numpy())
    assert_close(found, sums(files), 3e-6)
