"""Every layout of a model gives the same rows of the same original weights, bit for bit."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lorasurgery.architectures import architectures
from lorasurgery.architectures.from_base import NEARLY, closest
from lorasurgery.architectures.table import Span
from lorasurgery.errors import FileFormatError, RequestError
from lorasurgery.models import Model, open_model
from tests.models.small import CONFIGS, built, diffusers_arrays, original_arrays, place_of, save
from tests.oracle import model as reference
from tests.oracle import raw

LAYOUTS = (
    ("original", "", "original"),
    ("original", "model.diffusion_model.", "comfyui"),
    ("original", "diffusion_model.", "comfyui"),
    ("original", "net.", "original"),
    ("diffusers", "", "diffusers"),
    ("diffusers", "transformer.", "diffusers"),
)


def places(key):
    """(spans, weight, bias or None) of every module, by original and by Diffusers' names, from the reference."""
    original, own = original_arrays(key), diffusers_arrays(key)
    for name, values in original.items():
        if name.endswith(".weight"):
            module = name.removesuffix(".weight")
            yield ((module, 0, len(values)),), values, original.get(f"{module}.bias")
    for module, place in reference(key).diffusers.items():
        if len(place) == 1 and f"{module}.weight" in own and place[0].count == reference(key).shapes[place[0].weight][0]:
            rows = own[f"{module}.weight"]
            yield ((place[0].weight, 0, len(rows)),), rows, own.get(f"{module}.bias")


def spans_of(spans):
    return tuple(Span(*one) for one in spans)


def same(found, expected):
    return found.shape == expected.shape and np.array_equal(found.array(), expected)


@pytest.mark.parametrize("key", CONFIGS)
def test_every_layout_holds_the_same_weights(key, tmp_path):
    models: list[Model] = []
    for names, prefix, layout in LAYOUTS:
        arrays = original_arrays(key) if names == "original" else diffusers_arrays(key)
        found = open_model(save(tmp_path / f"{len(models)}.safetensors", arrays, prefix=prefix))
        assert found.architecture.id == architectures()[key].id
        assert found.layout == layout or (key == "qwen-image" and names == "diffusers")  # one naming
        models.append(found)
    folder = tmp_path / "saved"
    built(key).save_pretrained(folder)
    models.append(open_model(folder))
    assert models[-1].layout == "diffusers"
    for spans, weight, bias in places(key):
        for found in models:
            assert same(found.reader("denoiser", spans_of(spans)), weight), (found.path, spans)
            own = found.bias_reader("denoiser", spans_of(spans))
            assert (own is None) == (bias is None)
            assert own is None or same(own, bias)


@pytest.mark.parametrize("key", CONFIGS)
def test_every_site_of_one_layout_is_read_from_the_other(key, tmp_path):
    """Slices, exchanged halves and norms too: what each file divides its weights into, the other puts together."""
    first = open_model(save(tmp_path / "a.safetensors", original_arrays(key)))
    second = open_model(save(tmp_path / "b.safetensors", diffusers_arrays(key)))
    own, known = diffusers_arrays(key), 0
    for name, weight in second.weights.items():
        if weight.place is None or not weight.listed:
            continue
        if weight.role == "norm":
            assert same(second.reader(*weight.place), own[name])
            continue
        read = first.bias_reader if weight.role == "bias" else first.reader
        if weight.role == "bias" and f"{name.removesuffix('.bias')}.weight" in own and read(*weight.place) is None:
            assert own[f"{name.removesuffix('.bias')}.weight"].ndim == 1  # of a norm, which the reference does not list
            continue
        assert same(read(*weight.place), own[name]), name
        known += 1
    assert known >= len(original_arrays(key))
    for component, spans in first.sites():
        assert np.array_equal(second.reader(component, spans).rows(), first.reader(component, spans).rows())


def test_what_the_tables_do_not_know_has_no_place(tmp_path):
    arrays = original_arrays("sd1")
    vae = {"first_stage_model.encoder.conv_in.weight": np.ones((4, 3, 3, 3)), "first_stage_model.quant_conv.bias": np.ones(4)}
    whole = {f"model.diffusion_model.{name}": values for name, values in arrays.items()} | vae
    found = open_model(save(tmp_path / "a.safetensors", whole | {"model_ema.num_updates": np.array(3.0)}))
    assert found.layout == "all-in-one"
    for name in (*vae, "model_ema.num_updates"):
        assert (found.weights[name].place, found.weights[name].role) == (None, "other")
    assert list(found.weights) == [*whole, "model_ema.num_updates"]
    assert np.array_equal(found.weights["first_stage_model.encoder.conv_in.weight"].array(), np.ones((4, 3, 3, 3)))
    assert found.weights["model_ema.num_updates"].array() == 3.0


