"""apply: fp8 and its scales, stochastic rounding, values out of range, and taking adapters out again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from lorasurgery.errors import BrokenModuleError, NotRepresentableError
from lorasurgery.io.dtypes import numpy_dtype
from lorasurgery.operations.onto.numbers import FORMATS, nearest, spacing, stochastic, surely_finite
from lorasurgery.operations.onto.tools import Tools, TorchTools
from tests import applied as small
from tests.applied import LINEAR1, PROJ, QKV, SWAPPED, Added, Base, applied, assert_nearest, numbers, read, stem, stored
from tests.oracle import Raw, raw

if TYPE_CHECKING:
    from pathlib import Path

    from tests.applied import Array

LARGEST = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0}


# fp8 ----------------------------------------------------------------------------------------------------------------------


SHAPES = {"one": (), "number": (1,), "rows": (72, 1), "row vector": (72,), "blocks": (72, 3, 1)}


def spread(scale: Array, shape: str) -> Array:
    """Scales of a (72, 24) weight, one for each value."""
    groups = 3 if shape == "blocks" else 1
    return np.broadcast_to(np.atleast_1d(scale).reshape(-1, groups, 1), (72, groups, 24 // groups)).reshape(72, 24)


def scales_for(weight: Array, shape: str, room: float, dtype: str) -> Raw:
    """Scales with which the largest value of each group is the largest of the dtype over ``room``."""
    groups = 3 if shape == "blocks" else 1
    most = np.abs(weight).reshape(72, groups, -1).max(axis=2)
    values = most.reshape(SHAPES[shape]) if len(SHAPES[shape]) and SHAPES[shape][0] == 72 else most.max().reshape(SHAPES[shape])
    return raw(values * room / LARGEST[dtype], "F32")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
def test_scaled_fp8_is_dequantised_changed_and_quantised(tmp_path: Path, shape: str, dtype: str, suffix: str) -> None:
    """With room in the old scale it stays; values are nearest on the grid that it makes."""
    base, adapter = Base.make("BF16", size=0.02), Added("F32", size=0.05)
    scale = scales_for(base.weights[QKV], shape, 3.7, dtype)
    each = spread(scale.f64(), shape)
    weight = stored(base.weights[QKV] / each, dtype)
    base.extra = {f"{QKV}.weight": weight, f"{QKV}.{suffix}": scale, "scaled_fp8": stored(np.zeros(2), dtype)}
    delta = adapter.lora(stem(QKV), (72, 24), 3, 2.0)
    path, report = applied(tmp_path, base.save(tmp_path / "m.safetensors"), (adapter, 0.8))
    after = read(path)
    assert after[f"{QKV}.weight"].dtype == dtype
    assert after[f"{QKV}.{suffix}"] == scale
    assert_nearest(after[f"{QKV}.weight"], numbers(weight) + 0.8 * delta / each)
    assert report.new_scales() == 0


@pytest.mark.parametrize("policy", ["keep", "new"])
@pytest.mark.parametrize("shape", ["one", "rows", "blocks"])
def test_scales_are_new_where_values_no_longer_fit(tmp_path: Path, policy: str, shape: str) -> None:
    base, adapter = Base.make("BF16", size=0.02), Added("F32", size=0.5)
    groups = 3 if shape == "blocks" else 1
    scale = scales_for(base.weights[QKV], shape, 1.0, "F8_E4M3")
    each = spread(scale.f64(), shape)
    weight = stored(base.weights[QKV] / each * (1 - 1e-7), "F8_E4M3")
    base.extra = {f"{QKV}.weight": weight, f"{QKV}.weight_scale": scale}
    exact = numbers(weight) * each
    delta = adapter.lora(stem(QKV), (72, 24), 3, 2.0)
    delta[36:] = 0.0
    adapter.tensors[f"{stem(QKV)}.lora_up.weight"] = stored(
        np.concatenate([numbers(adapter.tensors[f"{stem(QKV)}.lora_up.weight"])[:36], np.zeros((36, 3))]), "F32"
    )
    path, report = applied(tmp_path, base.save(tmp_path / "m.safetensors"), (adapter, 1.0), scales=policy)
    after, new = read(path), exact + delta
    own = after[f"{QKV}.weight_scale"].f64()
    assert own.shape == scale.shape
    if shape == "one":
        assert own == pytest.approx(np.abs(new).max() / 448, rel=1e-6)
        assert report.new_scales() == 1
    else:
        wanted = np.abs(new).reshape(72, groups, -1).max(axis=2).reshape(own.shape) / 448
        fits = (wanted <= scale.f64() * (1 + 1e-6)) & (policy == "keep")
        np.testing.assert_allclose(own, np.where(fits, scale.f64(), wanted), rtol=1e-6)
    stands = numbers(after[f"{QKV}.weight"]) * spread(own, shape)
    assert np.abs(stands - new).max() <= np.abs(new).max() / 16
    assert np.linalg.norm(stands - new) / np.linalg.norm(new) < 0.04


def fp16_scaled(folder: Path, size: float) -> tuple[Base, Path, Raw]:
    """A small FLUX.1 with one fp8 weight of values around ``size`` and a scale in fp16."""
    base = Base.make("BF16", size=size)
    scale = raw(np.abs(base.weights[QKV]).max() / 448.0 * 1.5, "F16")
    base.extra = {
        f"{QKV}.weight": stored(base.weights[QKV] / scale.item(), "F8_E4M3"), f"{QKV}.scale_weight": scale,
        "scaled_fp8": stored(np.zeros(2), "F8_E4M3"),
    }  # fmt: skip
    return base, base.save(folder / "m.safetensors"), scale


@pytest.mark.parametrize("weight", [0.7, 1.3, 2.6])
def test_a_new_scale_is_never_rounded_to_less_than_the_largest_value_needs(tmp_path: Path, weight: float) -> None:
    """Scales among fp16's least numbers are a few steps apart: a smaller one would cut off the largest values."""
    base, path, scale = fp16_scaled(tmp_path, 2e-5)
    adapter = Added("F32", size=1.3e-3)
    before = numbers(base.extra[f"{QKV}.weight"]) * scale.item()
    exact = before + weight * adapter.lora(stem(QKV), (72, 24), 3, 3.0)
    out, _ = applied(tmp_path, path, (adapter, weight), scales="new")
    after = read(out)
    new = after[f"{QKV}.scale_weight"].item()
    most = np.abs(exact).max() / 448.0
    assert most <= new < most + 2.0**-24
    assert_nearest(after[f"{QKV}.weight"], exact / new)


