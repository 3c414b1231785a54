"""The parameters of a model by their own names, however its files hold them."""

import json

import numpy as np
import pytest

from lorasurgery.models import open_model, parameters
from tests.models.small import built, diffusers_arrays, original_arrays, save, save_gguf
from tests.oracle import Raw, raw, write

KEY = "wan-2.1-t2v-1.3b"
BARE = {"blocks.0.modulation": np.ones((1, 6, 8)), "head.modulation": np.ones((1, 2, 8)), "extra.proj.weight": np.ones((4, 3)),
        "extra.proj.bias": np.ones(4), "extra.norm.weight": np.ones(3), "extra.token": np.ones(5)}  # fmt: skip


def named():
    return original_arrays(KEY) | BARE


def shapes(arrays):
    return {name: values.shape for name, values in arrays.items()}


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_a_file(prefix, tmp_path):
    beside = {} if not prefix.startswith("model.") else {"first_stage_model.decoder.conv_in.weight": np.ones((2, 2, 3, 3))}
    tensors = {prefix + name: values for name, values in named().items()}
    model = open_model(save(tmp_path / "a.safetensors", tensors | beside))
    assert model.architecture.id == "wan"
    assert dict(parameters(model)) == shapes(named())


def test_shards(tmp_path):
    names = list(named())
    where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save(tmp_path / file, {name: named()[name] for name in names if where[name] == file})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        assert dict(parameters(open_model(path))) == shapes(named())


@pytest.mark.parametrize("whole", [False, True])
def test_a_folder_of_diffusers_has_its_own_names(whole, tmp_path):
    model = built(KEY)
    model.save_pretrained(tmp_path / "transformer" if whole else tmp_path)
    if whole:
        (tmp_path / "model_index.json").write_text("{}")
        save(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", {"decoder.conv_in.weight": np.ones((2, 2, 3, 3))})
    found = parameters(open_model(tmp_path))
    assert dict(found) == {name: tuple(own.shape) for name, own in model.named_parameters()}
    assert set(found) > set(diffusers_arrays(KEY)) - {"patch_embedding.weight"}


def test_gguf(tmp_path):
    arrays = {name: values.astype(np.float32) for name, values in named().items() if values.ndim < 5}
    assert dict(parameters(open_model(save_gguf(tmp_path / "a.gguf", arrays)))) == shapes(arrays)


def test_scales_of_fp8_and_integers_are_none(tmp_path):
    tensors = {name: raw(values, "BF16") for name, values in named().items()}
    weight = "blocks.0.self_attn.q.weight"
    tensors[weight] = Raw("F8_E4M3", tensors[weight].shape, bytes(np.prod(tensors[weight].shape)))
    stem = weight.removesuffix(".weight")
    more = {
        f"{stem}.scale_weight": raw(2.0, "F32"), f"{stem}.input_scale": raw(1.0, "F32"),
        "scaled_fp8": raw(np.zeros(2), "F16"), "position_ids": Raw("I64", (1,), bytes(8)),
    }  # fmt: skip
    write(tmp_path / "a.safetensors", tensors | more)
    model = open_model(tmp_path / "a.safetensors")
    assert dict(parameters(model)) == shapes(named())
    for name in more:
        assert model.weights[name].place is None


def test_what_no_table_has_is_read_under_its_own_name(tmp_path):
    from lorasurgery.architectures.table import Span

    model = open_model(save(tmp_path / "a.safetensors", {f"diffusion_model.{n}": v for n, v in named().items()}))
    for name, values in BARE.items():
        stem, _, end = name.rpartition(".")
        stem, rows = (stem if end in ("weight", "bias") else name), values.shape[0]
        reader = model.bias_reader if end == "bias" else model.reader
        found = reader("denoiser", (Span(stem, 0, rows),))
        assert found is not None
        assert np.array_equal(found.array(), values)
    own = {spans[0].weight for component, spans in model.sites() if component == "denoiser"}
    assert not own & {"extra.proj", "extra.token"}