def test_norms_have_places_in_both_namings(tmp_path):
    pairs = {
        "double_blocks.0.img_attn.norm.query_norm.scale": "transformer_blocks.0.attn.norm_q.weight",
        "double_blocks.1.txt_attn.norm.key_norm.scale": "transformer_blocks.1.attn.norm_added_k.weight",
        "single_blocks.0.norm.key_norm.scale": "single_transformer_blocks.0.attn.norm_k.weight",
    }
    own = diffusers_arrays("flux1-dev")
    norms = {name: own[other] for name, other in pairs.items()}
    first = open_model(save(tmp_path / "a.safetensors", original_arrays("flux1-dev") | norms))
    second = open_model(save(tmp_path / "b.safetensors", own))
    for name, other in pairs.items():
        assert first.weights[name].role == second.weights[other].role == "norm"
        assert first.weights[name].place == second.weights[other].place
        assert np.array_equal(second.reader(*place_of(first, name)).array(), norms[name])


def test_group_norms_have_biases(tmp_path):
    own = diffusers_arrays("sd1")
    found = open_model(save(tmp_path / "a.safetensors", own))
    weight, bias = (found.weights[f"down_blocks.0.resnets.0.norm1.{end}"] for end in ("weight", "bias"))
    assert (weight.role, bias.role, weight.place) == ("norm", "bias", bias.place)
    place = place_of(found, "down_blocks.0.resnets.0.norm1.weight")
    assert place.spans == spans_of([("input_blocks.1.0.in_layers.0", 0, 8)])
    assert same(found.bias_reader(*place), own["down_blocks.0.resnets.0.norm1.bias"])


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_values_come_as_they_are_stored(dtype, tmp_path):
    arrays = {k: v / 3 for k, v in original_arrays("z-image").items()}
    found = open_model(save(tmp_path / "a.safetensors", arrays, dtype))
    for name, values in arrays.items():
        weight, stored = found.weights[name], raw(values, dtype).f64()
        assert weight.array().dtype == (np.float64 if dtype == "F64" else np.float32)
        assert np.array_equal(weight.array(), stored)
        assert found.reader(*place_of(found, name)).dtype == dtype or weight.role == "bias"
        if weight.shape[0] > 5:
            assert np.array_equal(weight.rows(2, 5), stored[2:5].reshape(3, -1))


def test_rows_are_read_in_any_pieces_and_from_several_threads(tmp_path):
    found = open_model(save(tmp_path / "a.safetensors", diffusers_arrays("flux1-dev")))
    spans = spans_of([("single_blocks.0.linear1", 5, 90), ("single_blocks.0.linear1", 0, 3), ("img_in", 0, 16)])
    with pytest.raises(FileFormatError, match=r"widths \[4, 16\]"):
        found.reader("denoiser", spans)
    reader = found.reader("denoiser", spans[:2])
    whole = original_arrays("flux1-dev")["single_blocks.0.linear1.weight"]
    expected = np.concatenate([whole[5:90], whole[:3]])
    assert np.array_equal(reader.array(), expected)
    assert reader.rows(3, 3).shape == (0, 16)
    with ThreadPoolExecutor(8) as pool:
        for start, rows in pool.map(lambda at: (at, reader.rows(at, at + 7)), range(0, 80, 3)):
            assert np.array_equal(rows, expected[start : start + 7])
    blocks = list(reader.chunks(size=1000))
    assert [at for at, _ in blocks] == list(range(0, 88, 15))
    assert np.array_equal(np.concatenate([rows for _, rows in blocks]), expected)


def test_rows_that_nobody_holds_are_named(tmp_path):
    arrays = diffusers_arrays("flux1-dev")
    kept = {k: v for k, v in arrays.items() if "single_transformer_blocks.1.attn.to_v" not in k}
    found = open_model(
        save(tmp_path / "a.safetensors", kept), arch=open_model(save(tmp_path / "b.safetensors", arrays)).architecture
    )
    with pytest.raises(RequestError, match=r"no rows 32:48 of denoiser single_blocks\.1\.linear1"):
        found.reader("denoiser", spans_of([("single_blocks.1.linear1", 0, 112)]))
    with pytest.raises(RequestError, match=r"no biases 32:48 of denoiser single_blocks\.1\.linear1"):
        found.bias_reader("denoiser", spans_of([("single_blocks.1.linear1", 0, 112)]))


