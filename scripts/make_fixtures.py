"""Write small adapters with the real PEFT, Diffusers and LyCORIS on real model classes, for the tests.

    python scripts/make_fixtures.py             every fixture
    python scripts/make_fixtures.py NAME ...    some of them (--list names them)

The models are full-sized but live on torch's meta device; only the modules an adapter goes on are materialised. Beside
each adapter stands its truth, ``NAME.truth.safetensors``: what the producer itself says it adds to every weight, as
``left.T @ delta @ right`` in float64 with fixed probes (tests/probes.py), so that the tests need not build the
producer's model again. Weights are random (nothing is zero), alpha differs from the rank, and a second run writes the
same values.

Needs the test extra. Versions that wrote what is in the repository: tests/fixtures/producers/README.md.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.probes import bilinear  # noqa: E402  the repository's root has to be on the path first

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

OUT = ROOT / "tests" / "fixtures" / "producers"
SAMPLE = ROOT / "tests" / "fixtures" / "samples" / "z_image_lokr.safetensors"
Truth = dict[str, torch.Tensor]
"""Module name as the file spells it -> what the producer adds to the weight, in float64; ``NAME|bias`` and
``NAME|magnitude`` for the other tensors a module may have."""

# models ----------------------------------------------------------------------------------------------------------------

SD15: dict[str, Any] = {
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
}
SDXL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
WAN_1_3B: dict[str, Any] = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}


def on_meta(name: str, **config: Any) -> torch.nn.Module:  # noqa: ANN401  whatever the model's configuration takes
    """A Diffusers or transformers model of full size without any memory."""
    with torch.device("meta"):
        if name.startswith("CLIP"):
            import transformers

            model: torch.nn.Module = getattr(transformers, name)(transformers.CLIPTextConfig(**config))
        else:
            import diffusers

            model = getattr(diffusers, name)(**config)
    return model


def real(model: torch.nn.Module, names: Iterable[str]) -> None:
    """Give the weights of these modules memory and values."""
    for name in names:
        module = model.get_submodule(name)
        if any(p.is_meta for p in module.parameters()):
            module.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_(0, 0.02)


ATTENTION = "down_blocks.0.attentions.0"
LINEAR = (
    f"{ATTENTION}.transformer_blocks.0.attn1.to_q",
    f"{ATTENTION}.transformer_blocks.0.attn2.to_k",
    f"{ATTENTION}.transformer_blocks.0.ff.net.0.proj",
)
CONV_1X1, CONV_3X3 = f"{ATTENTION}.proj_in", "down_blocks.0.resnets.0.conv1"
NORMS = (f"{ATTENTION}.transformer_blocks.0.norm1", "down_blocks.0.resnets.0.norm1")
CONVS = (*LINEAR, CONV_1X1, CONV_3X3)
CLIP_LAYERS = (
    "encoder.layers.0.self_attn.q_proj",
    "encoder.layers.0.self_attn.out_proj",  # by which Diffusers recognises what a converted text encoder's keys are
    "encoder.layers.11.mlp.fc1",
)

# PEFT ------------------------------------------------------------------------------------------------------------------


def peft_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Every adapter parameter PEFT put into the model."""
    words = ("lora_", "hada_", "lokr_", "ia3_", "miss_")
    return {n: p for n, p in model.named_parameters() if any(f".{w}" in n for w in words)}


def randomised(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Random values in every adapter parameter, representable in ``dtype``, in which they are kept."""
    for name, parameter in peft_parameters(model).items():
        if "magnitude" in name:
            parameter.data = parameter.data * (1 + 0.1 * torch.rand_like(parameter))
        else:
            parameter.data.normal_(0, 0.1)
        parameter.data = parameter.data.to(dtype)


def peft_truth(model: torch.nn.Module, prefix: str) -> Truth:
    """The deltas PEFT's own layers compute, from their values in float64."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for parameter in peft_parameters(model).values():
        parameter.data = parameter.data.double()
    truth: Truth = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer) or not hasattr(layer, "get_delta_weight"):
            continue
        stem = prefix + name.removeprefix("base_model.model.")
        truth[stem] = peft_delta(layer)
        up = getattr(layer, "lora_B", {})
        if "default" in up and up["default"].bias is not None:
            truth[f"{stem}|bias"] = up["default"].bias.detach() * layer.scaling["default"]
        magnitude = getattr(layer, "lora_magnitude_vector", {})
        if "default" in magnitude:
            truth[f"{stem}|magnitude"] = magnitude["default"].weight.detach().flatten()
    return truth