def test_a_scale_out_of_range_is_an_error(tmp_path: Path) -> None:
    _, path, _ = fp16_scaled(tmp_path, 0.02)
    adapter = Added("F32")
    adapter.lora(stem(QKV), (72, 24), 3, 3.0)
    with pytest.raises(BrokenModuleError, match="scale is beyond the range of F16"):
        applied(tmp_path, path, (adapter, 1e12))


@pytest.mark.parametrize("dtype", LARGEST)
def test_fp8_without_scales_is_rounded_in_fp8_and_the_loss_is_told(tmp_path: Path, dtype: str) -> None:
    base, adapter = Base.make(dtype), Added("F32", size=0.03)
    delta = adapter.lora(stem(QKV), (72, 24), 3, 2.0)
    path, report = applied(tmp_path, base.save(tmp_path / "m.safetensors"), (adapter, 1.0))
    tensor = read(path)[f"{QKV}.weight"]
    assert_nearest(tensor, base.weights[QKV] + delta)
    loss = np.linalg.norm(numbers(tensor) - base.weights[QKV] - delta) / np.linalg.norm(delta)
    assert report.total.relative_loss == pytest.approx(loss, rel=1e-3)
    assert loss > 0.3


# rounding -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-7])
def test_stochastic_rounding_gives_a_neighbour_and_keeps_the_mean(dtype: str, size: float) -> None:
    value = np.float32(0.7654321 * size)
    many = np.full((4, 20000), value)
    many[2:] *= -1
    found = stochastic(many, dtype, np.random.default_rng(1)).astype(numpy_dtype(dtype)).astype(np.float64)
    exact = many.astype(np.float64)
    step = spacing(exact, dtype)
    assert (np.abs(found - exact) < step).all()
    error = abs((found - exact)[:2].mean()) / step[0, 0]
    assert error < 0.02
    assert len(np.unique(np.abs(found))) == 2


