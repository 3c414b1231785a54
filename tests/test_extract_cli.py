"""``lorasurgery extract`` as a person uses it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lorasurgery.cli.extract_progress import ProgressLine, duration
from lorasurgery.verbs.extract import Step
from lorasurgery.verbs.extract.compare import Families, FamilyRow
from tests.edges import run
from tests.extracting import changed, grid, whole_low_rank
from tests.models.small import save
from tests.oracle import read


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    found = {}
    for key in ("sdxl", "flux1-dev"):
        base = grid(key)
        found[key] = (
            save(folder / f"{key}.base.safetensors", base, "BF16"),
            save(folder / f"{key}.tuned.safetensors", changed(base, whole_low_rank(2)), "BF16"),
        )
    return found


def extracted(paths, out, *more):
    outcome = run("extract", *paths, out, "--json", "--quiet", *more)
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out), *read(out)


def test_the_report(models, tmp_path):
    out = tmp_path / "out.safetensors"
    outcome = run("extract", *models["sdxl"], out, "--rank", 4, "--spectrum", "--verbose")
    assert outcome.code == 0
    text = " ".join(outcome.out.split())
    assert f"sdxl.tuned.safetensors - sdxl.base.safetensors -> {out}" in text
    assert "kept 100.00% of the squared change; error 0.0000 of the change" in text
    assert "input_blocks.4" in text
    assert "energy kept when every module is cut to" in text
    assert "lora_unet_time_embed_0.bias" in text
    assert not outcome.err


def test_json_and_metadata(models, tmp_path):
    report, tensors, metadata = extracted(
        models["sdxl"], tmp_path / "my_style.safetensors", "--rank", 4, "--conv-rank", 6, "--alpha", 2
    )
    assert (report["architecture"], report["written"], report["layout"]["output"]) == ("sdxl-custom", True, "sd-scripts")
    assert report["energy"] > 1 - 1e-5
    assert report["size"] == (tmp_path / "my_style.safetensors").stat().st_size
    assert max(m["rank"] for m in report["modules"] if m["kind"] == "conv") == 6
    assert max(m["rank"] for m in report["modules"] if m["kind"] in ("linear", "1x1")) == 4
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert (metadata["ss_v2"], metadata["ss_network_module"]) == ("False", "networks.lora")
    assert metadata["ss_network_alpha"] == "2.0"
    assert json.loads(metadata["ss_network_args"])["conv_alpha"] == "2.0"
    assert metadata["ss_sd_model_name"] == "sdxl.base.safetensors"
    assert [len(metadata[f"ss_{which}sd_model_hash"]) for which in ("new_", "")] == [64, 8]
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["modelspec.title"] == "my_style"
    assert metadata["lorasurgery.operation"] == "extract lora, rank 4, conv rank 6"
    assert {t.dtype for k, t in tensors.items() if not k.endswith("alpha")} == {"BF16"}
    assert run("meta", "verify", tmp_path / "my_style.safetensors").code == 0


def test_sd_scripts_command_line(models, tmp_path):
    base, tuned = models["sdxl"]
    out = tmp_path / "old.safetensors"
    line = (
        "--model_org",
        base,
        "--model_tuned",
        tuned,
        "--save_to",
        out,
        "--dim",
        3,
        "--sdxl",
        "--device",
        "cpu",
        "--load_precision",
        "fp16",
        "--quiet",
    )
    assert run("extract", *line).code == 0
    tensors, metadata = read(out)
    assert {key.partition(".")[2] for key in tensors} == {"lora_up.weight", "lora_down.weight", "alpha"}
    assert {t.dtype for t in tensors.values()} == {"F32"}
    assert not [t for key, t in tensors.items() if key.endswith("down.weight") and t.shape[2:] == (3, 3)]
    downs = [t.f64().reshape(t.shape[0], -1) for key, t in tensors.items() if key.endswith("down.weight")]
    for down in downs:  # all of the strength is in up
        norms = np.linalg.norm(down, axis=1)
        assert np.all((np.abs(norms - 1) < 1e-4) | (norms < 1e-6))
    assert metadata["ss_network_dim"] == "3"
    more = ("--conv_dim", 2, "--save_precision", "fp16", "--no_metadata", "--force")
    assert run("extract", *line, *more).code == 0
    tensors, metadata = read(out)
    assert {t.dtype for key, t in tensors.items() if "lora_" in key} - {"F32"} == {"F16"}
    assert {t.shape[0] for key, t in tensors.items() if key.endswith("down.weight") and t.shape[2:] == (3, 3)} == {2}
    assert not [key for key in metadata if key.startswith("modelspec")]
    wrong = run("extract", *[str(x) if x != "--sdxl" else "--v2" for x in line], "--force")
    assert wrong.code != 0
    assert "Stable Diffusion 2" in wrong.err


def test_a_dry_run_tells_the_size_and_writes_nothing(models, tmp_path):
    for more in (
        (),
        ("--family", "lokr"),
        ("--dora",),
        ("--family", "full"),
        ("--family", "loha", "--rank", 2),
        ("--target", "diffusers"),
    ):
        dry = run("extract", *models["flux1-dev"], "--dry-run", "--json", *more)
        assert dry.code == 0, dry.err
        planned = json.loads(dry.out)
        assert planned["written"] is False
        report, _, _ = extracted(models["flux1-dev"], tmp_path / f"{'-'.join(map(str, more))}.safetensors", *more)
        assert abs(planned["size"] - report["size"]) < 1500
        assert set(planned["tensors"]) == {m["name"] for m in report["modules"]}
    text = run("extract", *models["flux1-dev"], "--dry-run", "--no-te", "--exclude", "img_in").out
    assert "if everything changed" in text
    assert "2 tensors: excluded" in text


def test_the_best_family_is_smaller_than_the_difference_and_better_than_rounding():
    rows = [
        ("full", 100, 0.0, 0.2),
        ("dora rank 16", 101, 0.0, 0.1),
        ("loha rank 4", 50, 0.0, 1e-5),
        ("lora rank 4", 9, 0.5, 0.5),
    ]
    found = [FamilyRow(*row, 4) for row in rows]
    assert Families(tuple(found), 4, 4, "F32").best == "lora"
    found.append(FamilyRow("lokr factor 4", 40, 0.1, 0.3, 4))
    assert Families(tuple(found), 4, 4, "F32").best == "lokr factor 4"


def test_families_compared(models):
    outcome = run("extract", *models["flux1-dev"], "--compare-families", "--include", "single=0", "--quiet", "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    rows = {row["name"]: row for row in found["families"]}
    assert rows["lora rank 8"]["error"] < 1e-3
    assert found["best"] == "lora"  # of rank 8 the change is exact, which nothing can better
    assert rows["full"]["error"] == 0.0
    assert rows["lora rank 4"]["size"] < rows["lora rank 8"]["size"] < rows["full"]["size"] * 2
    text = run("extract", *models["flux1-dev"], "--compare-families", "--include", "single=0", "--quiet").out
    assert "best per byte: " in text


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("{base}",), "two models and one output"), (("{base}", "{tuned}"), "two models and one output"),
        (("{base}", "{tuned}", "{out}", "--rank", "0"), "at least 1"),
        (("{base}", "{tuned}", "{out}", "--dim", "4", "--rank", "4"), "same thing"),
        (("{base}", "{tuned}", "{out}", "--save_precision", "fp8"), "float, fp16 or bf16"),
        (("{base}", "{tuned}", "{out}", "--full-small", "--lora-only"), "contradict"),
        (("{base}", "{tuned}", "{out}", "--family", "loha", "--target", "diffusers"), "--family lora"),
        (("{base}", "{tuned}", "{out}", "--family", "loha", "--size", "1MiB"), "--rank N alone"),
        (("{base}", "{tuned}", "{out}", "--policy", "energy"), "needs a parameter. Try: --param X"),
        (("{base}", "{tuned}", "{out}", "--size", "99KiB", "--uniform"), "beyond its size. Try: --rank N alone"),
        (("{base}", "{tuned}", "{out}", "--min-diff", "nan"), "0 or more, not nan"),
        (("{base}", "{tuned}", "{out}", "--family", "full", "--rank", "4"), "no rank. Try: --family lora"),
        (("{base}", "{tuned}", "{out}", "--family", "full", "--size", "1MiB"), "no rank to choose. Try: --family lora"),
        (("{base}", "{tuned}", "{out}", "--clamp-quantile", "0.9", "--size", "1MiB"), "Try: --rank N alone"),
        (("{base}", "{tuned}", "{out}", "--clamp-quantile", "0.9", "--factors", "balanced"), "Try: --factors kohya"),
        (("{base}", "{tuned}", "out.pt"), "PyTorch suffix"), (("{base}", "{tuned}", "{out}", "--target", "peft"), "folder"),
        (("{base}", "{tuned}", "{out}", "--device", "cuda:77"), "--device cpu"),
        (("{base}", "{tuned}", "{out}", "--out", "x", "--save_to", "y"), "same thing"),
        (("{base}", "{tuned}", "{out}", "--exclude", "single=99"), "single"),
        (("{base}", "{tuned}", "{out}", "--arch", "wan"), "names of wan"),
    ],
)  # fmt: skip
def test_refusals(models, args, words, tmp_path):
    names = {"base": models["flux1-dev"][0], "tuned": models["flux1-dev"][1], "out": tmp_path / "out.safetensors"}
    outcome = run("extract", *[arg.format(**names) for arg in args])
    assert outcome.code in (1, 2)
    assert words in outcome.err
    assert not list(tmp_path.iterdir())


def test_a_size_that_cannot_be_met_says_what_is_kept(models, tmp_path):
    out = tmp_path / "out.safetensors"
    outcome = run("extract", *models["flux1-dev"], out, "--size", "1KiB", "--quiet")
    assert outcome.code == 2
    assert "or --min-rank 0" in outcome.err
    assert "out.safetensors.partial has what is finished; another size with --resume uses it" in " ".join(outcome.err.split())


def test_progress(capsys, monkeypatch):
    times = iter([0.0, 1.0, 20.0, 40.0])
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    with ProgressLine(shown=True) as line:
        for done in (10, 30, 60):
            line(Step(done, 110, f"module_{done}"))
    shown = capsys.readouterr().err.splitlines()
    assert shown == [" 27%  1 min 20 s left  module_30", " 55%  40 s left        module_60"]
    assert [duration(s) for s in (3, 65, 4800)] == ["3 s", "1 min 5 s", "1 h 20 min"]