def peft_delta(layer: Any) -> torch.Tensor:  # noqa: ANN401  one of PEFT's layers
    """What a layer adds to its weight; MiSS only says what becomes of one."""
    delta: torch.Tensor
    if hasattr(layer, "get_delta_weight_miss"):
        base = layer.get_base_layer().weight
        delta = layer.get_delta_weight_miss("default", torch.zeros_like(base, dtype=torch.float64))
    else:
        delta = layer.get_delta_weight("default")
    return delta.detach()


def peft_folder(path: Path, config: Any, targets: Sequence[str] = CONVS) -> Truth:  # noqa: ANN401  any PeftConfig
    """An adapter on Stable Diffusion 1.5's UNet as ``save_pretrained`` writes it."""
    from peft import get_peft_model

    model = on_meta("UNet2DConditionModel", **SD15)
    real(model, targets)
    config.target_modules = list(targets)
    wrapped = get_peft_model(model, config)
    randomised(wrapped, torch.float32)
    wrapped.save_pretrained(path)
    (path / "README.md").unlink()
    return peft_truth(wrapped, "base_model.model.")


def peft_lora(path: Path) -> Truth:
    """Ranks and alphas of their own for some modules; one pattern is anchored."""
    from peft import LoraConfig

    patterns = {"attn2.to_k": 2, f"^{CONV_3X3}": 1}
    return peft_folder(path, LoraConfig(r=4, lora_alpha=6, rank_pattern=patterns, alpha_pattern={"attn2.to_k": 5, CONV_1X1: 1}))


def peft_dora(path: Path) -> Truth:
    """Magnitudes on linear layers and on a convolution."""
    from peft import LoraConfig

    return peft_folder(path, LoraConfig(r=2, lora_alpha=3, use_dora=True))


def peft_rslora(path: Path) -> Truth:
    """Scale alpha / sqrt(rank)."""
    from peft import LoraConfig

    return peft_folder(path, LoraConfig(r=3, lora_alpha=5, use_rslora=True, rank_pattern={CONV_1X1: 2}), CONVS)


def peft_lora_bias(path: Path) -> Truth:
    """A bias in every lora_B, scaled like the rest."""
    from peft import LoraConfig

    return peft_folder(path, LoraConfig(r=2, lora_alpha=6, lora_bias=True), (CONV_1X1, LINEAR[2], CONV_3X3))


def peft_raw(path: Path) -> Truth:
    """A raw state dict with the adapter's name in it; alpha is the rank, since such a file cannot say it."""
    from peft import LoraConfig, get_peft_model

    model = on_meta("UNet2DConditionModel", **SD15)
    real(model, CONVS)
    wrapped = get_peft_model(model, LoraConfig(r=2, lora_alpha=2, target_modules=list(CONVS)))
    randomised(wrapped, torch.float16)
    save_file({k: v.contiguous() for k, v in wrapped.state_dict().items() if ".lora_" in k}, path)
    return peft_truth(wrapped, "base_model.model.")


def peft_loha(path: Path) -> Truth:
    """Hadamard; the convolution is flat."""
    from peft import LoHaConfig

    return peft_folder(path, LoHaConfig(r=2, alpha=3, rank_pattern={"attn2.to_k": 3}, alpha_pattern={"ff.net.0.proj": 1}))


def peft_loha_tucker(path: Path) -> Truth:
    """Hadamard with Tucker cores in the convolution."""
    from peft import LoHaConfig

    return peft_folder(path, LoHaConfig(r=2, alpha=1, use_effective_conv2d=True))


def peft_lokr(path: Path) -> Truth:
    """Kronecker with w2 factored, and a rank so high in one module that both factors are whole."""
    from peft import LoKrConfig

    return peft_folder(path, LoKrConfig(r=4, alpha=6, rank_pattern={"attn1.to_q": 12}, alpha_pattern={"attn2.to_k": 3}))


def peft_lokr_both(path: Path) -> Truth:
    """Kronecker with both factors factored, and a fixed factor."""
    from peft import LoKrConfig

    return peft_folder(path, LoKrConfig(r=2, alpha=5, decompose_both=True, decompose_factor=16), (*LINEAR, CONV_1X1))


def peft_lokr_tucker(path: Path) -> Truth:
    """Kronecker with a Tucker core in the convolution."""
    from peft import LoKrConfig

    return peft_folder(path, LoKrConfig(r=3, alpha=2, use_effective_conv2d=True))


