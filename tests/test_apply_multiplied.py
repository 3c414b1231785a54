"""apply: families that multiply the weight, at any strength, in any layout and out again, against dense float64 matrices."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lorasurgery.errors import NotAnAdapterError, NotRepresentableError
from lorasurgery.models import open_model
from lorasurgery.verbs.apply import ApplyOptions, apply, read_source
from lorasurgery.verbs.apply.verify import verify
from tests.applied import LINEAR1, NORM, PROJ, QKV, SWAPPED, Added, Base, applied, assert_nearest, numbers, read, stem, stored
from tests.multiplied import FILES, base, save
from tests.oracle import Raw, raw, write

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.applied import Array

LAYOUTS = ("original", "diffusers")
PEFT = "base_model.model."


def block_diagonal(blocks: Array) -> Array:
    size = blocks.shape[-1]
    whole = np.zeros((len(blocks) * size, len(blocks) * size))
    for k, block in enumerate(blocks):
        whole[k * size : (k + 1) * size, k * size : (k + 1) * size] = block
    return whole


def butterfly(parameters: Array, strength: float) -> Array:
    """PEFT's matrix B with permutation matrices: in each run of 2^i b the even segments of b / 2 before the odd ones."""
    sets, blocks, size, _ = parameters.shape
    whole = np.eye(blocks * size)
    for i in range(sets):
        skew = (parameters[i] - np.swapaxes(parameters[i], 1, 2)) / 2
        turns = (np.eye(size) - skew) @ np.linalg.inv(np.eye(size) + skew)
        order: list[int] = []
        for start in range(0, blocks * size, size * 2**i):
            for parity in (0, 1):
                for pair in range(2**i):
                    first = start + (2 * pair + parity) * size // 2
                    order += range(first, first + size // 2)
        permutation = np.eye(blocks * size)[order] if sets > 1 else np.eye(blocks * size)
        mixed = strength * turns + (1 - strength) * np.eye(size)
        whole = permutation @ block_diagonal(mixed) @ permutation.T @ whole
    return whole


def boft(adapter: Added, weight: Array, strength: float, sets: int = 2) -> Array:
    parameters = adapter.put(f"{stem(QKV)}.boft_R", sets, 24 // 4, 4, 4)
    scale = adapter.put(f"{stem(QKV)}.boft_s", len(weight), 1, at=1.0)
    return (weight @ butterfly(parameters, strength).T) * (1 + strength * (scale - 1))


def boft_of_one_set(adapter: Added, weight: Array, strength: float) -> Array:
    return boft(adapter, weight, strength, 1)


def series(triangles: Array, size: int) -> Array:
    skew = np.zeros((len(triangles), size, size))
    rows, columns = np.triu_indices(size, 1)
    skew[:, rows, columns] = triangles
    skew = skew - np.swapaxes(skew, 1, 2)
    return np.eye(size) + 2 * skew + 2 * skew @ skew + 2 * skew @ skew @ skew + skew @ skew @ skew @ skew


def cayley(matrices: Array) -> Array:
    skew = (matrices - np.swapaxes(matrices, 1, 2)) / 2
    eye = np.eye(matrices.shape[-1])
    return (eye - skew) @ np.linalg.inv(eye + skew)


def early_oft(adapter: Added, weight: Array, strength: float) -> Array:
    """PEFT 0.14 and 0.15: columns, and a factor for each row."""
    turns = block_diagonal(cayley(adapter.put(f"{stem(QKV)}.oft_r", 6, 4, 4)))
    scale = adapter.put(f"{stem(QKV)}.oft_s", 72, 1, at=1.0)
    return weight @ (strength * turns + (1 - strength) * np.eye(24)).T * (1 + strength * (scale - 1))


def earliest_oft(adapter: Added, weight: Array, strength: float) -> Array:
    """PEFT before 0.14: rows."""
    turns = block_diagonal(cayley(adapter.put(f"{stem(QKV)}.oft_r", 9, 8, 8)))
    return (strength * turns + (1 - strength) * np.eye(72)).T @ weight


def scaled_oft(adapter: Added, weight: Array, strength: float) -> Array:
    triangles = adapter.put(f"{stem(QKV)}.oft_R.weight", 4, 15)
    adapter.tensors[f"{stem(QKV)}.oft_R.scaled_oft"] = Raw("BOOL", (), b"\x01")
    turned = weight @ block_diagonal(series(triangles / (2 * np.sqrt(5)), 6)).T
    return weight + strength * (turned - weight)


def old_glora(adapter: Added, weight: Array, strength: float) -> Array:
    shapes = {"a1": (3, 24), "a2": (24, 3), "b1": (3, 24), "b2": (72, 3)}
    a1, a2, b1, b2 = (adapter.put(f"{stem(QKV)}.{name}.weight", *shape) for name, shape in shapes.items())
    scale = adapter.number(f"{stem(QKV)}.alpha", 2.0) / 3
    return weight + strength * scale * (weight @ a2 @ a1 + b2 @ b1)


def bat(adapter: Added, weight: Array, strength: float) -> Array:
    blocks = adapter.put(f"{stem(QKV)}.bone_block", 12, 6, 6)
    change = np.zeros_like(weight)
    for o in range(12):
        for i in range(4):
            cell = weight[6 * o : 6 * o + 6, 6 * i : 6 * i + 6]
            change[6 * o : 6 * o + 6, 6 * i : 6 * i + 6] = cell @ blocks[o] + blocks[o]
    return weight + strength * change


def peft_ia3(adapter: Added, weight: Array, strength: float) -> Array:
    return weight * (1 + strength * (adapter.put(f"{stem(QKV)}.ia3_l", 72, 1, at=1.0) - 1))


def peft_ia3_inputs(adapter: Added, weight: Array, strength: float) -> Array:
    return weight * (1 + strength * (adapter.put(f"{stem(QKV)}.ia3_l", 1, 24, at=1.0) - 1))


KINDS = (boft, boft_of_one_set, early_oft, earliest_oft, scaled_oft, old_glora, bat, peft_ia3, peft_ia3_inputs)
Kind = Any


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strength", [1.0, 0.6, -0.4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_the_weight_is_the_dense_product(tmp_path: Path, layout: str, strength: float, kind: Kind, dtype: str) -> None:
    base, adapter = Base.make(dtype), Added("F32", size=0.2)
    exact = kind(adapter, base.weights[QKV], strength)
    out, report = applied(tmp_path, base.save(tmp_path / "m.safetensors", layout), (adapter, strength), verify=True)
    assert report.unmatched == []
    assert_nearest(base.result(out, layout)[0][QKV], exact)
    assert report.verified
    assert sum(own.wrong for own in report.verified) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_out_again(tmp_path: Path, kind: Kind) -> None:
    base, adapter = Base.make("F32"), Added("F32", size=0.1)
    kind(adapter, base.weights[QKV], 0.7)
    baked, _ = applied(tmp_path, base.save(tmp_path / "m.safetensors"), (adapter, 0.7))
    baked = baked.rename(tmp_path / "baked.safetensors")
    path, report = applied(tmp_path, baked, (adapter, 0.7), unapply=True)
    weights, biases = base.result(path, "original")
    for after, before in ((weights[QKV], base.weights[QKV]), (biases[QKV], base.biases[QKV])):
        assert np.linalg.norm(numbers(after) - before) / np.linalg.norm(before) < 2e-7
    assert 0.0 < report.total.relative_restored < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_peft_ia3_multiplies_the_bias_of_the_layers_outputs(tmp_path: Path, layout: str) -> None:
    base, adapter = Base.make("BF16"), Added("F32", size=0.2)
    rows = adapter.put(f"{stem(QKV)}.ia3_l", 72, 1, at=1.0)
    adapter.put(f"{stem(PROJ)}.ia3_l", 1, 24, at=1.0)
    out, report = applied(tmp_path, base.save(tmp_path / "m.safetensors", layout), (adapter, 0.8), verify=True)
    _, biases = base.result(out, layout)
    assert_nearest(biases[QKV], base.biases[QKV] * (1 + 0.8 * (rows[:, 0] - 1)))
    assert biases[PROJ] == stored(base.biases[PROJ], "BF16")
    assert ("bias",) in {own.families for own in report.verified}


def test_peft_ia3_on_a_split_weight_multiplies_its_rows_of_the_fused_bias(tmp_path: Path) -> None:
    base, adapter = Base.make("BF16"), Added("F32", size=0.2)
    vector = adapter.put(f"{PEFT}transformer_blocks.0.attn.to_k.ia3_l", 24, 1, at=1.0)
    out, report = applied(tmp_path, base.save(tmp_path / "m.safetensors"), (adapter, 1.0), verify=True)
    weights, biases = base.result(out, "original")
    whole, bias = base.weights[QKV].copy(), base.biases[QKV].copy()
    whole[24:48] *= vector
    bias[24:48] *= vector[:, 0]
    assert_nearest(weights[QKV], whole)
    assert_nearest(biases[QKV], bias)
    assert report.unmatched == []


def test_a_square_feedforward_layer_of_peft_is_multiplied_by_columns(tmp_path: Path) -> None:
    base, adapter = Base.make("BF16"), Added("F32", size=0.2)
    vector = adapter.put(f"{stem(PROJ)}.ia3_l", 1, 24, at=1.0)
    out, _ = applied(tmp_path, base.save(tmp_path / "m.safetensors"), (adapter, 1.0), verify=True)
    assert_nearest(base.result(out, "original")[0][PROJ], base.weights[PROJ] * vector)


def test_names_of_adapters_in_raw_state_dicts_make_no_difference(tmp_path: Path) -> None:
    base, plain = Base.make("BF16"), Added("F32", size=0.2)
    plain.put(f"{stem(QKV)}.oft_R.weight", 4, 15)
    plain.put(f"{stem(PROJ)}.boft_R", 1, 6, 4, 4)
    plain.put(f"{stem(PROJ)}.boft_s", 24, 1, at=1.0)
    plain.put(f"{stem('txt_in')}.ia3_l", 24, 1, at=1.0)
    named = Added("F32")
    for key, tensor in plain.tensors.items():
        named.tensors[key.replace("oft_R.weight", "oft_R.default.weight") if "oft_R.w" in key else f"{key}.default"] = tensor
    path = base.save(tmp_path / "m.safetensors")
    one, report = applied(tmp_path, path, (plain, 0.9))
    assert report.modules == 3
    before = read(one)
    two, _ = applied(tmp_path, path, (named, 0.9))
    assert read(two) == before


# verify -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", FILES, ids=lambda path: path.name)
def test_verify_finds_a_wrong_value_in_every_family(tmp_path: Path, adapter: Path) -> None:
    """One value of each changed tensor is moved by a few steps of single precision."""
    opened = open_model(save(tmp_path / "m.safetensors", base()), arch="sd1")
    source, out = read_source(adapter, opened.architecture, 0.7), tmp_path / "o.safetensors"
    report = apply(opened, [source], out)
    tensors = read(out)
    for own in report.tensors:
        values = np.frombuffer(tensors[own.name].data, "<f4").copy()
        values[0] += max(np.abs(values).max(), 1.0) * 1e-4
        tensors[own.name] = tensors[own.name]._replace(data=values.tobytes())
    write(out, tensors)
    found = verify(opened, [source], out, ApplyOptions())
    assert {own.tensor for own in found} == {own.name for own in report.tensors}
    assert all(own.wrong for own in found)


def test_verify_has_a_formula_for_every_family_that_adds(tmp_path: Path) -> None:
    base, adapter = Base.make("BF16"), Added("F32")
    adapter.lora(stem("img_in"), (24, 64), 3, 2.0)
    adapter.put(f"{stem('img_in')}.diff_b", 24)
    adapter.lora(stem(PROJ), (24, 24), 3, 2.0)
    adapter.put(f"{stem(PROJ)}.dora_scale", 24, 1, at=2.0)
    for slot, shape in {"w1_a": (72, 3), "w1_b": (3, 24), "w2_a": (72, 3), "w2_b": (3, 24)}.items():
        adapter.put(f"{stem(QKV)}.hada_{slot}", *shape)
    adapter.put(f"{stem(LINEAR1)}.lokr_w1", 4, 2)
    adapter.put(f"{stem(LINEAR1)}.lokr_w2", 42, 12)
    adapter.put(f"{stem(SWAPPED)}.diff", 48, 24)
    adapter.put(f"{stem('txt_in')}.miss_block", 5, 24)
    adapter.put(f"{stem(NORM)}.w_norm", 128)
    adapter.put("diffusion_model.vector_in.in_layer.set_weight", *base.weights["vector_in.in_layer"].shape)
    path = base.save(tmp_path / "m.safetensors")
    _, report = applied(tmp_path, path, (adapter, 0.7), verify=True)
    assert report.unmatched == []
    families = {family for own in report.verified for family in own.families}
    assert families == {"lora", "bias", "dora", "loha", "lokr", "full", "miss", "norm", "set"}
    assert sum(own.wrong for own in report.verified) == 0


def test_verify_compares_rows_that_depend_on_rows_of_other_tensors(tmp_path: Path) -> None:
    """A fused OFT and a fused DoRA over columns on a model of split weights, with a LoRA for one of them between."""
    base, first, second, third = Base.make("F32"), Added(seed=1), Added(seed=2), Added(seed=3)
    earliest_oft(first, base.weights[QKV], 0.5)
    second.lora("transformer.transformer_blocks.0.attn.to_k", (24, 24), 2, None, "peft")
    third.lora(stem(QKV), (72, 24), 2, None)
    third.put(f"{stem(QKV)}.dora_scale", 1, 24, at=3.0)
    path = base.save(tmp_path / "m.safetensors", "diffusers")
    weights = ((first, 0.5), (second, 0.8), (third, 0.7))
    out, report = applied(tmp_path, path, *weights, verify=True)
    expected = {f"transformer_blocks.0.attn.{part}.weight" for part in ("to_q", "to_k", "to_v")}
    assert {own.tensor for own in report.verified} == expected
    assert sum(own.wrong for own in report.verified) == 0
    tensors = read(out)
    for name in expected:
        values = np.frombuffer(tensors[name].data, "<f4").copy()
        values[-1] += 1e-4
        tensors[name] = tensors[name]._replace(data=values.tobytes())
    write(out, tensors)
    opened = open_model(path)
    sources = [read_source(tmp_path / f"a{i}.safetensors", opened.architecture, w) for i, (_, w) in enumerate(weights)]
    assert [own.wrong for own in verify(opened, sources, out, ApplyOptions())] == [1, 1, 1]


# refusals -----------------------------------------------------------------------------------------------------------------


def refused(folder: Path, adapter: Added, **how: object) -> str:
    path = Base.make("BF16").save(folder / "m.safetensors")
    with pytest.raises(NotRepresentableError) as caught:
        applied(folder, path, (adapter, 0.5), **how)
    return str(caught.value)


def lacking_scale(adapter: Added) -> None:
    adapter.put(f"{stem(QKV)}.boft_R", 1, 6, 4, 4)


def wrong_width(adapter: Added) -> None:
    adapter.put(f"{stem(QKV)}.boft_R", 1, 5, 4, 4)
    adapter.put(f"{stem(QKV)}.boft_s", 72, 1)


def no_butterfly(adapter: Added) -> None:
    adapter.put(f"{stem(QKV)}.boft_R", 4, 6, 4, 4)
    adapter.put(f"{stem(QKV)}.boft_s", 72, 1)


def early_of_another_width(adapter: Added) -> None:
    adapter.put(f"{stem(QKV)}.oft_r", 5, 4, 4)
    adapter.put(f"{stem(QKV)}.oft_s", 72, 1)


def other_factors(adapter: Added) -> None:
    adapter.put(f"{stem(QKV)}.oft_r", 6, 4, 4)
    adapter.put(f"{stem(QKV)}.oft_s", 70, 1)


def factors_alone(adapter: Added) -> None:
    adapter.put(f"{stem(QKV)}.oft_s", 72, 1)


def odd_triangles(adapter: Added) -> None:
    adapter.put(f"{stem(QKV)}.oft_R.weight", 4, 14)


def flat_triangles(adapter: Added) -> None:
    adapter.put(f"{stem(QKV)}.oft_R.weight", 60)


def other_bat(adapter: Added) -> None:
    adapter.put(f"{stem(QKV)}.bone_block", 12, 5, 5)


def other_glora(adapter: Added) -> None:
    for name, shape in {"a1": (3, 20), "a2": (20, 3), "b1": (3, 24), "b2": (72, 3)}.items():
        adapter.put(f"{stem(QKV)}.{name}.weight", *shape)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lacking_scale, "boft_s"), (wrong_width, "24 columns"), (no_butterfly, "no butterfly"),
        (odd_triangles, "no upper triangle"), (flat_triangles, "upper triangles"), (other_bat, "72 x 24"),
        (other_glora, "72 x 24"), (early_of_another_width, "24 columns"), (other_factors, "70 factors for 72 rows"),
        (factors_alone, "oft_r is applied"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_the_shapes(tmp_path: Path, make: Callable[[Added], None], reason: str) -> None:
    adapter = Added("F32")
    make(adapter)
    assert reason in refused(tmp_path, adapter)


def test_rows_that_were_multiplied_by_zero_do_not_come_out_again(tmp_path: Path) -> None:
    adapter = Added("F32")
    adapter.put(f"{stem(QKV)}.boft_R", 1, 6, 4, 4)
    adapter.tensors[f"{stem(QKV)}.boft_s"] = raw(np.full((72, 1), -1.0), "F32")
    assert "gone" in refused(tmp_path, adapter, unapply=True)


def test_a_square_convolution_of_peft_needs_its_configuration(tmp_path: Path) -> None:
    opened = open_model(save(tmp_path / "m.safetensors", base()), arch="sd1")
    write(tmp_path / "a.safetensors", {f"{PEFT}down_blocks.0.resnets.0.conv1.ia3_l": raw(np.ones((1, 320, 1, 1)), "F32")})
    source = read_source(tmp_path / "a.safetensors", opened.architecture)
    with pytest.raises(NotRepresentableError, match="feedforward_modules"):
        apply(opened, [source], tmp_path / "o.safetensors")


@pytest.mark.parametrize(("kind", "reason"), [("VERA", "random matrices"), ("HRA", "not known"), ("ADALORA", "count of ranks")])
def test_types_of_peft_that_are_not_read_are_named(tmp_path: Path, kind: str, reason: str) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "r": 4}))
    write(folder / "adapter_model.safetensors", {f"{PEFT}x_embedder.lora_A.weight": raw(np.ones((4, 64)), "F32")})
    opened = open_model(Base.make("BF16").save(tmp_path / "m.safetensors"))
    with pytest.raises(NotAnAdapterError, match=f"{kind} of PEFT.*{reason}"):
        read_source(folder, opened.architecture)
