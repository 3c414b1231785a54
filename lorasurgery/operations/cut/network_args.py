"""``ss_network_args`` after a resize: what it says about ranks is made true, or taken out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lorasurgery.metadata import ARGS, BY_BLOCK
from lorasurgery.operations.cut.subject import CONV

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorasurgery.adapter import Module
    from lorasurgery.operations.cut.subject import Subject


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
