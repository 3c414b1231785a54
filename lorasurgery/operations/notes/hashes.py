"""The hashes people know a file by, and whether those written in it are true.

- ``sshs_model_hash`` and ``sshs_legacy_hash``: sd-scripts ``precalculate_safetensors_hashes`` (see io/hashes.py).
- AutoV1: sha256 of bytes 0x100000:0x110000 of the file, 8 digits (the old webui, sd-webui-additional-networks' old hash).
- AutoV2: the file's sha256, 10 digits (webui and CivitAI for checkpoints).
- AutoV3: sha256 of the data region, 12 digits (webui's ``addnet_hash_safetensors`` for LoRAs, CivitAI).
- ``modelspec.hash_sha256``: ``0x`` and sha256 of all tensor content (SAI Model Spec). Writers differ in the order: the data
  as it lies in the file (SwarmUI) or the tensors by name (OneTrainer ``BaseModelSaver``).

LyCORIS writes yet another ``sshs_model_hash``, with ``0x`` before it: ``precalculate_safetensors_hashes`` in lycoris/utils.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from lorasurgery.interrupts import held
from lorasurgery.io.behind import CHUNK
from lorasurgery.io.hashes import LEGACY_LENGTH, LEGACY_START, NOW, OLDER, Era, legacy_hash, legacy_window
from lorasurgery.io.header import serialiser_order
from lorasurgery.io.in_place import data_region
from lorasurgery.io.sources import Region
from lorasurgery.io.tensors import Tensor
from lorasurgery.io.writer import LEGACY_HASH, MODEL_HASH

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lorasurgery.io.header import RawFile

SPEC_HASH = "modelspec.hash_sha256"
NOTHING = hashlib.sha256().hexdigest()
"""e3b0c442...: the sha256 of no bytes at all."""

RIGHT, STALE, ABSENT, UNKNOWN = "right", "stale", "absent", "cannot be checked"
_SMALL = "the hash of nothing: what it covers starts at 1 MiB and this file is smaller; every such file has it"
_NOTHING = "the hash of nothing (e3b0c442...): the program that wrote it hashed no data"
_RANDOM = (
    "the ss_ metadata alone reaches beyond 1 MiB, and the safetensors library writes it in another order every time: "
    "nobody can compute this hash again"
)
_ON_DISK = "of the data as it lies in the file; sd-scripts, which puts the tensors in order first, would write another"
_LYCORIS = (
    "LyCORIS's own hash: 0x and the sha256 of the tensors in the order the trainer held them, which no file keeps; "
    "fix --all writes sd-scripts' hash, which is the one that programs compute"
)
_BY_NAME = "of the tensors in the order of their names, as OneTrainer computes it"


class Legacy(NamedTuple):
    """The legacy hash of a file, None where it is not determined."""

    value: str | None
    empty: bool
    """Whether it covers no bytes."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A hash the metadata holds, or should hold."""

    key: str
    value: str | None
    verdict: str
    """``right``, ``stale``, ``absent`` or ``cannot be checked``."""
    expected: str | None
    """What it should be; None where that is not determined."""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Verified:
    """All hashes of one file."""

    size: int
    sha256: str
    """Of the whole file."""
    data_sha256: str
    """Of the data as it lies in the file."""
    autov1: str
    serialiser_order: bool
    """Whether the data lies as the safetensors library would write it (sd-scripts hashes it in that order)."""
    stored: tuple[Stored, ...]

    @property
    def verdict(self) -> str:
        """The first of ``stale``, ``cannot be checked``, ``right`` and ``absent`` that is said of any hash."""
        found = {one.verdict for one in self.stored}
        return next(verdict for verdict in (STALE, UNKNOWN, RIGHT, ABSENT) if verdict in found)

    def corrections(self, *, add: bool = False, unknown: bool = False) -> dict[str, str]:
        """The values that mend the stale hashes.

        ``add`` fills in sd-scripts' two where they are absent, ``unknown`` replaces what cannot be checked, where the
        right value can be computed.
        """
        verdicts = {STALE, *([ABSENT] if add else []), *([UNKNOWN] if unknown else [])}
        wrong = [one for one in self.stored if one.verdict in verdicts and (one.verdict != ABSENT or one.key != SPEC_HASH)]
        return {one.key: one.expected for one in wrong if one.expected is not None}

    def to_json(self) -> dict[str, Any]:
        """For ``--json``; see docs/meta.md."""
        return {
            "size": self.size,
            "sha256": self.sha256,
            "data_sha256": self.data_sha256,
            "autov1": self.autov1,
            "autov2": self.sha256[:10],
            "autov3": self.data_sha256[:12],
            "serialiser_order": self.serialiser_order,
            "verdict": self.verdict,
            "stored": [
                {"key": s.key, "value": s.value, "verdict": s.verdict, "expected": s.expected, "note": s.note}
                for s in self.stored
            ],
        }


