"""What ``lorasurgery resize`` was asked for: its options and sd-scripts' put together, sizes in words, the user's cache."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lorasurgery.cli.resize_advice import Advice
from lorasurgery.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasurgery.adapter import Adapter
    from lorasurgery.operations.cut import ResizeOptions
    from lorasurgery.operations.cut.pick import Pattern

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
    asked: bool = True
    """Whether anything says how far to cut; without it there is only a plan."""
    size_text: str | None = None
    planned: tuple[int, ...] = ()
    base: Path | None = None
    arch: str | None = None
    alpha: float | None = None
    strict: bool = False
    force: bool = False
    dry_run: bool = False
    named: bool = True
    """Whether the output was named; a dry run finds a name itself."""
    verbose: bool = False

    @property
    def way(self) -> str:
        """What decides the ranks, in a few words."""
        from lorasurgery.operations.cut.pick import ranks_text

        own = self.options
        if own.policy is not None:
            found = f"{own.policy} {1.0 if own.param is None else own.param:g}"
            found += f" as {own.compat}" if own.compat else ""
        elif own.size is not None:
            found = f"size {self.size_text}"
        else:
            found = "" if own.recipe is None else f"recipe {own.recipe}"
        ranks = (("rank", own.rank), ("conv rank", own.conv_rank), ("1x1 rank", own.pointwise_rank))
        words = [f"{name} {rank}" for name, rank in ranks if rank is not None]
        return ", ".join([*([found] if found else []), *words, *ranks_text(own.ranks)])

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


class Ranks(NamedTuple):
    """What ``--rank`` and ``--conv-rank`` say, under the names of :class:`ResizeOptions`."""

    rank: int | None
    conv_rank: int | None
    ranks: tuple[tuple[Pattern, int], ...]


def parse_ranks(texts: Sequence[str] | None, conv: Sequence[str] | None) -> Ranks:
    """The plain ranks of ``--rank`` and ``--conv-rank``, and those by name and by block, convolutions' first."""
    from lorasurgery.operations.cut import parse_ranks as parsed

    plain, by_name = parsed(texts or ())
    conv_plain, conv_by_name = parsed(conv or (), conv=True)
    return Ranks(plain, conv_plain, (*conv_by_name, *by_name))


class Theirs(NamedTuple):
    """sd-scripts' spellings, as far as they were used."""

    rank: int | None
    conv_rank: int | None
    method: str | None
    param: float | None
    source: Path | None
    output: Path | None
    precision: str | None
    iterations: int | None
    """Of ``torch.svd_lowrank``; 0: not used. Ours needs none, so that only what it looks at is of interest."""

    def added_to(self, own: ResizeOptions) -> ResizeOptions:
        """Our options with sd-scripts' in their place.

        A whole command line of it, which names its input by ``--model``, means what it means there: text encoders are
        included, nothing said is rank 4, and its ``--device`` is not needed. One spelling alone changes nothing else.
        Raises RequestError where both spellings of one thing are given.
        """
        pairs = (
            ("rank", "--rank", "--new_rank", self.rank), ("conv_rank", "--conv-rank", "--new_conv_rank", self.conv_rank),
            ("policy", "--policy", "--dynamic_method", self.method), ("param", "--param", "--dynamic_param", self.param),
        )  # fmt: skip
        merged = replace(own, lowrank=self.iterations != 0)
        for name, ours, theirs, value in pairs:
            merged = replace(merged, **{name: _one_of(getattr(own, name), value, f"{ours} and {theirs}")})
        if self.conv_rank is not None and own.pointwise_rank is None:
            merged = replace(merged, pointwise_rank=self.conv_rank)
        if self.source is None:
            return merged
        merged = replace(merged, text_encoders=True, device=None)
        limits = (merged.rank, merged.size, merged.recipe, own.policy if self.method is None else None)
        if all(value is None for value in limits) and not own.ranks:
            merged = replace(merged, rank=SD_SCRIPTS_RANK)
        return merged

    def source_or(self, given: Path | None) -> Path | None:
        """The input under either name."""
        found: Path | None = _one_of(given, self.source, "--input and --model")
        return found

    def output_or(self, out: Path | None) -> Path | None:
        """The output under either name."""
        found: Path | None = _one_of(out, self.output, "--out and --save_to")
        return found


def _one_of(ours: Any, theirs: Any, names: str) -> Any:  # noqa: ANN401  any option's value
    if ours is not None and theirs is not None:
        raise RequestError(f"{names} are the same thing", hint="one of them")
    return ours if theirs is None else theirs


def request(options: ResizeOptions, how: Request) -> Request:
    """The request for these options; raises RequestError for what no file could make right, before any is opened."""
    own = (options.rank, options.conv_rank, options.pointwise_rank, options.policy, options.size, options.recipe)
    asked = any(value is not None for value in own) or bool(options.ranks)
    if options.workers is not None and options.workers < 1:
        raise RequestError(f"--workers must be at least 1, not {options.workers}")
    if how.planned and not how.dry_run:
        raise RequestError("--plan is for --dry-run")
    with Advice():
        (options if asked or not how.dry_run else replace(options, rank=1)).check()
    if how.arch is not None:
        from lorasurgery.architectures import named

        named(how.arch)
    return replace(how, options=options, asked=asked)


def layout_id(target: str | None) -> str | None:
    """The layout of ``--target``; raises RequestError for an unknown one."""
    from lorasurgery.layouts.targets import layout

    return None if target is None else layout(target).id


def data_type(dtype: str, precision: str | None) -> str:
    """``--dtype``, or what ``--save_precision`` calls it; raises RequestError for both."""
    if precision is None:
        return dtype
    if dtype != "keep":
        raise RequestError("--dtype and --save_precision are the same thing", hint="one of them")
    if precision not in PRECISIONS:
        raise RequestError(f"--save_precision is {' or '.join(PRECISIONS)}, not {precision}")
    return PRECISIONS[precision]


def planned_ranks(text: str | None) -> tuple[int, ...]:
    """The ranks of ``--plan``; raises RequestError for anything else."""
    words = [] if text is None else text.replace(",", " ").split()
    if text is not None and not (words and all(word.isdigit() and int(word) for word in words)):
        raise RequestError(f"{text!r} is no list of ranks", hint="--plan 4,8,16")
    return tuple(sorted({int(word) for word in words}))


def cache_file() -> Path:
    """Where the norms of base models are remembered."""
    given = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if sys.platform == "win32" else None)
    own = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return (Path(given) if given else own) / "lorasurgery" / "norms.json"
