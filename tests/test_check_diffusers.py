"""Diffusers' verdicts are what Diffusers really does: its pipelines' loaders run on the same keys.

The loaders get tensors that say which row and which rank each number is for, and hand what they would put into the model to
a stand-in. A module loads when all its rows arrive under a name the model has, with the numbers the file means.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import diffusers.loaders.lora_pipeline as pipelines
import pytest
import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from diffusers.utils.peft_utils import get_peft_kwargs

from lorasurgery.architectures import architectures
from lorasurgery.architectures.table import DIFFUSERS, ORIGINAL, SD_SCRIPTS, flat
from lorasurgery.checking.diffusers import DIFFUSERS_LIBRARY
from lorasurgery.checking.engine import check
from lorasurgery.checking.result import CHANGED, IGNORED, LOADS, REJECTED
from lorasurgery.checking.subject import subject_of
from lorasurgery.io.header import RawFile
from lorasurgery.io.tensors import Tensor, scalar

if TYPE_CHECKING:
    from lorasurgery.architectures.table import Architecture, Spans

RANK, ALPHA = 2, 0.5
MIXINS = {
    "sd1": "StableDiffusionLoraLoaderMixin", "sdxl": "StableDiffusionXLLoraLoaderMixin", "sd3-medium": "SD3LoraLoaderMixin",
    "flux1-dev": "FluxLoraLoaderMixin", "chroma": "FluxLoraLoaderMixin", "flux2-klein-4b": "Flux2LoraLoaderMixin",
    "z-image": "ZImageLoraLoaderMixin", "qwen-image": "QwenImageLoraLoaderMixin", "wan-2.1-t2v-1.3b": "WanLoraLoaderMixin",
    "lumina2": "Lumina2LoraLoaderMixin", "hidream": "HiDreamImageLoraLoaderMixin", "ltx-video-2b": "LTXVideoLoraLoaderMixin",
    "ltx2": "LTX2LoraLoaderMixin", "hunyuan-video": "HunyuanVideoLoraLoaderMixin", "auraflow": "AuraFlowLoraLoaderMixin",
    "kandinsky5-lite": "KandinskyLoraLoaderMixin", "cosmos-predict2-2b": "CosmosLoraLoaderMixin",
    "anima": "AnimaLoraLoaderMixin",
}  # fmt: skip
SPELLINGS = {
    "lora_unet_ trained": ("lora_unet_", SD_SCRIPTS, True), "lora_unet_ original": ("lora_unet_", ORIGINAL, True),
    "lora_unet_ diffusers": ("lora_unet_", DIFFUSERS, True), "lora_transformer_": ("lora_transformer_", DIFFUSERS, True),
    "lycoris_": ("lycoris_", DIFFUSERS, True), "diffusion_model. original": ("diffusion_model.", ORIGINAL, False),
    "diffusion_model. diffusers": ("diffusion_model.", DIFFUSERS, False), "component.": ("{denoiser}.", DIFFUSERS, False),
    "component. trained": ("{denoiser}.", SD_SCRIPTS, False), "bare original": ("", ORIGINAL, False),
    "bare diffusers": ("", DIFFUSERS, False), "base_model.model. original": ("base_model.model.", ORIGINAL, False),
    "base_model.model. diffusers": ("base_model.model.", DIFFUSERS, False),
}  # fmt: skip
WORDS = {
    "A/B": (".lora_A.weight", ".lora_B.weight", False), "A/B alpha": (".lora_A.weight", ".lora_B.weight", True),
    "down/up alpha": (".lora_down.weight", ".lora_up.weight", True), "down/up": (".lora_down.weight", ".lora_up.weight", False),
}  # fmt: skip


@dataclass
class File:
    """A file in memory: torch's tensors for Diffusers, headers for the check."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    raw: dict[str, Tensor] = field(default_factory=dict)

    def put(self, key: str, tensor: torch.Tensor, shape: tuple[int, ...] = ()) -> None:
        self.tensors[key] = tensor
        self.raw[key] = Tensor("F32", shape) if shape else scalar(tensor.item())


def rows_of(spans: Spans) -> torch.Tensor:
    """A number for each row of the original weight a module's rows stand for."""
    return torch.cat([torch.arange(s.start, s.stop, dtype=torch.float32) for s in spans]) + 1


def factors(spans: Spans) -> tuple[torch.Tensor, torch.Tensor]:
    """down (rank, 1), for the first column only, and up (out, rank): their product is (row number) * 8."""
    return torch.tensor([[1.0], [2.0]]), rows_of(spans)[:, None] * torch.tensor([2.0, 3.0])


def names(arch: Architecture, naming: str, which: str) -> dict[str, Spans]:
    """Matrices of the first blocks (``block``), those and what is around the blocks (``all``), or one of them (``one``)."""
    found = {}
    for name, spans in arch.namings[naming].items():
        parts = spans[0].weight.split(".")
        numbers = [int(p) for p in parts if p.isdigit()]
        around = not any(word in parts[0] for word in ("block", "layers", "refiner", "stream"))
        if len(arch.shapes[spans[0].weight]) != 2 or (which == "block" and around) or (numbers[:1] != [0] and not around):
            continue
        if arch.denoiser == "unet" and which == "block" and "attn" not in name:
            continue
        found[name] = spans
    return dict(list(found.items())[:1]) if which == "one" else found


def made(arch: Architecture, spelling: str, words: str, which: str) -> File:
    prefix, naming, is_flat = SPELLINGS[spelling]
    down_word, up_word, alpha = WORDS[words]
    file = File()
    for name, spans in names(arch, naming, which).items():
        stem = prefix.format(denoiser=arch.denoiser) + (flat(name) if is_flat else name)
        down, up = factors(spans)
        out, width = arch.module_shape(spans)
        file.put(stem + down_word, down, (RANK, width))
        file.put(stem + up_word, up, (out, RANK))
        if alpha:
            file.put(f"{stem}.alpha", torch.tensor(ALPHA))
    return file


