"""apply: every family, dtype and layout against dense float64."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from lorasurgery.models import open_model
from tests.applied import LINEAR1, NORM, PROJ, QKV, SWAPPED, Added, Base, applied, assert_nearest, numbers, read, stem

if TYPE_CHECKING:
    from pathlib import Path

    from tests.applied import Array

LAYOUTS = ("original", "comfyui", "all-in-one", "diffusers")


@pytest.fixture(params=[(), ((5, 5), 120, 35, 7), ((128, 512), 1, 1, 1)], ids=["as it is", "small parts", "columns"])
def _parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of the small models are changed in one part otherwise."""
    for name, size in zip(("HEIGHT", "READ", "PART", "GRAIN"), request.param, strict=False):
        monkeypatch.setattr(f"lorasurgery.operations.onto.step.{name}", size)


@pytest.mark.usefixtures("_parts")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_lora_in_every_layout_is_the_nearest_to_the_exact_sum(tmp_path: Path, layout: str, dtype: str) -> None:
    base, adapter = Base.make(dtype), Added("BF16")
    deltas = {name: adapter.lora(stem(name), base.weights[name].shape, 3, 1.7) for name in (QKV, PROJ, LINEAR1, SWAPPED)}
    bias = adapter.put(f"{stem(QKV)}.diff_b", 72)
    norm = adapter.put(f"{stem(NORM)}.w_norm", 128)
    out, report = applied(tmp_path, base.save(tmp_path / "m.safetensors", layout), (adapter, 0.8))
    weights, biases = base.result(out, layout)
    for name, delta in deltas.items():
        assert_nearest(weights[name], base.weights[name] + 0.8 * delta)
    assert_nearest(biases[QKV], base.biases[QKV] + 0.8 * bias)
    assert_nearest(weights[NORM], base.weights[NORM] + 0.8 * norm)
    assert report.unmatched == []
    assert report.modules == 5


@pytest.mark.usefixtures("_parts")
def test_split_modules_change_rows_of_fused_weights(tmp_path: Path) -> None:
    base, adapter = Base.make("BF16"), Added("F16")
    k = adapter.lora("transformer.transformer_blocks.0.attn.to_k", (24, 24), 2, None, "peft")
    mlp = adapter.lora("transformer.single_transformer_blocks.0.proj_mlp", (96, 24), 5, None, "peft")
    swapped = adapter.lora("transformer.norm_out.linear", (48, 24), 4, None, "peft")
    out, _ = applied(tmp_path, base.save(tmp_path / "m.safetensors"), (adapter, -1.5))
    weights, _ = base.result(out, "original")
    exact = {name: base.weights[name].copy() for name in (QKV, LINEAR1, SWAPPED)}
    exact[QKV][24:48] -= 1.5 * k
    exact[LINEAR1][72:168] -= 1.5 * mlp
    exact[SWAPPED] -= 1.5 * np.concatenate([swapped[24:], swapped[:24]])
    for name, values in exact.items():
        assert_nearest(weights[name], values)


def test_untouched_tensors_keys_order_and_metadata_stay(tmp_path: Path) -> None:
    base, adapter = Base.make("BF16"), Added()
    adapter.lora(stem(PROJ), (24, 24), 2, 1.0)
    path = base.save(tmp_path / "m.safetensors", "all-in-one", {"format": "pt", "note": "été", "modelspec.hash_sha256": "0x1"})
    out, report = applied(tmp_path, path, (adapter, 1.0))
    before, after = read(path), read(out)
    changed = f"model.diffusion_model.{PROJ}.weight"
    assert [name for name in before if before[name] != after[name]] == [changed]
    model = open_model(out)
    assert model.files[0].raw.metadata["note"] == "été"
    assert "modelspec.hash_sha256" not in model.files[0].raw.metadata
    assert report.dropped_metadata == ["modelspec.hash_sha256"]
    assert '"weight": "1"' in model.files[0].raw.metadata["lorasurgery.applied"]
    orders = [list(entries(p)) for p in (path, out)]
    assert orders[0][1:] == orders[1][1:]
    assert entries(path)[changed]["data_offsets"] == entries(out)[changed]["data_offsets"]


def entries(path: Path) -> dict[str, dict[str, list[int]]]:
    """A file's header."""
    data = path.read_bytes()
    found: dict[str, dict[str, list[int]]] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return found


