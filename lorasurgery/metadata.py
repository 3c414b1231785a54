"""What becomes of a file's metadata: kept, made true again, and marked with where it came from."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from lorasurgery.architectures import architectures
from lorasurgery.deltas.kronecker import Kronecker
from lorasurgery.io.tensors import Tensor, scalar
from lorasurgery.io.writer import LEGACY_HASH, MODEL_HASH
from lorasurgery.layouts.scales import HEADER_KEY
from lorasurgery.site import DENOISER
from lorasurgery.version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorasurgery.adapter import Adapter
    from lorasurgery.layouts.emit import Written

FACTOR, FACTOR_KEY, FACTOR_DTYPE = "lokr_factor", "ss_lokr_factor", "lorasurgery.lokr_factor_dtype"

NETWORK_MODULES = {
    "flux1": "networks.lora_flux", "chroma": "networks.lora_flux", "flux2": "networks.lora_flux_2",
    "sd3": "networks.lora_sd3", "lumina2": "networks.lora_lumina", "hunyuan-image": "networks.lora_hunyuan_image",
    "anima": "networks.lora_anima", "wan": "networks.lora_wan", "framepack": "networks.lora_framepack",
    "hunyuan-video-1.5": "networks.lora_hv_1_5", "qwen-image": "networks.lora_qwen_image",
    "z-image": "networks.lora_zimage", "kandinsky5": "networks.lora_kandinsky",
}  # fmt: skip
"""``ss_network_module`` of a LoRA where it is not ``networks.lora``. Source: sd-scripts and musubi-tuner (2026)."""

ARGS = "ss_network_args"
LISTS = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")
"""sd-scripts' lists with a value for each block of a UNet; those of alphas have to be as long."""
BY_BLOCK = (
    *LISTS, "network_reg_dims", "rank_pattern",
    "img_attn_dim", "txt_attn_dim", "img_mlp_dim", "txt_mlp_dim", "img_mod_dim", "txt_mod_dim", "single_dim",
    "single_mod_dim", "in_dims", "context_attn_dim", "context_mlp_dim", "context_mod_dim", "x_attn_dim", "x_mlp_dim",
    "x_mod_dim", "emb_dims", "attn_dim", "mlp_dim", "mod_dim", "refiner_dim", "embedder_dims",
)  # fmt: skip
"""Entries of :data:`ARGS` with ranks for parts of the network: no longer true when ranks change. Only for :data:`LISTS` there
is a form that is, see :mod:`lorasurgery.operations.cut.block_args`. Fields: sd-scripts ``networks/lora.py``, ``lora_flux.py``,
``lora_sd3.py`` and ``lora_lumina.py`` (2026)."""


def converted(
    adapter: Adapter, source: Mapping[str, str], written: Sequence[Written], *, source_layout: str, target: str
) -> dict[str, str]:
    """The metadata of a conversion's result.

    Everything is kept but what the conversion made untrue: the hashes (the writer computes them again), Diffusers'
    adapter configuration, and ``ss_network_*``.
    """
    kept = {k: v for k, v in source.items() if k not in (MODEL_HASH, LEGACY_HASH, HEADER_KEY)}
    if target == "sd-scripts" or "ss_network_dim" in kept or "ss_network_module" in kept:
        kept |= _network(adapter, kept, written)
    kept.setdefault("format", "pt")
    return kept | {
        "lorasurgery.version": __version__,
        "lorasurgery.operation": adapter.operation or f"convert {source_layout} -> {target}",
        "lorasurgery.architecture": adapter.architecture.key,
    }


def _network(adapter: Adapter, source: Mapping[str, str], written: Sequence[Written]) -> dict[str, str]:
    """``ss_network_*`` as they are now."""
    ranked = [w for w in written if w.module.delta is not None and w.module.delta.rank is not None]
    denoiser = [w for w in ranked if w.module.site.component == DENOISER] or ranked
    found: dict[str, str] = {}
    if denoiser:
        ranks, alphas = {w.rank for w in denoiser}, {round(w.alpha, 6) for w in denoiser}
        found["ss_network_dim"] = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
        found["ss_network_alpha"] = str(alphas.pop()) if len(alphas) == 1 else "Dynamic"
    plain = all(w.module.family in ("lora", "dora", "bias") for w in written)
    module = source.get("ss_network_module", "")
    if not module or (plain and module == "networks.lokr") or (plain and module == "networks.loha"):
        own = NETWORK_MODULES.get(adapter.architecture.id, "networks.lora")
        found["ss_network_module"] = own if plain else "lycoris.kohya"
    sure = len({architectures()[key].id for key, _ in adapter.candidates if key in architectures()}) < 2
    if "ss_base_model_version" not in source and adapter.architecture.metadata_names and sure:
        found["ss_base_model_version"] = adapter.architecture.metadata_names[0]
    args = _arguments(source.get("ss_network_args", ""), plain=plain)
    return found if args is None else {**found, "ss_network_args": args}


def _arguments(text: str, *, plain: bool) -> str | None:
    """``ss_network_args`` without what no longer holds; None when nothing has to change."""
    try:
        args = json.loads(text or "{}")
    except ValueError:
        return None
    if not plain or not isinstance(args, dict) or args.get("algo", "lora") in ("lora", "locon"):
        return None
    return json.dumps({k: v for k, v in args.items() if k not in ("algo", "factor", "decompose_both", "full_matrix")})


def _neutral_alphas(tensors: dict[str, Tensor]) -> None:
    """Beside the buffer the musubi-tuner fork gives a LoKr with two whole factors alpha / max(w2.shape): make that 1."""
    for key in [key for key in tensors if key.endswith(".lokr_w2")]:
        stem, size = key.removesuffix(".lokr_w2"), max(tensors[key].shape)
        alpha = tensors.get(f"{stem}.alpha")
        if alpha is not None and f"{stem}.lokr_w1" in tensors and alpha.item() != size:
            tensors[f"{stem}.alpha"] = scalar(size)


def with_lokr_factor(
    adapter: Adapter, metadata: dict[str, str], tensors: dict[str, Tensor], *, explicit: int | None, buffer: bool
) -> list[str]:
    """Carry the LoKr factor both ways: the buffer where the layout takes one (``buffer``), and its metadata mirror.

    Precedence: the explicit option, the buffer, the metadata. The buffer's dtype is remembered, so that a layout
    without buffers gives it back bit for bit. Returns warnings.
    """
    stored = next((left.tensor for left in adapter.leftovers if left.key == FACTOR), None)
    known = adapter.lokr_factor
    factor = known if explicit is None else explicit
    tensors.pop(FACTOR, None)
    if factor is None:
        return []
    metadata[FACTOR_KEY] = str(factor)
    dtype = stored.dtype if stored is not None else metadata.get(FACTOR_DTYPE, "I64")
    if not buffer:
        metadata[FACTOR_DTYPE] = dtype
    elif any(isinstance(module.delta, Kronecker) for module in adapter.modules.values()) or stored is not None:
        metadata.pop(FACTOR_DTYPE, None)
        tensors[FACTOR] = stored if stored is not None and factor == known else scalar(factor, dtype)
        if stored is None:
            _neutral_alphas(tensors)
    if explicit is not None and known is not None and explicit != known:
        return [f"the file says its LoKr factor is {known}; {explicit} was written, as asked"]
    return []
