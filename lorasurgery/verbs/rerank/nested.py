"""Files whose first components are an adapter of their own: DyLoRA, and anything else that comes in an order.

The tensors of a DyLoRA are a LoRA's. Only the metadata says for sure what they are; otherwise the order of the components
speaks, and where that says nothing either, so do we.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any

from lorasurgery.adapter import account
from lorasurgery.deltas.low_rank import LowRank
from lorasurgery.errors import BrokenModuleError, NotAnAdapterError
from lorasurgery.files.read import leftovers
from lorasurgery.files.taken import Unparsed, taken_apart
from lorasurgery.layouts.module import keys_of
from lorasurgery.layouts.words import ALPHA, LORA, MAGNITUDE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorasurgery.io.header import RawFile
    from lorasurgery.io.tensors import Tensor
    from lorasurgery.layouts.group import Group
    from lorasurgery.layouts.scales import ScaleRules
    from lorasurgery.ledger import Ledger
    from lorasurgery.linalg.prefix import PrefixCurve

SD_SCRIPTS, LYCORIS = "sd-scripts", "LyCORIS"
SPLIT_COMMENT = "split from DyLoRA, rank "
"""How sd-scripts' ``extract_lora_from_dylora`` begins ``ss_training_comment``."""
CLEAR, ENOUGH = 6.0, 64
"""Standard deviations of the rank correlation that mean an order, and components that make its absence mean something."""


@dataclass(frozen=True, slots=True)
class NestedModule:
    """One LoRA module as the file spells it. No base model is needed to know it."""

    stem: str
    delta: LowRank
    keys: Mapping[str, str]
    """Slot (``up``, ``down``, ``mid``) -> key."""
    scale: float
    """What the product is multiplied by, as readers of this file resolve it."""
    alpha: float | None
    """None where neither a tensor nor the header says one: the scale is 1 at every rank."""
    alpha_key: str | None
    root: bool
    """rsLoRA: alpha is divided by sqrt(rank)."""
    component: str | None = None
    """The entry of ``lora_adapter_metadata`` that gives its alpha; None where a tensor does."""
    magnitude: bool = False

    @property
    def rank(self) -> int:
        """The larger side of a Tucker core, else the rows of ``down``."""
        return self.delta.rank if self.delta.mid is None else max(self.delta.mid.shape[:2])

    def divisor(self, rank: int) -> float:
        """What alpha is divided by at a rank."""
        return sqrt(rank) if self.root else float(rank)


@dataclass(frozen=True, slots=True)
class Origin:
    """What the metadata says about how the file was made."""

    trainer: str | None
    """``sd-scripts`` or ``LyCORIS`` for a DyLoRA; None when the metadata does not say so."""
    unit: int | None
    """Components that were trained together (``unit``, ``block_size``)."""
    other: str | None
    """Another algorithm that it names."""
    split: str | None
    """sd-scripts' comment when the file is itself a part of a DyLoRA."""


def nested_modules(raw: RawFile) -> tuple[list[NestedModule], list[str], Ledger]:
    """The LoRA modules of a file, the names of modules of other families, and an account of its keys.

    Raises BrokenModuleError for factors that do not fit, NotAnAdapterError for other files and for one without LoRA.
    """
    taken = taken_apart(Unparsed(raw))
    found, others = [], []
    for stem, own in taken.groups.items():
        delta = taken.deltas[stem]
        if isinstance(delta, LowRank) and not own.composed:
            found.append(_module(own, delta, taken.rules, raw))
        else:
            others.append(stem)
    if not found:
        raise NotAnAdapterError(
            f"none of its {len(taken.groups)} modules is a LoRA, and only a LoRA's first components are one again",
            path=raw.path, hint="lorasurgery resize FILE -o OUT --rank N, which takes every family with a rank",
        )  # fmt: skip
    used = {key: own.spelled for own in taken.groups.values() for key in keys_of(own).values()}
    return found, others, account(used, leftovers(taken))


def _module(own: Group, delta: LowRank, rules: ScaleRules, raw: RawFile) -> NestedModule:
    entry = own.modifier(ALPHA)
    tensor: Tensor | None = None if entry is None else entry.tensor
    if entry is not None and entry.tensor.size != 1:
        raise BrokenModuleError(
            f"{entry.key} has shape {list(entry.tensor.shape)}, an alpha is one number",
            key=entry.key, path=raw.path, hint="the file as its trainer wrote it",
        )  # fmt: skip
    scale = rules.resolve(own.stem, delta, tensor)
    component = _component(own.stem, rules) if tensor is None else None
    root = rules.rslora_flag if component is None else rules.configs[component].use_rslora
    alpha = None
    if tensor is not None:
        alpha = tensor.item()
    elif component is not None:
        alpha = scale.value * (sqrt(delta.rank) if root else delta.rank)
    return NestedModule(
        own.spelled, delta, {slot: e.key for (family, slot), e in own.entries.items() if family == LORA}, scale.value, alpha,
        None if entry is None else entry.key, root, component, own.modifier(MAGNITUDE) is not None,
    )  # fmt: skip


def _component(stem: str, rules: ScaleRules) -> str | None:
    """The configuration that covers a module, as ScaleRules finds it."""
    named = next((c for c in rules.configs if c and stem.startswith(c + ".")), None)
    return "" if named is None and "" in rules.configs else named


def origin(metadata: Mapping[str, str]) -> Origin:
    """Source: sd-scripts ``networks/dylora.py`` (``unit``, 1) and LyCORIS ``modules/dylora.py`` (``block_size``, 4)."""
    module = metadata.get("ss_network_module", "")
    args = _json(metadata.get("ss_network_args", "")) | _json(metadata.get("lycoris_config", ""))
    algorithm = str(args.get("algo") or args.get("network_module") or "")
    comment = metadata.get("ss_training_comment", "")
    split = comment.split(";")[0] if comment.startswith(SPLIT_COMMENT) else None
    if module.endswith(".dylora"):
        return Origin(SD_SCRIPTS, _count(args.get("unit"), 1), None, split)
    if algorithm.lower() == "dylora":
        return Origin(LYCORIS, _count(args.get("block_size"), 4), None, split)
    other = f"{module} {algorithm}".strip() or None
    return Origin(None, None, other, split)


def _json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _count(value: object, default: int) -> int:
    text = str(value)
    return int(text) if text.isdigit() and int(text) > 0 else default


def verdict(of: Origin, curves: Sequence[PrefixCurve]) -> tuple[str, str]:
    """(``dylora``, ``ordered``, ``unordered`` or ``unknown``; the reason in a sentence)."""
    from lorasurgery.linalg.prefix import falling_share, order_score

    if of.trainer is not None:
        part = f", itself {of.split}" if of.split else ""
        return "dylora", f"a DyLoRA of {of.trainer}, by its metadata (units of {of.unit}{part})"
    said = f"its metadata names {of.other}" if of.other else "its metadata does not say"
    norms = [curve.components for curve in curves]
    mean, score = order_score(norms)
    if falling_share(norms) > 0.95:
        return "ordered", f"{said}; the components' norms fall in every module, as an SVD writes them"
    if score < -CLEAR and mean < -0.1:
        return "ordered", f"{said}; the first components are the larger ones (rank correlation {mean:.2f}), as if nested"
    if sum(len(n) for n in norms) >= ENOUGH and abs(score) < CLEAR:
        return "unordered", (
            f"{said}; the components are in no order (rank correlation {mean:.2f}), so its first ones are no better than "
            "others: an ordinary LoRA. --svd keeps the best of that rank"
        )
    return "unknown", f"{said}, and the components do not tell whether this is a DyLoRA"