def test_stochastic_rounding_keeps_what_a_dtype_holds_exactly() -> None:
    for dtype in ("BF16", "F16", "F8_E4M3", "F8_E5M2"):
        values = numbers(stored(np.random.default_rng(0).standard_normal(500), dtype)).astype(np.float32)
        assert (stochastic(values, dtype, np.random.default_rng(2)).astype(np.float32) == values).all()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F8_E4M3", "F8_E5M2", "F32"])
def test_spacing_is_the_distance_to_the_next_number(dtype: str) -> None:
    values = numbers(stored(np.random.default_rng(0).standard_normal(200) * np.exp(np.linspace(-14, 2, 200)), dtype))
    up = numbers(stored(np.abs(values) + small.spacing(values, dtype), dtype))
    assert (spacing(values, dtype) == up - np.abs(values)).all()


def test_stochastic_runs_are_the_same_for_the_same_seed_and_keep_small_changes(tmp_path: Path) -> None:
    base, adapter = Base.make("F8_E4M3"), Added("F32", size=0.06)
    delta = adapter.lora(stem(LINEAR1), (168, 24), 3, 2.0)
    path = base.save(tmp_path / "m.safetensors")

    def kept(out: Path) -> float:
        change = numbers(read(out)[f"{LINEAR1}.weight"]) - base.weights[LINEAR1]
        return float((change * delta).sum() / (delta**2).sum())

    data, shares = [], []
    for seed, workers in ((1, 1), (1, 2), *((seed, 2) for seed in range(2, 14))):
        out, report = applied(tmp_path, path, (adapter, 1.0), rounding="stochastic", seed=seed, workers=workers)
        data.append(out.read_bytes())
        shares.append(kept(out))
        assert report.total.kept == pytest.approx(shares[-1], abs=0.3)
    assert data[0] == data[1] != data[2]
    assert abs(np.mean(shares[1:]) - 1) < 0.1
    plain, report = applied(tmp_path, path, (adapter, 1.0))
    assert report.total.kept == pytest.approx(kept(plain), abs=0.1)
    assert kept(plain) < 0.8


def test_the_certificate_of_finite_values_is_never_wrong() -> None:
    for dtype, own in FORMATS.items():
        if dtype != "F64":
            values = np.array([[own.largest, 1.0]], "f4")
            with np.errstate(over="ignore"):
                assert not surely_finite(values, dtype)
            assert not surely_finite(np.array([[np.nan]], "f4"), dtype)
            assert surely_finite(np.array([[0.5, 0.5]], "f4"), dtype)
            assert np.isfinite(nearest(values, dtype).astype("f4")).all()


