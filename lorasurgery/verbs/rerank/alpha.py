"""What happens to alpha, and so to the strength, when a LoRA is cut from rank R to rank r, and what becomes of the metadata.

Readers multiply by alpha / r. sd-scripts trains rank r of a DyLoRA at alpha / sqrt(R r) (``networks/dylora.py``: scale
alpha / R times sqrt(R / r)), LyCORIS at alpha * block_size / r (``modules/dylora.py``: alpha / number of blocks).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from math import sqrt
from typing import TYPE_CHECKING, Any

from lorasurgery.errors import RequestError
from lorasurgery.io.writer import LEGACY_HASH, MODEL_HASH
from lorasurgery.layouts.scales import HEADER_KEY
from lorasurgery.verbs.rerank.nested import LYCORIS, SD_SCRIPTS, SPLIT_COMMENT
from lorasurgery.version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorasurgery.verbs.rerank.nested import NestedModule, Origin

KEEP, RESCALE, LYCORIS_BLOCK, SCALE = "keep", "rescale", "lycoris", "scale"
POLICIES = (KEEP, "kohya", RESCALE, LYCORIS_BLOCK, SCALE)
SPEC_HASH = "modelspec.hash_sha256"


def new_alpha(module: NestedModule, rank: int, policy: str, unit: int | None) -> float | None:
    """The alpha of a module of rank R at ``rank``; None where nothing is to be written.

    ``keep`` alpha; ``rescale`` alpha sqrt(r/R); ``lycoris`` alpha block_size; ``scale`` alpha r/R, so that alpha / rank
    stays (with the square roots for rsLoRA). A missing alpha is R. Raises RequestError where a policy needs what is not
    there.
    """
    if module.alpha is None and policy in (KEEP, SCALE):
        return None
    alpha = module.alpha
    if alpha is None:
        if module.keys["down"].rpartition("lora_")[2].startswith("A"):
            raise RequestError(
                f"{module.stem}: its layout has no alpha tensors and this file no configuration to write one into",
                hint="--alpha scale, or lorasurgery convert --target sd-scripts first",
            )
        alpha = float(module.rank)
    if policy == RESCALE:
        return alpha * sqrt(rank / module.rank)
    if policy == LYCORIS_BLOCK:
        if unit is None:
            raise RequestError("--alpha lycoris needs the block size, and the metadata does not say it", hint="--unit N")
        return alpha * unit
    return alpha * module.divisor(rank) / module.divisor(module.delta.rank) if policy == SCALE else alpha


def written_scale(module: NestedModule, rank: int, alpha: float | None) -> float:
    """What readers of the result multiply by."""
    return 1.0 if alpha is None else alpha / module.divisor(rank)


def trained_scale(module: NestedModule, rank: int, of: Origin) -> float | None:
    """What the trainer multiplied by at ``rank``; None where that is not known (not a DyLoRA, or split before)."""
    if of.trainer is None or of.split is not None:
        return None
    alpha = float(module.rank) if module.alpha is None else module.alpha
    if of.trainer == SD_SCRIPTS:
        return alpha / sqrt(module.rank * rank)
    return alpha * of.unit / rank if of.trainer == LYCORIS and of.unit is not None else None


def metadata_at(
    metadata: Mapping[str, str], cuts: Sequence[tuple[NestedModule, int, float | None]], rank: int, policy: str, *, svd: bool
) -> dict[str, str]:
    """The metadata of the result; ``cuts``: (module, its new rank, its new alpha). The writer computes the hashes.

    Source: sd-scripts ``extract_lora_from_dylora.py`` and, for ``svd``, ``resize_lora.py``.
    """
    whole = max(module.rank for module, *_ in cuts)
    found = {k: v for k, v in metadata.items() if k not in (MODEL_HASH, LEGACY_HASH, SPEC_HASH)}
    said = any(key.startswith("ss_") for key in metadata)
    if said or any(module.alpha_key and "lora_down" in module.keys["down"] for module, *_ in cuts):
        found["ss_network_dim"] = str(min(rank, whole))
        if rank < whole:
            comment = metadata.get("ss_training_comment", "")
            what = f"dimension is resized from {whole} to {rank}" if svd else f"{SPLIT_COMMENT}{whole} to {rank}"
            found["ss_training_comment"] = f"{what}; {comment}"
        alphas = Counter(alpha for module, _, alpha in cuts if module.rank == whole and alpha is not None)
        if policy != KEEP and alphas:
            found["ss_network_alpha"] = str(round(next(iter(alphas)), 6)) if len(alphas) == 1 else "Dynamic"
        if "ss_network_args" in found:
            found["ss_network_args"] = _arguments(found["ss_network_args"], rank)
    if any(module.component is not None for module, *_ in cuts):
        found[HEADER_KEY] = _header(metadata[HEADER_KEY], cuts)
    return found | {
        "lorasurgery.version": __version__,
        "lorasurgery.operation": f"rerank {whole} -> {min(rank, whole)} ({'svd' if svd else 'prefix'}, alpha {policy})",
    }


def _arguments(text: str, rank: int) -> str:
    """``ss_network_args`` with a ``conv_dim`` that is still there."""
    try:
        args = json.loads(text)
        dim = int(args["conv_dim"])
    except (ValueError, KeyError, TypeError):
        return text
    return json.dumps(args | {"conv_dim": type(args["conv_dim"])(min(dim, rank))}) if dim > rank else text


def _header(text: str, cuts: Sequence[tuple[NestedModule, int, float | None]]) -> str:
    """``lora_adapter_metadata`` with every module's rank and alpha as they are now."""
    entries: dict[str, Any] = json.loads(text)
    for component in {module.component for module, *_ in cuts if module.component is not None}:
        own = [(m, r, a) for m, r, a in cuts if m.component == component and a is not None]
        before = f"{component}." if component else ""
        names = {m.stem.removeprefix(before).removeprefix("base_model.model."): (r, a) for m, r, a in own}
        rank = Counter(r for r, _ in names.values()).most_common(1)[0][0]
        alpha = Counter(a for _, a in names.values()).most_common(1)[0][0]
        entries |= {
            f"{before}r": rank,
            f"{before}lora_alpha": _number(alpha),
            f"{before}rank_pattern": {f"^{re.escape(n)}": r for n, (r, _) in names.items() if r != rank},
            f"{before}alpha_pattern": {f"^{re.escape(n)}": _number(a) for n, (_, a) in names.items() if a != alpha},
        }
    return json.dumps(entries, indent=2, sort_keys=True)


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value
