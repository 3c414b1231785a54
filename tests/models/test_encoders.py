"""Text encoders in pipelines and all-in-one checkpoints, under Hugging Face's and OpenCLIP's names."""

import numpy as np
import pytest
import torch

from lorasurgery.architectures.table import Span
from lorasurgery.errors import RequestError
from lorasurgery.models import open_model
from lorasurgery.verbs.apply import ApplyOptions, apply, read_source
from tests.models.small import built, original_arrays, save

WIDTH, LAYERS = 16, 2
OPEN_CLIP = {"self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "layer_norm1": "ln_1",
             "layer_norm2": "ln_2"}  # fmt: skip


def encoder(seed):
    """A small CLIP text encoder of transformers with random weights."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=2, vocab_size=50,
        max_position_embeddings=10, projection_dim=12, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = CLIPTextModelWithProjection(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def arrays_of(model):
    """Its parameters with ``text_model.``, which some versions of transformers leave out."""
    found = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    return {n if n.startswith("text_") else f"text_model.{n}": v for n, v in found.items()}


def open_clip(arrays):
    """The same under OpenCLIP's names: q, k and v are one, the projection is transposed."""
    found = {}
    for i in range(LAYERS):
        here, there = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
        for end in ("weight", "bias"):
            parts = [arrays[f"{here}.self_attn.{p}_proj.{end}"] for p in "qkv"]
            found[f"{there}.attn.in_proj_{end}"] = np.concatenate(parts)
            found |= {f"{there}.{theirs}.{end}": arrays[f"{here}.{ours}.{end}"] for ours, theirs in OPEN_CLIP.items()}
    found |= {f"ln_final.{end}": arrays[f"text_model.final_layer_norm.{end}"] for end in ("weight", "bias")}
    found["token_embedding.weight"] = arrays["text_model.embeddings.token_embedding.weight"]
    found["positional_embedding"] = arrays["text_model.embeddings.position_embedding.weight"]
    return found | {"text_projection": arrays["text_projection.weight"].T.copy(), "logit_scale": np.float32(2.0)}


def all_in_one(path, first, second):
    unet = {f"model.diffusion_model.{n}": v for n, v in original_arrays("sdxl").items()}
    one = {f"conditioner.embedders.0.transformer.{n}": v for n, v in first.items() if "projection" not in n}
    two = {f"conditioner.embedders.1.model.{n}": v for n, v in open_clip(second).items()}
    return save(path, unet | one | two | {"first_stage_model.decoder.conv_in.weight": np.ones((2, 2, 3, 3))})


def pipeline(path, first, second):
    built("sdxl").save_pretrained(path / "unet")
    first.save_pretrained(path / "text_encoder")
    second.save_pretrained(path / "text_encoder_2")
    save(path / "vae" / "diffusion_pytorch_model.safetensors", {"decoder.conv_in.weight": np.ones((2, 2, 3, 3))})
    (path / "model_index.json").write_text("{}")
    save(path / "sd_xl_base_1.0.safetensors", {"nothing": np.ones(1)})
    return path


def comfyui(path, first, second):
    unet = {f"model.diffusion_model.{n}": v for n, v in original_arrays("sdxl").items()}
    both = {f"text_encoders.clip_{c}.transformer.{n}": v for c, own in (("l", first), ("g", second)) for n, v in own.items()}
    return save(path, unet | both)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    first, second = encoder(1), encoder(2)
    own = {"clip_l": arrays_of(first), "clip_g": arrays_of(second)}
    both = own["clip_l"], own["clip_g"]
    paths = {
        "all-in-one": all_in_one(folder / "sdxl.safetensors", *both),
        "diffusers": pipeline(folder / "sdxl", first, second),
        "ComfyUI's all-in-one": comfyui(folder / "comfyui.safetensors", *both),
    }
    return own, {name: open_model(path) for name, path in paths.items()}


