"""The metadata of an extracted adapter: what sd-scripts would write, SAI's model spec, and where it came from.

No date is written, so that the same extraction gives the same file.
Source: sd-scripts ``networks/extract_lora_from_models.py`` and ``library/sai_model_spec.py`` (2026), ``train_util.py`` for
``ss_sd_model_*``.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from lorasurgery.io.sources import FileSource, Region
from lorasurgery.metadata import NETWORK_MODULES
from lorasurgery.operations.cut.pick import ranks_text
from lorasurgery.operations.notes.hashes import sha256_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path
    from threading import Event

    from lorasurgery.architectures.table import Architecture
    from lorasurgery.models import Model
    from lorasurgery.verbs.extract.options import ExtractOptions

SPEC = {
    "sd1": ("stable-diffusion-v1", "diffusers", "512x512"),
    "sd2": ("stable-diffusion-v2-768-v", "diffusers", "768x768"),
    "sdxl": ("stable-diffusion-xl-v1-base", "https://github.com/Stability-AI/generative-models", "1024x1024"),
    "sd3": ("stable-diffusion-3", "diffusers", "1024x1024"),
    "flux1": ("flux-1-dev", "https://github.com/black-forest-labs/flux", "1024x1024"),
    "chroma": ("chroma", "https://huggingface.co/lodestones/Chroma", "1024x1024"),
    "lumina2": ("lumina-2", "https://github.com/Alpha-VLLM/Lumina-Image-2.0", "1024x1024"),
}  # fmt: skip
"""architecture -> ``modelspec.architecture`` (before ``/lora``), ``implementation`` and ``resolution``."""
PIECE = 1 << 26
"""Bytes hashed before it is asked whether to stop."""
ALGO = {"lora": None, "locon": "locon", "lokr": "lokr", "loha": "loha", "full": "full"}


def metadata_of(
    base: Model, tuned: Model, options: ExtractOptions, title: str, hashes: Mapping[str, str], *, conv: bool
) -> dict[str, str]:
    """Everything but what the writer adds.

    ``hashes``: sha256 of each model's file under ``base`` and ``tuned``, where it was computed; ``conv``: the result has
    convolutions with a kernel.
    """
    arch = base.architecture
    found = {
        "lorasurgery.base": base.path.name,
        "lorasurgery.base_content": base.content,
        "lorasurgery.tuned": tuned.path.name,
        "lorasurgery.tuned_content": tuned.content,
    }
    found |= {f"lorasurgery.{which}_sha256": value for which, value in hashes.items()}
    if options.layout.id == "peft":
        return found
    return found | _as_trained(base, options, hashes, conv=conv) | (_spec(arch, title) if options.spec else {})


def operation(options: ExtractOptions) -> str:
    """What was done, for ``lorasurgery.operation``."""
    cut = options.cut
    asked = (("rank", cut.rank), ("conv rank", cut.conv_rank), (cut.policy or "", cut.param), ("size", cut.size))
    words = [*(f"{name} {value}" for name, value in asked if name and value is not None), *ranks_text(cut.ranks)]
    family = "dora" if options.dora else f"tucker {options.family}" if options.tucker else options.family
    return ", ".join([f"extract {family}", *words, *([f"recipe {cut.recipe}"] if cut.recipe else [])])


def _as_trained(base: Model, options: ExtractOptions, hashes: Mapping[str, str], *, conv: bool) -> dict[str, str]:
    """``ss_*``; the writer adds ``ss_network_module``, ``_dim`` and ``_alpha`` as they come out."""
    found = {
        "ss_v2": str(base.architecture.id == "sd2"),
        "ss_sd_model_name": base.path.name,
        "ss_network_module": NETWORK_MODULES.get(base.architecture.id, "networks.lora"),
    }
    if len(base.files) == 1:
        found["ss_sd_model_hash"] = old_hash(base.files[0].path)
    if "base" in hashes:
        found["ss_new_sd_model_hash"] = hashes["base"]
    args: dict[str, str] = {}
    algo = ALGO[options.family]
    if algo is not None:
        found["ss_network_module"] = "lycoris.kohya"
        args["algo"] = algo
    if options.family == "lokr":
        args["factor"] = str(options.factor)
    if options.dora:
        args["dora_wd"] = "True"
    if conv and options.family in ("lora", "locon"):
        args |= {"conv_dim": "", "conv_alpha": ""}  # the resize fills in what they are
    return found | {"ss_network_args": json.dumps(args)}


def _spec(arch: Architecture, title: str) -> dict[str, str]:
    name, implementation, resolution = SPEC.get(arch.id, (arch.key, "", ""))
    found = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{name}/lora",
        "modelspec.implementation": implementation,
        "modelspec.resolution": resolution,
        "modelspec.title": title,
    }
    return {key: value for key, value in found.items() if value}


def old_hash(path: Path) -> str:
    """``ss_sd_model_hash``: the old webui's, the first 8 digits of the sha256 of 64 KiB at 1 MiB."""
    source = FileSource(path)
    start = min(0x100000, source.size())
    return hashlib.sha256(source.read(start, min(0x10000, source.size() - start))).hexdigest()[:8]


def file_hash(path: Path, stop: Event) -> str:
    """``ss_new_sd_model_hash``: the sha256 of the whole file. Raises InterruptedError when it is no longer wanted."""
    source = FileSource(path)

    def pieces() -> Iterator[Region]:
        for at in range(0, source.size(), PIECE):
            if stop.is_set():
                raise InterruptedError
            yield Region(source, at, min(PIECE, source.size() - at))

    return sha256_of(pieces())