@pytest.mark.usefixtures("_parts")
@pytest.mark.parametrize("dtype", ["BF16", "F8_E5M2"])
def test_parts_of_a_weight_that_several_modules_change(tmp_path: Path, dtype: str) -> None:
    """One of them does not do parts; the report measures whole rows."""
    base, first, second = Base.make(dtype), Added("BF16"), Added("F32", seed=2)
    shapes = {name: base.weights[name].shape for name in (QKV, PROJ, LINEAR1)}
    deltas = {name: first.lora(stem(name), shape, 3, 1.7) for name, shape in shapes.items()}
    deltas[QKV] = deltas[QKV] - 0.5 * second.lora(stem(QKV), shapes[QKV], 2, 3.0)
    deltas[PROJ] = deltas[PROJ] - 0.5 * hadamard(second, stem(PROJ), *shapes[PROJ])
    out, report = applied(tmp_path, base.save(tmp_path / "m.safetensors"), (first, 1.0), (second, -0.5))
    weights, _ = base.result(out, "original")
    for name, delta in deltas.items():
        exact = base.weights[name] + delta
        assert_nearest(weights[name], exact)
        if len(exact) > 128:  # not every row is measured
            continue
        norms = next(tally.norms for tally in report.tensors if tally.name == f"{name}.weight")
        assert norms.relative_change == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(base.weights[name]), rel=1e-5)
        assert norms.loss == pytest.approx(float(np.sum((numbers(weights[name]) - exact) ** 2)), rel=1e-3)


def hadamard(adapter: Added, module: str, out: int, columns: int) -> Array:
    a, b, c, d = (
        adapter.put(f"{module}.hada_{slot}", *shape)
        for slot, shape in (("w1_a", (out, 3)), ("w1_b", (3, columns)), ("w2_a", (out, 3)), ("w2_b", (3, columns)))
    )
    return (a @ b) * (c @ d) * adapter.number(f"{module}.alpha", 2.0) / 3


