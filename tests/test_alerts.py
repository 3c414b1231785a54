"""What must be seen: errors above 5 % in every command's text and JSON, and outputs much larger than their inputs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from lorasurgery import alerts
from lorasurgery.alerts import Alert, bytes_of, bytes_text, large_errors, much_larger
from lorasurgery.io.tensors import zeros
from lorasurgery.verbs.apply.report import ApplyReport
from lorasurgery.verbs.apply.tally import Norms, Tally
from lorasurgery.verbs.extract.report import ExtractReport, ModuleResult

from tests.edges import lokr, lora, run, save  # isort: skip

if TYPE_CHECKING:
    from pathlib import Path

LOUD = "WARNING: large error: "
OUT = "lora_unet_layers_0_attention_out"


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A LoRA of rank 8 and a LoKr, each of one module of Z-Image."""
    return save(tmp_path / "a.safetensors", lora(OUT, rank=8)), save(tmp_path / "b.safetensors", lokr(OUT))


def test_a_large_error_is_told_with_where_it_is_largest() -> None:
    assert large_errors({"a": 0.05, "b": 0.01}, 0.03) == []
    (text,) = large_errors({"a": 0.81, "b": 0.06, "c": 0.01}, 0.4)
    assert text == "large error: 40.0% of the change in all, at worst 81.0% (a); above 5% in 2 of 3 modules"
    assert isinstance(text, Alert)
    assert large_errors({}, 0.2) == ["large error: 20.0% of the change in all"]


COMMANDS = {
    "convert": ("convert", "{b}", "{out}", "--target", "comfyui", "--as", "lora", "--lokr-rank", "2"),
    "convert to another family": ("convert", "{a}", "{out}", "--target", "comfyui", "--as", "lokr", "--rank", "1"),
    "merge": ("merge", "{a}:0.5", "{b}:0.5", "-o", "{out}", "--rank", "2", "--as", "lora"),
    "merge as another program": ("merge", "{a}:1", "{a}:0.5", "-o", "{out}", "--compat", "kohya"),
    "resize": ("resize", "{a}", "{out}", "--rank", "2"),
    "rerank": ("rerank", "{a}", "{out}", "--rank", "2"),
    "ema": ("ema", "{a}", "{b}", "-o", "{out}", "--on", "delta", "--rank", "2", "--no-sort"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_so(name: str, files: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    args = [text.format(a=files[0], b=files[1], out=out) for text in COMMANDS[name]]
    told = run(*args)
    assert told.code == 0, told.err
    assert sum(LOUD.strip() in line or ("WARNING: " in line and "large error: " in line) for line in told.out.splitlines()) == 1
    found = json.loads(run(*args, "--json", "--force").out)
    assert sum("large error: " in text for text in found["warnings"]) == 1


def test_exact_results_raise_no_alarm(files: tuple[Path, Path], tmp_path: Path) -> None:
    for args in (("convert", files[0], tmp_path / "x.safetensors", "--target", "diffusers"),
                 ("prune", files[0], tmp_path / "y.safetensors", "--scale", "0.5")):  # fmt: skip
        told = run(*args)
        assert told.code == 0, told.err
        assert "WARNING" not in told.out + told.err


def test_strict_fails_on_a_large_error(files: tuple[Path, Path], tmp_path: Path) -> None:
    """It promises that nothing is lost; what is known before writing is not written."""
    out = tmp_path / "out.safetensors"
    args = ("convert", files[1], out, "--target", "comfyui", "--as", "lora")
    told = run(*args, "--lokr-rank", "2", "--strict")
    assert told.code == 1
    assert "large error: " in told.err
    assert "without --strict" in told.err
    assert not out.exists()
    assert run(*args, "--energy", "0.9999", "--strict").code == 0


def test_apply_and_extract_say_so() -> None:
    applied = ApplyReport("m", "o", "flux1", "bfl")
    applied.tensors = [
        Tally("x", "", "", 1, norms=Norms(1.0, 1e-4, 1e-5)),
        Tally("same", "", "", 1, norms=Norms(1.0, 1e-20, 1e-20)),
    ]
    (text,) = applied.to_json()["warnings"]
    assert text == "large error: 31.6% of the change in all, at worst 31.6% (x)"
    cut = ModuleResult("x", "denoiser", "x", "linear", "lora", (4, 4), 1, 1.0, 1.0, 0.25)
    extracted = ExtractReport(modules=[cut])
    extracted.warn()
    assert any(text.startswith("large error: 50.0%") for text in extracted.to_json()["warnings"])


# sizes ------------------------------------------------------------------------------------------------------------------------


def test_an_output_much_larger_than_its_inputs(tmp_path: Path) -> None:
    source = tmp_path / "in.safetensors"
    source.write_bytes(b"0" * (20 << 20))
    big = zeros("BF16", (41 << 20,))
    (text,) = much_larger([big], [source], "--rank N")
    assert text == "large output: 82.0 MiB from 20.0 MiB of input; smaller with --rank N"
    assert much_larger([big], [source, source], "--rank N") == []  # two files of 20 MiB
    source.write_bytes(b"0")
    assert much_larger([zeros("BF16", (31 << 20,))], [source], "") == []  # small
    assert bytes_of(tmp_path) == 1
    assert bytes_of(tmp_path / "none") == 0
    assert [bytes_text(n) for n in (3, 2048, 3 << 20, 3 << 30)] == ["3 B", "2.0 KiB", "3.0 MiB", "3.0 GiB"]


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_large_output_is_told_of_before_it_is_written(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    monkeypatch.setattr(alerts, "LEAST", 1 << 10)
    out = tmp_path / "out.safetensors"
    told = run("convert", files[1], out, "--target", "comfyui", "--as", "lora", *more)
    assert told.code == 0, told.err
    assert told.err.startswith("warning: large output: ")
    assert "KiB of input; smaller with --rank N or --energy" in told.err
    assert "  WARNING: large output: " in told.out
    found = json.loads(run("convert", files[1], out, "--target", "comfyui", "--as", "lora", "--json", "--force", *more).out)
    assert any(text.startswith("large output: ") for text in found["warnings"])


def test_a_merge_compares_with_all_its_files(files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The average of two LoKr that share no factor is a full difference, here of 28 MiB."""
    monkeypatch.setattr(alerts, "LEAST", 1 << 10)
    other = lokr(OUT)
    other[f"{OUT}.lokr_w1"] = np.flip(other[f"{OUT}.lokr_w1"]).copy()
    other[f"{OUT}.lokr_w2_a"] = np.flip(other[f"{OUT}.lokr_w2_a"]).copy()
    second = save(tmp_path / "c.safetensors", other)
    told = run("merge", f"{files[1]}:0.5", f"{second}:0.5", "-o", tmp_path / "m.safetensors", "--dry-run")
    assert told.code == 0, told.err
    size = bytes_text(files[1].stat().st_size + second.stat().st_size)
    assert f"from {size} of input; smaller with --rank N" in told.err
