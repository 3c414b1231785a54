"""Sums whose rank is beyond the weight's sides: cut the short way, as the nearest LoKr, and what is offered before writing."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from lorasurgery.linalg.kronecker_sum import error_of_sum, nearest_of_sum, norm_of_sum
from lorasurgery.operations.route import dense_is_cheaper
from tests.edges import run

if TYPE_CHECKING:
    from pathlib import Path

    Arrays = dict[str, np.ndarray[Any, Any]]

STEM = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_{}"  # SD 1 has no second layer there
SIDE = 640


def lokr(
    folder: Path, seed: int, *, factor: int = 16, names: str = "qk", shared: int = 0
) -> tuple[Path, dict[str, np.ndarray[Any, Any]]]:
    """A file of LoKr with whole factors, and what it says in float64; ``shared``: the seed of a common part."""
    rng, common = np.random.default_rng(seed), np.random.default_rng(100 + shared)
    tensors: Arrays = {}
    dense = {}
    for name in names:
        first, second = (factor, factor), (SIDE // factor, SIDE // factor)
        w1 = (common.standard_normal(first) + 0.3 * rng.standard_normal(first)).astype(np.float32)
        w2 = (common.standard_normal(second) + 0.3 * rng.standard_normal(second)).astype(np.float32) / 10
        stem = STEM.format(name)
        tensors |= {f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2": w2, f"{stem}.alpha": np.array(3.0, np.float32)}
        dense[name] = np.kron(w1.astype(np.float64), w2.astype(np.float64))
    path = folder / f"lokr{seed}.safetensors"
    save_file(tensors, path)
    return path, dense


def dense_of(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """What a written file says, from first principles: LoRA, LoKr or a full difference."""
    tensors = {key: value.astype(np.float64) for key, value in load_file(path).items()}
    found = {}
    for name in "qkv":
        stem = STEM.format(name)
        if f"{stem}.lokr_w1" in tensors:
            found[name] = np.kron(tensors[f"{stem}.lokr_w1"], tensors[f"{stem}.lokr_w2"])
        elif f"{stem}.lora_up.weight" in tensors:
            up, down = tensors[f"{stem}.lora_up.weight"], tensors[f"{stem}.lora_down.weight"]
            found[name] = up @ down * (float(tensors.get(f"{stem}.alpha", len(down))) / len(down))
        elif f"{stem}.diff" in tensors:
            found[name] = tensors[f"{stem}.diff"]
    return found


def best_lokr(matrix: np.ndarray[Any, Any], factor: int) -> float:
    """The relative error of the nearest Kronecker product, by the dense rearrangement."""
    inner = SIDE // factor
    moved = matrix.reshape(factor, inner, factor, inner).transpose(0, 2, 1, 3).reshape(factor**2, inner**2)
    values = np.linalg.svd(moved, compute_uv=False)
    return float(np.linalg.norm(values[1:]) / np.linalg.norm(values))


def relative(truth: np.ndarray[Any, Any], found: np.ndarray[Any, Any]) -> float:
    return float(np.linalg.norm(truth - found) / np.linalg.norm(truth))


# the way ----------------------------------------------------------------------------------------------------------------


@given(st.integers(16, 4096), st.integers(16, 4096), st.integers(1, 8192), st.none() | st.integers(1, 4096))
def test_beyond_both_sides_the_matrix_is_the_shorter_way_and_below_it_more_rank_never_turns_back(out, width, rank, needed):
    sides = (out, width)
    if rank > 2 * min(sides):
        assert dense_is_cheaper(sides, rank, needed, out * width)
    chosen = [dense_is_cheaper(sides, r, needed, out * width) for r in sorted({8, 64, 256, min(rank, *sides), min(sides)})]
    assert all(later >= earlier for earlier, later in pairwise(chosen))
    assert not dense_is_cheaper(sides, 4, 4, out * width * 4)


@pytest.mark.parametrize("rank", [4, 100, 300, 700])
@pytest.mark.parametrize("more", [[], ["--as", "lora"]])
def test_a_rank_of_a_sum_of_lokr_is_the_best_there_is(tmp_path: Path, rank: int, more: list[str]) -> None:
    (a, one), (b, two) = lokr(tmp_path, 1), lokr(tmp_path, 2)
    out = tmp_path / "out.safetensors"
    done = run("merge", f"{a}:0.5", f"{b}:-0.25", "-o", out, "--rank", rank, *more, "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)["resize"]
    for name, found in dense_of(out).items():
        truth = 0.5 * one[name] - 0.25 * two[name]
        values = np.linalg.svd(truth, compute_uv=False)
        optimum = float(np.linalg.norm(values[rank:]) / np.linalg.norm(values))
        assert relative(truth, found) <= optimum * 1.001 + 1e-6
        told = next(m["relative_error"] for m in report["modules"] if m["name"].endswith(f"_{name}"))
        assert told == pytest.approx(relative(truth, found), rel=1e-3, abs=1e-5)


def test_a_policy_sees_every_singular_value_of_such_a_sum(tmp_path: Path) -> None:
    (a, one), (b, two) = lokr(tmp_path, 1), lokr(tmp_path, 2)
    done = run("merge", a, b, "-o", tmp_path / "out.safetensors", "--policy", "energy", "--param", 0.9, "--json")
    assert done.code == 0, done.err
    for module in json.loads(done.out)["resize"]["modules"]:
        values = np.linalg.svd(one[module["name"][-1]] + two[module["name"][-1]], compute_uv=False) ** 2
        assert module["new_rank"] == int(np.searchsorted(np.cumsum(values) / values.sum(), 0.9)) + 1


def full(folder: Path, seed: int) -> tuple[Path, np.ndarray[Any, Any]]:
    diff = np.random.default_rng(seed).standard_normal((SIDE, SIDE)).astype(np.float32)
    path = folder / f"full{seed}.safetensors"
    save_file({f"{STEM.format('q')}.diff": diff}, path)
    return path, diff.astype(np.float64)


@pytest.mark.parametrize("more", [[], ["--as", "lora"]])
@pytest.mark.parametrize("others", ["lora", "full", "none"])
def test_a_rank_cuts_full_differences_too_and_the_text_is_true(tmp_path: Path, others: str, more: list[str]) -> None:
    rng = np.random.default_rng(5)
    up, down = (rng.standard_normal(shape).astype(np.float32) for shape in ((SIDE, 6), (6, SIDE)))
    plain = tmp_path / "lora.safetensors"
    save_file({f"{STEM.format('k')}.lora_up.weight": up, f"{STEM.format('k')}.lora_down.weight": down,
               f"{STEM.format('k')}.alpha": np.array(2.0, np.float32)}, plain)  # fmt: skip
    (first, one), (second, two) = full(tmp_path, 1), full(tmp_path, 2)
    truth, words = {"lora": (one, [first, plain]), "full": (one + two, [first, second]), "none": (one, [first])}[others]
    out = tmp_path / "out.safetensors"
    done = run("merge", *words, "-o", out, "--rank", 4, *more)
    assert done.code == 0, done.err
    assert "cut to       rank 4;" in done.out
    ranks = {key: value.shape for key, value in load_file(out).items() if value.ndim == 2}
    assert {min(shape) for shape in ranks.values()} == {4}
    values = np.linalg.svd(truth, compute_uv=False)
    assert relative(truth, dense_of(out)["q"]) <= float(np.linalg.norm(values[4:]) / np.linalg.norm(values)) * 1.001


# the nearest LoKr -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
def test_the_nearest_kronecker_product_of_a_sum(seed, terms, o1, i1, o2, n2):
    rng = np.random.default_rng(seed)
    parts = [(rng.standard_normal((o1, i1)), rng.standard_normal((o2, n2))) for _ in range(terms)]
    found = nearest_of_sum(parts)
    whole = np.sum([np.kron(a, b) for a, b in parts], axis=0)
    moved = whole.reshape(o1, o2, i1, n2).transpose(0, 2, 1, 3).reshape(o1 * i1, o2 * n2)
    values = np.linalg.svd(moved, compute_uv=False)
    assert found.error == pytest.approx(float(np.sum(values[1:] ** 2)), rel=1e-6, abs=1e-12)
    distance = np.linalg.norm(whole - np.kron(found.w1, found.w2))
    assert distance**2 == pytest.approx(found.error, rel=1e-6, abs=1e-10)
    assert norm_of_sum(parts) == pytest.approx(float(np.sum(whole**2)), rel=1e-9)
    assert error_of_sum(parts, found.w1, found.w2) == pytest.approx(distance / np.linalg.norm(whole), abs=1e-7)


@pytest.mark.parametrize("dtype", ["keep", "bf16"])
@pytest.mark.parametrize("target", [[], ["--target", "comfyui"]])
def test_lokr_and_lokr_become_a_small_lokr_with_the_error_told(tmp_path: Path, dtype: str, target: list[str]) -> None:
    (a, one), (b, two) = lokr(tmp_path, 1), lokr(tmp_path, 2)
    out = tmp_path / "out.safetensors"
    words = ("merge", f"{a}:0.5", f"{b}:0.5", "-o", out, "--as", "lokr", "--dtype", dtype, *target)
    report = json.loads(run(*words, "--json").out)
    assert out.stat().st_size < 2 * a.stat().st_size
    squares = norms = 0.0
    if not target and dtype == "keep":
        for name, found in dense_of(out).items():
            truth = (one[name] + two[name]) / 2
            assert relative(truth, found) == pytest.approx(best_lokr(truth, 16), rel=1e-5)
            squares, norms = squares + np.sum((truth - found) ** 2), norms + np.sum(truth**2)
        assert report["deviation"] == pytest.approx(np.sqrt(squares / norms), rel=1e-4)
    assert 0.01 < report["deviation"] < 1
    assert {m["action"] for m in report["modules"]} == {"nearest LoKr"}
    assert "away from the sum" in run(*words, "--force").out


def test_another_factor_is_the_nearest_of_that_factor(tmp_path: Path) -> None:
    (a, one), (b, two) = lokr(tmp_path, 1, names="q"), lokr(tmp_path, 2, names="q")
    out = tmp_path / "out.safetensors"
    done = run("merge", a, b, "-o", out, "--as", "lokr", "--factor", 8, "--json")
    assert done.code == 0, done.err
    truth = one["q"] + two["q"]
    assert load_file(out)[f"{STEM.format('q')}.lokr_w1"].shape == (8, 8)
    assert relative(truth, dense_of(out)["q"]) == pytest.approx(best_lokr(truth, 8), rel=1e-4)
    assert json.loads(done.out)["deviation"] == pytest.approx(best_lokr(truth, 8), rel=1e-3)


def test_lokr_that_share_a_factor_stay_exact(tmp_path: Path) -> None:
    path, _ = lokr(tmp_path, 1)
    other = tmp_path / "other.safetensors"
    tensors = load_file(path)
    save_file({key: value * 2 if key.endswith("w2") else value for key, value in tensors.items()}, other)
    done = json.loads(run("merge", path, other, "-o", tmp_path / "o.safetensors", "--as", "lokr", "--json").out)
    assert done["deviation"] < 1e-7
    assert done["choices"] == []
    assert {m["action"] for m in done["modules"]} == {"added in one factor"}


# what is offered --------------------------------------------------------------------------------------------------------


def test_smaller_forms_are_offered_with_their_sizes_and_errors_before_anything_is_written(tmp_path: Path) -> None:
    (a, one), (b, two) = lokr(tmp_path, 1, names="qkv"), lokr(tmp_path, 2, names="qkv")
    words = ("merge", a, b, "-o", tmp_path / "o.safetensors", "--method", "average")
    dry = run(*words, "--dry-run")
    assert dry.code == 0
    assert not (tmp_path / "o.safetensors").exists()
    report = json.loads(run(*words, "--dry-run", "--json").out)
    offered = {(own["family"], own["rank"]): own for own in report["choices"]}
    assert set(offered) == {("lokr", None), ("lora", 16), ("lora", 64)}
    for (family, rank), choice in offered.items():
        out = tmp_path / f"{family}{rank}.safetensors"
        way = ["--as", family] if rank is None else ["--as", family, "--rank", rank]
        assert run(*words[:3], "-o", out, "--method", "average", *way).code == 0
        assert abs(out.stat().st_size - choice["size"]) <= 256  # what the header notes of the way
        found = dense_of(out)
        squares = sum(np.sum(((one[n] + two[n]) / 2 - found[n]) ** 2) for n in found)
        norms = sum(np.sum(((one[n] + two[n]) / 2) ** 2) for n in found)
        assert choice["error"] == pytest.approx(np.sqrt(squares / norms), rel=1e-3)
        assert (choice["measured"] is None) == (family == "lokr")
        assert " ".join(map(str, way)) in dry.out
    written = run(*words)
    assert written.code == 0
    assert "Smaller, but not exact: --as lokr:" in written.err
    assert abs((tmp_path / "o.safetensors").stat().st_size - report["size"]) <= 256


@pytest.mark.parametrize("way", [["--as", "full"], ["--as", "lora"], ["--rank", "4"], ["--as", "lokr"]])
def test_nothing_is_offered_to_who_has_chosen(tmp_path: Path, way: list[str]) -> None:
    (a, _), (b, _) = lokr(tmp_path, 1), lokr(tmp_path, 2)
    report = json.loads(run("merge", a, b, "-o", tmp_path / "o.safetensors", *way, "--dry-run", "--json").out)
    assert report["choices"] == []


@pytest.mark.parametrize("rank", [3, 30])
def test_a_fused_lora_of_many_ranks_is_cut_the_short_way(rank: int) -> None:
    from lorasurgery.deltas.hadamard import Hadamard
    from lorasurgery.io.tensors import of_array
    from lorasurgery.operations.conversion.reduce import Budget, to_lora

    rng = np.random.default_rng(7)
    shapes = ((300, 24), (24, 420), (300, 24), (24, 420))
    parts = [[rng.standard_normal(shape) for shape in shapes] for _ in range(2)]
    deltas = [Hadamard(*(of_array(array, "F64") for array in part)) for part in parts]
    found = to_lora([(deltas[0], 0.5, 300), (None, 1.0, 20), (deltas[1], -2.0, 300)], Budget(rank=rank), "F64", lambda *_: None)
    halves = [(a @ b) * (c @ d) for a, b, c, d in parts]
    truth = np.vstack([0.5 * halves[0], np.zeros((20, 420)), -2.0 * halves[1]])
    values = np.linalg.svd(truth, compute_uv=False)
    optimum = float(np.linalg.norm(values[rank:]))
    up, down = (found.delta.tensors[slot].f64() for slot in ("up", "down"))
    assert np.linalg.norm(truth - up @ down) <= optimum * 1.001
    assert np.sqrt(found.error) == pytest.approx(optimum, rel=1e-3)


def test_a_rank_beyond_the_sides_is_a_lora_where_the_layout_has_no_full_differences(tmp_path: Path) -> None:
    rng, paths = np.random.default_rng(3), []
    for number in range(2):
        stem = STEM.format("q")
        up, down = (rng.standard_normal(shape).astype(np.float32) for shape in ((SIDE, 400), (400, SIDE)))
        paths.append(tmp_path / f"{number}.safetensors")
        save_file({f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down}, paths[-1])
    done = run("merge", *paths, "-o", tmp_path / "o.safetensors", "--rank", 2000, "--target", "diffusers")
    assert done.code == 0, done.err
    shapes = {value.shape for value in load_file(tmp_path / "o.safetensors").values()}
    assert shapes == {(SIDE, SIDE)}