@pytest.mark.parametrize("tools", [Tools(), TorchTools()])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F8_E4M3", "F8_E5M2", "F32"])
def test_both_sets_of_tools_round_to_nearest_even_and_read_exactly(tools: Tools, dtype: str) -> None:
    if dtype in {"F16", "BF16"}:
        every = np.arange(65536, dtype=np.uint16).view(numpy_dtype(dtype)).reshape(256, 256)
    else:
        every = np.arange(256, dtype=np.uint8).view(numpy_dtype(dtype if dtype != "F32" else "F8_E5M2")).reshape(16, 16)
    out = np.empty(every.shape, "f4")
    if dtype != "F32":
        with np.errstate(invalid="ignore"):
            tools.decode(every, dtype, out)
            np.testing.assert_array_equal(out, every.astype("f4"))
    with np.errstate(invalid="ignore"):
        wide = every.astype("f8").reshape(-1)
    known = np.sort(wide[np.isfinite(wide)])
    middles = known[1:] / 2 + known[:-1] / 2
    with np.errstate(over="ignore"):
        around = [known, middles, np.nextafter(middles.astype("f4"), np.inf), np.nextafter(middles.astype("f4"), -np.inf)]
        values = np.concatenate(around).astype("f4").reshape(1, -1)
        beyond = np.array([[FORMATS[dtype].largest * 1.2 if dtype != "F32" else np.inf, np.nan]]).astype("f4")
    found = np.empty(values.shape, numpy_dtype(dtype))
    with np.errstate(over="ignore", invalid="ignore"):
        tools.encode(values, dtype, found)
        np.testing.assert_array_equal(found.astype("f8"), values.astype(numpy_dtype(dtype)).astype("f8"))
    found = np.empty(beyond.shape, numpy_dtype(dtype))
    with np.errstate(over="ignore", invalid="ignore"):
        tools.encode(beyond, dtype, found)
    assert not np.isfinite(found.astype("f4")).any()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F8_E4M3"])
