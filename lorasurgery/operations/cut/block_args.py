"""sd-scripts' lists of ranks and alphas by block in ``ss_network_args``, as they are after a resize.

Source: sd-scripts ``networks/lora.py`` (2026), ``get_block_dims_and_alphas``: strings of numbers, ``block_dims`` for linear
layers and 1x1 convolutions, ``conv_block_dims`` for those with a kernel, which are not trained without it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from lorasurgery.layouts.detect import expected_shape
from lorasurgery.metadata import ARGS, LISTS
from lorasurgery.operations.cut.network_args import parsed_args
from lorasurgery.operations.cut.subject import CONV, kind_of
from lorasurgery.operations.select.block_lists import trained_list
from lorasurgery.operations.select.blocks import chooser, parse_selection

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorasurgery.adapter import Adapter

    Values = Sequence[set[tuple[int, float]]]
    """For each block the (rank, alpha) of its modules."""

NETWORKS = ("", "networks.lora")
"""``ss_network_module`` of the networks that have the lists."""
FAMILIES = ("lora", "dora")


def with_block_args(adapter: Adapter, before: Mapping[str, str], layout: str, *, asked: bool) -> dict[str, str]:
    """The metadata of a resized adapter with the lists of its blocks' ranks and alphas.

    They are written where a list was ``asked`` for, or stood in the metadata ``before``, into metadata of sd-scripts or for
    its ``layout``, and if all modules of a block have one rank and alpha. A block without modules has rank 0, as there.
    """
    metadata = dict(adapter.metadata)
    args, old = parsed_args(metadata), parsed_args(before) or {}
    known = layout == "sd-scripts" or any(key.startswith("ss_") for key in metadata)
    if args is None or not known or not (asked or LISTS[0] in old) or metadata.get("ss_network_module", "") not in NETWORKS:
        return metadata
    found = _values(adapter)
    if found is None:
        return metadata
    kept = {key: value for key, value in args.items() if key not in ("conv_dim", "conv_alpha")}
    lists = _lists("", found[0]) | (_lists("conv_", found[1]) if any(found[1]) else {})
    return {**metadata, ARGS: json.dumps(kept | lists)}


def _values(adapter: Adapter) -> tuple[Values, Values] | None:
    """Of linear layers and 1x1 convolutions, and of convolutions with a kernel; None where they have no lists."""
    arch, names = adapter.architecture, trained_list(adapter.architecture)
    found: tuple[Values, Values] = ([set() for _ in names], [set() for _ in names])
    choose = chooser([parse_selection(name) for name in names], arch)
    for module in adapter.modules.values():
        index, rank = choose(module), None if module.delta is None else module.delta.rank
        if index is None or rank is None:
            continue
        if module.family not in FAMILIES:
            return None
        own = found[1 if kind_of(expected_shape(arch, module.site)) == CONV else 0]
        own[index].add((rank, round(module.scale.value * rank, 6)))
    return found if names and all(len(own) < 2 for values in found for own in values) else None


def _lists(prefix: str, values: Values) -> dict[str, str]:
    own = [next(iter(one), (0, 0.0)) for one in values]
    return {
        f"{prefix}block_dims": ",".join(str(rank) for rank, _ in own),
        f"{prefix}block_alphas": ",".join(f"{alpha:g}" for _, alpha in own),
    }
