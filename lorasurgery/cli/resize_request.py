"""What ``lorasurgery resize`` was asked for: its options and sd-scripts' put together, sizes in words, the user's cache."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorasurgery.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorasurgery.adapter import Adapter
    from lorasurgery.surgery.resize import ResizeOptions

UNITS = {
    "": 1, "B": 1, "K": 1 << 10, "KB": 10**3, "KIB": 1 << 10, "M": 1 << 20, "MB": 10**6, "MIB": 1 << 20,
    "G": 1 << 30, "GB": 10**9, "GIB": 1 << 30,
}  # fmt: skip
PRECISIONS = {"float": "fp32", "fp16": "fp16", "bf16": "bf16"}
"""sd-scripts' ``--save_precision`` as ``--dtype``."""
SD_SCRIPTS_RANK = 4
"""sd-scripts' own default of ``--new_rank``."""
PLANNED = (4, 8, 16, 32, 64)
"""Ranks of a plan, as far as they are below the file's own."""
SMALL = (1, 2)
"""Where there are none."""
SPEC_HASH = "modelspec.hash_sha256"


@dataclass(frozen=True, slots=True)
class Request:
    """What to do with every file."""

    options: ResizeOptions
    asked: bool
    """Whether anything says how far to cut; without it there is only a plan."""
    size_text: str | None = None
    planned: tuple[int, ...] = ()
    base: Path | None = None
    arch: str | None = None
    force: bool = False
    dry_run: bool = False
    verbose: bool = False

    @property
    def way(self) -> str:
        """What decides the ranks, in a few words."""
        own = self.options
        if own.policy is not None:
            found = f"{own.policy} {1.0 if own.param is None else own.param:g}"
            found += f" as {own.compat}" if own.compat else ""
        elif own.size is not None:
            found = f"size {self.size_text}"
        else:
            found = "" if own.recipe is None else f"recipe {own.recipe}"
        ranks = (("rank", own.rank), ("conv rank", own.conv_rank), ("1x1 rank", own.pointwise_rank), *own.ranks)
        return ", ".join([*([found] if found else []), *(f"{name} {rank}" for name, rank in ranks if rank is not None)])

    def marked(self, adapter: Adapter) -> Adapter:
        """The adapter with what is done noted in its metadata, as sd-scripts notes it."""
        kept = {key: value for key, value in adapter.metadata.items() if key != SPEC_HASH}
        layout = self.options.layout or adapter.layout
        if layout == "sd-scripts" or any(key.startswith("ss_") for key in kept):
            kept["ss_training_comment"] = f"{self._comment(old_rank(adapter))}; {kept.get('ss_training_comment', '')}"
        return replace(adapter, metadata=kept, operation=f"resize {self.way}")

    def _comment(self, old: int) -> str:
        """Source: sd-scripts ``networks/resize_lora.py`` (2026); size and recipe are named as methods."""
        own = self.options
        if own.policy is not None:
            return f"Dynamic resize with {own.policy}: {1.0 if own.param is None else own.param} from {old}"
        if own.size is not None or own.recipe is not None:
            return f"Dynamic resize with {'size' if own.size else 'recipe'}: {self.size_text or own.recipe} from {old}"

        def bounded(rank: int | None) -> int:
            return old if rank is None else rank if own.grow else min(rank, old)

        rank = "Dynamic" if own.ranks else str(bounded(own.rank))
        conv = "" if own.conv_rank in (None, own.rank) else f" (conv: {bounded(own.conv_rank)})"
        return f"dimension is resized from {old} to {rank}{conv}"

    def plan_ranks(self, adapter: Adapter) -> tuple[int, ...]:
        """The asked ranks, or the usual ones below the file's own and that."""
        old = old_rank(adapter)
        if self.planned:
            return self.planned
        wider = self.options.as_lora or self.options.full or not old
        if wider:
            return PLANNED
        return (*(rank for rank in (PLANNED if old > PLANNED[0] else SMALL) if rank < old), old)


def old_rank(adapter: Adapter) -> int:
    """The largest rank of a module, 0 where none has one."""
    deltas = [module.delta for module in adapter.modules.values()]
    return max((delta.rank for delta in deltas if delta is not None and delta.rank is not None), default=0)


def parse_size(text: str) -> int:
    """Bytes of ``40MiB``, ``1.5 GiB``, ``40MB`` (millions) or ``4000000``; raises RequestError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None:
        raise RequestError(f"{text!r} is no size", hint="40MiB, 800KiB, 1.5GiB, 40MB (millions) or a number of bytes")
    return int(float(found[1]) * unit)


def parse_ranks(texts: Sequence[str]) -> tuple[int | None, tuple[tuple[str, int], ...]]:
    """The one plain rank among ``--rank`` options, and the ranks by name."""
    from lorasurgery.surgery.resize import parse_rank

    found = [parse_rank(text) for text in texts]
    plain = [rank for rank in found if isinstance(rank, int)]
    if len(plain) > 1:
        raise RequestError("two plain ranks", hint='one --rank N; --rank "REGEX=N" for modules by name')
    return (plain[0] if plain else None), tuple(rank for rank in found if not isinstance(rank, int))


def with_sd_scripts(
    own: Mapping[str, object], *, rank: int | None, conv_rank: int | None, method: str | None, param: float | None, old: bool
) -> dict[str, object]:
    """Our options with sd-scripts' in their place; ``old``: any of its spellings was used.

    As in its tool text encoders are included, convolutions with any kernel have one rank, and nothing said means rank 4.
    Raises RequestError where both spellings of one thing are given.
    """
    merged = dict(own)
    pairs = (
        ("rank", "--rank", "--new_rank", rank), ("conv_rank", "--conv-rank", "--new_conv_rank", conv_rank),
        ("policy", "--policy", "--dynamic_method", method), ("param", "--param", "--dynamic_param", param),
    )  # fmt: skip
    for name, ours, theirs, value in pairs:
        if value is not None and own[name] is not None:
            raise RequestError(f"{ours} and {theirs} are the same thing", hint="one of them")
        merged[name] = own[name] if value is None else value
    if not old:
        return merged
    merged["text_encoders"] = True
    if conv_rank is not None and own["pointwise_rank"] is None:
        merged["pointwise_rank"] = conv_rank
    limits = [merged[name] for name in ("rank", "size", "recipe")] + ([own["policy"]] if method is None else [])
    if all(value is None for value in limits) and not own["ranks"]:
        merged["rank"] = SD_SCRIPTS_RANK
    return merged


def cache_file() -> Path:
    """Where the norms of base models are remembered."""
    given = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else None)
    own = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return (Path(given) if given else own) / "lorasurgery" / "norms.json"
