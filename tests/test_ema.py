"""``lorasurgery ema``: weights, order, the average bit by bit, the average of the changes, refusals."""

from __future__ import annotations

import json
import math
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasurgery.errors import BrokenModuleError, RequestError
from lorasurgery.io.header import read_safetensors
from lorasurgery.verbs.ema.ema import WIDEST, EmaOptions, ema, gamma_of
from lorasurgery.verbs.ema.order import in_order
from tests.edges import refused, run
from tests.oracle import Raw, raw, read, write

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

MODULE = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
UP, DOWN, ALPHA = (f"{MODULE}.{word}" for word in ("lora_up.weight", "lora_down.weight", "alpha"))


def checkpoint(
    path: Path, seed: int, *, dtype: str = "F16", rank: int = 4, alpha: float = 2.0, steps: int | None = None
) -> Path:
    rng = np.random.default_rng(seed)
    tensors = {
        UP: raw(rng.standard_normal((320, rank)) * 0.1, dtype),
        DOWN: raw(rng.standard_normal((rank, 320)) * 0.1, dtype),
        ALPHA: raw(alpha, dtype),
    }
    metadata = {"ss_network_dim": str(rank), "ss_output_name": path.stem}
    write(path, tensors, metadata if steps is None else {**metadata, "ss_steps": str(steps)})
    return path


def run_of(folder: Path, count: int, dtype: str = "F16") -> list[Path]:
    return [checkpoint(folder / f"run-{i + 1:06d}.safetensors", i, dtype=dtype, steps=100 * (i + 1)) for i in range(count)]


# weights ------------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.floats(1e-3, WIDEST))
def test_gamma_has_the_asked_width(sigma):
    gamma = gamma_of(sigma)
    assert math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) == pytest.approx(sigma, rel=1e-9)
    assert gamma >= (math.sqrt(5) - 3) / 2


@pytest.mark.parametrize(
    ("sigma", "gamma"), [(0.05, 16.97), (0.1, 6.94), (0.2, 1.826), (0.25, 0.720), (0.28, 0.169), (1 / math.sqrt(12), 0.0)]
)
def test_gamma_is_the_papers(sigma, gamma):
    """0.05 and 0.1 are the paper's own examples; the others are roots of its cubic."""
    assert gamma_of(sigma) == pytest.approx(gamma, abs=5e-3)
    roots = np.roots([1, 7, 16 - sigma**-2, 12 - sigma**-2])
    assert min(abs(roots - gamma_of(sigma))) < 1e-6


@pytest.mark.parametrize("sigma", [0.289, 0.295, 0.3])
def test_widths_whose_root_is_negative(sigma):
    roots = np.roots([1, 7, 16 - sigma**-2, 12 - sigma**-2])
    assert not any(np.isreal(roots) & (roots.real >= 0))  # musubi-tuner's condition finds none
    assert -0.382 <= gamma_of(sigma) < 0.0
    weights = EmaOptions(sigma_rel=sigma).weights(6)
    assert sum(weights) == pytest.approx(1.0)
    assert list(weights[1:]) == sorted(weights[1:], reverse=True)  # wider than the plain average: older ones count more


def test_the_widest_as_it_is_printed():
    assert gamma_of(0.3003) == gamma_of(WIDEST) == pytest.approx((math.sqrt(5) - 3) / 2)


def test_an_earlier_average_in_the_folder_is_no_checkpoint(tmp_path):
    run_of(tmp_path, 3)
    out = tmp_path / "run.safetensors"
    assert run("ema", tmp_path, "-o", out, "--sort", "steps").code == 0
    first = out.read_bytes()
    again = run("ema", tmp_path, "-o", out, "--force")
    assert again.code == 0
    assert again.out.startswith("3 checkpoints")
    assert out.read_bytes() == first


@pytest.mark.parametrize("sigma", [0.3004, 0.301, 0.5, 0.0, -0.1, math.nan])
def test_widths_that_no_power_function_has(sigma):
    with pytest.raises(RequestError, match="relative width"):
        EmaOptions(sigma_rel=sigma).check()


def test_weights_by_hand():
    assert list(EmaOptions(beta=0.9).weights(3)) == pytest.approx([0.81, 0.09, 0.1])
    assert list(EmaOptions(beta=0.5, beta2=0.8).betas(4)) == pytest.approx([0.5, 0.65, 0.8])
    assert EmaOptions(beta=0.5, beta2=0.8).betas(2) == (0.5,)
    assert EmaOptions(sigma_rel=0.2).weights(4)[0] == 0.0
    power = gamma_of(0.2) + 1
    kept = EmaOptions(sigma_rel=0.2, keep_first=True).weights(3)
    # b_t = (1 - 1/t)^power telescopes: file t of n weighs (t^p - (t-1)^p) / n^p.
    assert kept == tuple(pytest.approx(((t + 1) ** power - t**power) / 3**power) for t in range(3))


