"""Changes of parameters that are no layer's weights: under the parameter's own name, or named as not used."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lorasurgery.architectures.table import row
from lorasurgery.errors import DroppedKeysError
from lorasurgery.models import open_model
from lorasurgery.verbs.apply import ApplyOptions, apply, read_source
from tests.applied import NORM, PROJ, Added, Base, assert_nearest, numbers, read, stored
from tests.edges import run as command
from tests.oracle import raw, write

if TYPE_CHECKING:
    from pathlib import Path

    from lorasurgery.verbs.apply import ApplyReport

OWN = {
    "double_blocks.0.modulation": (1, 6, 24), "token": (5,), "vace_blocks.0.q": (24, 12), "vace_blocks.0.norm": (24,),
    "head.head.bias": (7,), f"{PROJ}.bias": (24,), "blocks.0.embed.proj": (50, 12), NORM + ".scale": (128,),
}  # fmt: skip
"""Names and shapes of sites as a file spells them."""


def based(path: Path, layout: str, dtype: str) -> tuple[Base, Path, dict[str, str]]:
    """A small FLUX.1 with parameters that no table has; the key of each of :data:`OWN`."""
    base, rng = Base.make(dtype), np.random.default_rng(4)
    prefix = {"original": "", "comfyui": "diffusion_model.", "all-in-one": "model.diffusion_model."}[layout]
    bare = ("double_blocks.0.modulation", "token")
    keys = {name: prefix + name + ("" if name in bare or name.endswith((".bias", ".scale")) else ".weight") for name in OWN}
    for name, key in keys.items():
        if key not in base.tensors(layout):
            base.extra[key] = stored(rng.standard_normal(OWN[name]), dtype)
    return base, base.save(path, layout), keys


def put_in(model: Path, adapter: Added, out: Path, weight: float = 1.0, **how: Any) -> ApplyReport:
    opened = open_model(model)
    known = opened.architecture.shapes
    table = replace(
        opened.architecture, rows=(*opened.architecture.rows, *(row(n, s) for n, s in OWN.items() if n not in known))
    )
    path = adapter.save(out.with_suffix(".adapter.safetensors"))
    return apply(opened, [read_source(path, table, weight)], out, ApplyOptions(**how), force=True)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("layout", ["original", "comfyui", "all-in-one"])
def test_differences_are_added_under_the_parameter_s_name(layout: str, dtype: str, tmp_path: Path) -> None:
    _, path, keys = based(tmp_path / "m.safetensors", layout, dtype)
    adapter = Added("F32")
    deltas = {name: adapter.put(f"diffusion_model.{name}.diff", *shape) for name, shape in OWN.items()}
    report = put_in(path, adapter, tmp_path / "out.safetensors", 0.75, verify=True)
    before, after = read(path), read(tmp_path / "out.safetensors")
    for name, key in keys.items():
        assert_nearest(after[key], numbers(before[key]) + 0.75 * deltas[name])
    assert {key for key in before if before[key] != after[key]} == set(keys.values())
    assert report.unmatched == []
    assert sum(own.wrong for own in report.verified) == 0


def test_replacements_are_exact(tmp_path: Path) -> None:
    _, path, keys = based(tmp_path / "m.safetensors", "original", "F32")
    adapter = Added("BF16")
    values = {name: adapter.put(f"diffusion_model.{name}.set_weight", *shape) for name, shape in OWN.items()}
    report = put_in(path, adapter, tmp_path / "out.safetensors", 0.5)
    after = read(tmp_path / "out.safetensors")
    for name, key in keys.items():
        assert np.array_equal(numbers(after[key]), values[name]), name
    assert report.unmatched == []


def test_a_lora_of_an_embedding_and_a_bias_of_an_own_layer(tmp_path: Path) -> None:
    base, path, keys = based(tmp_path / "m.safetensors", "comfyui", "F32")
    base.extra["diffusion_model.vace_blocks.0.q.bias"] = stored(np.ones(24), "F32")
    base.save(path, "comfyui")
    adapter = Added("F32")
    deltas = {
        name: adapter.lora(f"diffusion_model.{name}", OWN[name], 3, 1.0) for name in ("blocks.0.embed.proj", "vace_blocks.0.q")
    }
    bias = adapter.put("diffusion_model.vace_blocks.0.q.diff_b", 24)
    report = put_in(path, adapter, tmp_path / "out.safetensors")
    before, after = read(path), read(tmp_path / "out.safetensors")
    for name, delta in deltas.items():
        assert_nearest(after[keys[name]], numbers(before[keys[name]]) + delta)
    assert_nearest(after["diffusion_model.vace_blocks.0.q.bias"], 1.0 + bias)
    assert report.unmatched == []


def test_what_the_model_lacks_is_named(tmp_path: Path) -> None:
    base, path, keys = based(tmp_path / "m.safetensors", "original", "BF16")
    del base.extra[keys["token"]]
    base.save(path, "original")
    adapter = Added("F32")
    for name in ("token", "blocks.0.embed.proj"):
        adapter.put(f"diffusion_model.{name}.diff", *OWN[name])
    adapter.put("diffusion_model.embed.diff_b", 50)
    report = put_in(path, adapter, tmp_path / "out.safetensors")
    lacking = {
        "diffusion_model.token.diff": "weight for denoiser token",
        "diffusion_model.embed.diff_b": "bias for denoiser embed",
    }
    assert {key: reason for _, key, reason in report.unmatched} == {k: f"the model has no {v}" for k, v in lacking.items()}
    with pytest.raises(DroppedKeysError, match="2 keys match no weight"):
        put_in(path, adapter, tmp_path / "strict.safetensors", strict=True)


def test_a_weight_that_is_stored_twice_is_told(tmp_path: Path) -> None:
    """An embedding that the last layer shares is one tensor in the model and two in its file; other equal shapes are none."""
    rng = np.random.default_rng(0)
    shared = rng.standard_normal((12, 8))
    weights = {"embed": shared, "head": shared, "other": rng.standard_normal((12, 8)), "zero": shared * 0}
    base, adapter, out = (tmp_path / f"{name}.safetensors" for name in ("base", "adapter", "out"))
    write(base, {f"layers.0.{key}.weight": raw(value, "F32") for key, value in weights.items()})
    for name, told in (("embed", True), ("other", False), ("zero", False)):
        sides = {"A": (2, 8), "B": (12, 2)}
        write(adapter, {f"layers.0.{name}.lora_{s}.weight": raw(rng.standard_normal(n), "F32") for s, n in sides.items()})
        done = command("apply", base, adapter, "-o", out, "--force")
        assert done.code == 0, done.err
        assert ("a second time, as layers.0.head.weight" in done.out + done.err) == told
