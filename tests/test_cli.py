"""The command line as a person or a program uses it: every option, many files, JSON, help, and what a start costs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main

import lorasurgery
from lorasurgery.cli.app import app
from lorasurgery.io.header import read_safetensors
from lorasurgery.layouts.targets import ALIASES, LAYOUTS
from lorasurgery.version import __version__
from tests.edges import DIM, TO_Q, listing, loha, lokr, lora, run, save

DOCS = Path(__file__).parents[1] / "docs"
PLAIN = f"{TO_Q}.lora_up.weight"
FLUX = [f"transformer.transformer_blocks.0.attn.to_{x}" for x in "qkv"]


def keys(path: Path) -> set[str]:
    return set(read_safetensors(path).tensors)


def convert(source: Path, target: str, *more: object) -> dict[str, Any]:
    """Convert to ``out`` beside the source and return the JSON report."""
    out = source.parent / ("out" if target == "peft" else "out.safetensors")
    outcome = run("convert", source, out, "--target", target, "--force", "--json", *more)
    assert outcome.code == 0, outcome.err
    report: dict[str, Any] = json.loads(outcome.out)
    assert Path(report["output"]) == out
    return report


# help, version, start -----------------------------------------------------------------------------------------------------


def options() -> dict[str, list[str]]:
    """Every option of `convert` with its spellings."""
    command = typer.main.get_command(app).commands["convert"]  # type: ignore[attr-defined]
    return {p.name: [*p.opts, *p.secondary_opts] for p in command.params if p.param_type_name == "option"}


def test_help_is_complete() -> None:
    outcome = run("convert", "--help")
    assert outcome.code == 0
    text = outcome.out
    for spellings in options().values():
        for spelling in spellings:
            assert spelling in text
    for name in (*LAYOUTS, *ALIASES):
        assert name in text
    assert text.count("lorasurgery convert ") >= 4
    assert "Examples" in text
    whole = run("--help")
    assert "convert" in whole.out
    assert "Exit codes: 0 done, 1 refused or failed, 2 usage, 3 some" in whole.out
    assert run().code == 2


def test_every_option_is_tested_here() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    for spellings in options().values():
        for spelling in spellings:
            assert f'"{spelling}"' in text, spelling


def test_version_and_module() -> None:
    assert run("--version").out == f"lorasurgery {__version__}\n"
    done = subprocess.run([sys.executable, "-m", "lorasurgery", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"lorasurgery {__version__}\n"


def imported(*args: object) -> set[str]:
    """Modules loaded by a run of the command line in a process of its own."""
    code = (
        "import sys\nfrom lorasurgery.cli.app import app\ntry:\n    app()\nfinally:\n    print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_a_rename_needs_neither_torch_nor_numpy(tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", lora(), {"ss_network_dim": "2"})
    loaded = imported("convert", source, tmp_path / "out.safetensors", "-t", "lycoris")
    assert not loaded & {"torch", "numpy", "ml_dtypes", "safetensors", "scipy"}
    loaded = imported("convert", source, tmp_path / "folded.safetensors", "-t", "other")
    assert "numpy" in loaded
    assert "torch" not in loaded


def test_help_loads_little() -> None:
    loaded = imported("convert", "--help")
    assert not loaded & {
        "torch",
        "numpy",
        "lorasurgery.api",
        "lorasurgery.operations.conversion.convert",
        "lorasurgery.architectures",
    }


# inputs and outputs -------------------------------------------------------------------------------------------------------


def test_every_spelling_of_input_and_output(tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", lora())
    out = tmp_path / "out.safetensors"
    for args in (
        [source, out],
        ["--input", source, "--output", out],
        ["-i", source, "-o", out],
        [source, "--out", out],
        ["--input", source, out],
    ):
        assert run("convert", *args, "-t", "comfyui").code == 0
        assert "diffusion_model.layers.0.attention.qkv.lora_up.weight" in keys(out)
        out.unlink()
    (tmp_path / "folder").mkdir()
    assert run("convert", source, tmp_path / "folder", "-t", "comfyui").code == 0
    assert (tmp_path / "folder" / "in.safetensors").is_file()
    assert run("convert", source, tmp_path / "deep" / "er" / "x.safetensors", "-t", "comfyui").code == 0


@pytest.mark.parametrize("name", [*LAYOUTS, *ALIASES])
def test_every_target(name: str, tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", lora())
    report = convert(source, name)
    assert report["layout"] == {"from": "sd-scripts", "to": ALIASES.get(name, name)}
    assert report["modules"] == {"input": 1, "output": 1}
    back = tmp_path / "back.safetensors"
    assert run("convert", report["output"], back, "-t", "sd-scripts").code == 0
    assert keys(back) >= keys(source)


def tree(tmp_path: Path) -> Path:
    folder = tmp_path / "loras"
    save(folder / "a.safetensors", lora())
    save(folder / "deep" / "b.v2.safetensors", lora())
    save(folder / "deep" / ".hidden.safetensors", lora())
    (folder / "deep" / "bad.safetensors").write_bytes(b"<html>")
    (folder / "notes.txt").write_text("no adapter")
    assert run("convert", folder / "a.safetensors", folder / "peft", "-t", "peft").code == 0
    return folder


def test_a_folder_is_mirrored_and_one_bad_file_does_not_stop_the_rest(tmp_path: Path) -> None:
    folder, out = tree(tmp_path), tmp_path / "out"
    before = listing(folder)
    outcome = run("convert", folder, "--out-dir", out, "-t", "comfyui")
    assert outcome.code == 3
    assert sorted(listing(out)) == ["a.safetensors", "deep", "deep/b.v2.safetensors", "peft.safetensors"]
    assert len(outcome.out.splitlines()) == 3
    assert len(outcome.err.splitlines()) == 1
    assert str(folder / "deep" / "bad.safetensors") in outcome.err
    assert listing(folder) == before
    again = run("convert", folder, "--out-dir", out, "-t", "comfyui")
    assert (again.code, again.err.count("exists already")) == (1, 3)
    assert run("convert", folder, "--out-dir", out, "-t", "comfyui", "--force").code == 3
    (folder / "deep" / "bad.safetensors").unlink()
    inside = folder / "converted"
    for _ in range(2):
        assert run("convert", folder, "--out-dir", inside, "-t", "comfyui", "--force").code == 0
    assert sorted(listing(inside)) == ["a.safetensors", "deep", "deep/b.v2.safetensors", "peft.safetensors"]


def test_a_folder_to_peft_folders(tmp_path: Path) -> None:
    folder, out = tree(tmp_path), tmp_path / "out"
    assert run("convert", folder, "--out-dir", out, "-t", "peft").code == 3
    found = sorted(p for p in listing(out) if p.endswith("adapter_config.json"))
    assert found == ["a/adapter_config.json", "deep/b.v2/adapter_config.json", "peft/adapter_config.json"]


def test_several_files_and_globs(tmp_path: Path) -> None:
    first, second = (save(tmp_path / f"{name}.safetensors", lora()) for name in "ab")
    assert run("convert", first, second, "--out-dir", tmp_path / "one", "-t", "comfyui").code == 0
    assert run("convert", tmp_path / "*.safetensors", "--out-dir", tmp_path / "two", "-t", "comfyui").code == 0
    for out in ("one", "two"):
        assert sorted(listing(tmp_path / out)) == ["a.safetensors", "b.safetensors"]
    nothing = run("convert", tmp_path / "*.ckpt", "--out-dir", tmp_path / "three", "-t", "comfyui")
    assert nothing.code == 2
    assert "no adapter file" in nothing.err
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"")
    assert run("convert", bad, "--out-dir", tmp_path / "three", "-t", "comfyui").code == 1
    assert not (tmp_path / "three").exists()


def test_outputs_that_would_collide(tmp_path: Path) -> None:
    first, second = (save(tmp_path / name / "x.safetensors", lora()) for name in "ab")
    outcome = run("convert", first, second, "--out-dir", tmp_path / "out", "-t", "comfyui", "--force")
    assert outcome.code == 2
    assert "would both become" in outcome.err
    other = save(tmp_path / "b" / "y.safetensors", lora())
    outcome = run("convert", first, other, second, "--out-dir", tmp_path / "b", "-t", "comfyui", "--force")
    assert outcome.code == 2
    assert not (tmp_path / "out").exists()


# report -------------------------------------------------------------------------------------------------------------------


def shape_of(value: object) -> object:
    """The key tree of a JSON value; a list is described by its first entry, a map with free keys by "..."."""
    if isinstance(value, dict):
        return {key: shape_of(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shape_of(value[0])] if value else []
    return "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value).__name__


def without_free_keys(report: dict[str, Any]) -> dict[str, Any]:
    report = dict(report)
    for name in ("families", "actions"):
        report[name] = {}
    return {**report, "scale": {**report["scale"], "sources": {}}}


def test_json_is_as_documented(tmp_path: Path) -> None:
    tensors = {
        **lora(alpha=0.7),
        "lora_unet_layers_0_attention_norm1.w_norm": np.zeros(DIM, "f2"),
        "bundle_emb.x": np.zeros(4, "f4"),
        "lokr_factor": np.array(-1),
    }
    source = save(tmp_path / "in.safetensors", tensors)
    report = convert(source, "diffusers", "--lossy", "--dtype", "bf16")
    carried = convert(source, "comfyui")["carried"]
    examples = [
        json.loads(block)
        for block in re.findall(r"```json\n(.*?)```", (DOCS / "json.md").read_text(encoding="utf-8"), re.DOTALL)
    ]
    documented = examples[0]
    assert list(report) == list(documented)
    report["carried"] = carried
    report["candidates"], report["warnings"] = documented["candidates"], documented["warnings"]
    assert shape_of(without_free_keys(report)) == shape_of(without_free_keys(documented))
    for key in report:
        assert f"`{key}`" in (DOCS / "json.md").read_text(encoding="utf-8")
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"<html>")
    outcome = run("convert", source, bad, "--out-dir", tmp_path / "out", "-t", "comfyui", "--json")
    assert outcome.code == 3
    good, failed = [json.loads(line) for line in outcome.out.splitlines()]
    assert list(good) == list(documented)
    assert list(failed) == list(examples[1])
    assert f"error: {failed['error']}\n" == outcome.err


def test_report_for_people(tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", lora(alpha=0.7))
    text = run("convert", source, tmp_path / "out.safetensors", "-t", "comfyui").out
    assert text.startswith(f"in.safetensors -> {tmp_path / 'out.safetensors'}\n")
    for line in (
        "z-image",
        "sd-scripts -> comfyui",
        "1 fused",
        "1 lora",
        "1 alpha tensor; written: keep",
        "every module exact",
    ):
        assert line in text
    folded = run("convert", source, tmp_path / "folded.safetensors", "-t", "other").out
    assert re.search(r"relative error \d\.\d\de-04 over 1 modules, worst", folded)


def test_dry_run_writes_nothing_and_reports_the_same(tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", {**lora(alpha=0.7), **lokr("lora_unet_layers_1_attention_to_q")})
    for target, more in (("comfyui", ()), ("diffusers", ("--as", "lora", "--lokr-rank", 3)), ("peft", ("--as", "lora"))):
        before = listing(tmp_path)
        trial = convert(source, target, "--dry-run", *more)
        assert listing(tmp_path) == before
        real = convert(source, target, *more)
        assert (trial.pop("written"), real.pop("written")) == (False, True)
        del trial["seconds"], real["seconds"]
        assert trial == real
    assert "(not written)" in run("convert", source, tmp_path / "new.safetensors", "-t", "comfyui", "--dry-run").out


# options ------------------------------------------------------------------------------------------------------------------


def test_arch_and_base(tmp_path: Path) -> None:
    shared = save(tmp_path / "shared.safetensors", {k: t for n in FLUX for k, t in lora(n, 3072, 3072).items()})
    assert convert(shared, "sd-scripts", "--arch", "flux1")["architecture"] == "flux1-dev"
    assert convert(shared, "sd-scripts", "--arch", "flux1-schnell")["architecture"] == "flux1-schnell"
    assert keys(tmp_path / "out.safetensors") >= {"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"}
    base = save(tmp_path / "model.safetensors", {"blocks.0.odd_name.proj.weight": np.zeros((6, 4), "f2")})
    odd = save(tmp_path / "odd.safetensors", lora("lora_unet_blocks_0_odd_name_proj", 6, 4))
    assert run("convert", odd, tmp_path / "no.safetensors", "-t", "comfyui").code == 1
    report = convert(odd, "comfyui", "--base", base)
    assert report["architecture"] == "custom"
    assert "diffusion_model.blocks.0.odd_name.proj.lora_up.weight" in keys(tmp_path / "out.safetensors")


def test_qkv(tmp_path: Path) -> None:
    blocks = (48, 64, 32)
    source = save(
        tmp_path / "in.safetensors",
        {k: t for n, b in zip(FLUX, blocks, strict=True) for k, t in lokr(n, 3072, 3072, block=b).items()},
    )
    kept = convert(source, "comfyui", "--arch", "flux1", "--qkv", "auto")
    assert kept["families"] == {"lokr": 3}
    assert "--qkv fuse" in kept["warnings"][-1]
    split = convert(source, "comfyui", "--arch", "flux1", "--qkv", "split")
    assert split["families"] == {"lokr": 3}
    fused = convert(source, "comfyui", "--arch", "flux1", "--qkv", "fuse", "--lokr-rank", 8)
    assert (fused["families"], fused["actions"], fused["changes"][0]["rank"]) == ({"lora": 1}, {"fused to LoRA": 1}, 8)
    assert 0 < fused["error"]["total"] < 1
    same = convert(source, "comfyui", "--arch", "flux1", "--qkv", "fuse", "--rank", 8)
    assert same["changes"] == fused["changes"]


def test_as_rank_and_energy(tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", loha())
    exact = convert(source, "diffusers", "--as", "lora", "--dtype", "fp32")
    assert exact["changes"][0]["rank"] == 4
    cut = convert(source, "diffusers", "--as", "lora", "--energy", 0.7)
    assert cut["changes"][0]["rank"] < 4
    assert cut["error"]["total"] <= np.sqrt(0.3) + 1e-3
    assert cut["error"]["worst_module"] == TO_Q


def test_as_other_families(tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", lora())
    made = convert(source, "sd-scripts", "--as", "lokr", "--factor", 16)
    assert (made["families"], made["actions"]) == ({"lokr": 1}, {"to LoKr": 1})
    assert 0 < made["error"]["total"] < 1
    for family in ("loha", "full"):
        assert convert(source, "comfyui", "--as", family)["families"] == {family: 1}


def test_lossy_and_strict(tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", {**lora(), "lora_unet_layers_0_attention_norm1.w_norm": np.zeros(DIM, "f2")})
    report = convert(source, "diffusers", "--lossy")
    assert [d["key"] for d in report["dropped"]] == ["lora_unet_layers_0_attention_norm1"]
    assert not report["exact"]
    outcome = run("convert", source, tmp_path / "no.safetensors", "-t", "diffusers", "--lossy", "--strict")
    assert outcome.code == 1
    assert "1 keys would be left out, first lora_unet_layers_0_attention_norm1.w_norm" in outcome.err
    named = ("--drop", "norm1", "--strict")
    assert convert(source, "diffusers", *named)["dropped"][0]["reason"] == "--drop norm1"


def test_alpha(tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", lora(alpha=1.0))
    convert(source, "comfyui", "--alpha", "keep")
    assert any(key.endswith(".alpha") for key in keys(tmp_path / "out.safetensors"))
    assert convert(source, "comfyui", "--alpha", "fold")["scale"] == {"sources": {"alpha tensor": 1}, "written": "fold"}
    assert not any(key.endswith(".alpha") for key in keys(tmp_path / "out.safetensors"))
    convert(source, "diffusers", "--alpha", "header")
    metadata = read_safetensors(tmp_path / "out.safetensors").metadata
    assert json.loads(metadata["lora_adapter_metadata"])["transformer.lora_alpha"] == 1


@pytest.mark.parametrize(("name", "expected"), [("keep", "F16"), ("fp32", "F32"), ("fp16", "F16"), ("bf16", "BF16")])
def test_dtype(name: str, expected: str, tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", lora())
    report = convert(source, "lycoris", "--dtype", name)
    out = read_safetensors(tmp_path / "out.safetensors").tensors
    assert {t.dtype for key, t in out.items() if "lora_" in key.split(".", 1)[1]} == {expected}
    assert report["exact"] == (name != "bf16")


def test_lokr_factor(tmp_path: Path) -> None:
    tensors = {**lokr(), "lokr_factor": np.array(8, "i8")}
    source = save(tmp_path / "in.safetensors", tensors, {"ss_lokr_factor": "8"})
    convert(source, "comfyui", "--target", "comfyui")
    assert read_safetensors(tmp_path / "out.safetensors").tensors["lokr_factor"].item() == 8
    report = convert(source, "comfyui", "--lokr-factor", 16)
    assert read_safetensors(tmp_path / "out.safetensors").tensors["lokr_factor"].item() == 16
    assert any("8" in text and "16" in text for text in report["warnings"])


def test_trained_alpha(tmp_path: Path) -> None:
    """For a file that does not say its scale; what that gives is in test_peft_config.py."""
    source = save(tmp_path / "in.safetensors", lora(alpha=None))
    report = convert(source, "comfyui", "--trained-alpha", 2)
    assert set(report["scale"]["sources"]) == {"--trained-alpha"}


def test_diffusers_prefix(tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", lora())
    convert(source, "other", "--diffusers-prefix", "transformer")
    assert all(key.startswith("transformer.layers.0.") for key in keys(tmp_path / "out.safetensors"))


def test_fix_split_alpha(tmp_path: Path) -> None:
    """sd-scripts' split_qkv saved block-diagonal factors of rank 3r with an alpha for r."""
    up = np.zeros((9216, 6), "f2")
    for i in range(3):
        up[3072 * i : 3072 * (i + 1), 2 * i : 2 * i + 2] = np.random.default_rng(i).standard_normal((3072, 2)).astype("f2")
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    plain_module = lora(stem.replace("qkv", "proj"), 3072, 3072, alpha=1.0)
    tensors = {**plain_module, **lora(stem, 9216, 3072, rank=6, alpha=1.0), f"{stem}.lora_up.weight": up}
    source = save(tmp_path / "in.safetensors", tensors)
    plain = convert(source, "sd-scripts", "--arch", "flux1")
    fixed = convert(source, "sd-scripts", "--arch", "flux1", "--fix-split-alpha")
    alpha = read_safetensors(tmp_path / "out.safetensors").tensors[f"{stem}.alpha"].item()
    assert alpha == 3.0
    assert any("alpha" in text for text in plain["warnings"])
    assert fixed["warnings"] != plain["warnings"]


def test_drop(tmp_path: Path) -> None:
    encoder = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    unet = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    other = unet.replace("to_q", "to_k")
    source = save(tmp_path / "in.safetensors", {**lora(encoder, 768, 768), **lora(unet, 320, 320), **lora(other, 320, 320)})
    for what, left in (("te", {unet, other}), ("unet", {encoder}), ("to_q$", {encoder, other})):
        report = convert(source, "sd-scripts", "--arch", "sd1", "--drop", what)
        if what == "to_q$":
            assert {d["reason"] for d in report["dropped"]} == {"--drop to_q$"}
        assert {key.split(".")[0] for key in keys(tmp_path / "out.safetensors")} == left
    report = convert(source, "sd-scripts", "--arch", "sd1", "--drop", "te", "--drop", "to_k")
    assert {key.split(".")[0] for key in keys(tmp_path / "out.safetensors")} == {unet}


def test_help_option_of_the_command() -> None:
    assert run("convert", "--help").code == 0


def test_every_public_name_is_where_the_package_says() -> None:
    for name in lorasurgery.__all__:
        assert getattr(lorasurgery, name) is not None