@settings(deadline=None)
@given(st.integers(2, 12), st.floats(0, 1), st.floats(0, 1))
def test_weights_sum_to_one(count, beta, beta2):
    assert sum(EmaOptions(beta, beta2).weights(count)) == pytest.approx(1.0)


@pytest.mark.parametrize("wrong", [{"beta": 1.5}, {"beta2": -0.1}, {"keep_first": True}, {"beta": math.nan}])
def test_numbers_out_of_range(wrong):
    with pytest.raises(RequestError):
        EmaOptions(**wrong).check()


# tensors ------------------------------------------------------------------------------------------------------------------


def by_the_tool(files: Sequence[dict[str, Raw]], key: str, betas: Sequence[float]) -> NDArray[np.float32]:
    """musubi-tuner's loop: ``state * beta + value * (1 - beta)`` in float32."""
    state = files[0][key].f64().astype("f4")
    for file, beta in zip(files[1:], betas, strict=True):
        value = file[key].f64().astype("f4")
        state = state * np.float32(beta) + value * np.float32(1 - beta)
    return state


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("how", [{"beta": 0.9}, {"beta": 0.3, "beta2": 0.95}, {"sigma_rel": 0.15}, {"sigma_rel": 0.295}])
def test_the_average_is_the_tools_bit_for_bit(tmp_path, dtype, how):
    paths = run_of(tmp_path, 4, dtype)
    out = tmp_path / "out.safetensors"
    words = [word for name, value in how.items() for word in (f"--{name}", value)]
    assert run("ema", *paths, "-o", out, *words).code == 0
    found, metadata = read(out)
    files = [read(path)[0] for path in paths]
    betas = EmaOptions(**how).betas(4)
    assert found.keys() == files[0].keys()
    for key in (UP, DOWN):
        assert found[key] == raw(by_the_tool(files, key, betas), dtype), key
    assert found[ALPHA] == files[0][ALPHA]
    assert metadata["ss_steps"] == "400"
    assert len(metadata["sshs_model_hash"]) == 64
    merged = json.loads(metadata["lorasurgery.merged_from"])
    assert [row["file"] for row in merged["files"]] == [path.name for path in paths]


def test_float64_stays_float64_and_other_dtypes_become_the_first_ones(tmp_path):
    a, b = tmp_path / "a-1.safetensors", tmp_path / "a-2.safetensors"
    write(a, {"x": raw([1.0, 1e-9], "F64"), "y": raw([1.0], "F16"), "n": raw([7], "I64")}, {})
    write(b, {"x": raw([3.0, 3e-9], "F64"), "y": raw([2.0], "F32"), "n": raw([7], "I64")}, {})
    found = ema([read_safetensors(a), read_safetensors(b)], EmaOptions(beta=0.25))
    assert found["x"].array().tolist() == [0.25 + 2.25, 0.25e-9 + 2.25e-9]
    assert (found["y"].dtype, found["y"].item()) == ("F16", 1.75)
    assert found["n"].dtype == "I64"


@pytest.mark.parametrize("alpha", ["F16", "I64"])
def test_alphas_of_other_dtypes_agree(tmp_path, alpha):
    """``torch.allclose`` of an integer and a float raises in the original."""
    paths = run_of(tmp_path, 2)
    tensors, metadata = read(paths[1])
    write(paths[1], {**tensors, ALPHA: raw(2, alpha)}, metadata)
    assert run("ema", *paths, "-o", tmp_path / "out.safetensors").code == 0
    assert read(tmp_path / "out.safetensors")[0][ALPHA].dtype == "F16"


def test_files_that_are_not_alike(tmp_path):
    good = run_of(tmp_path, 2)
    raws = [read_safetensors(good[0])]
    cases = {
        "rank": checkpoint(tmp_path / "rank.safetensors", 9, rank=3),
        "alpha": checkpoint(tmp_path / "alpha.safetensors", 9, alpha=4.0),
    }
    tensors, _ = read(good[1])
    write(tmp_path / "less.safetensors", {k: t for k, t in tensors.items() if k != UP}, {})
    write(tmp_path / "more.safetensors", {**tensors, "extra.lora_up.weight": tensors[UP]}, {})
    cases |= {name: tmp_path / f"{name}.safetensors" for name in ("less", "more")}
    texts = {"rank": r"\[320, 3\]", "alpha": "another number", "less": f"no {UP}", "more": "extra.lora_up.weight"}
    for name, path in cases.items():
        with pytest.raises(BrokenModuleError, match=texts[name]) as error:
            ema([*raws, read_safetensors(path)])
        assert "--on delta" in str(error.value)
        assert path.name in str(error.value)
    with pytest.raises(RequestError, match="two checkpoints"):
        ema(raws)


