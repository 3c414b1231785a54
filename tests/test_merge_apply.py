"""A merge, applied, is the files applied one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

import lorasurgery
from lorasurgery.verbs.merge import MergeOptions
from tests.applied import LINEAR1, NORM, PROJ, QKV, SWAPPED, Added, Base, numbers, stem

if TYPE_CHECKING:
    from pathlib import Path

    from tests.applied import Array


def files() -> tuple[Added, Added, dict[str, Array], dict[str, Array]]:
    """One file with fused names and alphas, one with Diffusers' parts; and what each does, by original weight."""
    first, second = Added("F32", seed=1), Added("F32", seed=2)
    shapes = {name: weight.shape for name, weight in Base.make("F32").weights.items()}
    one = {name: first.lora(stem(name), shapes[name], 3, 1.7) for name in (QKV, PROJ, LINEAR1)}
    one[NORM] = first.put(f"{stem(NORM)}.w_norm", 128)
    other = {name: np.zeros(shapes[name]) for name in (QKV, PROJ, SWAPPED)}
    other[QKV][24:48] = second.lora("transformer.transformer_blocks.0.attn.to_k", (24, 24), 2, None, "peft")
    other[PROJ] = second.lora("transformer.transformer_blocks.0.attn.to_out.0", (24, 24), 5, None, "peft")
    swapped = second.lora("transformer.norm_out.linear", (48, 24), 4, None, "peft")
    other[SWAPPED] = np.concatenate([swapped[24:], swapped[:24]])
    return first, second, one, other


@pytest.mark.parametrize(("x", "y"), [(0.7, -0.4), (1.0, 1.0), (-2.0, 0.5), (0.0, 1.3)])
def test_merged_and_applied_is_applied_one_after_the_other(tmp_path: Path, x: float, y: float) -> None:
    base = Base.make("F32")
    path = base.save(tmp_path / "model.safetensors")
    first, second, one, other = files()
    a, b = first.save(tmp_path / "a.safetensors"), second.save(tmp_path / "b.safetensors")
    merged, _ = lorasurgery.merge([(lorasurgery.load(f, base=path), w) for f, w in ((a, x), (b, y))], MergeOptions())
    lorasurgery.save(merged, tmp_path / "merged.safetensors")

    def applied(model: Path, adapter: Path, weight: float, out: str) -> Path:
        opened = lorasurgery.open_model(model)
        lorasurgery.apply(opened, [lorasurgery.read_source(adapter, opened.architecture, weight)], tmp_path / out)
        return tmp_path / out

    once = applied(path, tmp_path / "merged.safetensors", 1.0, "once.safetensors")
    twice = (
        applied(applied(path, a, x, "half.safetensors"), b, y, "twice.safetensors")
        if x
        else applied(path, b, y, "t.safetensors")
    )
    results = [base.result(out, "original")[0] for out in (once, twice)]
    for name, weight in base.weights.items():
        truth = weight + x * one.get(name, np.zeros(())) + y * other.get(name, np.zeros(()))
        limit = 3e-7 * np.abs(truth).max()
        for result in results:
            assert np.abs(numbers(result[name]) - truth).max() <= limit, name