def test_a_model_without_a_table_keeps_its_names(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        f"weird.{i}.{name}": rng.standard_normal(shape).astype(np.float32)
        for i in range(3)
        for name, shape in (("proj.weight", (6, 4)), ("proj.bias", (6,)), ("ln.weight", (4,)), ("ln.bias", (4,)),
                            ("conv.weight", (5, 4, 3, 3)), ("gate", (4,)))
    }  # fmt: skip
    first = open_model(save(tmp_path / "a.safetensors", arrays))
    second = open_model(
        save(tmp_path / "b.safetensors", {k: v + 1 for k, v in arrays.items()}, prefix="model.diffusion_model.")
    )
    assert (first.architecture.id, first.layout, second.layout) == ("custom", "unknown", "comfyui")
    assert set(first.sites()) == set(second.sites())
    assert len(set(first.sites())) == len(list(first.sites())) == 9
    for name, weight in first.weights.items():
        assert weight.role == {"bias": "bias", "gate": "parameter"}.get(
            name.rsplit(".")[-1], "norm" if ".ln." in name else "weight"
        )
        if weight.place is not None:
            read = second.bias_reader if weight.role == "bias" else second.reader
            assert same(read(*weight.place), arrays[name] + 1)


def test_an_architecture_can_be_named(tmp_path):
    path = save(tmp_path / "a.safetensors", original_arrays("z-image"))
    assert open_model(path, arch="z-image").architecture.id == "z-image"
    with pytest.raises(RequestError, match="less than half"):
        open_model(path, arch="flux1")
    as_it_is = open_model(path, arch=architectures()["z-image"])
    placed = {name for name, weight in as_it_is.weights.items() if weight.place is not None}
    assert placed == {"t_embedder.mlp.0.weight", "t_embedder.mlp.0.bias"}  # the others have 48 rows where 3840 belong
    with pytest.raises(RequestError, match="no architecture is called"):
        open_model(path, arch="flux9")


@pytest.mark.parametrize("naming", ["original", "diffusers"])
def test_every_table_is_found_by_its_own_names_at_any_size(naming):
    tables = architectures()
    for arch in tables.values():
        names = arch.namings[naming]
        if not names:
            continue
        full = {name: arch.module_shape(spans) for name, spans in names.items()}
        half = {name: (shape[0] // 2, *shape[1:]) for name, shape in full.items()}
        whole, halved = (closest(shapes, tables.values(), NEARLY) for shapes in (full, half))
        assert whole is not None
        assert halved is not None
        assert whole[0] is arch
        assert halved[0].id == arch.id
        assert halved[1] == naming or arch.namings["original"] == arch.namings["diffusers"]


def test_parts_of_another_share_than_the_tables_are_not_guessed(tmp_path):
    """Lumina 2 has a third as many keys as queries, this one half as many; only Diffusers' file says where each part ends."""
    name = "layers.0.attention.qkv"
    fused, split = (
        open_model(save(tmp_path / f"{i}.safetensors", arrays)).architecture
        for i, arrays in enumerate((original_arrays("lumina2"), diffusers_arrays("lumina2")))
    )
    assert fused.shapes[name] == split.shapes[name] == (96, 48)
    assert split.namings["diffusers"]["layers.0.attn.to_k"] == spans_of([(name, 48, 72)])
    assert "layers.0.attn.to_k" not in fused.namings["diffusers"]


@pytest.mark.parametrize("first", ["weight", "scale"])
def test_a_scale_beside_a_weight_is_no_norm(tmp_path, first):
    own = {"weight": np.ones((6, 4)), "scale": np.full(6, 2.0)}
    names = [first, *(name for name in own if name != first)]
    found = open_model(save(tmp_path / "a.safetensors", {f"proj.{name}": own[name] for name in names}))
    assert found.architecture.shapes == {"proj": (6, 4)}
    assert found.weights["proj.scale"].place is None
    assert same(found.reader("denoiser", spans_of([("proj", 0, 6)])), own["weight"])
