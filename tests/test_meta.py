"""Edits of metadata: what is written, what is left alone, and that no tensor byte changes."""

from __future__ import annotations

import base64
import json
import os
import stat
import subprocess
import sys

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from lorasurgery.io import in_place
from lorasurgery.io.header import read_safetensors
from lorasurgery.verbs.meta.values import typed
from tests.edges import lora, refused, run, save, to_bytes

METADATA = {"format": "pt", "ss_network_dim": "4", "ss_output_name": "123", "modelspec.title": "t", "note": "n" * 200}


def file(folder, name="a.safetensors", metadata=METADATA, **more):
    return save(folder / name, lora(**more), metadata)


def data_of(path):
    raw = path.read_bytes()
    return raw[8 + int.from_bytes(raw[:8], "little") :]


def meta_of(path):
    with safe_open(path, "np") as opened:  # the reference reader takes it too
        return opened.metadata() or {}


def test_set_writes_a_new_file_and_leaves_the_input(tmp_path):
    path, out = file(tmp_path), tmp_path / "out.safetensors"
    before = path.read_bytes()
    done = json.loads(run("meta", "set", path, "ss_epoch=3", "x=a=b", "note=", "-o", out, "--json").out)
    assert path.read_bytes() == before
    assert meta_of(out) == METADATA | {"ss_epoch": "3", "x": "a=b", "note": ""}
    assert data_of(out) == data_of(path)
    assert (done["method"], done["added"], done["changed"], done["removed"]) == ("new file", ["ss_epoch", "x"], ["note"], [])
    assert int.from_bytes(out.read_bytes()[:8], "little") % 8 == 0


def test_data_keeps_its_order(tmp_path):
    tensors = {"z": np.ones(3, "f2"), "a": np.arange(4, dtype="f4")}
    path, out = save(tmp_path / "a.safetensors", tensors, {}), tmp_path / "out.safetensors"
    run("meta", "set", path, "k=v", "-o", out)
    assert data_of(out) == data_of(path)
    assert list(read_safetensors(out).tensors) == ["z", "a"]
    assert {k: v.tolist() for k, v in load_file(out).items()} == {k: v.tolist() for k, v in tensors.items()}


def test_in_place_when_it_fits(tmp_path):
    path = file(tmp_path)
    before, inode = path.read_bytes(), path.stat().st_ino
    done = run("meta", "unset", path, "note", "--in-place")
    assert "header rewritten in place" in done.out
    assert (path.stat().st_ino, len(path.read_bytes()), path.read_bytes()[:8]) == (inode, len(before), before[:8])
    assert data_of(path) == data_of_bytes(before)
    assert meta_of(path) == {k: v for k, v in METADATA.items() if k != "note"}
    assert "header rewritten in place" in run("meta", "set", path, "note=" + "m" * 100, "--in-place").out


def data_of_bytes(raw):
    return raw[8 + int.from_bytes(raw[:8], "little") :]


def test_in_place_replaces_when_it_does_not_fit(tmp_path):
    path = file(tmp_path)
    path.chmod(0o640)
    data = data_of(path)
    done = run("meta", "set", path, "long=" + "x" * 500, "--in-place")
    assert "replaced by a new file" in done.out
    assert (data_of(path), stat.S_IMODE(path.stat().st_mode)) == (data, 0o640)
    assert meta_of(path)["long"] == "x" * 500
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_in_place_through_links(tmp_path):
    (tmp_path / "real").mkdir()
    path = file(tmp_path / "real")
    link = tmp_path / "link.safetensors"
    link.symlink_to(path)
    run("meta", "set", link, "a=1", "--in-place")
    assert link.is_symlink()
    assert meta_of(path)["a"] == "1"
    other = tmp_path / "other.safetensors"
    os.link(path, other)
    before = other.read_bytes()
    assert "replaced" in run("meta", "unset", path, "note", "--in-place").out
    assert other.read_bytes() == before


def test_in_place_refuses_a_file_that_changed_meanwhile(tmp_path):
    path = file(tmp_path)
    header = in_place.read_header(path)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(Exception, match="changed while it was edited"):
        in_place.rewrite(header, {"a": "b"})


