"""Files, shards, folders and pipelines; and what is wrong with them."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from lorasurgery.architectures.table import Span
from lorasurgery.errors import FileFormatError, RequestError
from lorasurgery.io.sources import FileSource
from lorasurgery.models import open_model
from tests.models.small import built, diffusers_arrays, original_arrays, save, save_gguf

KEY = "sd1"


def values(model):
    return {name: weight.array() for name, weight in model.weights.items()}


def assert_same(model, arrays):
    found = values(model)
    assert set(found) == set(arrays)
    assert all(np.array_equal(found[name], arrays[name]) for name in arrays)


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "unet"
    built(KEY).save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def test_shards_are_one_model(shards, tmp_path):
    index = shards / "diffusion_pytorch_model.safetensors.index.json"
    whole = open_model(save(tmp_path / "whole.safetensors", diffusers_arrays(KEY)))
    for path in (shards, index):
        model = open_model(path)
        assert_same(model, diffusers_arrays(KEY))
        assert len(model.files) > 2
        assert model.layout == "diffusers"
        assert model.content == whole.content
    index.unlink()
    assert_same(open_model(shards), diffusers_arrays(KEY))


def test_a_single_shard_is_refused(shards):
    first = min(shards.glob("*-00001-of-*.safetensors"))
    with pytest.raises(RequestError, match="shard 1 of"):
        open_model(first)


def test_a_missing_shard_is_named(shards):
    second = min(shards.glob("*-00002-of-*.safetensors"))
    second.unlink()
    with pytest.raises(
        FileFormatError, match=rf"the shard {second.name} is missing; \d+ of {len(diffusers_arrays(KEY))} weights"
    ):
        open_model(shards)
    next(shards.glob("*.index.json")).unlink()
    with pytest.raises(FileFormatError, match="shard 2 of 4 of diffusion_pytorch_model is missing"):
        open_model(shards)


def test_a_truncated_shard_is_named(shards):
    second = min(shards.glob("*-00002-of-*.safetensors"))
    second.write_bytes(second.read_bytes()[:-100])
    with pytest.raises(FileFormatError, match="truncated") as caught:
        open_model(shards)
    assert caught.value.path == str(second)


def changed(shards, change):
    index = next(shards.glob("*.index.json"))
    content = json.loads(index.read_text())
    change(content)
    index.write_text(json.dumps(content))
    return index


def test_an_index_that_names_keys_that_are_not_there(shards):
    changed(shards, lambda c: c["weight_map"].update({"conv_in.extra": c["weight_map"]["conv_in.weight"]}))
    with pytest.raises(FileFormatError, match=r"says that conv_in\.extra is in it"):
        open_model(shards)


@pytest.mark.parametrize("name", ["../unet.safetensors", "/etc/passwd", "..", "a\\b"])
def test_an_index_stays_in_its_folder(shards, name):
    index = changed(shards, lambda c: c["weight_map"].update({"conv_in.weight": name}))
    with pytest.raises(FileFormatError, match="not in this folder"):
        open_model(index)


@pytest.mark.parametrize(("text", "why"), [("{", "not JSON"), ("[]", "weight_map"), ('{"weight_map": {"a": 3}}', "weight_map")])
def test_a_broken_index(shards, text, why):
    index = next(shards.glob("*.index.json"))
    index.write_text(text)
    for path in (shards, index):
        with pytest.raises(FileFormatError, match=why):
            open_model(path)


def test_two_shards_with_one_key(shards):
    first, second, *_ = sorted(shards.glob("*.safetensors"))
    shutil.copy(first, second)
    next(shards.glob("*.index.json")).unlink()
    with pytest.raises(FileFormatError, match=f"is in {first.name} too"):
        open_model(shards)


def test_the_plain_file_is_preferred_to_its_variants(tmp_path):
    folder = tmp_path / "unet"
    arrays = diffusers_arrays(KEY)
    built(KEY).save_pretrained(folder, variant="fp16")
    assert len(open_model(folder).files) == 1
    built(KEY).save_pretrained(folder, variant="bf16", max_shard_size="200KB")
    with pytest.raises(RequestError, match="several models"):
        open_model(folder)
    save(folder / "diffusion_pytorch_model.safetensors", arrays)
    model = open_model(folder)
    assert [f.path.name for f in model.files] == ["diffusion_pytorch_model.safetensors"]
    save(folder / "other.safetensors", arrays)
    assert open_model(folder).files[0].path == model.files[0].path
    for name in ("mine.fp16", "mine"):
        save(tmp_path / "mine" / f"{name}.safetensors", arrays)
    assert open_model(tmp_path / "mine").files[0].path.name == "mine.safetensors"


def test_folders_that_are_no_model(tmp_path):
    with pytest.raises(RequestError, match="no model is in this folder"):
        open_model(tmp_path)
    for name in ("a", "b"):
        save(tmp_path / f"{name}.safetensors", original_arrays(KEY))
    with pytest.raises(RequestError, match=r"several models are in this folder \(a, b\)"):
        open_model(tmp_path)


def test_a_pickled_model_is_read_weights_only(tmp_path):
    torch.save(built(KEY).state_dict(), tmp_path / "model.ckpt")
    model = open_model(tmp_path / "model.ckpt")
    assert_same(model, diffusers_arrays(KEY))
    torch.save({"x": built(KEY)}, tmp_path / "evil.ckpt")
    with pytest.raises(FileFormatError, match="weights-only loader refuses"):
        open_model(tmp_path / "evil.ckpt")
    folder = tmp_path / "unet"
    built(KEY).save_pretrained(folder, safe_serialization=False)
    assert_same(open_model(folder), diffusers_arrays(KEY))


def test_files_that_are_something_else(tmp_path):
    for content, why in ((b"<html>", "an HTML page"), (b"", "empty"), (b"version https://git-lfs", "LFS pointer")):
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(FileFormatError, match=why):
            open_model(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError):
        open_model(tmp_path / "none.safetensors")


def test_original_names_beside_a_config_are_original(tmp_path):
    """Wan's own repositories have a config.json and shards named as Diffusers names them."""
    for key, layout in (("wan-2.1-t2v-1.3b", "original"), ("qwen-image", "diffusers")):
        path = save(tmp_path / key / "diffusion_pytorch_model.safetensors", original_arrays(key))
        assert open_model(path).layout == "original"
        (path.parent / "config.json").write_text("{}")
        assert open_model(path.parent).layout == open_model(path).layout == layout


