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
    from collections.abc import Iterator

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
AB, KOHYA = (".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")
LOKR, LOHA = (".lokr_w1", ".lokr_w2"), (".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b")
WORDS = {
    "A/B": AB, "A/B alpha": (*AB, ".alpha"), "down/up": KOHYA, "down/up alpha": (*KOHYA, ".alpha"),
    "A/B dora_scale": (*AB, ".dora_scale"), "down/up dora_scale": (*KOHYA, ".alpha", ".dora_scale"), "LoKr": LOKR,
    "LoKr alpha": (*LOKR, ".alpha"), "LoHa alpha": (*LOHA, ".alpha"), "A/B and diff_b": (*AB, ".diff_b"),
}  # fmt: skip
"""The suffixes of a module, its factors first. What else is there is lost where the module loads at all."""
UNET = ("input_blocks.4", "middle_block.1")
"""The attention blocks of the UNets that are tried."""
SELECTIONS = {"A/B": ("block", "all", "one"), "down/up alpha": ("block", "all", "one"), "A/B alpha": ("block", "all")}
LOST = (".dora_scale", ".diff_b")


Loaded = tuple[torch.Tensor, torch.Tensor]
"""Row numbers, and the first column of the delta in those rows."""
FUSED = {
    "to_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "to_added_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}  # fmt: skip
"""What FLUX.2 fuses for a LoKr."""


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
        if arch.denoiser == "unet" and not parts[0].startswith(("time_embed", "label_emb")) and ".".join(parts[:2]) not in UNET:
            continue
        found[name] = spans
    return dict(list(found.items())[:1]) if which == "one" else found


def made(arch: Architecture, spelling: str, words: str, which: str) -> File:
    prefix, naming, is_flat = SPELLINGS[spelling]
    file = File()
    for name, spans in names(arch, naming, which).items():
        stem = prefix.format(denoiser=arch.denoiser) + (flat(name) if is_flat else name)
        for word in WORDS[words]:
            file.put(stem + word, *tensor(word, spans, *arch.module_shape(spans)))
    return file


def tensor(word: str, spans: Spans, out: int, width: int) -> tuple[torch.Tensor, tuple[int, ...]]:
    """A tensor for Diffusers, narrow where the width does not matter, and the shape of a real one."""
    down, up = factors(spans)
    shapes = {
        AB[0]: (RANK, width), AB[1]: (out, RANK), KOHYA[0]: (RANK, width), KOHYA[1]: (out, RANK), ".alpha": (),
        ".dora_scale": (out, 1), ".diff_b": (out,), ".lokr_w1": (1, 1), ".lokr_w2": (out, width),
        **{word: (out, RANK) if word.endswith("a") else (RANK, width) for word in LOHA},
    }  # fmt: skip
    made = {AB[0]: down, KOHYA[0]: down, AB[1]: up, KOHYA[1]: up, ".alpha": torch.tensor(ALPHA), ".lokr_w1": torch.ones(3, 1)}
    return made.get(word, rows_of(spans)[:, None] * 8), shapes[word]


def run_diffusers(arch: Architecture, mixin: str, file: File) -> dict[str, Loaded] | None:
    """Weight -> what Diffusers would put there; None when it refuses the file."""
    got: list[tuple[str, dict[str, torch.Tensor], Any]] = []

    def keep(prefix: str) -> Any:
        def load(state_dict: dict[str, torch.Tensor], *rest: Any, **how: Any) -> None:
            alphas = how.get("network_alphas") or next((r for r in rest if isinstance(r, dict)), None)
            got.append((how.get("prefix", prefix), dict(state_dict), alphas))

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


def placed(arch: Architecture, got: list[tuple[str, dict[str, torch.Tensor], Any]]) -> dict[str, Loaded]:
    """What arrives at the weights, by the names the model has."""
    found: dict[str, Loaded] = {}
    for prefix, state, alphas in got:
        own = {k.removeprefix(f"{prefix}."): v for k, v in state.items() if k.startswith(f"{prefix}.")}
        root = next((r for r, component in arch.diffusers_roots if component == prefix), "")
        others = tuple(r for r, component in arch.diffusers_roots if component != prefix)
        for name, values in products(own, {k.removeprefix(f"{prefix}."): v for k, v in (alphas or {}).items()}):
            block, _, leaf = name.rpartition(".attn.")
            parts = [f"{block}.{part}" for part in FUSED[leaf]] if leaf in FUSED else [root + name]
            known = [
                arch.namings[DIFFUSERS][p] for p in parts if p in arch.namings[DIFFUSERS] and not p.startswith(others or "/")
            ]
            if not known:
                continue
            at = torch.cat([rows_of(spans) for spans in known]).long() - 1
            if len(at) != len(values):
                raise RuntimeError("size mismatch")
            old = found.get(known[0][0].weight, (torch.tensor([]).long(), torch.tensor([])))
            found[known[0][0].weight] = (torch.cat([old[0], at]), torch.cat([old[1], values]))
    return found


def products(own: dict[str, torch.Tensor], alphas: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """(module, first column of its delta) as PEFT would compute it."""
    for key, right in own.items():
        if key.endswith(".lokr_w2"):
            yield key.removesuffix(".lokr_w2"), right[:, 0] * own[key.replace("_w2", "_w1")][0, 0]
    if own and not any(".lokr_" in k for k in own) and "lora_A" not in next(iter(own)):
        own = convert_unet_state_dict_to_peft(own)
    ups = {k.removesuffix(".lora_B.weight"): v for k, v in own.items() if k.endswith(".lora_B.weight")}
    if not ups:
        return
    config = get_peft_kwargs({k: v.shape[1] for k, v in ups.items()}, alphas, own)
    for name, up in ups.items():
        down = own.get(f"{name}.lora_A.weight")
        if down is None:
            continue
        if down.shape[0] != up.shape[1]:
            raise RuntimeError("size mismatch")
        yield name, up @ down[:, 0] * (float(config["alpha_pattern"].get(name, config["lora_alpha"])) / up.shape[1])


def fate(spans: Spans, scale: float, loaded: dict[str, Loaded]) -> str:
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
        scaled = ".alpha" in WORDS[words] and WORDS[words][:1] != LOKR[:1]
        truth = REJECTED if loaded is None else fate(item.site.spans, ALPHA / RANK if scaled else 1.0, loaded)
        if truth == LOADS and set(LOST) & set(WORDS[words]) and finding.reason in ("dora", "bias"):
            truth = CHANGED
        if finding.status != truth:
            return [(spelling, words, which, item.stem, finding.status, truth, finding.text)]
    return []


@pytest.mark.parametrize("key", MIXINS)
def test_the_verdicts_are_what_the_pipeline_does(key: str) -> None:
    own = architectures()[key].sd_scripts == SD_SCRIPTS
    spellings = [s for s, (_, naming, _) in SPELLINGS.items() if own or naming != SD_SCRIPTS]
    cases = [(s, words, which) for s in spellings for words in WORDS for which in SELECTIONS.get(words, ("block",))]
    assert [wrong for case in cases for wrong in disagreements(key, *case)] == []
