"""``ss_network_args`` after a resize: what it says about ranks is made true, or taken out.

Fields: sd-scripts ``networks/lora.py``, ``lora_flux.py``, ``lora_sd3.py`` and ``lora_lumina.py`` (2026).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lorasurgery.surgery.resize.subject import CONV

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorasurgery.adapter import Module
    from lorasurgery.surgery.resize.subject import Subject

ARGS = "ss_network_args"
LISTS = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")
"""sd-scripts' lists with a value for each block of a UNet; those of alphas have to be as long."""
BY_BLOCK = (
    *LISTS, "network_reg_dims", "rank_pattern",
    "img_attn_dim", "txt_attn_dim", "img_mlp_dim", "txt_mlp_dim", "img_mod_dim", "txt_mod_dim", "single_dim",
    "single_mod_dim", "in_dims", "context_attn_dim", "context_mlp_dim", "context_mod_dim", "x_attn_dim", "x_mlp_dim",
    "x_mod_dim", "emb_dims", "attn_dim", "mlp_dim", "mod_dim", "refiner_dim", "embedder_dims",
)  # fmt: skip
"""Ranks for parts of the network: no longer true. Only for :data:`LISTS` there is a form that is, see
:mod:`lorasurgery.surgery.resize.block_args`."""


def with_network_args(metadata: Mapping[str, str], pairs: Sequence[tuple[Subject, Module]]) -> dict[str, str]:
    """The metadata with ``conv_dim`` and ``conv_alpha`` as they are now; ``pairs``: subjects and their results.

    Where the convolutions have several ranks the two say ``Dynamic``, as sd-scripts' tools write it.
    """
    args = parsed_args(metadata)
    if args is None or not {"conv_dim", "conv_alpha", *BY_BLOCK} & set(args):
        return dict(metadata)
    kept = {key: value for key, value in args.items() if key not in BY_BLOCK}
    convs = [new for subject, new in pairs if subject.kind == CONV and new.delta is not None and new.delta.rank is not None]
    ranks = {new.delta.rank for new in convs if new.delta is not None}
    alphas = {round(new.scale.value * (new.delta.rank or 1), 6) for new in convs if new.delta is not None}
    for key, values in (("conv_dim", ranks), ("conv_alpha", alphas)):
        if key in kept and convs:
            kept[key] = str(values.pop()) if len(values) == 1 else "Dynamic"
    return {**metadata, ARGS: json.dumps(kept)}


def parsed_args(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The arguments of the network, none of them where the metadata has none; None for what is no object."""
    try:
        args = json.loads(metadata.get(ARGS, "") or "{}")
    except ValueError:
        return None
    return args if isinstance(args, dict) else None