@pytest.mark.parametrize("form", ["safetensors", "gguf"])
def test_only_the_rows_that_are_asked_for_are_read(tmp_path, monkeypatch, form):
    arrays = original_arrays("z-image")
    path = tmp_path / f"a.{form}"
    save(path, arrays, "F16") if form == "safetensors" else save_gguf(
        path, {k: v.astype(np.float16) for k, v in arrays.items()}
    )
    reads = []
    read = FileSource.read

    def counted(self, offset, length):
        reads.append(length)
        return read(self, offset, length)

    model = open_model(path)
    reader = model.reader("denoiser", (Span("layers.0.feed_forward.w1", 4, 90),))
    monkeypatch.setattr(FileSource, "read", counted)
    reader.rows(7, 10)
    assert reads == [3 * 48 * 2]
    reads.clear()
    for _ in reader.chunks(size=20 * 48 * 4):
        assert reads[-1] <= 20 * 48 * 2
    assert sum(reads) == 86 * 48 * 2


def test_opening_needs_neither_numpy_nor_torch(tmp_path):
    path = save(tmp_path / "a.safetensors", original_arrays("z-image"))
    code = (
        "import sys; from lorasurgery.models import open_model; m = open_model(sys.argv[1]); list(m.sites()); print(m.content)"
    )
    code += "; assert not {'numpy', 'torch', 'gguf'} & set(sys.modules)"
    assert len(subprocess.run([sys.executable, "-c", code, path], check=True, capture_output=True).stdout) == 65
