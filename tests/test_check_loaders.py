"""What ``check --for diffusers`` says of hundreds of small files is what the installed Diffusers and PEFT do with them.

Every loader mixin of Diffusers, every spelling it accepts, and every way in which a file departs from a plain one
(:mod:`tests.loader_variants`). A sample runs by default; ``LORASURGERY_ALL_VARIANTS=1`` runs all.
"""

from __future__ import annotations

import os
import random
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import diffusers.loaders.lora_pipeline as pipelines
import pytest
import torch

from lorasurgery.architectures import architectures
from lorasurgery.checking.diffusers import DIFFUSERS_LIBRARY
from lorasurgery.checking.engine import verdict_of
from lorasurgery.checking.result import CHANGED, IGNORED, LOADS
from lorasurgery.checking.subject import subject_of
from lorasurgery.io.header import RawFile
from tests.loader_variants import ALPHA, MUTATIONS, RANK, WORDS, Case, File, made, plain, spellings
from tests.real_diffusers import load, rows_of

if TYPE_CHECKING:
    from lorasurgery.checking.result import Result
    from lorasurgery.checking.subject import Item
    from tests.real_diffusers import Loaded

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
MIXINS = {
    "sd1": "StableDiffusionLoraLoaderMixin", "sdxl": "StableDiffusionXLLoraLoaderMixin", "sd3-medium": "SD3LoraLoaderMixin",
    "flux1-dev": "FluxLoraLoaderMixin", "chroma": "FluxLoraLoaderMixin", "flux2-klein-4b": "Flux2LoraLoaderMixin",
    "z-image": "ZImageLoraLoaderMixin", "qwen-image": "QwenImageLoraLoaderMixin", "wan-2.1-t2v-1.3b": "WanLoraLoaderMixin",
    "wan-2.1-i2v-14b": "WanLoraLoaderMixin", "lumina2": "Lumina2LoraLoaderMixin", "hidream": "HiDreamImageLoraLoaderMixin",
    "ltx-video-2b": "LTXVideoLoraLoaderMixin", "ltx2": "LTX2LoraLoaderMixin", "hunyuan-video": "HunyuanVideoLoraLoaderMixin",
    "framepack": "HunyuanVideoLoraLoaderMixin", "auraflow": "AuraFlowLoraLoaderMixin", "mochi": "Mochi1LoraLoaderMixin",
    "kandinsky5-lite": "KandinskyLoraLoaderMixin", "cosmos-predict2-2b": "CosmosLoraLoaderMixin",
    "anima": "AnimaLoraLoaderMixin",
}  # fmt: skip
WITHOUT_A_TABLE = {
    "Amused", "CogVideoX", "Sana", "Helios", "SkyReelsV2", "CogView4", "Krea2", "Flux3", "BriaFibo2", "Ideogram4", "ErnieImage",
    "AceStep", "MiniMaxH3", "RFD4Proteina",
}  # fmt: skip
"""Pipelines of models that have no table here; the check then says that nothing is recorded."""
ORDER = "the loader looks at the first key only, and in which order it sees the keys is the reader's choice"
LEFT_OUT = {
    ("old", "A/B among them"): ORDER, ("old", "magnitude on all"): ORDER, ("old", "magnitude on one"): ORDER,
    ("old", "magnitude alone"): ORDER,
}  # fmt: skip
ODD = {
    ("z-image", "diffusion_model. original", "old"),
    *((key, "component.", words) for key in ("flux1-dev", "chroma") for words in ("LoKr", "LoKr alpha")),
}
"""Words that nobody writes under these names (Diffusers splits the fused weights of such a file); and a LoKr whose rank PEFT
takes from the widths, which are one here, of names that end in each other's."""
ALL = bool(os.environ.get("LORASURGERY_ALL_VARIANTS"))
SAMPLE = 48
"""Variants of a model in a default run."""


def test_every_loader_is_tried_or_has_no_table() -> None:
    mixins = {name for name in vars(pipelines) if name.endswith("LoraLoaderMixin")} - {"LoraLoaderMixin"}
    assert mixins == set(MIXINS.values()) | {f"{name}LoraLoaderMixin" for name in WITHOUT_A_TABLE}


@cache
def accepted(key: str) -> frozenset[tuple[str, str]]:
    """The spellings and words of which the pipeline loads anything."""
    arch, mixin = architectures()[key], MIXINS[key]
    found = set()
    for spelling in spellings(arch):
        for words in WORDS:
            files = (plain(arch, spelling, words, around=around) for around in (True, False))
            if any(file.raw and load(arch, mixin, file.tensors).effects for file in files):
                found.add((spelling, words))
    return frozenset(found)