def kronecker(adapter: Added, module: str, out: int, columns: int) -> Array:
    one = adapter.put(f"{module}.lokr_w1", 4, 2)
    left, right = adapter.put(f"{module}.lokr_w2_a", out // 4, 2), adapter.put(f"{module}.lokr_w2_b", 2, columns // 2)
    return np.kron(one, left @ right) * adapter.number(f"{module}.alpha", 5.0) / 2


def full(adapter: Added, module: str, out: int, columns: int) -> Array:
    return adapter.put(f"{module}.diff", out, columns)


@pytest.mark.parametrize("family", [hadamard, kronecker, full])
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_other_additive_families(tmp_path: Path, family: object, layout: str) -> None:
    base, adapter = Base.make("BF16"), Added("F32")
    deltas = {name: family(adapter, stem(name), *base.weights[name].shape) for name in (QKV, SWAPPED, PROJ)}  # type: ignore[operator]
    out, _ = applied(tmp_path, base.save(tmp_path / "m.safetensors", layout), (adapter, 0.6))
    weights, _ = base.result(out, layout)
    for name, delta in deltas.items():
        assert_nearest(weights[name], base.weights[name] + 0.6 * delta)


def dora_exact(weight: Array, delta: Array, magnitude: Array, strength: float, mode: str) -> Array:
    """By rows or columns, from the definitions."""
    axis = 1 if magnitude.shape[0] == weight.shape[0] else 0
    changed = weight + (strength if mode == "peft" else 1.0) * delta
    norm = np.linalg.norm(weight if mode == "comfyui" and axis == 1 else changed, axis=axis, keepdims=True)
    recomposed = magnitude * changed / norm
    return recomposed if mode == "peft" else weight + strength * (recomposed - weight)


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize("mode", ["interpolate", "peft", "comfyui"])
@pytest.mark.parametrize("axis", ["out", "in"])
def test_dora(tmp_path: Path, layout: str, strength: float, mode: str, axis: str) -> None:
    base, adapter = Base.make("BF16"), Added("F32")
    exact = {}
    for name in (QKV, PROJ, SWAPPED):
        out, columns = base.weights[name].shape
        delta = adapter.lora(stem(name), (out, columns), 3, 2.0)
        shape = (out, 1) if axis == "out" else (1, columns)
        magnitude = adapter.put(f"{stem(name)}.dora_scale", *shape, at=2.0)
        exact[name] = dora_exact(base.weights[name], delta, magnitude, strength, mode)
    path, _ = applied(tmp_path, base.save(tmp_path / "m.safetensors", layout), (adapter, strength), dora=mode)
    weights, _ = base.result(path, layout)
    for name, values in exact.items():
        assert_nearest(weights[name], values)


def cayley(blocks: Array, limit: float) -> Array:
    """(I + Q)(I - Q)^-1 for each block, Q no longer than ``limit``."""
    skew = blocks - np.swapaxes(blocks, -1, -2)
    norm = np.linalg.norm(skew.reshape(-1)) + 1e-8
    skew = skew * (limit / norm if 0 < limit < norm else 1.0)
    eye = np.eye(blocks.shape[-1])
    return (eye + skew) @ np.linalg.inv(eye - skew)


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize(("alpha", "rescaled"), [(0.0, False), (0.001, True)])
def test_diagonal_oft(tmp_path: Path, layout: str, alpha: float, rescaled: bool) -> None:
    base, adapter = Base.make("BF16"), Added("F32", size=0.2)
    exact = {}
    for name in (QKV, SWAPPED):
        weight = base.weights[name]
        turns = cayley(adapter.put(f"{stem(name)}.oft_blocks", len(weight) // 8, 8, 8), alpha * len(weight))
        adapter.number(f"{stem(name)}.alpha", alpha)
        mixed = 0.6 * turns + 0.4 * np.eye(8)
        whole = np.zeros((len(weight), len(weight)))
        for k, turn in enumerate(mixed):
            whole[8 * k : 8 * k + 8, 8 * k : 8 * k + 8] = turn.T
        scale = adapter.put(f"{stem(name)}.rescale", len(weight), 1, at=1.0) if rescaled else 1.0
        exact[name] = scale * (whole @ weight)
    path, _ = applied(tmp_path, base.save(tmp_path / "m.safetensors", layout), (adapter, 0.6))
    weights, _ = base.result(path, layout)
    for name, values in exact.items():
        assert_nearest(weights[name], values)


def test_butterfly_oft(tmp_path: Path) -> None:
    base, adapter = Base.make("BF16"), Added("F32", size=0.2)
    weight, sets, size = base.weights[PROJ], 2, 4
    turns = 0.5 * cayley(adapter.put(f"{stem(PROJ)}.oft_blocks", sets, 24 // size, size, size), 0.0) + 0.5 * np.eye(size)
    scale = adapter.put(f"{stem(PROJ)}.rescale", 24, 1, at=1.0)
    exact = weight
    for i in range(sets):
        near = 2**i * size // 2
        order = np.arange(24).reshape(-1, 2, near).swapaxes(1, 2).reshape(-1)
        whole = np.zeros((24, 24))
        for k in range(24 // size):
            whole[size * k : size * k + size, size * k : size * k + size] = turns[i, k]
        permutation = np.eye(24)[order]
        exact = permutation.T @ whole @ permutation @ exact
    path, _ = applied(tmp_path, base.save(tmp_path / "m.safetensors"), (adapter, 0.5))
    assert_nearest(base.result(path, "original")[0][PROJ], scale * exact)


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_peft_oft_turns_columns(tmp_path: Path, layout: str) -> None:
    base, adapter = Base.make("BF16"), Added("F32", size=0.1)
    triangles = adapter.put(f"{stem(QKV)}.oft_R.weight", 6, 6)
    whole = np.zeros((24, 24))
    for k, triangle in enumerate(triangles):
        skew = np.zeros((4, 4))
        skew[np.triu_indices(4, 1)] = triangle
        skew = skew - skew.T
        power = np.linalg.matrix_power
        turn = np.eye(4) + 2 * skew + 2 * power(skew, 2) + 2 * power(skew, 3) + power(skew, 4)
        whole[4 * k : 4 * k + 4, 4 * k : 4 * k + 4] = turn
    exact = base.weights[QKV] + 0.8 * (base.weights[QKV] @ whole.T - base.weights[QKV])
    path, _ = applied(tmp_path, base.save(tmp_path / "m.safetensors", layout), (adapter, 0.8))
    assert_nearest(base.result(path, layout)[0][QKV], exact)


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("old", [False, True])
def test_glora(tmp_path: Path, layout: str, old: bool) -> None:
    base, adapter = Base.make("BF16"), Added("F32")
    weight, rank = base.weights[QKV], 3
    shapes = {"a1": (24, rank), "a2": (rank, 24), "b1": (72, rank), "b2": (rank, 24)}
    if old:
        shapes = {"a1": (rank, 24), "a2": (24, rank), "b1": (rank, 24), "b2": (72, rank)}
    own = {name: adapter.put(f"{stem(QKV)}.{name}.weight", *shape) for name, shape in shapes.items()}
    scale = adapter.number(f"{stem(QKV)}.alpha", 2.0) / rank
    change = (
        own["b2"] @ own["b1"] + weight @ own["a2"] @ own["a1"]
        if old
        else own["b1"] @ own["b2"] + weight @ own["a1"] @ own["a2"]
    )
    path, _ = applied(tmp_path, base.save(tmp_path / "m.safetensors", layout), (adapter, 0.4))
    assert_nearest(base.result(path, layout)[0][QKV], weight + 0.4 * scale * change)


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("on_input", [False, True])
def test_ia3(tmp_path: Path, layout: str, on_input: bool) -> None:
    base, adapter = Base.make("BF16"), Added("F32")
    weight = base.weights[QKV]
    vector = adapter.put(f"{stem(QKV)}.weight", 24 if on_input else 72)
    adapter.tensors[f"{stem(QKV)}.on_input"] = adapter.tensors[f"{stem(QKV)}.weight"]._replace(
        dtype="I64", shape=(), data=int(on_input).to_bytes(8, "little")
    )
    factors = 1 + 0.9 * (vector[None, :] if on_input else vector[:, None])
    path, _ = applied(tmp_path, base.save(tmp_path / "m.safetensors", layout), (adapter, 0.9))
    assert_nearest(base.result(path, layout)[0][QKV], weight * factors)


def test_replaced_weights_ignore_the_strength(tmp_path: Path) -> None:
    base, adapter = Base.make("BF16"), Added("F32")
    whole = adapter.put(f"diffusion_model.{PROJ}.set_weight", 24, 24)
    path, _ = applied(tmp_path, base.save(tmp_path / "m.safetensors"), (adapter, 0.5))
    assert_nearest(base.result(path, "original")[0][PROJ], whole)


def test_several_adapters_act_one_after_the_other(tmp_path: Path) -> None:
    """Additions commute; a DoRA acts on what the ones before it left. A fused one and split ones meet in one weight."""
    base, first, second, third = Base.make("BF16"), Added(seed=1), Added(seed=2), Added(seed=3)
    fused = first.lora(stem(QKV), (72, 24), 3, 2.0)
    k = second.lora("transformer.transformer_blocks.0.attn.to_k", (24, 24), 2, None, "peft")
    magnitude = second.put("transformer.transformer_blocks.0.attn.to_k.lora_magnitude_vector", 24, at=2.0)
    columns = third.lora(stem(QKV), (72, 24), 2, None)
    scale = third.put(f"{stem(QKV)}.dora_scale", 1, 24, at=3.0)
    exact = base.weights[QKV] + 0.5 * fused
    exact[24:48] = dora_exact(exact[24:48], k, magnitude[:, None], 0.8, "interpolate")
    exact = dora_exact(exact, columns, scale, 0.7, "interpolate")
    for layout in LAYOUTS:
        path, _ = applied(tmp_path, base.save(tmp_path / "m.safetensors", layout), (first, 0.5), (second, 0.8), (third, 0.7))
        assert_nearest(base.result(path, layout)[0][QKV], exact)


def test_what_matches_nothing_is_listed(tmp_path: Path) -> None:
    base, adapter = Base.make("BF16"), Added()
    adapter.lora(stem(PROJ), (24, 24), 2, 1.0)
    adapter.lora(stem("double_blocks.7.img_attn.proj"), (24, 24), 2, 1.0)
    adapter.put("lora_unet_nothing.lora_up.weight", 3, 3)
    adapter.put("lora_unet_nothing.lora_down.weight", 3, 3)
    adapter.put(f"{stem(NORM)}.diff_b", 128)
    _, report = applied(tmp_path, base.save(tmp_path / "m.safetensors"), (adapter, 1.0))
    keys = {key for _, key, _ in report.unmatched}
    assert keys == {key for key in adapter.tensors if "img_attn_proj" not in key or "_7_" in key}


def test_zero_leaves_an_adapter_out(tmp_path: Path) -> None:
    base, adapter, other = Base.make("BF16"), Added(), Added(seed=5)
    delta = adapter.lora(stem(PROJ), (24, 24), 2, 1.0)
    other.put(f"diffusion_model.{PROJ}.set_weight", 24, 24)
    path, report = applied(tmp_path, base.save(tmp_path / "m.safetensors"), (adapter, 1.0), (other, 0.0))
    assert_nearest(base.result(path, "original")[0][PROJ], base.weights[PROJ] + delta)
    assert report.used[1].left_out == 1


def test_the_report_measures_change_and_loss(tmp_path: Path) -> None:
    base, adapter = Base.make("BF16"), Added(size=0.05)
    delta = adapter.lora(stem(PROJ), (24, 24), 2, 1.0)
    path, report = applied(tmp_path, base.save(tmp_path / "m.safetensors"), (adapter, 1.0))
    after = numbers(base.result(path, "original")[0][PROJ])
    loss = np.linalg.norm(after - base.weights[PROJ] - delta) / np.linalg.norm(delta)
    assert report.total.relative_change == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(base.weights[PROJ]), rel=1e-3)
    assert report.total.relative_loss == pytest.approx(loss, rel=1e-3)
