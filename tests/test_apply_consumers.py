"""apply equals what the programs do: Diffusers' fuse_lora, LyCORIS' modules, PEFT's OFT, and merge before apply."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import lorasurgery
from lorasurgery.models import open_model
from lorasurgery.verbs.apply import ApplyOptions, apply, read_source
from tests.applied import LINEAR1, PROJ, QKV, SWAPPED, Added, Base, applied, numbers, read, stem
from tests.multiplied import save
from tests.oracle import raw
from tests.probes import base_weight

if TYPE_CHECKING:
    from pathlib import Path

    from tests.applied import Array

torch = pytest.importorskip("torch")

# Diffusers ----------------------------------------------------------------------------------------------------------------


def flux(channels: int = 8) -> Any:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=channels, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=20, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def unet() -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(8, 16, 16, 16), layers_per_block=2, norm_num_groups=4, cross_attention_dim=12, attention_head_dim=2,
        sample_size=8,
    )  # fmt: skip


def peft_lora(model: Any, names: list[str], *, dora: bool) -> dict[str, Any]:
    """Random factors of unequal ranks for layers of a model, as Diffusers saves them."""
    rng = torch.Generator().manual_seed(1)
    found = {}
    for i, name in enumerate(names):
        weight, rank = model.get_submodule(name).weight, 2 + i % 3
        ones = [1] * (weight.ndim - 2)
        found[f"{name}.lora_A.weight"] = torch.randn(rank, *weight.shape[1:], generator=rng) * 0.2
        found[f"{name}.lora_B.weight"] = torch.randn(len(weight), rank, *ones, generator=rng) * 0.2
        if dora:
            found[f"{name}.lora_magnitude_vector"] = 1.0 + torch.rand(len(weight), generator=rng)
    return found


FLUX = [
    "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_v", "transformer_blocks.0.attn.add_k_proj",
    "transformer_blocks.0.ff.net.2", "single_transformer_blocks.0.attn.to_k", "single_transformer_blocks.0.proj_mlp",
    "single_transformer_blocks.0.norm.linear", "norm_out.linear", "x_embedder",
]  # fmt: skip
UNET = [
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "up_blocks.2.attentions.1.transformer_blocks.0.ff.net.0.proj", "down_blocks.1.resnets.0.conv1",
    "down_blocks.1.attentions.0.proj_in", "up_blocks.3.resnets.2.conv_shortcut",
]  # fmt: skip


@pytest.mark.parametrize(("make", "names", "prefix"), [(flux, FLUX, "transformer"), (unet, UNET, "unet")])
@pytest.mark.parametrize("dora", [False, True])
def test_apply_equals_diffusers_fuse_lora(tmp_path: Path, make: Any, names: list[str], prefix: str, dora: bool) -> None:
    from safetensors.torch import save_file

    if dora and make is unet:
        names = [name for name in names if "conv" not in name and "proj_in" not in name]
    model = make()
    model.save_pretrained(tmp_path / prefix)
    (tmp_path / "model_index.json").write_text("{}")
    state = peft_lora(model, names, dora=dora)
    save_file({f"{prefix}.{key}": value for key, value in state.items()}, tmp_path / "lora.safetensors")
    model.load_lora_adapter(dict(state), prefix=None)
    model.fuse_lora(lora_scale=0.7)
    model.unload_lora()
    opened = open_model(tmp_path)
    source = read_source(tmp_path / "lora.safetensors", opened.architecture, 0.7)
    report = apply(opened, [source], tmp_path.with_name(tmp_path.name + "_out"), ApplyOptions(dora="peft"))
    assert report.unmatched == []
    assert report.modules == len(names)
    ours = type(model).from_pretrained(tmp_path.with_name(tmp_path.name + "_out") / prefix)
    fused = model.state_dict()
    assert set(fused) == set(ours.state_dict())
    for key, value in ours.state_dict().items():
        assert torch.allclose(value, fused[key], rtol=0, atol=2e-6), key
    untouched = make().state_dict()
    changed = {
        key.removesuffix(".weight") for key, value in ours.state_dict().items() if not torch.equal(value, untouched[key])
    }
    assert changed == set(names)


def test_a_wider_input_layer_is_what_diffusers_makes_and_loads(tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel
    from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin
    from safetensors.torch import save_file

    model = flux(64)
    model.save_pretrained(tmp_path / "model" / "transformer")
    (tmp_path / "model" / "model_index.json").write_text("{}")
    rng = torch.Generator().manual_seed(1)
    shapes = {"x_embedder": (32, 128), "context_embedder": (32, 24)}
    state = {}
    for name, (out, columns) in shapes.items():
        state[f"transformer.{name}.lora_A.weight"] = torch.randn(4, columns, generator=rng) * 0.2
        state[f"transformer.{name}.lora_B.weight"] = torch.randn(out, 4, generator=rng) * 0.2
    save_file(state, tmp_path / "lora.safetensors")
    opened = open_model(tmp_path / "model")
    apply(opened, [read_source(tmp_path / "lora.safetensors", opened.architecture)], tmp_path / "out", ApplyOptions())
    ours = FluxTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer")
    assert (ours.config.in_channels, ours.config.out_channels) == (128, 64)
    FluxLoraLoaderMixin._maybe_expand_transformer_param_shape_or_error_(model, lora_state_dict=state, prefix="transformer")
    model.load_lora_adapter({key.removeprefix("transformer."): own for key, own in state.items()}, prefix=None)
    model.fuse_lora()
    model.unload_lora()
    fused = model.state_dict()
    for key, value in ours.state_dict().items():
        assert torch.allclose(value, fused[key], rtol=0, atol=2e-6), key


# LyCORIS ------------------------------------------------------------------------------------------------------------------


def lycoris_module(kind: str, weight: Array) -> Any:
    """A LyCORIS module over a linear layer with this weight, its parameters random."""
    from lycoris.modules import boft, diag_oft, glora, ia3, locon, loha, lokr

    out, inputs, *kernel = weight.shape
    layer = torch.nn.Conv2d(inputs, out, kernel) if kernel else torch.nn.Linear(inputs, out)
    layer.weight.data = torch.from_numpy(weight).float()
    # LoHa's and LoKr's get_merged_weight multiply by alpha / rank twice (4.1): they are right where that is 1.
    more: dict[str, Any] = {"lora_dim": 4, "alpha": 4.0 if kind.startswith(("loha", "lokr")) else 2.0}
    made = {
        "locon": lambda: locon.LoConModule("m", layer, **more),
        "loha": lambda: loha.LohaModule("m", layer, **more),
        "lokr": lambda: lokr.LokrModule("m", layer, factor=4, **more),
        "dora": lambda: locon.LoConModule("m", layer, weight_decompose=True, wd_on_out=True, **more),
        "dora in": lambda: locon.LoConModule("m", layer, weight_decompose=True, wd_on_out=False, **more),
        "loha dora": lambda: loha.LohaModule("m", layer, weight_decompose=True, wd_on_out=True, **more),
        "oft": lambda: diag_oft.DiagOFTModule("m", layer, lora_dim=4, constraint=0.002, rescaled=True),
        "oft free": lambda: diag_oft.DiagOFTModule("m", layer, lora_dim=4),
        "boft": lambda: boft.ButterflyOFTModule("m", layer, lora_dim=10 if kernel else 8, rescaled=True),
        "glora": lambda: glora.GLoRAModule("m", layer, **more),
        "ia3": lambda: ia3.IA3Module("m", layer),
        "ia3 in": lambda: ia3.IA3Module("m", layer, train_on_input=True),
    }[kind]()
    rng = torch.Generator().manual_seed(3)
    for name, parameter in made.named_parameters():
        if not name.startswith("org"):
            noise = torch.randn(parameter.shape, generator=rng) * 0.2
            parameter.data = noise + (parameter.data if name in {"rescale", "dora_scale"} else 0.0)
    return made


def lycoris_file(module: Any, name: str, strength: float) -> tuple[Array, Added]:
    """The weight that a module makes, and its file."""
    with torch.no_grad():
        merged = module.get_merged_weight(strength)[0].double().numpy()
        state = module.custom_state_dict() or module.state_dict()
    adapter = Added("F32")
    for key, value in state.items():
        if not key.startswith(("org", "scalar")):
            integer = value.dtype in (torch.int64, torch.int32)
            adapter.tensors[f"{stem(name)}.{key}"] = raw(value.detach().double().numpy(), "I64" if integer else "F32")
    return merged, adapter


MLP = "double_blocks.0.img_mlp.0"
KINDS = ("locon", "loha", "lokr", "dora", "dora in", "loha dora", "oft", "oft free", "boft", "glora", "ia3", "ia3 in")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_apply_equals_lycoris(tmp_path: Path, kind: str, strength: float) -> None:
    pytest.importorskip("lycoris")
    if "dora" in kind and strength != 1.0:
        pytest.skip("LyCORIS' multiplier of a DoRA is another one: it keeps the low-rank part whole")
    base = Base.make("F32")
    name = MLP if kind == "boft" else QKV
    module = lycoris_module(kind, base.weights[name])
    theirs, adapter = lycoris_file(module, name, strength)
    if f"{stem(name)}.alpha" not in adapter.tensors and hasattr(module, "alpha"):
        adapter.number(f"{stem(name)}.alpha", float(module.alpha))
    path, report = applied(
        tmp_path, base.save(tmp_path / "m.safetensors"), (adapter, strength), verify=True, prefer_lycoris=True
    )
    assert report.unmatched == []
    ours = numbers(read(path)[f"{name}.weight"])
    assert np.abs(ours - base.weights[name]).max() > 0.01
    assert len(report.verified) == 1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-6)
    assert sum(own.wrong for own in report.verified) == 0
    assert all(own.difference < 1e-5 for own in report.lycoris)
    if kind not in {"glora", "ia3", "ia3 in"} and not (kind.startswith("oft") and strength != 1.0):
        assert len(report.lycoris) == 1


@pytest.mark.parametrize("kind", ["oft", "oft free", "boft", "glora", "ia3", "ia3 in"])
@pytest.mark.parametrize("strength", [0.6, -0.3])
def test_apply_equals_lycoris_on_convolutions(tmp_path: Path, kind: str, strength: float) -> None:
    pytest.importorskip("lycoris")
    name = "down_blocks.0.resnets.0.conv1"
    weight = base_weight(name, (40, 20, 3, 3))
    module = lycoris_module(kind, weight)
    theirs, adapter = lycoris_file(module, name, strength)
    opened = open_model(save(tmp_path / "m.safetensors", {f"{name}.weight": weight}), arch="sd1")
    source = read_source(adapter.save(tmp_path / "a.safetensors"), opened.architecture, strength)
    report = apply(opened, [source], tmp_path / "o.safetensors", ApplyOptions(verify=True, prefer_lycoris=True))
    ours = numbers(read(tmp_path / "o.safetensors")[f"{name}.weight"])
    assert np.abs(ours - weight).max() > 0.01
    np.testing.assert_allclose(ours, theirs.reshape(ours.shape), rtol=0, atol=3e-6)
    assert [own.wrong for own in report.verified] == [0]
    assert all(own.difference < 1e-5 for own in report.lycoris)


@pytest.mark.parametrize("neumann", [True, False])
def test_apply_equals_pefts_oft(tmp_path: Path, neumann: bool) -> None:
    peft = pytest.importorskip("peft")
    base = Base.make("F32")
    model = torch.nn.ModuleDict({"double_blocks": torch.nn.ModuleList([torch.nn.ModuleDict({"img_attn": torch.nn.Module()})])})
    layer = torch.nn.Linear(24, 72, bias=False)
    layer.weight.data = torch.from_numpy(base.weights[QKV]).float()
    model["double_blocks"][0]["img_attn"].qkv = layer
    config = peft.OFTConfig(r=0, oft_block_size=6, target_modules=["qkv"], use_cayley_neumann=neumann)
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "oft_R" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1
    wrapped.save_pretrained(tmp_path / "adapter")
    merged = wrapped.merge_and_unload()["double_blocks"][0]["img_attn"].qkv.weight.detach().double().numpy()
    opened = open_model(base.save(tmp_path / "m.safetensors"))
    source = read_source(tmp_path / "adapter", opened.architecture)
    apply(opened, [source], tmp_path / "o.safetensors")
    ours = numbers(read(tmp_path / "o.safetensors")[f"{QKV}.weight"])
    assert np.abs(ours - base.weights[QKV]).max() > 0.1
    np.testing.assert_allclose(ours, merged, rtol=0, atol=3e-6)


# merge --------------------------------------------------------------------------------------------------------------------


def test_merge_then_apply_equals_apply_one_after_the_other(tmp_path: Path) -> None:
    from lorasurgery.verbs.merge import MergeOptions, Source, Weight, merge

    base, first, second = Base.make("F32"), Added("BF16", seed=1), Added("F16", seed=2)
    for name in (QKV, PROJ, LINEAR1, SWAPPED):
        first.lora(stem(name), base.weights[name].shape, 3, 1.7)
    second.lora(stem(QKV), (72, 24), 5, 2.0)
    second.lora(stem(PROJ), (24, 24), 2, None)
    path = base.save(tmp_path / "m.safetensors")
    one, _ = applied(tmp_path, path, (first, 0.8), (second, -0.4))
    one = one.rename(tmp_path / "one.safetensors")
    arch = open_model(path).architecture
    files = [own.save(tmp_path / f"{i}.safetensors") for i, own in enumerate((first, second))]
    sources = [Source(read_source(f, arch).adapter, Weight(w), f.name) for f, w in zip(files, (0.8, -0.4), strict=True)]
    merged, _ = merge(sources, MergeOptions(dtype="fp32"))
    from lorasurgery.operations.conversion.convert import Options, convert

    merged, report = convert(merged, "sd-scripts", Options(dtype="fp32"))
    lorasurgery.save(merged, tmp_path / "merged.safetensors", report=report)
    opened = open_model(path)
    apply(opened, [read_source(tmp_path / "merged.safetensors", opened.architecture)], tmp_path / "two.safetensors")
    a, b = read(one), read(tmp_path / "two.safetensors")
    assert set(a) == set(b)
    for key in a:
        np.testing.assert_allclose(numbers(a[key]), numbers(b[key]), rtol=0, atol=1e-6)
