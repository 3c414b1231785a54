"""``convert --as lokr|loha|full`` against dense float64 deltas, and the nearest Kronecker product against a dense SVD."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lorasurgery
from lorasurgery.deltas.factorization import factorization
from lorasurgery.errors import BrokenModuleError, NotRepresentableError, RequestError
from lorasurgery.linalg.nearest_kronecker import kronecker_error, nearest_kronecker, rearranged_dense, rearranged_product
from tests.builders import Builder, convert
from tests.edges import run
from tests.oracle import assert_same, model, raw, relative_errors

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from tests.builders import Output

    Array = NDArray[np.float64]

ROUNDING = {"BF16": 2.0**-8, "F16": 2.0**-10, "F32": 2.0**-22}
SD1 = model("sd1")
LINEAR = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def sd1(dtype: str = "F16", layout: str = "sd-scripts", seed: int = 0) -> Builder:
    return Builder.start(SD1, layout, dtype, seed)


def weights(builder: Builder) -> dict[str, str]:
    """A linear layer, a 1x1 and a 3x3 convolution by their names in the layout's naming."""
    from tests.oracle import rule

    found: dict[str, str] = {}
    for name, place in SD1.names(rule(builder.made.layout, SD1).naming).items():
        shape = SD1.shape(place)
        kind = "linear" if len(shape) == 2 else f"conv{shape[2]}"
        if max(shape) <= 320 and kind not in found:
            found[kind] = name
    assert found.keys() >= {"linear", "conv1"}
    return found


def conv3(builder: Builder) -> str:
    from tests.oracle import rule

    names = SD1.names(rule(builder.made.layout, SD1).naming)
    return next(n for n, p in names.items() if len(SD1.shape(p)) == 4 and SD1.shape(p)[2] == 3 and max(SD1.shape(p)) <= 320)


# the nearest Kronecker product --------------------------------------------------------------------------------------------


