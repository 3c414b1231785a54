"""The metadata of a merge: what the files agree on, the trigger words of all of them, and where everything came from."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from lorasurgery.io.writer import LEGACY_HASH, MODEL_HASH
from lorasurgery.layouts.scales import HEADER_KEY
from lorasurgery.metadata import ARGS, BY_BLOCK
from lorasurgery.operations.notes.functional import agreed
from lorasurgery.verbs.merge.options import FIRST, STRIP

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorasurgery.verbs.merge.source import Source

PROVENANCE = "lorasurgery.merged_from"
"""JSON: a list of {file, weight, hash, title} in the order given; files of weight 0 are in it."""
MERGED_FROM = "modelspec.merged_from"
"""Source: sd-scripts ``library/sai_model_spec.py`` (2026): titles, joined with a comma."""
TITLE = "modelspec.title"
HASHES = (MODEL_HASH, "modelspec.hash_sha256")
PHRASES = ("modelspec.trigger_phrase", "modelspec.tags", "trained_words", "trigger_words")
"""Words for people, as lists joined with a comma."""
COUNTED = ("ss_tag_frequency", "ss_dataset_dirs")
"""JSON objects whose entries are those of all files."""
UNTRUE = (*HASHES, LEGACY_HASH, HEADER_KEY, "ss_output_name", TITLE, "modelspec.date", "modelspec.thumbnail")
NETWORK = ("ss_network_module", "ss_network_args")
"""Kept from the first file that has them: they are made true afterwards."""
SIZES = ("ss_network_dim", "ss_network_alpha")


def merged_metadata(
    sources: Sequence[Source], used: Sequence[bool], method: str, policy: str
) -> tuple[dict[str, str], list[str]]:
    """The result's metadata under ``merge``, ``first`` or ``strip``, and warnings; ranks in it are put right at saving.

    What programs load a file by is kept whoever says it. Files that are not ``used``, because their weight is 0, are named
    among the sources; nothing else is taken from them.
    """
    files = [(s.name, s.adapter.metadata) for s, own in zip(sources, used, strict=True) if own]
    every = [metadata for _, metadata in files]
    needed, warnings = agreed(files)
    first = _plain_args(_first_of(every, (*NETWORK, *SIZES))) | needed
    if policy == STRIP:
        return first, warnings
    if policy == FIRST:
        kept = {k: v for k, v in every[0].items() if k not in (*HASHES, LEGACY_HASH, HEADER_KEY)}
        return {**kept, **first, **_provenance(sources, method)}, warnings
    alike = {k: v for k, v in every[0].items() if k not in UNTRUE and all(own.get(k) == v for own in every[1:])}
    return {**alike, **first, **_phrases(every), **_counts(every), **_provenance(sources, method)}, warnings


def _plain_args(found: dict[str, str]) -> dict[str, str]:
    """``ss_network_args`` without ranks of parts of the network, which a merge changes; readers take them from the tensors."""
    args = _object(found.get(ARGS, ""))
    kept = {key: value for key, value in args.items() if key not in ("conv_dim", "conv_alpha", *BY_BLOCK)}
    return found if len(kept) == len(args) else {**found, ARGS: json.dumps(kept)}


def _first_of(every: Sequence[Mapping[str, str]], keys: Sequence[str]) -> dict[str, str]:
    return {key: next(own[key] for own in every if key in own) for key in keys if any(key in own for own in every)}


def _phrases(every: Sequence[Mapping[str, str]]) -> dict[str, str]:
    found = {}
    for key in PHRASES:
        said = [part.strip() for own in every for part in own.get(key, "").split(",")]
        words = list(dict.fromkeys(word for word in said if word))
        if words:
            found[key] = ", ".join(words)
    return found


def _counts(every: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The data sets of all files; of one name in two files, the counts of each tag are added."""
    found = {}
    for key in COUNTED:
        joined: dict[str, Any] = {}
        for own in every:
            for name, value in _object(own.get(key, "")).items():
                joined[name] = _together(joined[name], value) if name in joined else value
        if joined:
            found[key] = json.dumps(joined)
    return found


def _together(first: Any, second: Any) -> Any:  # noqa: ANN401  JSON
    if not (isinstance(first, dict) and isinstance(second, dict)):
        return first
    numbers = all(isinstance(v, int | float) for v in (*first.values(), *second.values()))
    return dict(Counter(first) + Counter(second)) if numbers and first != second else {**second, **first}


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _provenance(sources: Sequence[Source], method: str) -> dict[str, str]:
    rows = []
    for source in sources:
        own = source.adapter.metadata
        title = own.get(TITLE) or own.get("ss_output_name") or source.name.rsplit(".", 1)[0]
        row = {"file": source.name, "weight": str(source.weight), "hash": _first_of([own], HASHES), "title": title}
        rows.append({k: v for k, v in row.items() if v})
    titles = ", ".join(row["title"] for row in rows if isinstance(row["title"], str))
    return {PROVENANCE: json.dumps({"method": method, "files": rows}), MERGED_FROM: titles}
