"""Edits of a file's metadata: set, unset, strip, copy.

The tensors are not touched, and the hash that hangs on the metadata stays true.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from lorasurgery.errors import RequestError, SurgeryError
from lorasurgery.io.header import read_safetensors
from lorasurgery.io.in_place import header_of
from lorasurgery.io.sniff import TORCH_SUFFIXES, explain_torch
from lorasurgery.io.writer import LEGACY_HASH, MODEL_HASH
from lorasurgery.operations.notes.functional import FUNCTIONAL
from lorasurgery.operations.notes.hashes import SPEC_HASH, legacy_era, legacy_of
from lorasurgery.verbs.meta.privacy import private_keys, without_paths
from lorasurgery.verbs.meta.values import SPEC, SPEC_VERSION, spec_notes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from lorasurgery.io.header import RawFile
    from lorasurgery.io.in_place import Header

    Change = Callable[[RawFile], tuple[dict[str, str], list[str]]]

HASHES = (MODEL_HASH, LEGACY_HASH, SPEC_HASH)

LOADED = (
    "format", "lora_adapter_metadata", "lycoris_config", "ss_lokr_factor", "lorasurgery.lokr_factor_dtype",
    "unet", "text_encoder", "unet:*", "text_encoder:*", "omi_data", *FUNCTIONAL,
)  # fmt: skip
"""Key patterns that programs read to load the tensors: rank, alpha and targets (Diffusers, SimpleTuner, OMI), the only
copy of a LoKr factor, cloneofsimo's ranks, and what decides how they are used. The presets of ``strip`` keep them."""

DESCRIBING = (
    *(key for key in LOADED[1:] if key not in FUNCTIONAL),
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_module",
    "ss_network_args",
)
"""Key patterns that describe the tensors beside them: ``copy`` takes them along only between files with the same tensors."""


@dataclass(frozen=True, slots=True)
class Edited:
    """What an edit makes of a file's metadata. Nothing is written yet."""

    header: Header
    metadata: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def changes(self) -> dict[str, list[str]]:
        """The keys that are ``added``, ``changed`` and ``removed``."""
        old, new = self.header.metadata, self.metadata
        return {
            "added": [key for key in new if key not in old],
            "changed": [key for key in new if key in old and old[key] != new[key]],
            "removed": [key for key in old if key not in new],
        }


@dataclass(frozen=True, slots=True)
class Stripping:
    """What ``strip`` removes; at least one of the first three is needed."""

    only: Sequence[str] = ()
    """Patterns: remove what matches, whatever it is."""
    privacy: bool = False
    """Remove :data:`~lorasurgery.verbs.meta.privacy.PRIVATE_KEYS` and shorten paths in the rest."""
    everything: bool = False
    """Remove all but :data:`LOADED`."""
    keep: Sequence[str] = field(default=())
    """Patterns that stay as they are; alone: remove everything else but :data:`LOADED`."""


def read_metadata(path: Path) -> RawFile:
    """A safetensors file's header; raises SurgeryError for PyTorch's formats, which have no metadata."""
    if path.suffix.lower() in TORCH_SUFFIXES:
        if path.is_file():
            with path.open("rb") as file:
                other = explain_torch(path, file.read(512), path.stat().st_size)
            if other is not None:
                raise other
        raise SurgeryError(
            "a PyTorch file has no metadata of this kind", path=path, hint="lorasurgery convert to a .safetensors file"
        )
    return read_safetensors(path)


def edited(path: Path, change: Change) -> Edited:
    """Apply a change to a file's metadata in memory.

    The legacy hash covers the length of the ``ss_*`` metadata: where it was right before, it is right afterwards.
    """
    raw = read_metadata(path)
    metadata, notes = change(raw)
    before = raw.metadata.get(LEGACY_HASH)
    if before is not None and metadata.get(LEGACY_HASH) == before and legacy_era(raw.tensors, raw.metadata, before):
        after = legacy_of(raw.tensors, metadata).value
        if after is not None and not legacy_era(raw.tensors, metadata, before):
            metadata[LEGACY_HASH] = after
            notes = [*notes, f"{LEGACY_HASH} hangs on the ss_ metadata and was computed again"]
    return Edited(header_of(raw), metadata, tuple(notes))