def verify(raw: RawFile) -> Verified:
    """Compute every hash of a file, reading it once or twice at the same time, and compare with what the metadata says."""
    data = data_region(raw)
    whole = Region(data.source, 0, data.offset + data.length)
    ordered = _merged(_regions(raw.tensors, serialiser_order(raw.tensors)))
    in_order = [(region.offset, region.length) for region in ordered] == [(data.offset, data.length)] * bool(data.length)
    with ThreadPoolExecutor(3) as pool:
        with held():
            file_hash, data_hash = pool.submit(sha256_of, [whole]), pool.submit(sha256_of, [data])
            model_hash = data_hash if in_order else pool.submit(sha256_of, ordered)
        digests = file_hash.result(), data_hash.result(), model_hash.result()
    window = Region(whole.source, LEGACY_START, max(min(LEGACY_LENGTH, whole.length - LEGACY_START), 0))
    stored = (_model(raw, digests[2], digests[1]), _legacy(raw, digests[2]), _spec(raw, digests[1], digests[2]))
    return Verified(whole.length, digests[0], digests[1], sha256_of([window])[:8], in_order, stored)


def sha256_of(regions: Iterable[Region]) -> str:
    """The sha256 of the regions' bytes, one after another."""
    digest = hashlib.sha256()
    for region in regions:
        for at in range(0, region.length, CHUNK):
            digest.update(region.source.read(region.offset + at, min(CHUNK, region.length - at)))
    return digest.hexdigest()


def legacy_era(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], value: str) -> Era | None:
    """The library whose serialisation has this legacy hash, None where none has."""
    return next((era for era in (NOW, *OLDER) if legacy_of(tensors, metadata, era).value == value.lower()), None)


def legacy_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], era: Era = NOW) -> Legacy:
    """sd-scripts' legacy hash of these tensors with this metadata; reads 64 KiB at most."""
    ours = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    head = len('{"__metadata__":') + len(json.dumps(ours, separators=(",", ":"), ensure_ascii=False).encode())
    if len(ours) > 1 and 8 + head > LEGACY_START:
        return Legacy(None, empty=False)
    part, start, stop = legacy_window(tensors, metadata, era)
    regions = tuple(_regions(tensors, era.order(tensors)))
    data = Tensor("U8", (sum(region.length for region in regions),), regions).rows([(start, stop)]).tobytes()
    return Legacy(legacy_hash(part, data), empty=not part and not data)


def _regions(tensors: Mapping[str, Tensor], names: Iterable[str]) -> list[Region]:
    return [region for name in names for region in tensors[name].regions]


def _merged(regions: Sequence[Region]) -> list[Region]:
    """The same bytes in as few regions as possible, all of one source."""
    found: list[Region] = []
    for region in regions:
        last = found[-1] if found else None
        if last is not None and last.offset + last.length == region.offset:
            found[-1] = Region(last.source, last.offset, last.length + region.length)
        elif region.length:
            found.append(Region(regions[0].source, region.offset, region.length))
    return found


def _model(raw: RawFile, ordered: str, on_disk: str) -> Stored:
    value = raw.metadata.get(MODEL_HASH)
    if value is None:
        return Stored(MODEL_HASH, None, ABSENT, ordered)
    if value.lower() == ordered:
        return Stored(MODEL_HASH, value, RIGHT, ordered)
    if value.lower() == on_disk:
        return Stored(MODEL_HASH, value, RIGHT, ordered, _ON_DISK)
    if value.startswith("0x"):
        return Stored(MODEL_HASH, value, RIGHT if value[2:] == ordered else UNKNOWN, ordered, _LYCORIS)
    return Stored(MODEL_HASH, value, STALE, ordered, _NOTHING if value.lower() == NOTHING else "")


def _legacy(raw: RawFile, ordered: str) -> Stored:
    value, computed = raw.metadata.get(LEGACY_HASH), legacy_of(raw.tensors, raw.metadata)
    note = _RANDOM if computed.value is None else _SMALL if computed.empty else ""
    if value is None:
        return Stored(LEGACY_HASH, None, ABSENT, computed.value, note)
    if computed.value is None:
        wrong_model = raw.metadata.get(MODEL_HASH, ordered).lower() != ordered
        return Stored(LEGACY_HASH, value, UNKNOWN, None, note + ("; sshs_model_hash beside it is stale" if wrong_model else ""))
    era = legacy_era(raw.tensors, raw.metadata, value)
    verdict = STALE if era is None else RIGHT
    if era not in (None, NOW):
        note = f"as sd-scripts computed it with safetensors {era.versions}, which padded headers otherwise"
    if verdict == STALE and value.lower() == NOTHING[:8]:
        note = "the hash of nothing (e3b0c442), which belongs to files smaller than 1 MiB"
    return Stored(LEGACY_HASH, value, verdict, computed.value, note)


def _spec(raw: RawFile, on_disk: str, ordered: str) -> Stored:
    value, expected = raw.metadata.get(SPEC_HASH), f"0x{on_disk}"
    if value is None:
        return Stored(SPEC_HASH, None, ABSENT, expected)
    digits = value.lower().removeprefix("0x")
    if digits in (on_disk, ordered):
        return Stored(SPEC_HASH, value, RIGHT, expected)
    if digits == sha256_of(_merged(_regions(raw.tensors, sorted(raw.tensors)))):
        return Stored(SPEC_HASH, value, RIGHT, expected, _BY_NAME)
    return Stored(SPEC_HASH, value, STALE, expected, _NOTHING if digits == NOTHING else "")