# order --------------------------------------------------------------------------------------------------------------------


def named(folder: Path, *names: str, steps: Sequence[int] = ()) -> list[Any]:
    """Files in an order that is none."""
    given = [checkpoint(folder / f"{name}.safetensors", i, steps=steps[i] if steps else None) for i, name in enumerate(names)]
    return [read_safetensors(path) for path in given]


def order(files: Sequence[Any], how: str = "steps") -> list[str]:
    return [file.path.stem for file in in_order(files, how).files]


def test_order_by_steps_names_and_dates(tmp_path):
    by_steps = named(tmp_path, "c", "a", "b", steps=(30, 10, 20))
    assert order(by_steps) == ["a", "b", "c"]
    assert in_order(by_steps).by == "by ss_steps"
    assert order(by_steps, "given") == ["c", "a", "b"]
    epochs = named(tmp_path, "run", "run-000010", "run-000002")
    assert order(epochs) == ["run-000002", "run-000010", "run"]
    numbers = named(tmp_path, "x-step00000500", "x-step00001000", "x-step00000050")
    assert order(numbers) == ["x-step00000050", "x-step00000500", "x-step00001000"]
    for age, file in zip((5, 50, 20), epochs, strict=True):
        os.utime(file.path, (1e9 - age, 1e9 - age))
    assert order(epochs, "time") == ["run-000010", "run-000002", "run"]
    assert order(named(tmp_path, "e10", "e9")) == ["e9", "e10"]


def test_an_order_that_cannot_be_told_is_refused(tmp_path):
    for names in (("b", "a"), ("x-1", "y-1"), ("a", "b", "a-000001")):
        with pytest.raises(RequestError, match="order") as error:
            in_order(named(tmp_path, *names))
        assert "--sort given" in str(error.value)
    with pytest.raises(RequestError):
        in_order([], "size")


# changes ------------------------------------------------------------------------------------------------------------------


def change(tensors: dict[str, Raw]) -> NDArray[np.float64]:
    scale = tensors[ALPHA].item() / tensors[DOWN].shape[0]
    return scale * tensors[UP].f64() @ tensors[DOWN].f64()


def test_the_average_of_the_changes(tmp_path):
    """Exact, and with other ranks and alphas; the average of the tensors is something else."""
    paths = [
        checkpoint(tmp_path / f"run-{i}.safetensors", i, dtype="F32", rank=r, alpha=a)
        for i, (r, a) in enumerate([(4, 2.0), (3, 6.0), (4, 2.0)], 1)
    ]
    out = tmp_path / "out.safetensors"
    outcome = run("ema", *paths, "-o", out, "--beta", "0.6", "--on", "delta", "--json")
    assert outcome.code == 0, outcome.err
    weights = EmaOptions(beta=0.6).weights(3)
    expected = sum(w * change(read(path)[0]) for w, path in zip(weights, paths, strict=True))
    found, metadata = read(out)
    assert np.linalg.norm(change(found) - expected) < 1e-6 * np.linalg.norm(expected)
    assert found[DOWN].shape[0] == 11
    assert metadata["ss_network_dim"] == "11"
    assert [row["weight"] for row in json.loads(outcome.out)["files"]] == list(weights)


def test_cut_to_the_best_approximation(tmp_path):
    paths = run_of(tmp_path, 3, "F32")
    out, plain = tmp_path / "out.safetensors", tmp_path / "plain.safetensors"
    outcome = run("ema", *paths, "-o", out, "--sigma-rel", "0.25", "--on", "delta", "--rank", "4", "--json")
    assert outcome.code == 0, outcome.err
    weights = EmaOptions(sigma_rel=0.25).weights(3)
    expected = sum(w * change(read(path)[0]) for w, path in zip(weights, paths, strict=True))
    best = math.sqrt(sum(np.linalg.svd(expected, compute_uv=False)[4:] ** 2)) / np.linalg.norm(expected)
    error = np.linalg.norm(change(read(out)[0]) - expected) / np.linalg.norm(expected)
    assert error == pytest.approx(best, rel=1e-4)
    assert json.loads(outcome.out)["resize"]["relative_error"] == pytest.approx(best, rel=1e-4)
    assert run("ema", *paths, "-o", plain, "--sigma-rel", "0.25").code == 0
    assert np.linalg.norm(change(read(plain)[0]) - expected) > 1.1 * error * np.linalg.norm(expected)