def peft_miss(path: Path) -> Truth:
    """A rank that does not divide the inputs."""
    from peft import MissConfig

    return peft_folder(path, MissConfig(r=6), LINEAR)


def peft_miss_mini(path: Path) -> Truth:
    """Blocks repeated over the outputs, too."""
    from peft import MissConfig

    return peft_folder(path, MissConfig(r=4, mini_r=64, init_weights="mini"), LINEAR)


def peft_ia3(path: Path) -> Truth:
    """(IA)^3 multiplies the base weight; it is only ever carried."""
    from peft import IA3Config

    return peft_folder(path, IA3Config(feedforward_modules=[LINEAR[2]]), LINEAR)


# Diffusers -------------------------------------------------------------------------------------------------------------

FLUX = (
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.add_k_proj",
    "transformer_blocks.0.ff.net.0.proj",
    "single_transformer_blocks.0.attn.to_v",
    "single_transformer_blocks.0.proj_out",
    "norm_out.linear",
    "proj_out",
)
"""``proj_out`` is also the end of another module's name, which patterns must tell apart."""


def adapted(
    name: str,
    targets: Sequence[str],
    *,
    lora: Mapping[str, Any],
    dtype: torch.dtype = torch.bfloat16,
    **config: Any,  # noqa: ANN401  as on_meta
) -> torch.nn.Module:
    """A model with random LoRA on ``targets``, through its own ``add_adapter``."""
    from peft import LoraConfig

    model: Any = on_meta(name, **config)
    real(model, targets if lora.get("use_dora") else ())
    for target in targets:
        if not lora.get("use_dora"):
            model.get_submodule(target).to_empty(device="cpu")
    # An anchored expression: a list would also take modules whose names end like these.
    expression = "|".join(target.replace(".", r"\.") for target in targets)
    model.add_adapter(LoraConfig(target_modules=expression, **lora), "default")
    randomised(model, dtype)
    return model  # type: ignore[no-any-return]


def diffusers_file(path: Path, pipeline: str, **models: torch.nn.Module) -> Truth:
    """What ``pipeline.save_lora_weights`` writes, with the configuration in the header."""
    import diffusers
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict

    layers = {f"{component}_lora_layers": get_peft_model_state_dict(model) for component, model in models.items()}
    getattr(diffusers, pipeline).save_lora_weights(
        path.parent, weight_name=path.name, **layers, **_collate_lora_metadata(models)
    )
    truth: Truth = {}
    for component, model in models.items():
        truth |= peft_truth(model, f"{component}.")
    return truth


def diffusers_flux(path: Path) -> Truth:
    """FLUX.1 with ranks and alphas of their own, and CLIP."""
    lora = {
        "r": 4, "lora_alpha": 6, "rank_pattern": {"^proj_out": 2}, "alpha_pattern": {"norm_out.linear": 1, "^proj_out": 8},
    }  # fmt: skip
    return diffusers_file(
        path,
        "FluxPipeline",
        transformer=adapted("FluxTransformer2DModel", FLUX, lora=lora, guidance_embeds=True),
        text_encoder=adapted("CLIPTextModel", CLIP_LAYERS, lora={"r": 2, "lora_alpha": 3}, **CLIP_L),
    )


def diffusers_sd15(path: Path) -> Truth:
    """A UNet alone, half precision."""
    unet = adapted("UNet2DConditionModel", CONVS, lora={"r": 4, "lora_alpha": 3}, dtype=torch.float16, **SD15)
    return diffusers_file(path, "StableDiffusionPipeline", unet=unet)


def diffusers_sd15_dora(path: Path) -> Truth:
    """Magnitudes, single precision."""
    lora = {"r": 2, "lora_alpha": 3, "use_dora": True}
    unet = adapted("UNet2DConditionModel", CONVS, lora=lora, dtype=torch.float32, **SD15)
    return diffusers_file(path, "StableDiffusionPipeline", unet=unet)