def optimum(matrix: Array, outer: tuple[int, int]) -> Array:
    """The singular values of the rearrangement, from the definition."""
    (o1, i1), (out, columns) = outer, matrix.shape
    blocks = [
        matrix[o * (out // o1) :][: out // o1, m * (columns // i1) :][:, : columns // i1] for o in range(o1) for m in range(i1)
    ]
    values: Array = np.linalg.svd(np.stack([block.reshape(-1) for block in blocks]), compute_uv=False)
    return values


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(1, 7))
def test_nearest_is_the_leading_singular_pair(seed: int, o1: int, o2: int, i1: int, i2: int, rank: int) -> None:
    rng = np.random.default_rng(seed)
    up, down = rng.standard_normal((o1 * o2, rank)), rng.standard_normal((rank, i1 * i2))
    values = optimum(up @ down, (o1, i1))
    for of in (rearranged_product(up, down, (o1, i1)), rearranged_dense(up @ down, (o1, i1))):
        found = nearest_kronecker(of)
        total = float(np.sum(values**2))
        error = float(np.sum((up @ down - np.kron(found.w1, found.w2)) ** 2))
        assert error == pytest.approx(np.sum(values[1:] ** 2), abs=1e-9 * total)
        assert found.error == pytest.approx(error, abs=1e-9 * total)
        assert kronecker_error(of, found.w1, found.w2) == pytest.approx(error, abs=1e-9 * total)
        assert np.linalg.norm(found.w1) == pytest.approx(np.linalg.norm(found.w2))


def test_a_kronecker_product_is_found_again() -> None:
    rng = np.random.default_rng(0)
    w1, w2 = rng.standard_normal((6, 5)), rng.standard_normal((8, 7))
    left, values, right = np.linalg.svd(np.kron(w1, w2), full_matrices=False)
    found = nearest_kronecker(rearranged_product(left * values, right, (6, 5)))
    assert np.allclose(np.kron(found.w1, found.w2), np.kron(w1, w2), atol=1e-12)
    zero = nearest_kronecker(rearranged_product(left * 0, right, (6, 5)))
    assert not zero.w1.any()
    assert zero.error == 0.0
    with pytest.raises(ValueError, match="does not divide"):
        rearranged_dense(np.ones((7, 4)), (2, 2))


def test_low_rank_right_factor() -> None:
    rng = np.random.default_rng(1)
    matrix = rng.standard_normal((48, 60))
    of = rearranged_dense(matrix, (4, 5))
    whole = nearest_kronecker(of)
    errors = []
    for rank in (1, 2, 5, 11):
        found = nearest_kronecker(of, rank=rank)
        assert found.w2_b is not None
        assert found.w2.shape == (12, rank)
        error = float(np.sum((matrix - np.kron(found.w1, found.w2 @ found.w2_b)) ** 2))
        assert found.error == pytest.approx(error, rel=1e-9)
        left, values, right = np.linalg.svd(whole.w2, full_matrices=False)
        plain = np.kron(whole.w1, (left[:, :rank] * values[:rank]) @ right[:rank])
        assert error <= float(np.sum((matrix - plain) ** 2)) * (1 + 1e-12)
        errors.append(error)
    assert errors == sorted(errors, reverse=True)
    assert nearest_kronecker(of, rank=12).w2_b is None
    energy = nearest_kronecker(of, energy=0.5)
    assert energy.w2_b is not None
    assert energy.w2_b.shape[0] < 12


# converting ---------------------------------------------------------------------------------------------------------------


def lokr_error(output: Output, builder: Builder, stem: str) -> tuple[float, float]:
    """(relative error of the written factors, of the best ones) from whole dense matrices."""
    old, new = builder.made.tensors, output.tensors
    scale = old[f"{stem}.alpha"].item() / old[f"{stem}.lora_down.weight"].shape[0]
    up, down = (old[f"{stem}.lora_{side}.weight"].f64() for side in ("up", "down"))
    whole = scale * up.reshape(len(up), -1) @ down.reshape(len(down), -1)
    w1, w2 = new[f"{stem}.lokr_w1"].f64(), new[f"{stem}.lokr_w2"].f64()
    values = optimum(whole, (w1.shape[0], w1.shape[1]))
    norm = float(np.linalg.norm(whole))
    made = np.kron(w1, w2.reshape(len(w2), -1))
    return float(np.linalg.norm(whole - made)) / norm, float(np.sqrt(np.sum(values[1:] ** 2))) / norm


@pytest.mark.parametrize("factor", [None, 8])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_lora_to_lokr(dtype: str, factor: int | None, tmp_path: Path) -> None:
    builder = sd1(dtype)
    stems = {kind: builder.add(name, "lora", rank=3, alpha=2.0) for kind, name in weights(builder).items()}
    output = convert(builder.made, "sd-scripts", tmp_path, family="lokr", factor=factor)
    losses = output.report.losses.relative()
    for stem in stems.values():
        out, inside = (builder.made.tensors[f"{stem}.lora_{s}.weight"].shape[i] for s, i in (("up", 0), ("down", 1)))
        limit = -1 if factor is None else factor
        assert output.tensors[f"{stem}.lokr_w1"].shape == (factorization(out, limit)[0], factorization(inside, limit)[0])
        assert output.tensors[f"{stem}.lokr_w2"].dtype == dtype
        error, best = lokr_error(output, builder, stem)
        assert best <= error + 1e-9
        assert error <= best + 2 * ROUNDING[dtype]
        assert losses[stem] == pytest.approx(error, abs=1e-6)
    assert output.report.actions() == {"to LoKr": len(stems)}
    errors = relative_errors(builder.made.meaning(), output.meaning())
    assert max(errors.values()) < 1.1
    args = json.loads(output.metadata["ss_network_args"])
    assert args == {"algo": "lokr", "factor": str(-1 if factor is None else factor)}
    assert output.metadata["ss_network_module"] == "lycoris.kohya"


def test_lokr_survives_the_way_through_lora_and_loha(tmp_path: Path) -> None:
    """Its own factors are found again, exactly up to rounding; by itself it is left alone."""
    builder = sd1("F32")
    names = [name for kind, name in weights(builder).items() if kind != "conv3"]  # of 4 channels, which 8 does not divide
    for name in names:
        builder.add(name, "lokr", rank=2, alpha=1.5)
    same = convert(builder.made, "comfyui", tmp_path, family="lokr")
    assert same.report.actions() == {"renamed": len(names)}
    low = convert(builder.made, "sd-scripts", tmp_path, as_lora=True)
    assert_same(builder.made.meaning(), low.meaning(), 1e-6)
    blocks = next(t.shape[0] for k, t in builder.made.tensors.items() if k.endswith("lokr_w1"))
    back = convert(low.as_made(), "comfyui", tmp_path, family="lokr", factor=blocks)
    assert_same(builder.made.meaning(), back.meaning(), 1e-5)
    loha = convert(builder.made, "comfyui", tmp_path, family="loha")
    assert loha.report.families() == {"loha": len(names)}
    assert_same(builder.made.meaning(), loha.meaning(), 1e-5)


def test_lokr_rank_makes_a_product_of_w2(tmp_path: Path) -> None:
    builder = sd1("F32")
    name = weights(builder)["linear"]
    stem = builder.add(name, "lora", rank=4, alpha=3.0)
    tucker = builder.add(conv3(builder), "lora", rank=2, alpha=1.0, tucker=True)
    output = convert(builder.made, "lycoris", tmp_path, family="lokr", rank=2)
    assert {t.shape[1] for k, t in output.tensors.items() if k.endswith("w2_a")} == {2}
    assert {t.shape[0] for k, t in output.tensors.items() if k.endswith("w2_b")} == {2}
    assert any(t.shape[1] % 9 == 0 for k, t in output.tensors.items() if k.endswith("w2_b"))
    losses = output.report.losses.relative()
    assert losses.keys() == {stem, tucker}
    new = {k.rpartition(".")[2]: t for k, t in output.tensors.items() if "attn1" in k}
    strength = new["alpha"].item() / new["lokr_w2_b"].shape[0]  # as LyCORIS and ComfyUI read it
    made = strength * np.kron(new["lokr_w1"].f64(), new["lokr_w2_a"].f64() @ new["lokr_w2_b"].f64())
    old = builder.made.tensors
    whole = 3.0 / 4 * old[f"{stem}.lora_up.weight"].f64() @ old[f"{stem}.lora_down.weight"].f64()
    assert losses[stem] == pytest.approx(np.linalg.norm(whole - made) / np.linalg.norm(whole), abs=1e-7)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("target", ["sd-scripts", "comfyui", "peft"])
def test_lora_to_loha_is_exact(dtype: str, target: str, tmp_path: Path) -> None:
    builder = sd1(dtype)
    for i, name in enumerate([*weights(builder).values(), conv3(builder)]):
        builder.add(name, "lora", rank=2 + i % 3, alpha=0.7 + i)
    output = convert(builder.made, target, tmp_path, family="loha")
    assert output.report.exact
    assert output.report.families() == {"loha": len(output.report.changes)}
    assert_same(builder.made.meaning(), output.meaning(), 3e-7)
    if target == "peft":
        assert output.configs[""]["peft_type"] == "LOHA"


def test_full_and_tucker_to_loha_and_cuts(tmp_path: Path) -> None:
    builder = sd1("F32")
    builder.add(weights(builder)["linear"], "full")
    builder.add(conv3(builder), "lora", rank=3, alpha=2.0, tucker=True)
    exact = convert(builder.made, "comfyui", tmp_path, family="loha")
    assert_same(builder.made.meaning(), exact.meaning(), 1e-5)
    cut = convert(builder.made, "comfyui", tmp_path, family="loha", rank=2)
    assert {t.shape[0] for k, t in cut.tensors.items() if k.endswith("w1_b")} == {2}
    assert cut.report.losses.total() > 0.01


@pytest.mark.parametrize("family", ["lora", "full", "lokr", "loha"])
def test_a_smaller_loha_is_near_and_its_error_true(family: str, tmp_path: Path) -> None:
    builder = sd1("F32")
    names = list(weights(builder).values())[:2]
    for name in names:
        builder.add(name, family, rank=6, alpha=4.0)
    output = convert(builder.made, "sd-scripts", tmp_path, family="loha", rank=2)
    losses = output.report.losses.relative()
    assert {t.shape[0] for k, t in output.tensors.items() if k.endswith("hada_w1_b")} == {2}
    for stem in (k.removesuffix(".hada_w1_a") for k in output.tensors if k.endswith(".hada_w1_a")):
        arms = [output.tensors[f"{stem}.hada_{slot}"].f64() for slot in ("w1_a", "w1_b", "w2_a", "w2_b")]
        strength = output.tensors[f"{stem}.alpha"].item() / 2
        before = dense_of(builder, stem, family)
        error = np.linalg.norm(before - strength * (arms[0] @ arms[1]) * (arms[2] @ arms[3])) / np.linalg.norm(before)
        assert losses[stem] == pytest.approx(error, rel=1e-6)
        values = np.linalg.svd(before, compute_uv=False)
        assert error < np.sqrt(np.sum(values[2:] ** 2) / np.sum(values**2))  # the best LoRA of rank 2


def dense_of(builder: Builder, stem: str, family: str) -> Array:
    """A module's scaled change, (out, in), restated."""
    slots = {k.removeprefix(f"{stem}."): t.f64() for k, t in builder.made.tensors.items() if k.startswith(f"{stem}.")}
    scale = slots["alpha"].item() / 6 if "alpha" in slots else 1.0
    change: Array
    if family == "full":
        change = slots["diff"].reshape(len(slots["diff"]), -1)
    elif family == "lora":
        up, down = (slots[f"lora_{side}.weight"] for side in ("up", "down"))
        change = up.reshape(len(up), -1) @ down.reshape(len(down), -1)
    elif family == "loha":
        change = (slots["hada_w1_a"] @ slots["hada_w1_b"]) * (slots["hada_w2_a"] @ slots["hada_w2_b"])
    else:
        change = np.asarray(np.kron(slots["lokr_w1"], slots["lokr_w2_a"] @ slots["lokr_w2_b"]), np.float64)
    return scale * change


def test_an_energy_asks_for_the_rank_of_a_lora(tmp_path: Path) -> None:
    builder = sd1("F32")
    name = weights(builder)["linear"]
    builder.add(name, "lora", rank=6, alpha=4.0)
    output = convert(builder.made, "sd-scripts", tmp_path, family="loha", energy=0.5)
    (rank,) = {t.shape[0] for k, t in output.tensors.items() if k.endswith("hada_w1_b")}
    (error,) = output.report.losses.relative().values()
    assert 1 <= rank < 6
    assert error**2 <= 0.5
    assert convert(builder.made, "sd-scripts", tmp_path, family="loha", energy=1.0).report.exact


@pytest.mark.parametrize("family", ["loha", "lokr"])
def test_as_lora_rounds_once_to_the_asked_dtype(family: str, tmp_path: Path) -> None:
    builder = sd1("F16")
    builder.add(weights(builder)["linear"], family, rank=2, alpha=3.0)
    builder.add(conv3(builder), "lora", rank=2, alpha=3.0, tucker=True)
    wide = convert(builder.made, "comfyui", tmp_path, as_lora=True, dtype="fp32")
    assert {t.dtype for k, t in wide.tensors.items() if "lora_" in k} == {"F32"}
    assert max(relative_errors(builder.made.meaning(), wide.meaning()).values()) < ROUNDING["F32"]


@pytest.mark.parametrize("family", ["lora", "loha", "lokr"])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_to_full(family: str, dtype: str, tmp_path: Path) -> None:
    builder = sd1(dtype)
    for name in weights(builder).values():
        builder.add(name, family, rank=2, alpha=3.0)
    builder.add(conv3(builder), family, rank=2, alpha=3.0, tucker=True)
    output = convert(builder.made, "sd-scripts", tmp_path, family="full")
    assert all(k.endswith(".diff") for k in output.tensors)
    errors = relative_errors(builder.made.meaning(), output.meaning())
    limit = ROUNDING[dtype] if dtype != "F16" else 8 * ROUNDING[dtype]  # below 6e-5 fp16 has fewer digits
    assert max(errors.values()) < limit
    assert max(output.report.losses.relative().values()) < limit
    shapes = {t.shape for t in output.tensors.values()}
    assert any(len(shape) == 4 and shape[2] == 3 for shape in shapes)
    wide = convert(builder.made, "comfyui", tmp_path, family="full", dtype="fp32")
    assert max(relative_errors(builder.made.meaning(), wide.meaning()).values()) < ROUNDING["F32"]


def test_split_members_are_fused_before_they_change_family(tmp_path: Path) -> None:
    builder = Builder.start(model("flux1-dev"), "diffusers", "F32")
    for x in "qkv":
        builder.add(f"transformer_blocks.0.attn.to_{x}", "lora", rank=2)
    fused = convert(builder.made, "comfyui", tmp_path, family="loha")
    assert fused.report.actions() == {"fused to LoHa": 1}
    assert_same(builder.made.meaning(), fused.meaning(), 1e-6)
    full = convert(builder.made, "sd-scripts", tmp_path, family="full")
    assert [c.action for c in full.report.changes] == ["fused"]
    assert_same(builder.made.meaning(), full.meaning(), 1e-6)
    lokr = convert(builder.made, "comfyui", tmp_path, family="lokr", factor=4)
    assert lokr.report.actions() == {"fused to LoKr": 1}
    assert len([k for k in lokr.tensors if k.endswith("lokr_w1")]) == 1


def test_peft_loads_the_shapes_we_choose(tmp_path: Path) -> None:
    builder = sd1("F32")
    builder.add(weights(builder)["linear"], "lora", rank=2, alpha=3.0)
    output = convert(builder.made, "peft", tmp_path, family="lokr")
    assert output.configs[""]["peft_type"] == "LOKR"
    assert output.configs[""]["decompose_factor"] == -1


# refusals -----------------------------------------------------------------------------------------------------------------


def test_targets_that_hold_no_such_family(tmp_path: Path) -> None:
    builder = sd1()
    builder.add(weights(builder)["linear"], "lora", alpha=1.0)
    for target, family in (("diffusers", "lokr"), ("diffusers", "loha"), ("diffusers", "full"), ("peft", "full")):
        with pytest.raises(RequestError, match="does not load"):
            convert(builder.made, target, tmp_path, family=family)


def test_options_that_make_no_sense() -> None:
    cases: list[dict[str, Any]] = [
        {"family": "oft"}, {"family": "lokr", "as_lora": True}, {"factor": 8}, {"family": "lokr", "factor": 0},
        {"family": "full", "rank": 4},
    ]  # fmt: skip
    for how in cases:
        with pytest.raises(RequestError):
            lorasurgery.Options(**how).check()
    assert run("convert", "a", "b", "--target", "comfyui", "--as", "oft").code == 2


@pytest.mark.parametrize("how", [{"as_lora": True, "rank": 1}, {"family": "lokr", "rank": 1}, {"energy": 0.5}])
def test_a_rank_that_cuts_nothing_is_told(how: dict[str, Any], tmp_path: Path) -> None:
    builder = sd1("F32")
    builder.add(weights(builder)["linear"], "lokr" if "family" in how else "lora", rank=2, alpha=1.0)
    output = convert(builder.made, "comfyui", tmp_path, **how)
    assert any("no module does" in warning for warning in output.report.warnings)


def test_magnitudes(tmp_path: Path) -> None:
    builder = sd1("F32")
    builder.add(weights(builder)["linear"], "dora", rank=2, alpha=3.0)
    with pytest.raises(NotRepresentableError, match="DoRA magnitude"):
        convert(builder.made, "comfyui", tmp_path, family="full")
    with pytest.raises(NotRepresentableError, match="DoRA magnitude"):
        convert(builder.made, "peft", tmp_path, family="loha")
    output = convert(builder.made, "sd-scripts", tmp_path, family="loha")
    assert any(k.endswith(".dora_scale") for k in output.tensors)
    assert_same(builder.made.meaning(), output.meaning(), 1e-6)


def test_what_has_no_form_stays_and_nan_is_named(tmp_path: Path) -> None:
    builder = sd1("F32")
    name = weights(builder)["linear"]
    stem = builder.add(name, "lora", rank=2, alpha=1.0)
    other = builder.stem(weights(builder)["conv1"])
    builder.made.tensors[f"{other}.oft_blocks"] = raw(np.zeros((4, 80, 80)), "F32")
    output = convert(builder.made, "comfyui", tmp_path, family="lokr")
    assert any("stay as they are" in warning for warning in output.report.warnings)
    assert any(k.endswith("oft_blocks") for k in output.tensors)
    output = convert(builder.made, "comfyui", tmp_path, as_lora=True)
    assert any("no LoRA form" in warning for warning in output.report.warnings)
    builder.made.tensors[f"{stem}.lora_up.weight"] = raw(np.full((320, 2), np.nan), "F32")
    with pytest.raises(BrokenModuleError, match="NaN"):
        convert(builder.made, "comfyui", tmp_path, family="lokr")


@pytest.mark.parametrize("target", ["sd-scripts", "comfyui"])
def test_a_dora_that_stays_one_where_lora_was_asked_for_is_named(tmp_path: Path, target: str) -> None:
    own = Builder.start(model("sdxl"), "sd-scripts", "F32", 0)
    own.add("input_blocks.4.1.transformer_blocks.1.attn1.to_q", "dora", rank=3, alpha=1.0)
    own.add("input_blocks.4.1.transformer_blocks.1.attn1.to_k", "lokr")
    adapter = lorasurgery.load(own.made.save(tmp_path), arch="sdxl")
    result, report = lorasurgery.convert(adapter, target, lorasurgery.Options(as_lora=True))
    assert {module.family for module in result.modules.values()} == {"dora", "lora"}
    told = [text for text in report.warnings if "stay DoRA" in text]
    assert len(told) == 1
    assert "1 modules stay DoRA" in told[0]
    assert "attn1_to_q" in told[0]
    assert "--dora fold" in told[0]
    assert not [text for text in lorasurgery.convert(adapter, target)[1].warnings if "stay DoRA" in text]
