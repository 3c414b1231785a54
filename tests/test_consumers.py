"""The real readers load what we write: Diffusers' pipelines, PEFT, LyCORIS.

Models are full-sized on torch's meta device; only the modules an adapter is for have memory. A load counts when nothing
is missing, unexpected or warned about, every key of the file is in the model, and every layer adds the delta that the
source file's own producer computes (tests/probes.py) or that these tests compute from the formula.
"""

from __future__ import annotations

import inspect
import json
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lorasurgery
from lorasurgery.errors import NotRepresentableError
from scripts.make_fixtures import CLIP_G, CLIP_L, SD15, SDXL, WAN_1_3B, on_meta, peft_parameters
from tests.probes import bilinear, probes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

HERE = Path(__file__).parent / "fixtures"
PRODUCERS = HERE / "producers"
SAMPLE = HERE / "samples" / "z_image_lokr.safetensors"
CONFIGS: dict[str, Mapping[str, Any]] = {"sd15": SD15, "sdxl": SDXL, "clip_l": CLIP_L, "clip_g": CLIP_G}
KLEIN_4B: dict[str, Any] = {
    "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680, "guidance_embeds": False,
}  # fmt: skip
MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "flux": lambda: on_meta("FluxTransformer2DModel", guidance_embeds=True),
    "z_image": lambda: on_meta("ZImageTransformer2DModel"),
    "flux2": lambda: on_meta("Flux2Transformer2DModel", **KLEIN_4B),
    "qwen": lambda: on_meta("QwenImageTransformer2DModel"),
    "wan": lambda: on_meta("WanTransformer3DModel", **WAN_1_3B),
    "sd15": lambda: on_meta("UNet2DConditionModel", **SD15),
    "sdxl": lambda: on_meta("UNet2DConditionModel", **SDXL),
    "clip_l": lambda: on_meta("CLIPTextModel", **CLIP_L),
    "clip_g": lambda: on_meta("CLIPTextModelWithProjection", **CLIP_G),
}
PIPELINES = {
    "flux": ("FluxPipeline", {"transformer": "flux", "text_encoder": "clip_l"}),
    "z_image": ("ZImagePipeline", {"transformer": "z_image"}),
    "flux2": ("Flux2KleinPipeline", {"transformer": "flux2"}),
    "qwen": ("QwenImagePipeline", {"transformer": "qwen"}),
    "wan": ("WanPipeline", {"transformer": "wan"}),
    "sd15": ("StableDiffusionPipeline", {"unet": "sd15", "text_encoder": "clip_l"}),
    "sdxl": ("StableDiffusionXLPipeline", {"unet": "sdxl", "text_encoder": "clip_l", "text_encoder_2": "clip_g"}),
}
EXACT = 1e-6
ROUNDED = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""What folding the scale into a factor of this dtype may cost."""

pytestmark = [
    # PEFT and Diffusers talk about our meta models and their own lists, not about the file.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:While injecting the PEFT adapters, an inconsistency:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor.s. have invalid shape"),  # it means biases
]

# comparing ---------------------------------------------------------------------------------------------------------------


def flat(name: str) -> str:
    """A module's name without its prefix, its spelling of separators, and CLIP's lost ``text_model.``."""
    name = re.sub(r"^(base_model\.model\.|lora_unet_|lycoris_|(transformer|unet)\.)", "", name)
    name = re.sub(r"^(lora_te\d?_|text_encoder(_2)?\.)", "", name)
    return name.removeprefix("text_model.").removeprefix("text_model_").replace(".", "_")


def truth(name: str) -> dict[str, np.ndarray]:
    """The producer's probes of every module, by flat name; ``NAME|bias`` and ``NAME|magnitude`` too."""
    found: dict[str, np.ndarray] = {}
    for key, value in load_file(PRODUCERS / f"{name}.truth.safetensors").items():
        stem, mark, what = key.partition("|")
        assert flat(stem) + mark + what not in found
        found[flat(stem) + mark + what] = value.numpy()
    return found