def diffusers_sdxl(path: Path) -> Truth:
    """UNet with a convolution, and both text encoders."""
    at = "down_blocks.1.attentions.0"
    targets = (
        f"{at}.proj_in",
        f"{at}.transformer_blocks.1.attn2.to_v",
        "mid_block.resnets.1.conv2",
        "up_blocks.1.upsamplers.0.conv",
    )
    return diffusers_file(
        path,
        "StableDiffusionXLPipeline",
        unet=adapted("UNet2DConditionModel", targets, lora={"r": 2, "lora_alpha": 5}, **SDXL),
        text_encoder=adapted("CLIPTextModel", CLIP_LAYERS, lora={"r": 2, "lora_alpha": 1}, **CLIP_L),
        text_encoder_2=adapted(
            "CLIPTextModelWithProjection",
            ("text_model.encoder.layers.31.self_attn.out_proj", "text_model.encoder.layers.2.mlp.fc2"),
            lora={"r": 3, "lora_alpha": 2},
            **CLIP_G,
        ),
    )


def diffusers_z_image(path: Path) -> Truth:
    """Z-Image, as its pipeline writes it."""
    targets = (
        "layers.0.attention.to_q",
        "layers.29.attention.to_out.0",
        "noise_refiner.1.feed_forward.w2",
        "context_refiner.0.attention.to_v",
        "layers.3.adaLN_modulation.0",
    )
    model = adapted("ZImageTransformer2DModel", targets, lora={"r": 4, "lora_alpha": 2})
    return diffusers_file(path, "ZImagePipeline", transformer=model)


def diffusers_qwen(path: Path) -> Truth:
    """Qwen-Image, as its pipeline writes it."""
    targets = (
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.59.attn.add_v_proj",
        "transformer_blocks.1.img_mlp.net.0.proj",
        "transformer_blocks.2.txt_mod.1",
    )
    model = adapted("QwenImageTransformer2DModel", targets, lora={"r": 2, "lora_alpha": 3})
    return diffusers_file(path, "QwenImagePipeline", transformer=model)


WAN = ("blocks.0.attn1.to_q", "blocks.29.attn2.to_out.0", "blocks.7.ffn.net.0.proj", "blocks.7.ffn.net.2")


def diffusers_wan(path: Path) -> Truth:
    """Wan 2.1 1.3B."""
    model = adapted("WanTransformer3DModel", WAN, lora={"r": 4, "lora_alpha": 6}, **WAN_1_3B)
    return diffusers_file(path, "WanPipeline", transformer=model)


def diffusers_adapter(path: Path) -> Truth:
    """``model.save_lora_adapter``: names without a component."""
    model: Any = adapted("WanTransformer3DModel", WAN, lora={"r": 2, "lora_alpha": 6, "use_rslora": True}, **WAN_1_3B)
    model.save_lora_adapter(path.parent, weight_name=path.name)
    return peft_truth(model, "")


# LyCORIS ---------------------------------------------------------------------------------------------------------------


def lycoris_weight(module: Any) -> torch.Tensor:  # noqa: ANN401  a LyCORIS module of any kind
    """What the module's own forward pass adds to the weight.

    ``get_diff_weight`` is not asked: for LoHa and LoKr it multiplies alpha / rank in twice (LyCORIS 4.1), while
    ``get_weight`` is what ``forward`` uses.
    """
    kind = type(module).__name__
    if kind in ("LohaModule", "LokrModule"):
        return module.get_weight(module.shape)  # type: ignore[no-any-return]
    if kind == "LoConModule":
        return module.make_weight().reshape(module.shape) * module.scale  # type: ignore[no-any-return]
    if kind == "DyLoraModule":
        up, down = torch.cat(list(module.up_list), 1), torch.cat(list(module.down_list))
        return (up @ down).reshape(module.shape) * module.scale  # type: ignore[no-any-return]
    if kind == "NormModule":
        return module.w_norm  # type: ignore[no-any-return]
    if kind == "FullModule":
        return module.weight.double() - module._org_weight[0].double()  # type: ignore[no-any-return]  # noqa: SLF001
    raise TypeError(kind)


def lycoris_values(network: Any, dtype: torch.dtype) -> Truth:  # noqa: ANN401  a LycorisNetwork
    """Random values in ``dtype``; the truth of every module from them."""
    truth: Truth = {}
    with torch.no_grad():
        for module in network.loras:
            rounded = torch.float32 if type(module).__name__ == "FullModule" else dtype
            alpha = module.alpha.clone() if hasattr(module, "alpha") else None
            for name, parameter in module.named_parameters():
                if "dora_scale" in name:
                    parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
                elif rounded != torch.float32 or type(module).__name__ != "FullModule":
                    parameter.normal_(0, 0.1)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                parameter.data = parameter.data.to(rounded)
            module.double()
            if type(module).__name__ != "IA3Module":
                truth[module.lora_name] = lycoris_weight(module).clone()
            if getattr(module, "wd", False):
                truth[f"{module.lora_name}|magnitude"] = module.dora_scale.flatten().clone()
            bias = getattr(module, "b_norm", None)
            if getattr(module, "org_bias", None) is not None:
                bias = module.bias - module.org_bias[0].double()
            if bias is not None:
                truth[f"{module.lora_name}|bias"] = bias.clone()
            module.to(rounded)
            if alpha is not None:  # otherwise rsLoRA's is rounded with the weights
                module.alpha = alpha
    return truth


