"""``lorasurgery resize`` as a person uses it: every option, sd-scripts' command line, plans, metadata, refusals."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main

import lorasurgery
from lorasurgery.cli.app import app
from lorasurgery.cli.resize_request import cache_file, parse_size
from lorasurgery.errors import RequestError
from tests.edges import calm, listing, lokr, refused, run
from tests.edges import save as save_arrays
from tests.oracle import Raw, raw, read, write

FIXTURES = Path(__file__).parent / "fixtures" / "producers"
LOCON, DORA, LOHA, LOKR, PEFT = (
    FIXTURES / f"{name}.safetensors"
    for name in ("lycoris_locon", "lycoris_dora_out", "lycoris_loha", "lycoris_lokr", "peft_raw")
)
BLOCK = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_"
SHAPES: dict[str, tuple[int, ...]] = {
    f"{BLOCK}attn1_to_q": (320, 320),
    f"{BLOCK}attn1_to_k": (320, 320),
    f"{BLOCK}attn1_to_v": (320, 320),
    f"{BLOCK}ff_net_2": (320, 1280),
    "lora_unet_down_blocks_0_attentions_0_proj_in": (320, 320, 1, 1),
    "lora_unet_down_blocks_0_resnets_0_conv1": (320, 320, 3, 3),
    "lora_te_text_model_encoder_layers_0_mlp_fc1": (3072, 768),
}
LINEAR, _, _, _, POINTWISE, CONV, ENCODER = SHAPES
RANK, ALPHA = 16, 4.0
META = {"ss_network_dim": "16", "ss_network_alpha": "4.0", "ss_training_comment": "cats", "modelspec.hash_sha256": "0x0"}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def made(dtype: str = "F16") -> dict[str, Raw]:
    """Stable Diffusion 1: linear layers, a 1x1 and a 3x3 convolution, a text encoder, with falling spectra."""
    rng = np.random.default_rng(0)
    tensors = {}
    for i, (stem, (out, inside, *kernel)) in enumerate(SHAPES.items()):
        fall = (0.6 + 0.05 * i) ** np.arange(RANK)
        up = (rng.standard_normal((out, RANK)) * fall * 0.1).reshape(out, RANK, *[1] * len(kernel))
        tensors[f"{stem}.lora_up.weight"] = raw(up, dtype)
        tensors[f"{stem}.lora_down.weight"] = raw(rng.standard_normal((RANK, inside, *kernel)) * 0.1, dtype)
        tensors[f"{stem}.alpha"] = raw(ALPHA, dtype)
    return tensors


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write(tmp_path / "in.safetensors", made(), META)
    return tmp_path / "in.safetensors"


def resized(source: Path, *more: object) -> tuple[dict[str, Raw], dict[str, Any]]:
    """Resize to ``out`` beside the source; its tensors, and the JSON report."""
    out = source.parent / "out.safetensors"
    outcome = run("resize", source, out, "--force", "--json", *more)
    assert outcome.code == 0, outcome.err
    report: dict[str, Any] = json.loads(outcome.out)
    assert (Path(report["output"]), report["written"], report["bytes"]["output"]) == (out, True, out.stat().st_size)
    return read(out)[0], report


def ranks(tensors: dict[str, Raw]) -> dict[str, int]:
    end = ".lora_down.weight"
    return {key.removesuffix(end): t.shape[0] for key, t in tensors.items() if key.endswith(end)}


def change(tensors: dict[str, Raw], stem: str) -> Any:
    up, down = (tensors[f"{stem}.lora_{side}.weight"].f64() for side in ("up", "down"))
    scale = tensors[f"{stem}.alpha"].item() / len(down)
    return scale * up.reshape(len(up), -1) @ down.reshape(len(down), -1)


# results ------------------------------------------------------------------------------------------------------------------


def test_the_result_is_the_best_of_its_rank(source: Path) -> None:
    old, (new, report) = read(source)[0], resized(source, "--rank", 5, "--dtype", "fp32")
    lost = norm = 0.0
    for stem in SHAPES:
        before, after = change(old, stem), change(new, stem)
        if stem == ENCODER:
            assert np.allclose(before, after)
            continue
        values = np.linalg.svd(before, compute_uv=False)
        best = np.sum(values[5:] ** 2)
        assert np.sum((before - after) ** 2) <= best * 1.0001
        lost, norm = lost + best, norm + np.sum(values**2)
        assert new[f"{stem}.alpha"].item() == ALPHA * 5 / RANK
    assert report["resize"]["relative_error"] == pytest.approx(math.sqrt(lost / norm), rel=1e-4)
    assert report["resize"]["ranks"] == {"5": 6}
    assert report["resize"]["kept"] == [{"name": ENCODER, "reason": "a text encoder's"}]


def test_ranks_by_kind_and_name(source: Path) -> None:
    found = ranks(
        resized(source, "--rank", 8, "--rank", "to_[kv]=3", "-r", r"ff\.net=2", "--conv-rank", 6, "--pointwise-rank", 5)[0]
    )
    assert found == dict(zip(SHAPES, (8, 3, 3, 2, 5, 6, RANK), strict=True))
    found = ranks(resized(source, "--rank", 4, "--include", "attn1", "--include", "conv", "--exclude", "to_k$")[0])
    assert found == dict(zip(SHAPES, (4, RANK, 4, RANK, RANK, 4, RANK), strict=True))


def test_names_that_fit_nothing_are_told(source: Path) -> None:
    named = ("--rank", "atn1=4", "--rank", "attn1=4", "--conv-rank", "time=2", "--rank", "blocks=" + ",".join(["4"] * 25))
    report = resized(source, "--rank", 8, *named, "--exclude", "nowhere", "--include", "te", "--include", "unet")[1]
    said = [f"{name!r} fits no module" for name in ("atn1", "conv time", "nowhere")]
    assert sorted(calm(report["resize"]["warnings"])) == sorted(said)


def test_ranks_by_block(source: Path) -> None:
    found = ranks(resized(source, "--rank", 9, "--rank", "in=1=4", "--te", "--rank", "te=2")[0])
    assert found == dict(zip(SHAPES, (4, 4, 4, 4, 4, 4, 2), strict=True))
    assert ranks(resized(source, "--rank", 3, "--exclude", "in=1", "--te")[0])[ENCODER] == 3
    outcome = run("resize", source, source.parent / "no.safetensors", "--rank", "in=40=4")
    assert outcome.code == 2
    assert "has no block 40" in outcome.err


POLICIES = {
    "sv_ratio": 5, "sv_cumulative": 0.8, "sv_fro": 0.9, "energy": 0.8, "threshold": 0.5, "knee": 1, "error": 0.3, "params": 0.3,
}  # fmt: skip


@pytest.mark.parametrize("name", POLICIES)
def test_policies(source: Path, name: str) -> None:
    found = ranks(resized(source, "--policy", name, "--param", POLICIES[name], "--rank", 7)[0])
    assert max(rank for stem, rank in found.items() if stem != ENCODER) <= 7
    assert len(set(found.values())) > 1
    if name == "sv_ratio":
        values = np.linalg.svd(change(read(source)[0], CONV), compute_uv=False)
        assert found[CONV] == min(np.sum(values >= values[0] / 5), 7)


def test_compat(source: Path) -> None:
    plain = ranks(resized(source, "--policy", "sv_ratio", "--param", 5)[0])
    kohya = ranks(resized(source, "--policy", "sv_ratio", "--param", 5, "--compat", "kohya")[0])
    assert kohya[LINEAR] == plain[LINEAR]  # until 0.11 it was one more
    assert resized(source, "--policy", "knee", "--compat", "kj")[1]["way"] == "knee 1 as kj"


@pytest.mark.parametrize("text", ["200KiB", "0.3 MiB", "300kb", "250000"])
def test_size_is_met_from_below(source: Path, text: str) -> None:
    _, report = resized(source, "--size", text)
    assert 0.99 * parse_size(text) <= report["bytes"]["output"] <= parse_size(text)
    even = [resized(source, "--rank", rank)[1] for rank in range(1, RANK)]
    fits = [one["resize"]["relative_error"] for one in even if one["bytes"]["output"] <= report["bytes"]["output"]]
    assert report["resize"]["relative_error"] < min(fits)


def test_size_in_words() -> None:
    assert [parse_size(t) for t in ("40MiB", "40MB", "1.5 GiB", "7", "2K")] == [40 << 20, 40_000_000, 3 << 29, 7, 2048]
    with pytest.raises(RequestError, match="no size"):
        parse_size("40 apples")


def test_recipe_and_base(source: Path, cache: Path) -> None:
    assert len(set(ranks(resized(source, "--recipe", "spn_lora=1,thr=-0.7")[0]).values())) > 2
    rng = np.random.default_rng(1)
    names = {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (320, 320),
        "down_blocks.0.attentions.0.proj_in": (320, 320, 1, 1),
    }
    write(source.with_name("base.safetensors"), {f"{n}.weight": raw(rng.standard_normal(s), "F16") for n, s in names.items()})
    how = ("--base", source.with_name("base.safetensors"), "--recipe", "fro_ckpt=1,thr=-3.5")
    _, report = resized(source, *how, "--include", r"attn1\.to_q", "--include", "proj_in", "--min-rank", 1)
    assert len(report["resize"]["modules"]) == 2
    assert report["base"].endswith("base.safetensors")
    assert cache_file() == cache / "lorasurgery" / "norms.json"
    assert len(next(iter(json.loads(cache_file().read_text()).values()))) == 2
    left_out = resized(source, *how[:3], "fro_ckpt=1,thr=9", "--include", "attn1_to_q", "--min-rank", 0)[0]
    assert set(ranks(left_out)) == set(SHAPES) - {LINEAR}
    refused(
        source.parent,
        ("resize", source, "-o", source.with_name("base.safetensors"), *how, "--force"),
        "base model; it is never",
    )


def test_dora(tmp_path: Path) -> None:
    asked = ("resize", DORA, tmp_path / "no.safetensors", "--rank", 1)
    refused(tmp_path, asked, "DoRA magnitude", "--base MODEL with --dora recompute")
    tensors, _ = read(DORA)
    shapes = {
        stem: (tensors[f"{stem}.lora_up.weight"].shape[0], *tensors[f"{stem}.lora_down.weight"].shape[1:])
        for stem in ranks(tensors)
    }
    stem = f"{BLOCK}attn1_to_q"
    rng = np.random.default_rng(0)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    write(tmp_path / "base.safetensors", {name: raw(rng.standard_normal(shapes[stem]), "F32")})
    for how, magnitude in (("recompute", True), ("fold", False)):
        args = ("--rank", 1, "--include", "attn1_to_q", "--base", tmp_path / "base.safetensors", "--dora", how)
        out = tmp_path / f"{how}.safetensors"
        outcome = run("resize", DORA, out, *args)
        assert outcome.code == 0, outcome.err
        assert "against what they do to base.safetensors" in outcome.out
        assert (f"{stem}.dora_scale" in read(out)[0]) == magnitude
        assert ranks(read(out)[0])[stem] == 1


def test_families(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    for source in (LOHA, LOKR):
        assert run("resize", source, out, "--rank", 1, "--te", "--force").code == 0
        assert not ranks(read(out)[0])
        assert run("resize", source, out, "--rank", 1, "--te", "--force", "--as", "lora").code == 0
        assert set(ranks(read(out)[0]).values()) == {1}
    refused(
        tmp_path,
        ("resize", LOHA, tmp_path / "no.safetensors", "--size", "60KiB"),
        "no singular values",
        "--as lora, or --rank alone",
    )
    full = FIXTURES / "lycoris_full.safetensors"
    refused(tmp_path, ("resize", full, tmp_path / "no.safetensors", "--rank", 1), "a full difference", "--full", code=2)
    assert run("resize", full, out, "--rank", 2, "--te", "--full", "--force").code == 0
    assert set(ranks(read(out)[0]).values()) == {2}


def test_uniform_grow_alpha_factors_dtype(source: Path) -> None:
    assert len(set(ranks(resized(source, "--policy", "sv_ratio", "--param", 5, "--uniform", "--te")[0]).values())) == 1
    assert set(ranks(resized(source, "--rank", 20, "--te")[0]).values()) == {RANK}
    grown = resized(source, "--rank", 20, "--grow", "--te")[0]
    assert set(ranks(grown).values()) == {20}
    assert np.allclose(change(grown, CONV), change(read(source)[0], CONV), atol=1e-3)
    for alpha, expected in (("rank", 8.0), ("2", 2.0), ("keep-ratio", 2.0)):
        tensors = resized(source, "--rank", 8, "--alpha", alpha)[0]
        assert tensors[f"{LINEAR}.alpha"].item() == expected
    down = resized(source, "--rank", 8, "--factors", "kohya", "--dtype", "fp32", "--workers", 2)[0][
        f"{LINEAR}.lora_down.weight"
    ].f64()
    assert np.allclose(down @ down.T, np.eye(8), atol=1e-5)
    assert resized(source, "--rank", 8, "--dtype", "bf16")[0][f"{LINEAR}.lora_up.weight"].dtype == "BF16"


def test_target_and_arch(source: Path) -> None:
    tensors, report = resized(source, "--rank", 8, "--target", "diffusers", "--arch", "sd1")
    assert report["layout"] == {"from": "sd-scripts", "to": "diffusers"}
    assert all(key.startswith(("unet.", "text_encoder.")) for key in tensors)
    folder = source.parent / "folder"
    assert run("resize", source, folder, "--rank", 2, "-t", "peft").code == 0
    again = source.parent / "again"
    assert run("resize", folder, "--output", again, "--rank", 1).code == 0
    assert (again / "unet" / "adapter_config.json").is_file()
    folder_as_file = ("resize", folder, "-o", source.parent / "x.safetensors", "--rank", 1)
    refused(source.parent, folder_as_file, "folder", "--target diffusers", code=2)


def test_unknown_names_are_kept_or_the_bases(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    stem = "lora_unet_blocks_0_odd_name_proj"
    sides = {"up": (12, 6), "down": (6, 10)}
    write(
        tmp_path / "odd.safetensors", {f"{stem}.lora_{s}.weight": raw(rng.standard_normal(n), "F32") for s, n in sides.items()}
    )
    write(tmp_path / "base.safetensors", {"blocks.0.odd_name.proj.weight": raw(np.ones((12, 10)), "F16")})
    args = ("resize", tmp_path / "odd.safetensors", tmp_path / "out.safetensors", "--rank", 3)
    refused(tmp_path, (*args, "--arch", "z-image"), "none of its 1 modules", "--base MODEL")
    plain = run(*args)
    assert (plain.code, "no table knows the model" in plain.out) == (0, True), plain.err
    assert set(read(tmp_path / "out.safetensors")[0]) == set(read(tmp_path / "odd.safetensors")[0])
    outcome = run(*args, "--force", "--base", tmp_path / "base.safetensors")
    assert outcome.code == 0, outcome.err
    assert set(ranks(read(tmp_path / "out.safetensors")[0]).values()) == {3}


# sd-scripts ---------------------------------------------------------------------------------------------------------------


def test_a_command_line_of_sd_scripts(source: Path) -> None:
    out = source.parent / "out.safetensors"
    base = ("resize", "--model", source, "--save_to", out)
    outcome = run(*base, "--new_rank", 6, "--new_conv_rank", 3, "--save_precision", "fp16", "--device", "cuda", "--verbose")
    assert outcome.code == 0, outcome.err
    tensors, metadata = read(out)
    assert ranks(tensors) == dict(zip(SHAPES, (6, 6, 6, 6, 3, 3, 6), strict=True))
    assert metadata["ss_training_comment"] == "dimension is resized from 16 to 6 (conv: 3); cats"
    for stem in SHAPES:
        assert stem in outcome.out
    assert run(*base, "--save_precision", "float").code == 1
    out.unlink()
    assert run(*base, "--save_precision", "float").code == 0
    assert set(ranks(read(out)[0]).values()) == {4}
    assert read(out)[0][f"{LINEAR}.lora_up.weight"].dtype == "F32"
    dynamic = (*base, "--new_rank", 12, "--dynamic_method", "sv_ratio", "--dynamic_param", 5, "--force")
    assert run(*dynamic).code == 0
    plain, metadata = ranks(read(out)[0]), read(out)[1]
    assert metadata["ss_training_comment"] == "Dynamic resize with sv_ratio: 5.0 from 16; cats"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("Dynamic", "Dynamic")
    assert run(*dynamic, "--compat", "kohya").code == 0
    assert ranks(read(out)[0])[LINEAR] == plain[LINEAR]
    assert run(*dynamic, "--svd_lowrank_niter", 0).code == 0


def test_one_spelling_of_sd_scripts_changes_nothing_else(source: Path) -> None:
    plain = ranks(resized(source, "--rank", 6)[0])
    for spelled in (("--new_rank", 6), ("--rank", 6, "--save_precision", "fp16"), ("--rank", 6, "--svd_lowrank_niter", 2)):
        assert ranks(resized(source, *spelled)[0]) == plain


def test_metadata(source: Path) -> None:
    for args, comment, operation, dim in (
        (("--rank", 6), "dimension is resized from 16 to 6; cats", "resize rank 6", "6"),
        (("--rank", 99), "dimension is resized from 16 to 16; cats", "resize rank 99", "16"),
        (("--rank", "attn=2"), "dimension is resized from 16 to Dynamic; cats", "resize attn 2", "Dynamic"),
        (("--size", "300KiB"), "Dynamic resize with size: 300KiB from 16; cats", "resize size 300KiB", "Dynamic"),
        (
            ("--policy", "energy", "--param", 0.9),
            "Dynamic resize with energy: 0.9 from 16; cats",
            "resize energy 0.9",
            "Dynamic",
        ),
    ):
        resized(source, *args)
        metadata = read(source.parent / "out.safetensors")[1]
        assert metadata["ss_training_comment"] == comment
        assert metadata["lorasurgery.operation"] == operation
        assert metadata["ss_network_dim"] == dim
        assert "modelspec.hash_sha256" not in metadata
        assert len(metadata["sshs_model_hash"]) == 66 or len(metadata["sshs_model_hash"]) == 64
    assert run("inspect", source.parent / "out.safetensors").code == 0


# plans, reports, batches --------------------------------------------------------------------------------------------------


def test_a_dry_run_of_a_file_with_pefts_names(tmp_path: Path) -> None:
    source = tmp_path / "one.safetensors"
    source.write_bytes(PEFT.read_bytes())
    report = json.loads(run("resize", source, "--dry-run", "--plan", 1, "--json").out)
    assert report["output"] == str(tmp_path / "one-resized.safetensors")
    refused(
        tmp_path,
        ("resize", source, tmp_path / "two.safetensors", "--rank", 1, "--target", "peft", "--dry-run"),
        "PEFT's layout is a folder",
        code=2,
    )


def test_a_dry_run_writes_nothing_and_plans(source: Path) -> None:
    before = listing(source.parent)
    outcome = run("resize", source, "--dry-run")
    assert outcome.code == 0, outcome.err
    assert re.findall(r"^ +(\d+) +[\d.]+ [KM]iB", outcome.out, re.MULTILINE) == ["4", "8", "16"]
    assert "(not written)" in outcome.out
    assert "o one rank for every module" in outcome.out
    report = json.loads(run("resize", source, "--dry-run", "--json", "--rank", 8, "--plan", "2,8").out)
    assert [row["rank"] for row in report["plan"]] == [2, 8]
    assert report["written"] is False
    assert listing(source.parent) == before
    _, real = resized(source, "--rank", 8)
    assert report["bytes"] == real["bytes"]
    assert report["plan"][1]["relative_error"] == pytest.approx(real["resize"]["relative_error"])
    assert report["plan"][1]["size"] == pytest.approx(real["bytes"]["output"], abs=200)
    assert all(row["at_size"] <= row["relative_error"] + 1e-3 for row in report["plan"])
    assert json.loads(run("resize", LOCON, "--dry-run", "--json", "--te").out)["plan"][-1]["relative_error"] == 0
    assert run("resize", source.parent, "--dry-run").code == 0


def test_the_report(source: Path) -> None:
    outcome = run("resize", "--input", source, "--out", source.parent / "out.safetensors", "--policy", "sv_fro", "--param", 0.9)
    for text in ("sd1", "6 resized", "1 (a text encoder's)", "sv_fro 0.9", "new rank", "####", "worst module", "energy kept"):
        assert text in outcome.out
    assert "max ratio" not in outcome.out
    assert "max ratio" in run("resize", "-i", source, "--rank", 2, "--dry-run", "--verbose").out


def test_many_files(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "loras"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a.safetensors").write_bytes(source.read_bytes())
    (folder / "bad.safetensors").write_bytes(b"<html>")
    out = tmp_path / "out"
    outcome = run("resize", folder, "--out-dir", out, "--rank", 2, "--json")
    assert outcome.code == 3
    assert sorted(listing(out)) == ["deep", "deep/a.safetensors"]
    assert len([json.loads(line) for line in outcome.out.splitlines()]) == 2
    assert "bad.safetensors" in outcome.err
    assert run("resize", folder, "--out-dir", out, "--rank", 2).code == 1
    assert run("resize", folder, "--out-dir", out, "--rank", 2, "--force").code == 3
    assert run("resize", tmp_path / "*.safetensors", "--out-dir", tmp_path / "glob", "--rank", 2).code == 0


def test_refusals(source: Path) -> None:
    folder, out = source.parent, source.parent / "no.safetensors"
    for args, code, texts in (
        ((), 2, ("how far", "--rank 16", "--dry-run")),
        (("--rank", "x"), 2, ("no rank", "REGEX=16")),
        (("--rank", 4, "--rank", 8), 2, ("two plain ranks",)),
        (("--rank", 0), 2, ("at least 1",)),
        (("--rank", "(=3"), 2, ("regular expression",)),
        (("--policy", "best", "--param", 1), 2, ("no policy", "sv_fro")),
        (("--policy", "sv_fro"), 2, ("needs a parameter. Try: --param X",)),
        (("--policy", "sv_fro", "--param", 1, "--size", "1MiB"), 2, ("both decide",)),
        (("--size", "big"), 2, ("no size", "40MiB")),
        (("--size", "300KiB", "--uniform"), 2, ("uniform would pad", "--rank N")),
        (("--size", "1KiB"), 2, ("a size from", "or --min-rank 0")),
        (("--policy", "params", "--param", 2), 2, ("params: the share",)),
        (("--rank", 4, "--compat", "a1111"), 2, ("compat is kohya or kj, not a1111",)),
        (("--rank", 4, "--min-rank", 3), 2, ("min rank is 0 or 1",)),
        (("--rank", 4, "--new_rank", 4), 2, ("--new_rank are the same",)),
        (("--rank", 4, "--dtype", "fp16", "--save_precision", "fp16"), 2, ("the same",)),
        (("--rank", 4, "--save_precision", "fp8"), 2, ("float or fp16",)),
        (("--rank", 4, "--model", source, "--input", source), 2, ("the same",)),
        (("--rank", 4, "--as", "loha"), 2, ("convert --as",)),
        (("--rank", 4, "--target", "nowhere"), 2, ("no layout",)),
        (("--rank", 4, "--arch", "nothing"), 2, ("nothing",)),
        (("--rank", 4, "--plan", "4"), 2, ("--dry-run",)),
        (("--rank", 4, "--plan", "x", "--dry-run"), 2, ("no list",)),
        (("--rank", 4, "--alpha", "much"), 2, ("alpha is",)),
        (("--rank", 4, "--dora", "keep"), 2, ("dora is",)),
        (("--rank", 4, "--compat", "kohya"), 2, ("compat kohya",)),
        (("--rank", 4, "--workers", 0), 2, ("--workers",)),
        (("--rank", 4, "--include", "nothing"), 2, ("nothing to resize", "other patterns")),
        (("--recipe", "fro_ckpt=1,thr=-3"), 2, ("base", "--base MODEL")),
        (("--recipe", "what=1"), 2, ("recipe",)),
    ):
        refused(folder, ("resize", source, out, *args), *texts, code=code)
    refused(folder, ("resize", source, "-o", source, "--rank", 2, "--force"), "the input")
    assert "one input and one output" in run("resize", source, "--rank", 2).err


@pytest.mark.parametrize("name", ["lycoris_oft", "lycoris_ia3_input"])
def test_what_has_no_rank_is_sent_to_extract(name: str, tmp_path: Path) -> None:
    outcome = run("resize", FIXTURES.parent / "multiplied" / f"{name}.safetensors", tmp_path / "out.safetensors", "--rank", 2)
    assert outcome.code == 2
    assert "has no rank. Try: lorasurgery apply MODEL FILE -o TUNED, then lorasurgery extract MODEL TUNED" in outcome.err
    assert "--te" not in outcome.err


def test_every_option_is_tested_here_and_documented() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    page = (Path(__file__).parents[1] / "docs" / "resize.md").read_text(encoding="utf-8")
    command = typer.main.get_command(app).commands["resize"]  # type: ignore[attr-defined]
    for param in (p for p in command.params if p.param_type_name == "option"):
        for spelling in param.opts:
            assert f'"{spelling}"' in text, spelling
        assert any(re.search(rf"{spelling}(?![\w-])", page) for spelling in param.opts), param.opts


def test_the_alpha_of_a_file_that_does_not_say_it(tmp_path: Path) -> None:
    """It becomes a part of the strength, which stays."""
    source, out = Path(__file__).parent / "fixtures" / "producers" / "peft_raw.safetensors", tmp_path / "out.safetensors"
    done = run("resize", source, out, "--rank", 2, "--trained-alpha", 3, "--json")
    assert done.code == 0, done.err
    whole = lorasurgery.load(source)
    for site, module in lorasurgery.load(out):
        old = whole.modules[site]
        assert old.delta is not None
        values = np.linalg.svd(old.dense().reshape(old.out, -1) * 3.0 / (old.delta.rank or 1), compute_uv=False)
        cut = np.linalg.svd(module.dense().reshape(module.out, -1), compute_uv=False)
        assert np.allclose(cut[:2], values[:2], rtol=2e-2)


def test_lokr_of_another_model(tmp_path: Path) -> None:
    source = save_arrays(tmp_path / "zimage.safetensors", lokr())
    assert run("resize", source, tmp_path / "out.safetensors", "--rank", 1).code == 0
    assert read(tmp_path / "out.safetensors")[0]["lora_unet_layers_0_attention_to_q.lokr_w2_a"].shape[1] == 1


def test_strict_refuses_what_is_not_understood(tmp_path: Path) -> None:
    tensors, _ = read(save_arrays(tmp_path / "zimage.safetensors", lokr()))
    source, out = tmp_path / "more.safetensors", tmp_path / "out.safetensors"
    write(source, {**tensors, "notes": raw(np.ones(3), "F32")})
    done = run("resize", source, out, "--rank", 1, "--strict")
    assert done.code == 1
    assert "notes" in done.err
    assert not out.exists()
    assert run("resize", source, out, "--rank", 1).code == 0