def variants(key: str) -> list[Case]:
    """All changes of what the loader accepts, on modules drawn by chance, and some of what it does not."""
    rng = random.Random(key)
    all_words = [(s, w) for s in spellings(architectures()[key]) for w in WORDS]
    if ALL:
        good, bad = sorted(accepted(key)) * 3, all_words
    else:
        good, bad = rng.sample(all_words, len(all_words)), []
    cases = [
        Case(spelling, words, mutation, rng.randrange(1000), around=rng.random() < 0.5)
        for spelling, words in [*good, *bad] for mutation in MUTATIONS
        if (words, mutation) not in LEFT_OUT and (key, spelling, words) not in ODD
    ]  # fmt: skip
    return cases if ALL else rng.sample(cases, SAMPLE)


def part(values: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Some of a weight's rows; nan where there are none."""
    seen = torch.full((int(at.max()) + 1,), torch.nan)
    count = min(len(seen), len(values))
    seen[:count] = values[:count]
    return seen[at]


def fate(item: Item, file: File, loaded: Loaded) -> str:
    """What became of a module: its rows and its bias arrive as the file means them, otherwise, or not at all."""
    own = file.modules.get(item.stem)
    arrived = None if own is None or item.stem.endswith("zz") else loaded.effects.get(own.spans[0].weight)
    if own is None or arrived is None:
        return IGNORED
    rows, words = rows_of(own.spans), set(own.words)
    delta, bias = part(arrived.delta, rows.long() - 1), part(arrived.bias, rows.long() - 1)
    if delta.isnan().all():
        return IGNORED
    scale = ALPHA / RANK if ".alpha" in words and not any("lokr" in word for word in words) else 1.0
    right = torch.allclose(delta, rows * 8 * scale, rtol=1e-3)
    if words & {".diff_b", ".lora_B.bias"}:
        right &= torch.allclose(bias, rows * (scale if ".lora_B.bias" in words else 1.0), rtol=1e-3)
    right &= arrived.magnitude or not words & {".lora_magnitude_vector", ".dora_scale"}
    right &= ".diff" not in words or not any("lora" in word for word in words)
    return LOADS if right else CHANGED


def disagreement(key: str, case: Case) -> tuple[object, ...] | None:
    """Where the verdict on a variant is not what the loader does."""
    arch = architectures()[key]
    file = made(arch, case)
    if not file.raw:
        return None
    subject = subject_of(RawFile(Path("x.safetensors"), file.raw, {}), among=(arch,))
    result, loaded = verdict_of(subject, DIFFUSERS_LIBRARY)[0], load(arch, MIXINS[key], file.tensors)
    fails = loaded.error.startswith("forward")
    if loaded.error and not fails:
        return None if nothing(result) else (case, result.verdict, loaded.error)
    if result.refusals or bool(result.failures) != fails:
        return case, result.verdict, loaded.error or "loads"
    for item, finding in zip(subject.items, result.findings, strict=True):
        if not fails and finding.status != (truth := fate(item, file, loaded)):
            return case, finding, truth
    return None


def nothing(result: Result) -> bool:
    return bool(result.refusals) or not result.counts[LOADS] + result.counts[CHANGED]


@pytest.mark.parametrize("key", MIXINS)
def test_the_verdicts_are_what_the_loader_does(key: str) -> None:
    assert [wrong for case in variants(key) if (wrong := disagreement(key, case)) is not None] == []


@pytest.mark.parametrize("key", MIXINS)
def test_the_verdicts_on_plain_files(key: str) -> None:
    """Every spelling with every set of words, whether the loader takes it or not."""
    cases = [
        Case(spelling, words, "nothing", 0, around=around)
        for spelling in spellings(architectures()[key]) for words in WORDS for around in (True, False)
        if (key, spelling, words) not in ODD
    ]  # fmt: skip
    assert [wrong for case in cases if (wrong := disagreement(key, case)) is not None] == []


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_way_of_the_wan_converter(mutation: str) -> None:
    """Its converter is the pickiest: every change, at every module."""
    key = "wan-2.1-i2v-14b"
    words = sorted(WORDS) if ALL else ("A/B alpha", "A/B", "down/up alpha")
    count = len(plain(architectures()[key], "diffusion_model. original", "A/B").modules)
    step = 1 if ALL else 3
    cases = [
        Case("diffusion_model. original", word, mutation, at, around=True)
        for word in words for at in range(len(word) % step, count, step)
    ]  # fmt: skip
    assert [wrong for case in cases if (wrong := disagreement(key, case)) is not None] == []