def test_large_models_are_changed_with_torch(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = Base.make(dtype), Added("BF16")
    deltas = {name: adapter.lora(stem(name), base.weights[name].shape, 3, 1.7) for name in (QKV, PROJ, LINEAR1, SWAPPED)}
    path = base.save(tmp_path / "m.safetensors", "comfyui")
    monkeypatch.setattr("lorasurgery.operations.onto.tools.WORTH", 0.0)
    monkeypatch.setattr(Tools, "adder", lambda *_: pytest.fail("numpy's"))
    out, _ = applied(tmp_path, path, (adapter, 0.8), verify=True)
    weights, _ = base.result(out, "comfyui")
    for name, delta in deltas.items():
        assert_nearest(weights[name], base.weights[name] + 0.8 * delta)


# out of range -------------------------------------------------------------------------------------------------------------


def test_a_value_out_of_range_is_named(tmp_path: Path) -> None:
    base, adapter = Base.make("F16"), Added("F32", size=300.0)
    adapter.lora(stem(PROJ), (24, 24), 2, None)
    path = base.save(tmp_path / "m.safetensors")
    with pytest.raises(BrokenModuleError, match="beyond the range of F16") as caught:
        applied(tmp_path, path, (adapter, 1.0))
    assert caught.value.key == f"{PROJ}.weight"
    assert stem(PROJ) in str(caught.value)
    assert [p.name for p in tmp_path.iterdir() if p.name not in ("m.safetensors", "a0.safetensors")] == []


@pytest.mark.parametrize("where", ["model", "adapter"])
def test_nan_is_found_and_blamed(tmp_path: Path, where: str) -> None:
    base, adapter = Base.make("BF16"), Added("F32")
    adapter.lora(stem(PROJ), (24, 24), 2, None)
    if where == "model":
        base.weights[PROJ][3, 5] = np.nan
    else:
        adapter.tensors[f"{stem(PROJ)}.lora_up.weight"] = stored(np.full((24, 2), np.inf), "F32")
    with pytest.raises(BrokenModuleError, match="in the model" if where == "model" else "comes out") as caught:
        applied(tmp_path, base.save(tmp_path / "m.safetensors"), (adapter, 1.0))
    assert caught.value.key == f"{PROJ}.weight"


# out again ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_unapply_restores_to_rounding_and_says_how_well(tmp_path: Path, dtype: str) -> None:
    base, adapter, other = Base.make(dtype), Added("F32", size=0.2), Added("BF16", seed=9, size=0.2)
    for name in (QKV, LINEAR1, SWAPPED):
        adapter.lora(stem(name), base.weights[name].shape, 3, 2.0)
        other.lora(stem(name), base.weights[name].shape, 5, 1.0)
    adapter.put(f"{stem(QKV)}.diff_b", 72)
    baked, _ = applied(tmp_path, base.save(tmp_path / "m.safetensors"), (adapter, 0.8), (other, -0.4))
    baked = baked.rename(tmp_path / "baked.safetensors")
    path, report = applied(tmp_path, baked, (adapter, 0.8), (other, -0.4), unapply=True)
    weights, biases = base.result(path, "original")
    error = norm = 0.0
    for name in (QKV, LINEAR1, SWAPPED):
        error += float(((numbers(weights[name]) - base.weights[name]) ** 2).sum())
        norm += float((base.weights[name] ** 2).sum())
    error += float(((numbers(biases[QKV]) - base.biases[QKV]) ** 2).sum())
    norm += float((base.biases[QKV] ** 2).sum())
    assert report.total.relative_restored == pytest.approx((error / norm) ** 0.5, rel=0.25)
    for name in (PROJ,):
        assert weights[name] == stored(base.weights[name], dtype)


def multiplied(adapter: Added, kind: str) -> None:
    """A module of a family that multiplies the base."""
    if kind == "oft":
        adapter.put(f"{stem(QKV)}.oft_blocks", 9, 8, 8)
        adapter.put(f"{stem(QKV)}.rescale", 72, 1, at=2.0)
    elif kind == "boft":
        adapter.put(f"{stem(QKV)}.oft_blocks", 2, 18, 4, 4)
        adapter.put(f"{stem(QKV)}.rescale", 72, 1, at=2.0)
    elif kind == "peft oft":
        adapter.put(f"{stem(QKV)}.oft_R.weight", 6, 6)
    elif kind == "glora":
        for name, shape in {"a1": (24, 3), "a2": (3, 24), "b1": (72, 3), "b2": (3, 24)}.items():
            adapter.put(f"{stem(QKV)}.{name}.weight", *shape)
    elif kind == "ia3":
        adapter.put(f"{stem(QKV)}.weight", 24)
        adapter.tensors[f"{stem(QKV)}.on_input"] = Raw("I64", (), (1).to_bytes(8, "little"))


@pytest.mark.parametrize("kind", ["oft", "boft", "peft oft", "glora", "ia3"])
def test_families_that_multiply_are_taken_out_by_their_inverses(tmp_path: Path, kind: str) -> None:
    base, adapter = Base.make("F32"), Added("F32", size=0.1)
    multiplied(adapter, kind)
    baked, _ = applied(tmp_path, base.save(tmp_path / "m.safetensors"), (adapter, 0.7))
    baked = baked.rename(tmp_path / "baked.safetensors")
    assert np.abs(numbers(read(baked)[f"{QKV}.weight"]) - base.weights[QKV]).max() > 1e-2
    path, report = applied(tmp_path, baked, (adapter, 0.7), unapply=True)
    error = np.linalg.norm(numbers(read(path)[f"{QKV}.weight"]) - base.weights[QKV]) / np.linalg.norm(base.weights[QKV])
    assert error < 2e-7
    assert 0.2 < error / report.total.relative_restored < 5


def test_what_cannot_be_taken_out_is_refused_with_the_reason(tmp_path: Path) -> None:
    base, dora, replaced = Base.make("BF16"), Added(), Added()
    dora.lora(stem(PROJ), (24, 24), 2, 1.0)
    dora.put(f"{stem(PROJ)}.dora_scale", 24, 1)
    replaced.put(f"diffusion_model.{PROJ}.set_weight", 24, 24)
    path = base.save(tmp_path / "m.safetensors")
    for adapter, reason in ((dora, "norms"), (replaced, "replaced")):
        with pytest.raises(NotRepresentableError, match=reason):
            applied(tmp_path, path, (adapter, 1.0), unapply=True)
