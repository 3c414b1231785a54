"""apply on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from lorasurgery.cli.app import application
from tests.applied import PROJ, QKV, Added, Base, assert_nearest, numbers, read, stem

if TYPE_CHECKING:
    from typer.testing import Result


PRODUCERS = Path(__file__).parent / "fixtures" / "producers"


def call(*words: object) -> Result:
    """Run ``lorasurgery apply``."""
    return CliRunner().invoke(application(), ["apply", *map(str, words)])


def made(folder: Path) -> tuple[Base, Path, Path, dict[str, Any]]:
    """A model and a LoRA for two of its weights."""
    base, adapter = Base.make("BF16"), Added("BF16")
    deltas = {name: adapter.lora(stem(name), base.weights[name].shape, 3, 2.0) for name in (QKV, PROJ)}
    return base, base.save(folder / "model.safetensors"), adapter.save(folder / "lora.safetensors"), deltas


def test_weights_by_file_and_block(tmp_path: Path) -> None:
    base, model, lora, deltas = made(tmp_path)
    out = tmp_path / "out.safetensors"
    found = call(model, f"{lora}:0.5", f"{lora}:1:re=qkv:-0.25", "-o", out)
    assert found.exit_code == 0, found.output
    weights, _ = base.result(out, "original")
    assert_nearest(weights[QKV], base.weights[QKV] + 0.25 * deltas[QKV])
    assert_nearest(weights[PROJ], base.weights[PROJ] + 1.5 * deltas[PROJ])
    assert "2 changed, 23 copied byte for byte" in found.output
    assert "lora.safetensors x 0.5: 2 modules (2 lora)" in found.output
    assert "denoiser double_blocks 0" in found.output


def test_tags_and_an_output_folder(tmp_path: Path) -> None:
    base, model, _, deltas = made(tmp_path)
    (tmp_path / "out").mkdir()
    found = call(model, "<lora:lora:0.5>", "--lora-dir", tmp_path, "-o", tmp_path / "out", "--verify", "--verbose")
    assert found.exit_code == 0, found.output
    weights, _ = base.result(tmp_path / "out" / "model.safetensors", "original")
    assert_nearest(weights[PROJ], base.weights[PROJ] + 0.5 * deltas[PROJ])
    assert "all the nearest to the exact ones" in found.output


def test_json_lists_everything(tmp_path: Path) -> None:
    _, model, lora, _ = made(tmp_path)
    found = call(model, lora, "-o", tmp_path / "out.safetensors", "--json", "--verify")
    assert found.exit_code == 0
    report = json.loads(found.stdout)
    assert report["schema"] == 1
    assert report["written"] is True
    assert report["tensors"] == {"changed": 2, "untouched": 23}
    assert report["adapters"][0]["families"] == {"lora": 2}
    assert {own["tensor"] for own in report["changes"]} == {f"{QKV}.weight", f"{PROJ}.weight"}
    assert report["unmatched"] == []
    assert sum(own["wrong"] for own in report["verified"]) == 0
    assert 0 < report["rounding"]["share_of_change"] < 0.1


def test_there_and_back(tmp_path: Path) -> None:
    base, model, lora, _ = made(tmp_path)
    assert call(model, f"{lora}:0.3", "-o", tmp_path / "a.safetensors").exit_code == 0
    back = call(tmp_path / "a.safetensors", f"{lora}:0.3", "--unapply", "-o", tmp_path / "b.safetensors")
    assert back.exit_code == 0
    assert "restored" in back.output
    twice = call(tmp_path / "a.safetensors", f"{lora}:0.3", f"{lora}:-1", "--unapply", "--dry-run")
    assert twice.stdout.startswith(f"a.safetensors - {lora.name} - {lora.name} -> ")
    weight = numbers(read(tmp_path / "b.safetensors")[f"{PROJ}.weight"])
    assert abs(weight - base.weights[PROJ]).max() < 0.02
    history = json.loads(call(tmp_path / "b.safetensors", lora, "--dry-run", "--json").stdout)
    assert history["written"] is False


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        ((), 2, "where the result goes"),
        (("--rounding", "up", "--dry-run"), 2, "nearest or stochastic"),
        (("--dora", "twice", "--dry-run"), 2, "interpolate"),
        (("--workers", "0", "--dry-run"), 2, "at least 1"),
        (("--arch", "flux9", "--dry-run"), 2, "flux9"),
    ],
)
def test_requests_that_mean_nothing(tmp_path: Path, words: tuple[str, ...], code: int, text: str) -> None:
    _, model, lora, _ = made(tmp_path)
    found = call(model, lora, *words)
    assert found.exit_code == code
    assert text in found.output


def test_ranks_are_cut_by_merge(tmp_path: Path) -> None:
    _, model, lora, _ = made(tmp_path)
    found = call(model, f"{lora}:1:dyn=2", "--dry-run")
    assert found.exit_code == 2
    assert "merge" in found.output


def test_much_lost_to_rounding_gets_advice(tmp_path: Path) -> None:
    base, adapter = Base.make("F8_E4M3"), Added("F32", size=0.005)
    adapter.lora(stem(PROJ), (24, 24), 2, None)
    model, lora = base.save(tmp_path / "model.safetensors"), adapter.save(tmp_path / "lora.safetensors")
    found = call(model, lora, "-o", tmp_path / "o.safetensors")
    assert found.exit_code == 0
    assert "--rounding stochastic" in found.output


@pytest.mark.parametrize("name", ["out.gguf", "out.ckpt", "out.bin"])
def test_an_output_named_like_another_format_is_refused(tmp_path: Path, name: str) -> None:
    _, model, lora, _ = made(tmp_path)
    found = call(model, lora, "-o", tmp_path / name)
    assert found.exit_code == 2
    assert "ends in .safetensors" in found.stderr
    assert not (tmp_path / name).exists()


def test_an_adapter_in_the_models_place_is_named(tmp_path: Path) -> None:
    _, model, lora, _ = made(tmp_path)
    found = call(lora, model, "-o", tmp_path / "o.safetensors")
    assert found.exit_code == 2
    assert "this is an adapter, not a model" in found.stderr


def test_an_adapter_of_another_model_gets_advice_that_apply_can_follow(tmp_path: Path) -> None:
    _, model, _, _ = made(tmp_path)
    other = Added("F16")
    other.lora("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q", (8, 8), 1, None)
    found = call(model, other.save(tmp_path / "other.safetensors"), "-o", tmp_path / "o.safetensors")
    assert found.exit_code == 1
    assert "another model than FLUX.1" in found.stderr
    assert "--base" not in found.stderr
    known = call(model, PRODUCERS / "diffusers_sd15.safetensors", "-o", tmp_path / "o.safetensors")
    assert "it is for Stable Diffusion 1, and the model is FLUX.1" in known.stderr


def test_the_longest_bar_is_the_largest_change_shown(tmp_path: Path) -> None:
    _, model, lora, _ = made(tmp_path)
    lines = call(model, lora, "-o", tmp_path / "o.safetensors").stdout.splitlines()
    assert max(line.count("#") for line in lines) == 24