def test_the_distance_from_the_average_of_the_changes(tmp_path):
    paths = run_of(tmp_path, 3, "F32")
    out = tmp_path / "out.safetensors"
    told = json.loads(run("ema", *paths, "-o", out, "--beta", "0.6", "--measure", "--json").out)
    expected = sum(w * change(read(path)[0]) for w, path in zip(EmaOptions(beta=0.6).weights(3), paths, strict=True))
    ours = change(read(out)[0])
    right = np.linalg.norm(ours - expected) / max(np.linalg.norm(ours), np.linalg.norm(expected))
    assert told["distance_from_changes"] == pytest.approx(right, rel=1e-6)
    one = [paths[0], tmp_path / "again.safetensors"]
    one[1].write_bytes(paths[0].read_bytes())
    text = run("ema", *one, "--sort", "given", "--dry-run", "--measure").out
    assert "0.0000 from the average of the changes" in text
    refused(tmp_path, ["ema", *paths, "--on", "delta", "--measure", "--dry-run"], "--measure", code=2)


# command line -------------------------------------------------------------------------------------------------------------


def test_the_report(tmp_path):
    paths = run_of(tmp_path, 3)
    outcome = run("ema", tmp_path, "--dry-run", "--sigma-rel", "0.2")
    assert outcome.code == 0
    assert outcome.out.startswith("3 checkpoints -> (no output) (not written)")
    assert "by ss_steps" in outcome.out
    assert f"{paths[0].name} has no weight (--keep-first counts it)" in outcome.out
    told = json.loads(run("ema", *paths, "--dry-run", "--json").out)
    assert [row["weight"] for row in told["files"]] == [pytest.approx(w) for w in (0.9025, 0.0475, 0.05)]
    assert (told["written"], told["on"], told["order"]) == (False, "factors", "by ss_steps")


def test_musubis_command_line(tmp_path):
    paths = run_of(tmp_path, 3)
    out = tmp_path / "out.safetensors"
    outcome = run("ema", *reversed(paths), "--no_sort", "--sigma_rel", "0.2", "--output_file", out)
    assert outcome.code == 0
    files = [read(path)[0] for path in reversed(paths)]
    assert read(out)[0][UP] == raw(by_the_tool(files, UP, EmaOptions(sigma_rel=0.2).betas(3)), "F16")


def test_another_layout_and_dtype(tmp_path):
    paths = run_of(tmp_path, 2, "F32")
    out = tmp_path / "out.safetensors"
    assert run("ema", *paths, "-o", out, "--target", "comfyui", "--dtype", "bf16").code == 0
    found, _ = read(out)
    key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_up.weight"
    average = by_the_tool([read(path)[0] for path in paths], UP, EmaOptions().betas(2))
    assert found[key] == raw(average, "BF16")


def test_refusals(tmp_path):
    paths = run_of(tmp_path, 2)
    out = tmp_path / "out.safetensors"
    refused(tmp_path, ["ema", *paths], "-o OUT", code=2)
    refused(tmp_path, ["ema", paths[0], "-o", out], "two checkpoints", code=2)
    refused(tmp_path, ["ema", *paths, "-o", paths[1], "--force"], "the output is the input")
    refused(tmp_path, ["ema", *run_of(tmp_path, 3), "-o", paths[0], "--force"], "the output is the input")
    refused(tmp_path, ["ema", tmp_path, "-o", paths[1], "--force"], "the output is the input")
    refused(tmp_path, ["ema", *paths, "-o", out, "--beta2", "0.9", "--sigma-rel", "0.2"], "in place of --beta", code=2)
    refused(tmp_path, ["ema", *paths, "-o", out, "--rank", "4"], "--on delta", code=2)
    refused(tmp_path, ["ema", *paths, "-o", out, "--on", "weights"], "--on is factors or delta", code=2)
    refused(tmp_path, ["ema", *paths, "-o", out, "--sigma-rel", "0.4"], "0.3003", code=2)
    refused(tmp_path, ["ema", *paths, tmp_path / "none.safetensors", "-o", out], "none.safetensors")
    out.write_bytes(b"x")
    refused(tmp_path, ["ema", *paths, "-o", out], "exists", "--force")