def set_values(values: Mapping[str, str]) -> Change:
    """Set keys; a key of the SAI Model Spec brings the specification's version along."""

    def change(raw: RawFile) -> tuple[dict[str, str], list[str]]:
        metadata = dict(raw.metadata) | dict(values)
        if any(key.startswith("modelspec.") for key in values):
            metadata.setdefault(SPEC, SPEC_VERSION)
            return metadata, spec_notes(metadata)
        return metadata, []

    return change


def unset(patterns: Sequence[str]) -> Change:
    """Remove keys by name or pattern; raises SurgeryError for one that matches nothing."""

    def change(raw: RawFile) -> tuple[dict[str, str], list[str]]:
        gone: set[str] = set()
        for pattern in patterns:
            found = matching(raw.metadata, [pattern])
            if not found:
                raise absent(pattern, raw)
            gone |= found
        loaded = sorted(gone & matching(raw.metadata, LOADED))
        notes = [f"programs read {key} to load the file" for key in loaded]
        return {key: value for key, value in raw.metadata.items() if key not in gone}, notes

    return change


def strip(how: Stripping) -> Change:
    """Remove what ``how`` says; raises RequestError when it says nothing."""
    if not (how.only or how.privacy or how.everything or how.keep):
        raise RequestError("nothing says what to remove", hint="--privacy, --all, --only GLOB or --keep GLOB")
    rest = how.everything or not (how.only or how.privacy)

    def change(raw: RawFile) -> tuple[dict[str, str], list[str]]:
        kept, loaded = matching(raw.metadata, how.keep), matching(raw.metadata, LOADED)
        asked = matching(raw.metadata, how.only) - kept
        preset = set(raw.metadata) if rest else set(private_keys(raw.metadata)) if how.privacy else set()
        gone = asked | (preset - kept - loaded)
        notes = []
        metadata = {key: value for key, value in raw.metadata.items() if key not in gone}
        if how.privacy:
            metadata = {key: v if key in kept else without_paths(key, v) for key, v in metadata.items()}
            shortened = [key for key in metadata if metadata[key] != raw.metadata[key]]
            notes += [f"paths shortened in {key}" for key in shortened]
        stayed = sorted((preset - asked - kept) & (loaded - {"format"}))
        notes += [f"{key} stays: programs read it to load the file (unset removes it)" for key in stayed]
        if "ss_tag_frequency" in gone and "modelspec.trigger_phrase" not in metadata:
            notes.append("no trigger words are left in the file; set --trigger adds them")
        return metadata, notes

    return change


def copied(source: RawFile, *, only: Sequence[str] = (), replace: bool = False) -> Change:
    """Bring the metadata of ``source``; its values win. ``replace`` removes what the file had, its hashes aside.

    Hashes belong to their own tensors and are never brought. What describes the tensors comes when both files have the
    same names and shapes, or when ``only`` names it.
    """

    def change(raw: RawFile) -> tuple[dict[str, str], list[str]]:
        wanted = matching(source.metadata, only) if only else set(source.metadata)
        same = _shapes(source) == _shapes(raw)
        left = wanted & set(HASHES)
        if not same:
            named = {key for key in wanted if key in only}
            left |= (wanted & matching(source.metadata, DESCRIBING)) - named
        brought = {key: value for key, value in source.metadata.items() if key in wanted - left}
        own = dict(raw.metadata)
        if replace:
            own = {key: value for key, value in own.items() if key in HASHES or key in matching(own, DESCRIBING) - set(brought)}
        why = "it belongs to the other file's tensors"
        return own | brought, [f"{key} was not copied: {why}" for key in sorted(left)]

    return change


def _shapes(raw: RawFile) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in raw.tensors.items()}


def matching(metadata: Mapping[str, str], patterns: Sequence[str]) -> set[str]:
    """The keys that are, or match, one of the patterns."""
    return {key for key in metadata if any(key == p or fnmatchcase(key, p) for p in patterns)}


def absent(key: str, raw: RawFile) -> SurgeryError:
    """The error for a key that is not there, with the nearest one that is."""
    near = get_close_matches(key, raw.metadata, 1, 0.6)
    return SurgeryError(f"no metadata key {key}", path=raw.path, hint=near[0] if near else "lorasurgery meta show FILE")