def first_layer() -> dict[str, np.ndarray]:
    """The sample's first layer; whole matrices of all 21 modules would take a minute."""
    return {name: value for name, value in truth("z_image_lokr").items() if name.startswith("layers_0_")}


def layers(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            yield name.removeprefix("base_model.model."), layer


def weight_probes(layer: Any, adapter: str) -> np.ndarray:
    """Of what a PEFT layer adds to its weight; from the two factors where the whole would be large."""
    up = getattr(layer, "lora_B", {})
    if adapter in up and up[adapter].weight.dim() == 2:
        b, a = up[adapter].weight.detach().numpy(), layer.lora_A[adapter].weight.detach().numpy()
        return layer.scaling[adapter] * (probes(len(b), 0).T @ b) @ (a @ probes(a.shape[1], 1))
    return bilinear(layer.get_delta_weight(adapter).detach().numpy())


def loaded_deltas(model: torch.nn.Module, matching: str = "") -> dict[str, np.ndarray]:
    """What every PEFT layer of a model (or those whose flat name begins so) adds, in float64, by flat name."""
    found: dict[str, np.ndarray] = {}
    for parameter in peft_parameters(model).values():
        parameter.data = parameter.data.double()
    for name, layer in layers(model):
        if not flat(name).startswith(matching):
            continue
        (adapter,) = layer.active_adapters
        found[flat(name)] = weight_probes(layer, adapter)
        up = getattr(layer, "lora_B", {})
        if adapter in up and up[adapter].bias is not None:
            found[f"{flat(name)}|bias"] = bilinear(up[adapter].bias.detach().numpy() * layer.scaling[adapter])
        magnitude = getattr(layer, "lora_magnitude_vector", {})
        if adapter in magnitude:
            found[f"{flat(name)}|magnitude"] = bilinear(magnitude[adapter].weight.detach().numpy().ravel())
    return found


def assert_close(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], relative: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() <= relative * np.abs(value).max(), name


# Diffusers ---------------------------------------------------------------------------------------------------------------


class Complaints(logging.Handler):
    """Every warning of the libraries' loggers."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        nothing_there = "No LoRA keys associated to" in message  # said of each text encoder the file is not for
        if not nothing_there and "safety checker" not in message and "torchvision" not in message:
            self.messages.append(message)


@pytest.fixture
def complaints():
    handler = Complaints()
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "peft")]
    for logger in loggers:
        logger.addHandler(handler)
    yield handler.messages
    for logger in loggers:
        logger.removeHandler(handler)


def saved(source: Path | lorasurgery.Adapter, out: Path, target: str, alpha: str | None = None, **options: Any) -> Path:
    """``source`` converted and written; nothing may be dropped."""
    adapter = source if isinstance(source, lorasurgery.Adapter) else lorasurgery.load(source, arch=options.pop("arch", None))
    converted, report = lorasurgery.convert(adapter, target, lorasurgery.Options(**options))
    lorasurgery.save(converted, out, report=report, options=lorasurgery.SaveOptions(alpha=alpha))
    assert not report.dropped
    return out


def with_memory(model: torch.nn.Module, stems: set[str]) -> None:
    """Gives the modules an adapter is for real storage: PEFT puts the adapter where the base weight is."""
    for name, module in model.named_modules():
        if flat(name) in stems and any(p.is_meta for p in module.parameters(recurse=False)):
            module.to_empty(device="cpu")


def loaded(kind: str, path: Path) -> dict[str, torch.nn.Module]:
    """The models of a pipeline after its own ``load_lora_weights(path)``; every key of the file is in one of them."""
    tensors = load_file(path)
    models = through_pipeline(kind, path, {flat(re.sub(r"\.lora_\w+(\.weight|\.bias)?$", "", key)) for key in tensors})
    assert sum(len(peft_parameters(model)) for model in models.values()) == len(tensors)
    return models


def through_pipeline(kind: str, path: Path, stems: set[str]) -> dict[str, torch.nn.Module]:
    """The models of a pipeline after its own ``load_lora_weights(path)``; ``stems``: the modules that get memory."""
    import diffusers

    name, parts = PIPELINES[kind]
    models = {component: MODELS[model]() for component, model in parts.items()}
    for component, model in models.items():
        if component.startswith("text_encoder"):  # Diffusers moves the whole model to where its first weight is
            model.to_empty(device="cpu")
        with_memory(model, stems)
    pipeline_class = getattr(diffusers, name)
    signature = inspect.signature(pipeline_class.__init__).parameters
    empty = {n: None if p.default is p.empty else p.default for n, p in signature.items() if n != "self"}
    pipeline = pipeline_class(**{**empty, **models})
    pipeline.load_lora_weights(str(path))
    return models


def all_deltas(models: Mapping[str, torch.nn.Module]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for model in models.values():
        own = loaded_deltas(model)
        assert not found.keys() & own.keys()
        found |= own
    return found


DIFFUSERS = [
    ("flux", "diffusers_flux"), ("sdxl", "diffusers_sdxl"), ("sd15", "diffusers_sd15"), ("sd15", "diffusers_sd15_dora"),
    ("z_image", "diffusers_z_image"), ("qwen", "diffusers_qwen"), ("wan", "diffusers_wan"), ("wan", "diffusers_adapter"),
    ("sd15", "lycoris_locon"), ("sd15", "lycoris_locon_tucker"), ("sd15", "lycoris_dora_out"), ("sd15", "lycoris_dylora"),
    ("sd15", "peft_lora"), ("sd15", "peft_dora"), ("sd15", "peft_rslora"), ("sd15", "peft_lora_bias"), ("sd15", "peft_raw"),
]  # fmt: skip


def fixture(name: str) -> Path:
    folder = PRODUCERS / name
    return folder if folder.is_dir() else PRODUCERS / f"{name}.safetensors"


@pytest.mark.parametrize("alpha", ["fold", "header"])
@pytest.mark.parametrize(("kind", "name"), DIFFUSERS)
def test_diffusers(kind, name, alpha, tmp_path, complaints):
    path = saved(fixture(name), tmp_path / "out.safetensors", "diffusers", alpha)
    found = all_deltas(loaded(kind, path))
    widest = max(ROUNDED[tensor.dtype] for tensor in load_file(path).values())
    core_folded = name == "lycoris_locon_tucker"
    assert_close(found, truth(name), widest if alpha == "fold" or core_folded else EXACT)
    assert not complaints


def beside_zeros(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """``found`` without the modules that do nothing: a fuse fills missing members up with zeros."""
    assert all(np.abs(value).max() == 0 for name, value in found.items() if name not in expected)
    return {name: value for name, value in found.items() if name in expected}


ROUND_ABOUT = [(kind, name) for kind, name in DIFFUSERS if name.startswith("diffusers_") and name != "diffusers_adapter"]


@pytest.mark.parametrize("between", ["sd-scripts", "comfyui"])
@pytest.mark.parametrize(("kind", "name"), ROUND_ABOUT)
def test_diffusers_by_way_of_another_layout(kind, name, between, tmp_path, complaints):
    """Other names, fused weights and swapped halves on the way."""
    there = saved(fixture(name), tmp_path / "there.safetensors", between)
    arch = lorasurgery.load(fixture(name)).architecture.key
    path = saved(there, tmp_path / "out.safetensors", "diffusers", arch=arch)
    assert_close(beside_zeros(all_deltas(loaded(kind, path)), truth(name)), truth(name), 2e-2)
    assert not complaints


@pytest.mark.parametrize(
    ("kind", "name"),
    [("sd15", "diffusers_sd15"), ("sd15", "lycoris_locon"), ("sdxl", "diffusers_sdxl"), ("flux", "diffusers_flux"),
     ("z_image", "diffusers_z_image"), ("qwen", "diffusers_qwen")],
)  # fmt: skip
def test_diffusers_own_converters_read_sd_scripts(kind, name, tmp_path, complaints):
    """Independent code for sd-scripts' names, alphas and fused weights comes to the same deltas."""
    path = saved(fixture(name), tmp_path / "out.safetensors", "sd-scripts")
    # FLUX' converter forgets the prefix of what is outside the blocks, and its loader then skips it.
    expected = {n: v for n, v in truth(name).items() if kind != "flux" or n not in ("norm_out_linear", "proj_out")}
    filled_up = {flat(n) for n, _ in MODELS[kind]().named_modules() if re.search(r"blocks\.0\.(attn\.\w+|proj_mlp)$", n)}
    found = all_deltas(through_pipeline(kind, path, set(expected) | (filled_up if kind == "flux" else set())))
    assert_close(beside_zeros(found, expected), expected, 2e-2)
    assert not complaints


@pytest.mark.parametrize("name", ["lycoris_lokr", "lycoris_loha", "lycoris_lokr_tucker", "lycoris_lokr_dora", "peft_loha"])
def test_diffusers_takes_other_families_as_lora(name, tmp_path, complaints):
    path = saved(fixture(name), tmp_path / "out.safetensors", "diffusers", as_lora=True)
    assert_close(all_deltas(loaded("sd15", path)), truth(name), 5e-3)
    assert not complaints


def test_diffusers_takes_the_sample_as_lora(tmp_path, complaints):
    path = saved(SAMPLE, tmp_path / "out.safetensors", "diffusers", as_lora=True)
    assert_close(all_deltas(loaded("z_image", path)), truth("z_image_lokr"), 2e-2)
    assert not complaints


@pytest.mark.parametrize("alpha", ["fold", "header"])
def test_diffusers_takes_the_sample_as_it_is(alpha, tmp_path, complaints):
    path = saved(SAMPLE, tmp_path / "out.safetensors", "diffusers", alpha)
    assert not any(key.endswith(".alpha") or key == "lokr_factor" for key in load_file(path))
    model = through_pipeline("z_image", path, {flat(key.partition(".lokr_")[0]) for key in load_file(path)})["transformer"]
    assert len(list(layers(model))) == 21
    assert_close(loaded_deltas(model, "layers_0_"), first_layer(), 2e-2)
    assert not complaints


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("blocks", [8, 12])
def test_diffusers_takes_lokr_of_flux2(blocks, dtype, tmp_path, complaints):
    """Diffusers fuses its own weights for those of fused ones, whether q, k and v end between their blocks (12) or not (8)."""
    torch.manual_seed(blocks)
    d = 3072
    modules = {
        "double_blocks.1.img_attn.qkv": (3 * d, d), "double_blocks.1.txt_attn.qkv": (3 * d, d),
        "double_blocks.0.img_mlp.0": (6 * d, d), "single_blocks.3.linear2": (d, 4 * d),
    }  # fmt: skip
    tensors: dict[str, torch.Tensor] = {}
    dense: dict[str, np.ndarray] = {}
    for i, (name, (out, columns)) in enumerate(modules.items()):
        w1, up, down = (
            (0.1 * torch.randn(shape)).to(dtype) for shape in ((blocks, blocks), (out // blocks, 4), (4, columns // blocks))
        )
        alpha = 2.0 + i
        stem = f"diffusion_model.{name}"
        tensors |= {f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2_a": up, f"{stem}.lokr_w2_b": down}
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
        dense[name] = np.kron(w1.double().numpy(), up.double().numpy() @ down.double().numpy()) * alpha / 4
    save_file(tensors | {"lokr_factor": torch.tensor(blocks)}, tmp_path / "in.safetensors")
    path = saved(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "diffusers")
    stems = {flat(key.partition(".lokr_")[0]) for key in load_file(path)}
    to_fuse = {f"transformer_blocks_1_attn_{name}" for p in "qkv" for name in (f"to_{p}", f"add_{p}_proj")}
    model = through_pipeline("flux2", path, stems | to_fuse)["transformer"]
    expected = {
        "transformer_blocks_1_attn_to_qkv": dense["double_blocks.1.img_attn.qkv"],
        "transformer_blocks_1_attn_to_added_qkv": dense["double_blocks.1.txt_attn.qkv"],
        "transformer_blocks_0_ff_linear_in": dense["double_blocks.0.img_mlp.0"],
        "single_transformer_blocks_3_attn_to_out": dense["single_blocks.3.linear2"],
    }
    assert_close(loaded_deltas(model), {name: bilinear(value) for name, value in expected.items()}, ROUNDED[dtype])
    assert not complaints


def test_diffusers_takes_the_samples_lokr_itself(tmp_path, complaints):
    """Diffusers 0.42 reads LoKr for Z-Image under ``diffusion_model.`` and its own names, which is what ``other`` writes."""
    import diffusers

    path = saved(SAMPLE, tmp_path / "out.safetensors", "other")
    mixin = diffusers.ZImagePipeline
    if "lokr" not in inspect.getsource(mixin.lora_state_dict):
        pytest.skip("this Diffusers has no LoKr")
    tensors = {k: v for k, v in load_file(path).items() if k != "lokr_factor"}
    state = mixin.lora_state_dict(tensors)
    model = MODELS["z_image"]()
    with_memory(model, {flat(key.rpartition(".")[0]) for key in state})
    model.load_lora_adapter(state, prefix="transformer")  # type: ignore[operator]
    assert len(list(layers(model))) == 21
    # Diffusers bakes the alpha into the file's own dtype.
    assert_close(loaded_deltas(model, "layers_0_"), first_layer(), 2e-2)
    assert not complaints


def low_rank(out: int, columns: int, rank: int, alpha: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """sd-scripts' tensors of one module, by suffix."""
    return {
        "lora_up.weight": (0.1 * torch.randn(out, rank)).to(dtype),
        "lora_down.weight": (0.1 * torch.randn(rank, columns)).to(dtype),
        "alpha": torch.tensor(alpha),
    }


def rows_probe(parts: Mapping[str, torch.Tensor], start: int, stop: int) -> np.ndarray:
    """The probes of rows start:stop of alpha / rank * up @ down, in float64."""
    up, down = (parts[f"lora_{side}.weight"].double().numpy() for side in ("up", "down"))
    up = up[start:stop]
    scale = parts["alpha"].item() / len(down)
    return scale * (probes(len(up), 0).T @ up) @ (down @ probes(down.shape[1], 1))


@pytest.mark.parametrize("alpha", ["fold", "header"])
def test_a_fused_kohya_flux_file(alpha, tmp_path, complaints):
    """Fused weights split, the halves of the last modulation swapped, ranks and alphas unequal, CLIP beside it."""
    torch.manual_seed(1)
    d, dtype = 3072, torch.bfloat16
    modules = {
        "lora_unet_double_blocks_0_img_attn_qkv": low_rank(3 * d, d, 4, 3, dtype),
        "lora_unet_double_blocks_18_txt_attn_qkv": low_rank(3 * d, d, 2, 5, dtype),
        "lora_unet_double_blocks_0_img_mlp_0": low_rank(4 * d, d, 3, 2, dtype),
        "lora_unet_single_blocks_3_linear1": low_rank(7 * d, d, 4, 1, dtype),
        "lora_unet_single_blocks_0_linear2": low_rank(d, 5 * d, 2, 3, dtype),
        "lora_unet_final_layer_linear": low_rank(64, d, 4, 6, dtype),
        "lora_unet_final_layer_adaLN_modulation_1": low_rank(2 * d, d, 2, 3, dtype),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": low_rank(3072, 768, 3, 7, dtype),
        "lora_te1_text_model_encoder_layers_5_self_attn_v_proj": low_rank(768, 768, 2, 7, dtype),
    }
    save_file({f"{m}.{k}": v for m, parts in modules.items() for k, v in parts.items()}, tmp_path / "in.safetensors")
    double, text, mlp, single, linear2, last, modulation, clip, value = modules.values()
    swapped = dict(modulation)
    swapped["lora_up.weight"] = torch.cat(modulation["lora_up.weight"].chunk(2)[::-1])
    expected = {
        **{f"transformer_blocks_0_attn_to_{p}": rows_probe(double, i * d, (i + 1) * d) for i, p in enumerate("qkv")},
        **{f"transformer_blocks_18_attn_add_{p}_proj": rows_probe(text, i * d, (i + 1) * d) for i, p in enumerate("qkv")},
        **{f"single_transformer_blocks_3_attn_to_{p}": rows_probe(single, i * d, (i + 1) * d) for i, p in enumerate("qkv")},
        "single_transformer_blocks_3_proj_mlp": rows_probe(single, 3 * d, 7 * d),
        "transformer_blocks_0_ff_net_0_proj": rows_probe(mlp, 0, 4 * d),
        "single_transformer_blocks_0_proj_out": rows_probe(linear2, 0, d),
        "proj_out": rows_probe(last, 0, 64),
        "norm_out_linear": rows_probe(swapped, 0, 2 * d),
        "encoder_layers_0_mlp_fc1": rows_probe(clip, 0, 3072),
        "encoder_layers_5_self_attn_v_proj": rows_probe(value, 0, 768),
    }
    path = saved(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "diffusers", alpha, arch="flux1-dev")
    assert_close(all_deltas(loaded("flux", path)), expected, ROUNDED[dtype] if alpha == "fold" else EXACT)
    assert not complaints


@pytest.mark.parametrize(("arch", "encoder"), [("flux1-dev", "lora_te3"), ("chroma", "lora_te1")])
def test_diffusers_never_loads_t5(arch, encoder, tmp_path):
    """FLUX' pipeline would skip its keys without a word, Chroma's cannot make out what they are: refused."""
    torch.manual_seed(2)
    modules = {
        "lora_unet_double_blocks_0_img_attn_proj": low_rank(3072, 3072, 2, 1, torch.float32),
        f"{encoder}_encoder_block_0_layer_0_SelfAttention_q": low_rank(4096, 4096, 2, 1, torch.float32),
    }
    save_file({f"{m}.{k}": v for m, parts in modules.items() for k, v in parts.items()}, tmp_path / "in.safetensors")
    with pytest.raises(NotRepresentableError, match="SelfAttention_q"):
        saved(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "diffusers", arch=arch)


@pytest.mark.parametrize("alpha", ["fold", "header"])
def test_magnitudes_of_a_text_encoder(alpha, tmp_path, complaints):
    torch.manual_seed(3)
    modules = {
        "lora_te1_text_model_encoder_layers_3_self_attn_k_proj": low_rank(768, 768, 2, 1, torch.float32),
        "lora_te2_text_model_encoder_layers_3_self_attn_k_proj": low_rank(1280, 1280, 3, 2, torch.float32),
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": low_rank(640, 640, 2, 3, torch.float32),
    }
    for parts in modules.values():
        parts["dora_scale"] = 1 + torch.rand(len(parts["lora_up.weight"]), 1)
    save_file({f"{m}.{k}": v for m, parts in modules.items() for k, v in parts.items()}, tmp_path / "in.safetensors")
    models = loaded("sdxl", saved(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "diffusers", alpha))
    for model, parts in zip(map(models.get, ("text_encoder", "text_encoder_2", "unet")), modules.values(), strict=True):
        assert model is not None
        (weight, magnitude) = loaded_deltas(model).values()
        np.testing.assert_allclose(weight, rows_probe(parts, 0, len(parts["dora_scale"])), rtol=1e-4)
        np.testing.assert_allclose(magnitude, bilinear(parts["dora_scale"].numpy().ravel()))
    assert not complaints


def test_wans_second_expert(tmp_path, complaints):
    """Diffusers looks for ``transformer.`` whichever expert it loads into."""
    tensors = {f"transformer_2.{k.partition('.')[2]}": v for k, v in load_file(fixture("diffusers_wan")).items()}
    save_file(tensors, tmp_path / "in.safetensors")
    path = saved(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "diffusers", arch="wan-2.1-t2v-1.3b")
    assert len(all_deltas(loaded("wan", path))) == 4
    assert not complaints
    save_file(tensors | load_file(fixture("diffusers_wan")), tmp_path / "both.safetensors")
    with pytest.raises(NotRepresentableError, match="two files"):
        saved(tmp_path / "both.safetensors", tmp_path / "two.safetensors", "diffusers", arch="wan-2.1-t2v-1.3b")


def mixed(path: Path) -> Path:
    """The DoRA fixture with the magnitude of one module taken away."""
    tensors = load_file(fixture("diffusers_sd15_dora"))
    gone = next(key for key in tensors if "to_q" in key and "magnitude" in key)
    save_file({key: tensor for key, tensor in tensors.items() if key != gone}, path)
    return path


@pytest.mark.parametrize("target", ["diffusers", "peft"])
def test_magnitudes_on_some_modules_only(target, tmp_path, complaints):
    """PEFT would invent the missing one from the base weight: refused, or all left out when that was asked for."""
    source = lorasurgery.load(mixed(tmp_path / "in.safetensors"))
    with pytest.raises(NotRepresentableError, match="every module or of none"):
        lorasurgery.convert(source, target)
    converted, report = lorasurgery.convert(source, target, lorasurgery.Options(lossy=True))
    assert len(report.dropped) == 4
    lorasurgery.save(converted, tmp_path / "out.safetensors", report=report)
    if target == "diffusers":
        expected = {n: v for n, v in truth("diffusers_sd15_dora").items() if "magnitude" not in n}
        found = all_deltas(loaded("sd15", tmp_path / "out.safetensors"))
        assert found.keys() == expected.keys()
        assert not complaints


def test_a_bias_beside_lokr_is_not_for_peft(tmp_path):
    tensors = load_file(fixture("lycoris_lokr_whole"))
    stem = next(iter(tensors)).partition(".")[0]
    save_file(tensors | {f"{stem}.diff_b": torch.ones(320)}, tmp_path / "in.safetensors")
    source = lorasurgery.load(tmp_path / "in.safetensors")
    with pytest.raises(NotRepresentableError, match="bias"):
        lorasurgery.convert(source, "peft")


def test_header_patterns_do_not_reach_other_modules(tmp_path):
    """FLUX' ``proj_out`` is also the end of every single block's: an unanchored pattern would give them its rank."""
    path = saved(fixture("diffusers_flux"), tmp_path / "out.safetensors", "diffusers", "header")
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
    assert "^proj_out" in header["transformer.rank_pattern"]
    model = loaded("flux", path)["transformer"]
    ranks = {name: next(iter(layer.r.values())) for name, layer in layers(model)}
    assert (ranks["proj_out"], ranks["single_transformer_blocks.0.proj_out"]) == (2, 4)


# PEFT --------------------------------------------------------------------------------------------------------------------

PEFT = [
    "peft_lora", "peft_dora", "peft_rslora", "peft_lora_bias", "peft_loha", "peft_loha_tucker", "peft_lokr",
    "peft_lokr_both", "peft_lokr_tucker", "lycoris_locon_tucker", "lycoris_loha_tucker", "lycoris_lokr_whole",
    "lycoris_lokr_both", "lycoris_lokr_tucker", "lycoris_dora_out", "diffusers_sd15",
]  # fmt: skip


def peft_loaded(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """The model after ``PeftModel.from_pretrained``; every key of the folder has arrived unchanged."""
    from peft import PeftModel, get_peft_model_state_dict

    tensors = load_file(folder / "adapter_model.safetensors")
    words = r"\.(lora_(A|B|magnitude_vector)(\.weight|\.bias)?|(hada|lokr)_\w+)$"
    with_memory(model, {flat(re.sub(words, "", key)) for key in tensors})
    wrapped = PeftModel.from_pretrained(model, str(folder))
    state = get_peft_model_state_dict(wrapped)
    assert state.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(state[key], tensor.to(state[key].dtype)), key
    return wrapped


@pytest.mark.parametrize("name", PEFT)
def test_peft(name, tmp_path):
    folder = saved(fixture(name), tmp_path / "out", "peft")
    relative = 2e-3 if name == "lycoris_locon_tucker" else EXACT  # its core is folded into fp16 factors
    assert_close(loaded_deltas(peft_loaded(MODELS["sd15"](), folder)), truth(name), relative)


def test_peft_takes_the_sample(tmp_path):
    folder = saved(SAMPLE, tmp_path / "out", "peft")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["decompose_factor"]) == ("LOKR", -1)
    assert_close(loaded_deltas(peft_loaded(MODELS["z_image"](), folder), "layers_0_"), first_layer(), EXACT)


def test_peft_folders_of_a_pipeline(tmp_path):
    """One folder a model, in that model's own names."""
    folder = saved(fixture("diffusers_sdxl"), tmp_path / "out", "peft")
    models = {"unet": "sdxl", "text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    assert {child.name for child in folder.iterdir()} == models.keys()
    found: dict[str, np.ndarray] = {}
    for component, model in models.items():
        found |= loaded_deltas(peft_loaded(MODELS[model](), folder / component))
    assert_close(found, truth("diffusers_sdxl"), EXACT)


# LyCORIS -----------------------------------------------------------------------------------------------------------------

LYCORIS = [
    "lycoris_locon", "lycoris_locon_tucker", "lycoris_loha", "lycoris_loha_tucker", "lycoris_lokr", "lycoris_lokr_whole",
    "lycoris_lokr_both", "lycoris_lokr_dora", "lycoris_dora_out", "lycoris_dylora", "lycoris_full",
    "peft_lora", "peft_rslora", "peft_dora", "peft_loha", "peft_loha_tucker", "peft_lokr", "peft_lokr_both",
    "diffusers_sd15",
]  # fmt: skip


def lycoris_delta(module: Any) -> np.ndarray:
    """What its forward pass adds: ``get_diff_weight`` has alpha / rank twice for LoHa and LoKr (LyCORIS 4.1)."""
    module.double()
    kind = type(module).__name__
    if kind in ("LohaModule", "LokrModule"):
        weight = module.get_weight(module.shape)
    elif kind == "NormModule":
        weight = module.w_norm
    else:
        weight = module.get_diff_weight()[0].reshape(module.shape)
    return bilinear(weight.detach().numpy())


@pytest.mark.parametrize("target", ["sd-scripts", "lycoris"])
@pytest.mark.parametrize("name", LYCORIS)
def test_lycoris(name, target, tmp_path):
    from lycoris.modules import get_module, make_module

    path = saved(fixture(name), tmp_path / "out.safetensors", target)
    tensors = load_file(path)
    model, clip = MODELS["sd15"](), MODELS["clip_l"]()
    stems = {key.partition(".")[0] for key in tensors}
    names = {flat(n): m for part in (model, clip) for n, m in part.named_modules()}
    found: dict[str, np.ndarray] = {}
    for stem in sorted(stems):
        original = names[flat(stem)]
        original.to_empty(device="cpu")
        kind, parameters = get_module(tensors, stem)
        module: Any = make_module(kind, parameters, stem, original)
        found[flat(stem)] = lycoris_delta(module)
        if getattr(module, "wd", False):
            found[f"{flat(stem)}|magnitude"] = bilinear(module.dora_scale.detach().numpy().ravel())
        if kind.__name__ == "FullModule" and f"{stem}.diff_b" in tensors:
            found[f"{flat(stem)}|bias"] = bilinear(module.bias.detach().numpy())
    assert_close(found, truth(name), EXACT)


def test_lycoris_reads_its_whole_file(tmp_path):
    """``create_lycoris_from_weights``, as SimpleTuner calls it: every module is found by its name."""
    from lycoris import LycorisNetwork, create_lycoris_from_weights

    path = saved(fixture("lycoris_standalone"), tmp_path / "out.safetensors", "lycoris", arch="flux1")
    model = MODELS["flux"]()
    with_memory(model, {flat(key.partition(".")[0]) for key in load_file(path)})
    LycorisNetwork.LORA_PREFIX = "lycoris"
    network, _ = create_lycoris_from_weights(1.0, str(path), model)
    found = {flat(module.lora_name): lycoris_delta(module) for module in network.loras}
    assert_close(found, truth("lycoris_standalone"), EXACT)
