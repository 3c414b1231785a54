"""apply makes of a weight what PEFT, LyCORIS and OneTrainer make of it themselves, for every family that multiplies it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import load_file

from lorasurgery.models import open_model
from lorasurgery.verbs.apply import ApplyOptions, apply, read_source
from tests.multiplied import FILES, base, save, truth
from tests.probes import bilinear

if TYPE_CHECKING:
    from pathlib import Path

    from lorasurgery.verbs.apply import ApplyReport
    from tests.multiplied import Arrays

SINGLE = 2e-5
"""LyCORIS calculates in single precision; PEFT and OneTrainer were asked in double."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model") / "unet.safetensors", base())


def run(model: Path, adapter: Path, out: Path, strength: float = 1.0, **how: object) -> tuple[Arrays, ApplyReport]:
    opened = open_model(model, arch="sd1")
    source = read_source(adapter, opened.architecture, strength)
    report = apply(opened, [source], out, ApplyOptions(**how), force=True)  # type: ignore[arg-type]
    return load_file(out), report


@pytest.mark.parametrize("adapter", FILES, ids=lambda path: path.name)
def test_every_weight_becomes_what_its_producer_makes_of_it(tmp_path: Path, model: Path, adapter: Path) -> None:
    after, report = run(model, adapter, tmp_path / "o.safetensors", verify=True)
    expected, before = truth(adapter), base()
    assert report.unmatched == []
    assert not report.warnings
    changed = {key for key in before if not np.array_equal(after[key], before[key])}
    assert changed == set(expected)
    for key, probes in expected.items():
        found = bilinear(after[key].astype("f8") - before[key])
        stored = np.abs(after[key]).max() * 2e-8 * found.size**0.5 * after[key].size ** 0.5
        limit = np.abs(probes).max() * (SINGLE if adapter.name.startswith("lycoris") else 1e-6) + stored
        assert np.abs(found - probes).max() <= limit, key
        assert np.abs(probes).max() > 100 * limit, key
    assert len(report.verified) == len(expected)
    assert sum(own.wrong for own in report.verified) == 0


def test_the_weights_of_a_folder_bring_their_configuration(tmp_path: Path, model: Path) -> None:
    folder = next(path for path in FILES if path.name == "peft_oft_cayley")
    whole, _ = run(model, folder, tmp_path / "a.safetensors")
    alone, report = run(model, folder / "adapter_model.safetensors", tmp_path / "b.safetensors")
    assert report.used[0].path == str(folder)
    for key, values in whole.items():
        np.testing.assert_array_equal(alone[key], values)