def run_diffusers(arch: Architecture, mixin: str, file: File) -> dict[str, tuple[torch.Tensor, ...]] | None:
    """Weight -> (row numbers, values) that Diffusers would put there; None when it refuses the file."""
    got: list[tuple[str, dict[str, torch.Tensor], Any]] = []

    def keep(prefix: str) -> Any:
        def load(state_dict: dict[str, torch.Tensor], *rest: Any, **how: Any) -> None:
            alphas = how.get("network_alphas") or next((r for r in rest if isinstance(r, dict)), None)
            got.append((prefix, dict(state_dict), alphas))

        return load

    class Pipeline(getattr(pipelines, mixin)):  # type: ignore[misc]
        transformer_name, text_conditioner_name, connectors_name = "transformer", "text_conditioner", "connectors"
        transformer = text_conditioner = connectors = SimpleNamespace(config=SimpleNamespace(image_dim=None))
        unet = SimpleNamespace(config=SimpleNamespace(layers_per_block=2))
        text_encoder = text_encoder_2 = None
        load_lora_into_unet = staticmethod(keep("unet"))
        load_lora_into_transformer = staticmethod(keep("transformer"))
        load_lora_into_text_conditioner = staticmethod(keep("text_conditioner"))
        load_lora_into_connectors = staticmethod(keep("connectors"))
        load_lora_into_text_encoder = staticmethod(lambda *_, **__: None)
        _maybe_expand_transformer_param_shape_or_error_ = staticmethod(lambda *_: False)
        _maybe_expand_lora_state_dict = staticmethod(lambda transformer, lora_state_dict: lora_state_dict)

    try:
        Pipeline().load_lora_weights(dict(file.tensors))
        return placed(arch, got)
    except (ValueError, KeyError, AssertionError, RuntimeError, NotImplementedError, IndexError):
        return None


def placed(arch: Architecture, got: list[tuple[str, dict[str, torch.Tensor], Any]]) -> dict[str, tuple[torch.Tensor, ...]]:
    found: dict[str, tuple[torch.Tensor, ...]] = {}
    for prefix, state, alphas in got:
        own = {k.removeprefix(f"{prefix}."): v for k, v in state.items() if k.startswith(f"{prefix}.")}
        if own and not any(".lokr_" in k for k in own) and "lora_A" not in next(iter(own)):
            own = convert_unet_state_dict_to_peft(own)
        ranks = {k: v.shape[1] for k, v in own.items() if "lora_B" in k and v.ndim > 1}
        if not ranks:
            continue
        own_alphas = {k.removeprefix(f"{prefix}."): v for k, v in (alphas or {}).items()}
        config = get_peft_kwargs(ranks, own_alphas, own)
        root = next((r for r, component in arch.diffusers_roots if component == prefix), "")
        for key, up in own.items():
            if not key.endswith(".lora_B.weight"):
                continue
            name = key.removesuffix(".lora_B.weight")
            spans = arch.namings[DIFFUSERS].get(root + name)
            if spans is None:
                continue
            down = own[f"{name}.lora_A.weight"]
            if up.shape[0] != arch.module_shape(spans)[0] or down.shape[0] != up.shape[1]:
                raise RuntimeError("size mismatch")
            scale = float(config["alpha_pattern"].get(name, config["lora_alpha"])) / up.shape[1]
            values = up @ down[:, 0] * scale
            at = rows_of(spans).long() - 1
            old = found.get(spans[0].weight, (torch.tensor([]).long(), torch.tensor([])))
            found[spans[0].weight] = (torch.cat([old[0], at]), torch.cat([old[1], values]))
    return found


def fate(spans: Spans, scale: float, loaded: dict[str, tuple[torch.Tensor, ...]]) -> str:
    at, values = loaded.get(spans[0].weight, (torch.tensor([]).long(), torch.tensor([])))
    wanted = rows_of(spans).long() - 1
    seen = torch.full((int(max(wanted.max(), at.max() if len(at) else 0)) + 1,), torch.nan)
    seen[at] = values
    mine = seen[wanted]
    if mine.isnan().all():
        return IGNORED
    return LOADS if torch.allclose(mine, rows_of(spans) * 8 * scale, rtol=1e-3) else CHANGED



def disagreements(key: str, spelling: str, words: str, which: str) -> list[tuple[str, ...]]:
    """The first module judged otherwise than Diffusers treats it."""
    arch = architectures()[key]
    file = made(arch, spelling, words, which)
    if not file.raw:
        return []
    subject = subject_of(RawFile(Path("x.safetensors"), file.raw, {}), among=(arch,))
    result = check(subject, DIFFUSERS_LIBRARY)
    loaded = run_diffusers(arch, MIXINS[key], file)
    for item, finding in zip(subject.items, result.findings, strict=True):
        assert item.site is not None
        truth = REJECTED if loaded is None else fate(item.site.spans, ALPHA / RANK if WORDS[words][2] else 1.0, loaded)
        if finding.status != truth:
            return [(spelling, words, which, item.stem, finding.status, truth, finding.text)]
    return []


@pytest.mark.parametrize("key", MIXINS)
def test_the_verdicts_are_what_the_pipeline_does(key: str) -> None:
    own = architectures()[key].sd_scripts == SD_SCRIPTS
    spellings = [s for s, (_, naming, _) in SPELLINGS.items() if own or naming != SD_SCRIPTS]
    cases = [(s, words, which) for s in spellings for words in WORDS for which in ("block", "all", "one")]
    assert [wrong for case in cases for wrong in disagreements(key, *case)] == []