def test_failure_leaves_nothing(tmp_path, monkeypatch):
    path = file(tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr(in_place, "copy_region", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    refused(tmp_path, ["meta", "set", path, "a=" + "b" * 999, "--in-place"], "No space left")
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("args", "texts", "code"),
    [
        (["set", "{a}", "k=v"], ["-o OUT", "--in-place"], 2),
        (["set", "{a}", "k=v", "--in-place", "-o", "{d}/o.safetensors"], ["one place"], 2),
        (["set", "{a}", "novalue", "--in-place"], ["novalue", "KEY=VALUE"], 2),
        (["set", "{a}", "--in-place"], ["nothing to set"], 2),
        (["set", "{a}", "--base", "juggernaut", "--in-place"], ["juggernaut", "flux1", "ss_sd_model_name"], 2),
        (["set", "{a}", "--thumbnail", "{a}", "--in-place"], ["no JPEG"], 1),
        (["set", "{a}", "k=v", "-o", "{a}"], ["the output is the input", "--in-place"], 1),
        (["set", "{a}", "k=v", "-o", "{b}"], ["exists already", "--force"], 1),
        (["set", "{d}/none.safetensors", "k=v", "--in-place"], ["none.safetensors", "No such file"], 1),
        (["set", "{d}/x.pt", "k=v", "--in-place"], ["PyTorch", "convert"], 1),
        (["get", "{a}", "modelspec.titel"], ["modelspec.titel", "modelspec.title"], 1),
        (["unset", "{a}", "ss_outptu_name", "--in-place"], ["ss_outptu_name", "ss_output_name"], 1),
        (["strip", "{a}", "--in-place"], ["--privacy"], 2),
        (["strip", "{a}", "{b}", "--all", "-o", "{d}/o.safetensors"], ["--out-dir"], 2),
        (["show", "{d}/*.bin"], ["no .safetensors file"], 2),
    ],
)
def test_refusals(tmp_path, args, texts, code):
    names = {"a": file(tmp_path), "b": file(tmp_path, "b.safetensors"), "d": tmp_path}
    refused(tmp_path, ["meta", *(arg.format(**names) for arg in args)], *texts, code=code)


def test_header_too_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(in_place, "MAX_HEADER", 2000)
    refused(tmp_path, ["meta", "set", file(tmp_path), "k=" + "v" * 2000, "--in-place"], "the format allows", code=2)


def test_typed_options(tmp_path):
    picture = tmp_path / "p.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 20)
    path = file(tmp_path, metadata={})
    args = ["--trigger", "my cat", "--title", "T", "--author", "A", "--license", "MIT", "--description", "d", "--tags", "a, b"]
    done = run("meta", "set", path, *args, "--base", "flux1-schnell", "--thumbnail", picture, "--in-place")
    assert "modelspec.implementation" in done.out  # what the specification still wants
    found = meta_of(path)
    assert base64.b64decode(found.pop("modelspec.thumbnail").removeprefix("data:image/png;base64,")) == picture.read_bytes()
    assert found == {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.trigger_phrase": "my cat",
        "modelspec.title": "T",
        "modelspec.author": "A",
        "modelspec.license": "MIT",
        "modelspec.description": "d",
        "modelspec.tags": "a, b",
        "modelspec.architecture": "flux-1-schnell/lora",
        "ss_base_model_version": "flux1",
    }


@pytest.mark.parametrize(
    ("name", "version", "architecture"),
    [
        ("flux1", "flux1", "flux-1/lora"),
        ("flux1-dev", "flux1", "flux-1-dev/lora"),
        ("sdxl", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
        ("sd1", "sd_v1", "stable-diffusion-v1/lora"),
        ("z-image", "z_image", "Z-Image/lora"),
        ("qwen-image", "qwen_image", "Qwen-Image/lora"),
        ("sd3-3.5-large", "5-large", "stable-diffusion-3-5-large/lora"),
        ("wan", "wan", "wan2.1/lora"),
        ("chroma", "chroma", "chroma/lora"),
    ],
)
def test_base_model_in_the_trainers_words(tmp_path, name, version, architecture):
    path = file(tmp_path, metadata={})
    run("meta", "set", path, "--base", name, "--in-place")
    found = meta_of(path)
    assert (found["ss_base_model_version"], found["modelspec.architecture"]) == (version, architecture)


def test_get_prints_the_value_as_it_is(tmp_path):
    value = '{"a": [1,  2]}\nß'
    path = file(tmp_path, metadata={"ss_x": value, "ss_network_dim": "4"})
    assert run("meta", "get", path, "ss_x").out == value + "\n"
    found = json.loads(run("meta", "get", path, "ss_network_dim", "--json").out)
    assert (found["type"], found["value"], found["text"]) == ("int", 4, "4")


def test_show(tmp_path):
    nested = json.dumps({f"tag{i}": i for i in range(40)})
    metadata = {"ss_tag_frequency": nested, "ss_training_started_at": "1700000000.5", "ss_unet_lr": "None", "x": "\x1b[31m"}
    path = file(tmp_path, metadata=metadata)
    text = run("meta", "show", path).out
    assert "2023-11-14 22:13 UTC" in text
    assert '"tag3": 3' in text
    assert "more lines (--full" in text
    assert "\x1b" not in text
    assert '"tag39": 39' in run("meta", "show", path, "--full").out
    found = json.loads(run("meta", "show", path, "--json").out)
    assert found["metadata"]["ss_tag_frequency"]["tag39"] == 39
    assert found["types"] == {
        "ss_tag_frequency": "json", "ss_training_started_at": "float", "ss_unet_lr": "none", "x": "text",
    }  # fmt: skip
    file(tmp_path, "b.safetensors", metadata=None)
    assert len(run("meta", "show", tmp_path, "--json").out.splitlines()) == 2


@pytest.mark.parametrize(
    ("key", "text", "kind", "value"),
    [
        ("ss_epoch", "3", "int", 3),
        ("ss_learning_rate", "1e-05", "float", 1e-5),
        ("ss_v2", "False", "bool", False),
        ("ss_bucket_info", "null", "none", None),
        ("ss_network_args", '{"factor": "8"}', "json", {"factor": "8"}),
        ("ss_text_encoder_lr", "[1e-05]", "json", [1e-5]),
        ("ss_x", '{"a": NaN, "b": 1e999}', "json", {"a": "NaN", "b": "1e999"}),
        ("ss_x", "{broken", "text", "{broken"),
        ("ss_x", "[" * 100_000, "text", "[" * 100_000),
        ("ss_x", "[" * 900 + "]" * 900, "text", "[" * 900 + "]" * 900),
        ("ss_x", "9" * 5000, "text", "9" * 5000),
        ("ss_x", "1e999", "text", "1e999"),
        ("ss_output_name", "123", "text", "123"),
        ("ss_sd_model_hash", "12345678", "text", "12345678"),
        ("sshs_legacy_hash", "12345678", "text", "12345678"),
        ("modelspec.title", "1.0", "text", "1.0"),
        ("other", "1", "text", "1"),
        ("training_info", '{"step": 1}', "json", {"step": 1}),
        ("modelspec.thumbnail", "data:image/png;base64,xx", "image", "data:image/png;base64,xx"),
    ],
)
def test_types(key, text, kind, value):
    assert typed(key, text) == (kind, value)


def test_strip_only_keep_and_all(tmp_path):
    metadata = METADATA | {"lora_adapter_metadata": "{}", "ss_lokr_factor": "8", "ss_network_alpha": "1"}
    path, out = file(tmp_path, metadata=metadata), tmp_path / "out.safetensors"

    def stripped(*args):
        outcome = run("meta", "strip", path, *args, "-o", out, "--force")
        assert outcome.code == 0, outcome
        return set(meta_of(out)), outcome.out

    loaded = {"format", "lora_adapter_metadata", "ss_lokr_factor"}
    keys, text = stripped("--all")
    assert keys == loaded
    assert "lora_adapter_metadata stays" in text
    assert stripped("--all", "--keep", "modelspec.*")[0] == loaded | {"modelspec.title"}
    assert stripped("--keep", "ss_network_*")[0] == loaded | {"ss_network_dim", "ss_network_alpha"}
    only = set(metadata) - {"ss_output_name", "ss_lokr_factor"}
    assert stripped("--only", "ss_*", "--keep", "ss_network_*")[0] == only
    assert set(meta_of(path)) == set(metadata)


def test_copy(tmp_path):
    source = file(tmp_path, metadata=METADATA | {"sshs_model_hash": "00", "lora_adapter_metadata": "{}"})
    same = file(tmp_path, "same.safetensors", metadata={"own": "1", "note": "mine", "sshs_model_hash": "11"})
    other = file(tmp_path, "other.safetensors", metadata={"own": "1", "ss_network_dim": "8"}, rank=3)
    run("meta", "copy", source, same, "--in-place")
    assert meta_of(same) == METADATA | {"own": "1", "sshs_model_hash": "11", "lora_adapter_metadata": "{}"}
    done = run("meta", "copy", source, other, "-o", tmp_path / "out.safetensors")
    assert "ss_network_dim was not copied" in done.out
    assert meta_of(tmp_path / "out.safetensors") == METADATA | {"own": "1", "ss_network_dim": "8"}
    run("meta", "copy", source, other, "--replace", "--only", "note", "--in-place")
    assert meta_of(other) == {"note": METADATA["note"], "ss_network_dim": "8"}


def test_many_files(tmp_path):
    for name in ("a.safetensors", "deep/b.safetensors"):
        file(tmp_path / "in", name)
    (tmp_path / "in" / "bad.safetensors").write_bytes(b"")
    outcome = run("meta", "strip", tmp_path / "in", "--all", "--out-dir", tmp_path / "out", "--json")
    assert outcome.code == 3
    assert [("error" in json.loads(line)) for line in outcome.out.splitlines()] == [False, True, False]
    assert set(meta_of(tmp_path / "out" / "deep" / "b.safetensors")) == {"format"}
    assert run("meta", "strip", tmp_path / "in", "--all", "--in-place").code == 3
    assert set(meta_of(tmp_path / "in" / "a.safetensors")) == {"format"}


def test_dry_run_writes_nothing(tmp_path):
    path = file(tmp_path)
    before = path.read_bytes()
    done = json.loads(run("meta", "strip", path, "--all", "--dry-run", "--json").out)
    assert (done["written"], "note" in done["removed"], path.read_bytes()) == (False, True, before)


def test_no_heavy_imports(tmp_path):
    path = file(tmp_path)
    code = (
        "import sys; from typer.testing import CliRunner; from lorasurgery.cli.app import app\n"
        f"for args in (['show'], ['verify'], ['fix', '--add', '--in-place'], ['strip', '--privacy', '--in-place']):\n"
        f"    assert CliRunner().invoke(app, ['meta', args[0], {str(path)!r}, *args[1:]]).exit_code == 0, args\n"
        f"CliRunner().invoke(app, ['meta', 'set', {str(path)!r}, '--base', 'sdxl', '--in-place'])\n"
        "print([m for m in ('torch', 'numpy', 'ml_dtypes', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_values_that_no_terminal_prints(tmp_path):
    deep, lone = '{"a":' * 800 + '"/home/jane/x"' + "}" * 800, '{"a": "\\ud800"}'
    path = file(tmp_path, metadata={"ss_deep": deep, "ss_lone": lone})
    assert "\\ud800" in run("meta", "show", path).out
    assert json.loads(run("meta", "show", path, "--json").out)["metadata"]["ss_lone"] == {"a": "\ud800"}
    run("meta", "strip", path, "--privacy", "--in-place")
    assert "jane" not in meta_of(path)["ss_deep"]


def test_file_without_tensors(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(to_bytes({}))
    run("meta", "set", path, "a=b", "--in-place")
    assert meta_of(path) == {"a": "b"}


@pytest.mark.parametrize("command", [("strip", "--all"), ("fix", "--add"), ("set", "--title", "x"), ("unset", "note")])
@pytest.mark.parametrize("form", ["folder", "glob"])
def test_a_folder_with_one_file_has_room_in_one_output(tmp_path, command, form):
    home = tmp_path / "in"
    home.mkdir()
    file(home, metadata={"note": "n"})
    name, *options = command
    source, out = home if form == "folder" else home / "*.safetensors", tmp_path / "out.safetensors"
    arguments = [source, *options] if name != "unset" else [source, "note"]
    done = run("meta", name, *arguments, "-o", out)
    assert done.code == 0, done.err
    assert out.is_file()
    file(home, "b.safetensors", metadata={"note": "n"})
    done = run("meta", name, *arguments, "-o", tmp_path / "other.safetensors")
    assert done.code == 2
    assert "2 inputs have no room in one output" in done.err