@pytest.mark.parametrize("layout", ["all-in-one", "diffusers", "ComfyUI's all-in-one"])
def test_encoders_are_read_in_every_layout(models, layout):
    own, found = models
    model = found[layout]
    assert model.architecture.id == "sdxl"
    assert layout.endswith(model.layout)
    for component, arrays in own.items():
        for name, values in arrays.items():
            module, _, end = name.rpartition(".")
            if "projection" in name and component != "clip_g":  # in no other encoder's file
                continue
            span = (Span(module, 0, len(values)),)
            reader = model.bias_reader(component, span) if end == "bias" else model.reader(component, span)
            assert np.array_equal(reader.array(), values), name


def test_roles(models):
    _, found = models
    weights = found["all-in-one"].weights
    two = "conditioner.embedders.1.model."
    assert weights[f"{two}transformer.resblocks.0.attn.in_proj_bias"].role == "bias"
    assert weights[f"{two}transformer.resblocks.0.ln_1.weight"].role == "norm"
    assert [s.weight.rsplit(".", 1)[1] for s in weights[f"{two}transformer.resblocks.1.attn.in_proj_weight"].place.spans] == [
        "q_proj", "k_proj", "v_proj",
    ]  # fmt: skip
    projection = weights[f"{two}text_projection"]
    assert (projection.role, projection.place.spans) == ("turned", (Span("text_projection", 0, 12),))
    for name in (f"{two}logit_scale", "first_stage_model.decoder.conv_in.weight"):
        assert (weights[name].role, weights[name].place) == ("other", None)
    assert found["diffusers"].weights["vae.decoder.conv_in.weight"].place is None
    assert found["diffusers"].weights["text_encoder_2.text_projection.weight"].place.component == "clip_g"


@pytest.mark.parametrize("family", ["lora", "full", "dora"])
def test_a_projection_that_is_stored_turned_over_is_changed(tmp_path, family):
    """OpenCLIP has it as (in, out): the change comes turned over, too; a DoRA, whose rows those are not, is not used."""
    rng = np.random.default_rng(3)
    side, prefix, stem = 1280, "conditioner.embedders.1.model.", "lora_te2_text_projection"
    base = {f"model.diffusion_model.{n}": v for n, v in original_arrays("sdxl").items()}
    base[f"{prefix}text_projection"] = rng.standard_normal((side, side)).astype("f4")
    base[f"{prefix}ln_final.weight"] = np.ones(side, "f4")
    model = save(tmp_path / "model.safetensors", base)
    up, down = (rng.standard_normal(shape).astype("f4") for shape in ((side, 2), (2, side)))
    adapter = {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down, f"{stem}.alpha": np.array(1.0, "f4")}
    change = up.astype("f8") @ down.astype("f8") / 2
    if family == "full":
        adapter = {f"{stem}.diff": change.astype("f4")}
    elif family == "dora":
        adapter[f"{stem}.dora_scale"] = np.ones((side, 1), "f4")
    path, opened, out = save(tmp_path / "adapter.safetensors", adapter), open_model(model), tmp_path / "out.safetensors"
    sources, options = [read_source(path, opened.architecture, 0.5)], ApplyOptions(fork=False)
    if family == "dora":
        with pytest.raises(RequestError, match="turned over"):
            apply(opened, sources, out, options)
        return
    assert not apply(opened, sources, out, options).unmatched
    before, after = (open_model(file).weights[f"{prefix}text_projection"].array() for file in (model, out))
    assert np.allclose(after, before + 0.5 * change.T, rtol=0, atol=1e-5)


def test_both_experts_of_wan_have_a_component_of_their_own(tmp_path):
    for folder, add in (("transformer", 0.0), ("transformer_2", 1.0)):
        arrays = {n: p.detach().numpy() + add for n, p in built("wan-2.1-t2v-1.3b").named_parameters()}
        save(tmp_path / folder / "diffusion_pytorch_model.safetensors", arrays)
    model = open_model(tmp_path)
    spans = (Span("blocks.0.self_attn.q", 0, 24),)
    high, low = (model.reader(component, spans).array() for component in ("denoiser", "denoiser_2"))
    assert np.array_equal(high + np.float32(1), low)
