"""``lorasurgery merge`` as a command: options, output, errors and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.builders import Builder, meaning, read_output
from tests.edges import refused, run
from tests.oracle import Meaning, model, read, relative_errors
from tests.test_merge import CONV, ENCODER, MID, weighted

if TYPE_CHECKING:
    from pathlib import Path

SDXL = model("sdxl")
TO_Q = "input_blocks.4.1.transformer_blocks.1.attn1.to_q"  # SD 1 has no second layer there


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Meaning, Meaning]:
    """Two SDXL files of different ranks, and what they say."""
    found: list[Path] = []
    said: list[Meaning] = []
    for seed, (name, rank) in enumerate((("a", 4), ("b", 6))):
        own = Builder.start(SDXL, "sd-scripts", "F16", seed)
        for module in (TO_Q, CONV, MID):
            own.add(module, "lora", rank=rank, alpha=3.0)
        own.add_encoder("clip_l", ENCODER, "lora", rank=rank, alpha=3.0)
        folder = tmp_path / f"made_{name}"
        folder.mkdir()
        path = own.made.save(folder)
        found.append(path.rename(tmp_path / f"{name}.safetensors"))
        said.append(own.made.meaning())
    return found[0], found[1], said[0], said[1]


def written(path: Path, layout: str = "sd-scripts") -> Meaning:
    tensors, metadata, configs = read_output(path)
    return meaning(tensors, metadata, SDXL, layout, configs)


def test_it_writes_the_sum_and_says_how_exact_it_is(files: tuple[Path, Path, Meaning, Meaning], tmp_path: Path) -> None:
    a, b, first, second = files
    out = tmp_path / "out.safetensors"
    done = run("merge", f"{a}:0.7", f"{b}:-0.4:mid=0", "-o", out)
    assert done.code == 0, done.err
    for text in (
        "sum of 2 files",
        "0.7 x a.safetensors",
        "-0.4:mid=0 x b.safetensors",
        "3 of them used",
        "rounding",
        "3 side by side",
    ):
        assert text in done.out, done.out
    truth = weighted((first, 0.7), (second, -0.4))
    truth.deltas[MID] = 0.7 * first.deltas[MID]
    assert max(relative_errors(truth, written(out)).values()) < 1e-3


def test_json_has_everything(files: tuple[Path, Path, Meaning, Meaning], tmp_path: Path) -> None:
    a, b, *_ = files
    found = json.loads(run("merge", a, f"{b}:0.5", "-o", tmp_path / "out.safetensors", "--rank", 5, "--json").out)
    assert found["written"] is True
    assert [s["modules"] for s in found["sources"]] == [4, 4]
    assert found["resize"]["ranks"] == {"5": 4}
    assert {m["action"] for m in found["modules"]} == {"side by side"}
    assert found["bytes"] == (tmp_path / "out.safetensors").stat().st_size
    assert 0 < found["resize"]["relative_error"] < 1


@pytest.mark.parametrize(
    "how", [["--size", "60KiB"], ["--policy", "energy", "--param", "0.8"], ["--rank", "6", "--rank", "mid=2"]]
)
def test_results_are_cut_as_resize_cuts(files: tuple[Path, Path, Meaning, Meaning], tmp_path: Path, how: list[str]) -> None:
    a, b, *_ = files
    out = tmp_path / "out.safetensors"
    found = json.loads(run("merge", a, f"{b}:0.5", "-o", out, *how, "--json").out)
    assert found["written"], found
    if how[0] == "--size":
        assert out.stat().st_size <= 60 << 10
    ranks = {m["name"]: m["new_rank"] for m in found["resize"]["modules"]}
    assert len(ranks) == 4  # text encoders, too
    assert max(ranks.values()) < 10
    if "middle=2" in how:
        assert [rank for name, rank in ranks.items() if "middle" in name] == [2]


def test_a_dry_run_writes_nothing(files: tuple[Path, Path, Meaning, Meaning], tmp_path: Path) -> None:
    a, b, *_ = files
    before = sorted(tmp_path.iterdir())
    done = run("merge", a, b, "--dry-run", "--verbose")
    assert done.code == 0, done.err
    assert "(not written)" in done.out
    assert "side by side" in done.out
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("target", ["diffusers", "comfyui", "peft", "onetrainer"])
def test_any_layout_can_be_written(files: tuple[Path, Path, Meaning, Meaning], tmp_path: Path, target: str) -> None:
    a, b, first, second = files
    out = tmp_path / ("out" if target == "peft" else "out.safetensors")
    te = [] if target != "peft" else ["--verbose"]
    done = run("merge", f"{a}:0.5", f"{b}:2", "-o", out, "--target", target, "--dtype", "fp32", *te)
    assert done.code == 0, done.err
    if target != "peft":
        truth = weighted((first, 0.5), (second, 2.0))
        assert max(relative_errors(truth, written(out, target)).values()) < 1e-6


def test_tags_and_presets(files: tuple[Path, Path, Meaning, Meaning], tmp_path: Path) -> None:
    _, _, first, second = files
    presets = tmp_path / "p.txt"
    presets.write_text("MIDONLY:0,0,0,0,0,1,0,0,0,0,0,0\n")
    out = tmp_path / "out.safetensors"
    prompt = "<lora:a:0.5:1> <lora:b:2:lbw=MIDONLY>"
    done = run("merge", prompt, "--lora-dir", tmp_path, "--presets", presets, "-o", out, "--dtype", "fp32")
    assert done.code == 0, done.err
    truth = weighted((first, 1.0))
    truth.deltas[MID] = truth.deltas[MID] + 2.0 * second.deltas[MID]
    name = next(n for n in truth.deltas if n.startswith("clip_l"))
    truth.deltas[name] = 0.5 * truth.deltas[name]
    assert max(relative_errors(truth, written(out)).values()) < 1e-6


def test_refusals_leave_nothing_behind(files: tuple[Path, Path, Meaning, Meaning], tmp_path: Path) -> None:
    a, b, *_ = files
    out = tmp_path / "out.safetensors"
    refused(tmp_path, ["merge", a, b], "-o OUT", code=2)
    refused(tmp_path, ["merge", a, b, "-o", a, "--force"], "never overwritten")
    refused(tmp_path, ["merge", a, b, "-o", out, "--method", "ties"], "--rank 32", "--as full", code=2)
    refused(tmp_path, ["merge", a, b, "-o", out, "--method", "x"], "sum, average, slerp", code=2)
    refused(tmp_path, ["merge", f"{a}:double=0-3:1", b, "-o", out], "no component or blocks of that name", "in=0-8", code=2)
    refused(tmp_path, ["merge", f"{a}:0", f"{b}:0", "-o", out], "every weight is 0", code=2)
    refused(tmp_path, ["merge", a, tmp_path / "none.safetensors", "-o", out], "none.safetensors: No such file")
    refused(tmp_path, ["merge", a, b, "-o", out, "--target", "peft"], "PEFT's layout is a folder", code=2)
    refused(tmp_path, ["merge", a, b, "-o", out, "--as", "loha"], "--as is lora, full or lokr", code=2)
    refused(tmp_path, ["merge", a, b, "-o", out, "--as", "lokr", "--rank", 4], "--as lokr alone", code=2)
    refused(tmp_path, ["merge", a, b, "-o", out, "--factor", 4], "of a result as LoKr", code=2)


def test_an_existing_output_needs_force(files: tuple[Path, Path, Meaning, Meaning], tmp_path: Path) -> None:
    a, b, *_ = files
    out = tmp_path / "out.safetensors"
    out.write_text("mine")
    assert run("merge", a, b, "-o", out).code == 1
    assert out.read_text() == "mine"
    assert run("merge", a, b, "-o", out, "--force").code == 0


def test_full_differences_of_a_sum(files: tuple[Path, Path, Meaning, Meaning], tmp_path: Path) -> None:
    first, second, one, two = files
    out = tmp_path / "full.safetensors"
    outcome = run("merge", f"{first}:0.7", f"{second}:-0.4", "-o", out, "--as", "full", "--json")
    assert outcome.code == 0, outcome.err
    tensors, _ = read(out)
    assert all(key.endswith((".diff", ".diff_b")) for key in tensors)
    assert max(relative_errors(weighted((one, 0.7), (two, -0.4)), written(out)).values()) < 1e-2
    assert json.loads(outcome.out)["ranks"] == {}


def test_options_of_convert_are_called_so(tmp_path: Path) -> None:
    own = Builder.start(model("sdxl"), "sd-scripts", "F32", 0)
    own.add("input_blocks.4.1.transformer_blocks.0.attn1.to_q", "dora", rank=3, alpha=1.0)
    path = own.made.save(tmp_path)
    text = refused(tmp_path, ["merge", path, "-o", tmp_path / "o.safetensors", "--as", "full"], "no DoRA magnitude")
    assert "Try: lorasurgery convert before this, with --lossy" in text


def test_unlike_parts_of_a_fused_weight_become_lora(tmp_path: Path) -> None:
    own = Builder.start(model("flux1-dev"), "onetrainer", "F16", 0)
    own.add("transformer_blocks.0.attn.to_q", "lora", rank=2, alpha=1.0)
    own.add("transformer_blocks.0.attn.to_k", "full")
    words = ["merge", own.made.save(tmp_path), "-o", tmp_path / "o.safetensors", "--target", "sd-scripts", "--arch", "flux1"]
    text = refused(tmp_path, words, "different families")
    assert "or --as lora (exact)" in text
    assert "--qkv" not in text
    assert run(*words, "--as", "lora").code == 0


@pytest.mark.parametrize("weight", ["1e60", "1e31", "-1e35", "1e-40", "1e-60"])
@pytest.mark.parametrize("target", ["sd-scripts", "diffusers"])
def test_weights_that_no_file_can_hold(
    files: tuple[Path, Path, Meaning, Meaning], tmp_path: Path, weight: str, target: str
) -> None:
    out = tmp_path / "o.safetensors"
    refused(
        tmp_path, ["merge", f"{files[0]}:{weight}", "-o", out, "--target", target], "would have the scale", "another weight"
    )
    refused(tmp_path, ["prune", files[0], out, "--scale", weight, "--target", target], "would have the scale")


def test_ranks_are_those_of_the_file(tmp_path: Path) -> None:
    own = Builder.start(model("sdxl"), "sd-scripts", "F32", 0)
    own.add("input_blocks.4.1.transformer_blocks.0.attn1.to_q", "loha", rank=3, alpha=1.0)
    path = own.made.save(tmp_path)
    assert "rank         9" in run("merge", path, "-o", tmp_path / "o.safetensors", "--as", "lora").out
    assert run("merge", path, "--dry-run").out.startswith("sum of 1 file -> ")


def test_strict_refuses_what_would_be_left_out(tmp_path: Path) -> None:
    paths = []
    for seed, family in enumerate(("dora", "lora")):
        own = Builder.start(SDXL, "sd-scripts", "F16", seed)
        own.add(TO_Q, family, rank=4, alpha=3.0)
        own.add(MID, "lora", rank=4, alpha=3.0)
        (folder := tmp_path / family).mkdir()
        paths.append(own.made.save(folder))
    out = tmp_path / "out.safetensors"
    refused(tmp_path, ["merge", *paths, "-o", out], "magnitude", "--dora fold")
    refused(tmp_path, ["merge", *paths, "-o", out, "--drop-nonlinear", "--strict"], "--strict", code=2)
    done = run("merge", *paths, "-o", out, "--drop-nonlinear")
    assert done.code == 0
    assert "left out" in done.out


def test_the_file_with_nan_is_named(files: tuple[Path, Path, Meaning, Meaning], tmp_path: Path) -> None:
    a, *_ = files
    own = Builder.start(SDXL, "sd-scripts", "F16", 5)
    stem = own.add(TO_Q, "lora", rank=4, alpha=3.0)
    up = own.made.tensors[f"{stem}.lora_up.weight"]
    own.made.tensors[f"{stem}.lora_up.weight"] = up._replace(data=b"\x00\x7e" + up.data[2:])
    (tmp_path / "bad").mkdir()
    bad, out = own.made.save(tmp_path / "bad"), tmp_path / "out.safetensors"
    for how in ([], ["--rank", "2"], ["--method", "ties", "--rank", "2"], ["--method", "slerp"]):
        refused(tmp_path, ["merge", a, bad, "-o", out, *how], f"{bad}: {stem}.lora_up.weight holds NaN", "FILE:1:re=REGEX:0")


def test_a_folder_that_is_read_is_not_written_into(files: tuple[Path, Path, Meaning, Meaning], tmp_path: Path) -> None:
    a, *_ = files
    folder = tmp_path / "peft"
    assert run("convert", a, folder, "--target", "peft").code == 0
    refused(tmp_path, ["merge", folder, a, "-o", folder / "new"], "in an input's folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path, ["merge", a, "-o", tmp_path / "empty", "--force"], "the output is a folder", "merged.safetensors")


def test_dora_cannot_be_cut_here(tmp_path: Path) -> None:
    own = Builder.start(SDXL, "sd-scripts", "F16", 0)
    own.add(TO_Q, "dora", rank=4, alpha=3.0)
    path = own.made.save(tmp_path)
    refused(tmp_path, ["merge", path, "-o", tmp_path / "out.safetensors", "--rank", "2"], "--dora recompute", code=2)


def test_merging_needs_no_torch(files: tuple[Path, Path, Meaning, Meaning], tmp_path: Path) -> None:
    a, b, *_ = files
    code = (
        "import sys; from lorasurgery.cli.app import application\n"
        f"try: application('merge')(['merge', {str(a)!r}, {str(b)!r}, '-o', {str(tmp_path / 'o.safetensors')!r}])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