def exactly(names: Iterable[str]) -> list[str]:
    """LyCORIS matches targets as regular expressions, from the start of the name."""
    return [name.replace(".", r"\.") + "$" for name in names]


def lycoris_kohya(path: Path, targets: Sequence[str] = CONVS, *, clip: bool = False, **args: Any) -> Truth:  # noqa: ANN401
    """What LyCORIS writes as sd-scripts' network module, for Stable Diffusion 1.5 (``lora_unet_...``, ``lora_te_...``)."""
    from lycoris.kohya import LycorisNetworkKohya

    unet = on_meta("UNet2DConditionModel", **SD15)
    real(unet, targets)
    encoder = on_meta("CLIPTextModel", **CLIP_L) if clip else None
    if encoder is not None:
        real(encoder, CLIP_LAYERS)
    LycorisNetworkKohya.apply_preset(
        {
            "enable_conv": True,
            "unet_target_module": [],
            "unet_target_name": exactly(targets),
            "text_encoder_target_module": [],
            "text_encoder_target_name": exactly(CLIP_LAYERS),
        }
    )
    fields = {"lora_dim": 4, "conv_lora_dim": 2, "alpha": 3, "conv_alpha": 5} | args
    network = LycorisNetworkKohya(encoder, unet, warn_on_unmatched=False, **fields)
    network.apply_to(encoder, unet, apply_text_encoder=clip, apply_unet=True)
    dtype = torch.float16
    truth = lycoris_values(network, dtype)
    network.save_weights(str(path), None, {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps(args)})
    return truth


def lycoris_standalone(path: Path) -> Truth:
    """LyCORIS' own wrapper (``lycoris_...``) around FLUX.1, as SimpleTuner uses it."""
    from lycoris import LycorisNetwork

    targets = FLUX[:5]
    model = on_meta("FluxTransformer2DModel", guidance_embeds=True)
    for target in targets:
        model.get_submodule(target).to_empty(device="cpu")
    LycorisNetwork.apply_preset({"target_module": [], "target_name": exactly(targets), "enable_conv": True})
    network = LycorisNetwork(
        model, lora_dim=4, alpha=6, network_module="lokr", factor=16, decompose_both=True, warn_on_unmatched=False
    )
    network.apply_to()
    truth = lycoris_values(network, torch.bfloat16)
    config = {"algo": "lokr", "linear_dim": 4, "linear_alpha": 6, "factor": 16}
    network.save_weights(str(path), None, {"lycoris_config": json.dumps(config)})
    return truth


def kohya(targets: Sequence[str] = CONVS, **args: Any) -> Callable[[Path], Truth]:  # noqa: ANN401  LyCORIS' options
    """A builder of :func:`lycoris_kohya`."""
    return lambda path: lycoris_kohya(path, targets, **args)


def z_image_sample(path: Path) -> Truth:
    """The sample of scripts/demo: a LoKr of Z-Image as the musubi-tuner fork with native LoKr saves it."""
    from lycoris.modules.lokr import LokrModule

    rank, alpha = 4, 2
    modules = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")
    names = [
        f"layers.{i}.{m}" for i in (0, 14, 29) for m in (*modules, "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    ]
    model = on_meta("ZImageTransformer2DModel")
    tensors: dict[str, torch.Tensor] = {"lokr_factor": torch.tensor(-1, dtype=torch.int64)}
    truth: Truth = {}
    for name in names:
        stem = "lora_unet_" + name.replace(".", "_")
        module = LokrModule(stem, model.get_submodule(name), 1.0, rank, alpha, factor=-1)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_(0, 0.05)
        module.bfloat16()
        tensors |= {f"{stem}.{key}": value.detach().clone() for key, value in module.state_dict().items()}
        truth[stem] = module.double().get_weight(module.shape).detach()
    path.parent.mkdir(exist_ok=True)
    metadata = {
        "ss_network_module": "networks.lokr",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(alpha)),
        "ss_network_args": json.dumps({"factor": "-1"}),
        "ss_lokr_factor": "-1",
        "ss_base_model_version": "z_image",
        "ss_output_name": "z_image_lokr",
        "format": "pt",
    }
    save_file(tensors, path, metadata)
    return truth


FIXTURES: dict[str, Callable[[Path], Truth]] = {
    "z_image_lokr.safetensors": z_image_sample,
    "peft_lora": peft_lora,
    "peft_dora": peft_dora,
    "peft_rslora": peft_rslora,
    "peft_lora_bias": peft_lora_bias,
    "peft_raw.safetensors": peft_raw,
    "peft_loha": peft_loha,
    "peft_loha_tucker": peft_loha_tucker,
    "peft_lokr": peft_lokr,
    "peft_lokr_both": peft_lokr_both,
    "peft_lokr_tucker": peft_lokr_tucker,
    "peft_ia3": peft_ia3,
    "peft_miss": peft_miss,
    "peft_miss_mini": peft_miss_mini,
    "diffusers_flux.safetensors": diffusers_flux,
    "diffusers_sd15.safetensors": diffusers_sd15,
    "diffusers_sd15_dora.safetensors": diffusers_sd15_dora,
    "diffusers_sdxl.safetensors": diffusers_sdxl,
    "diffusers_z_image.safetensors": diffusers_z_image,
    "diffusers_qwen.safetensors": diffusers_qwen,
    "diffusers_wan.safetensors": diffusers_wan,
    "diffusers_adapter.safetensors": diffusers_adapter,
    "lycoris_locon.safetensors": kohya(network_module="locon", clip=True),
    "lycoris_locon_tucker.safetensors": kohya(network_module="locon", use_tucker=True, rs_lora=True),
    "lycoris_loha.safetensors": kohya(network_module="loha", clip=True),
    "lycoris_loha_tucker.safetensors": kohya(network_module="loha", use_tucker=True),
    "lycoris_lokr.safetensors": kohya(network_module="lokr", factor=8, clip=True),
    "lycoris_lokr_whole.safetensors": kohya(LINEAR, network_module="lokr", full_matrix=True),
    "lycoris_lokr_both.safetensors": kohya(network_module="lokr", decompose_both=True),
    "lycoris_lokr_unbalanced.safetensors": kohya(network_module="lokr", unbalanced_factorization=True),
    "lycoris_lokr_tucker.safetensors": kohya(network_module="lokr", use_tucker=True),
    "lycoris_dora_out.safetensors": kohya(network_module="locon", weight_decompose=True, wd_on_out=True),
    "lycoris_dora_in.safetensors": kohya(network_module="locon", weight_decompose=True, wd_on_out=False),
    "lycoris_lokr_dora.safetensors": kohya(LINEAR, network_module="lokr", weight_decompose=True, wd_on_out=True),
    "lycoris_dylora.safetensors": kohya(network_module="dylora", block_size=2),
    "lycoris_full.safetensors": kohya((LINEAR[0], CONV_1X1), network_module="full"),
    "lycoris_ia3.safetensors": kohya(network_module="ia3"),
    "lycoris_norms.safetensors": kohya((LINEAR[0], *NORMS), network_module="locon", train_norm=True),
    "lycoris_standalone.safetensors": lycoris_standalone,
}
"""File or folder name -> what writes it and returns the truth."""


def make(name: str) -> None:
    """Write one fixture and its truth."""
    torch.manual_seed(crc32(name.encode()))
    path = SAMPLE if name == SAMPLE.name else OUT / name
    if path.is_dir():
        shutil.rmtree(path)
    truth = FIXTURES[name](path)
    stem = name.removesuffix(".safetensors")
    probes = {key: torch.from_numpy(bilinear(delta.detach().numpy())) for key, delta in truth.items()}
    if probes:
        save_file(probes, OUT / f"{stem}.truth.safetensors")
    for written in (path, *OUT.glob(f"{stem}.truth.*")):
        written.chmod(0o755 if written.is_dir() else 0o644)
    print(f"{name}: {len(truth)} truths")


def main(names: Sequence[str]) -> None:
    """Write the named fixtures, or all."""
    if "--list" in names:
        print("\n".join(FIXTURES))
        return
    logging.getLogger("LyCORIS").setLevel(logging.WARNING)
    OUT.mkdir(parents=True, exist_ok=True)
    for name in names or FIXTURES:
        make(name)


if __name__ == "__main__":
    main(sys.argv[1:])
