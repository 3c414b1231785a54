"""What is finished of an extraction, on disk beside the output: a journal, and the arrays it speaks of.

``OUT.partial/journal.jsonl`` has one line for each finished module, after a first line that identifies both models and the
options; ``OUT.partial/data.bin`` has the arrays one after another. The data of a module are written before its line, and
the line holds their checksum, so whatever a kill cuts off is recognised and done again.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.errors import OutputExistsError, RequestError
from lorasurgery.io.sources import FileSource, Region
from lorasurgery.io.tensors import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lorasurgery.linalg.factors import AnyArray

FORMAT = 1
DTYPES = {"float32": "F32", "float64": "F64"}
BLOCK = 1 << 22


@dataclass(frozen=True, slots=True)
class Entry:
    """One finished module: numbers about it, and its arrays on disk."""

    numbers: Mapping[str, Any]
    arrays: Mapping[str, Tensor]


@dataclass(slots=True)
class Store:
    """The finished modules by their id."""

    folder: Path
    entries: dict[str, Entry] = field(default_factory=dict)
    _journal: Any = None
    _data: Any = None
    _source: FileSource | None = None
    _at: int = 0

    @classmethod
    def open(cls, folder: Path, identity: Mapping[str, Any], *, resume: bool, force: bool) -> Store:
        """Begin, or go on where an earlier run stopped.

        Raises OutputExistsError when an earlier run's folder is there and neither is allowed, RequestError when it belongs
        to other models or options.
        """
        own = cls(folder)
        if folder.exists() and not resume:
            if not force:
                raise OutputExistsError(
                    "an earlier extraction stopped here", path=folder, hint="--resume to go on, --force to begin again"
                )
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lines = own._intact(identity)
        own._journal = (folder / "journal.jsonl").open("w", encoding="utf-8")
        own._data = (folder / "data.bin").open("r+b" if (folder / "data.bin").exists() else "w+b")
        own._data.truncate(own._at)
        own._data.seek(own._at)
        own._journal.writelines(json.dumps(line) + "\n" for line in [{"format": FORMAT, **identity}, *lines])
        own._journal.flush()
        own._source = FileSource(folder / "data.bin")
        for line in lines:
            own._enter(line)
        return own

    def _intact(self, identity: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The lines of the journal whose data are whole; raises RequestError for another extraction's."""
        journal, data = self.folder / "journal.jsonl", self.folder / "data.bin"
        if not journal.exists() or not data.exists():
            return []
        found: list[dict[str, Any]] = []
        with journal.open(encoding="utf-8") as file, data.open("rb") as stored:
            head = _parsed(file.readline())
            if head is not None and head != json.loads(json.dumps({"format": FORMAT, **identity})):
                wrong = next((key for key in identity if head.get(key) != identity[key]), "format")
                raise RequestError(
                    f"it belongs to another extraction ({wrong} not the same)", path=self.folder,
                    hint="the same models and options as then, or --force without --resume to begin again",
                )  # fmt: skip
            for text in file if head is not None else ():
                line = _parsed(text)
                if line is None or line["start"] != self._at or not _whole(stored, line):
                    break
                found.append(line)
                self._at = line["stop"]
        return found

    def _enter(self, line: Mapping[str, Any]) -> None:
        assert self._source is not None  # noqa: S101  open() has made it
        arrays, at = {}, line["start"]
        for name, (dtype, shape) in line["arrays"].items():
            tensor = Tensor(dtype, tuple(shape))
            arrays[name] = Tensor(dtype, tuple(shape), (Region(self._source, at, tensor.nbytes),))
            at += tensor.nbytes
        self.entries[line["id"]] = Entry(line["numbers"], arrays)

    def add(self, name: str, numbers: Mapping[str, Any], arrays: Mapping[str, AnyArray]) -> None:
        """A finished module. Raises OSError when the disk is full."""
        start, checksum = self._at, 0
        for array in arrays.values():
            view = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
            checksum = zlib.crc32(view, checksum)
            self._data.write(view)
            self._at += len(view)
        self._data.flush()
        kept = {key: (DTYPES[array.dtype.name], list(array.shape)) for key, array in arrays.items()}
        line = {
            "id": name, "numbers": dict(numbers), "arrays": kept, "start": start, "stop": self._at, "crc": checksum
        }  # fmt: skip
        self._journal.write(json.dumps(line) + "\n")
        self._journal.flush()
        self._enter(line)

    def close(self, *, keep: bool) -> None:
        """Close both files; without ``keep`` there is nothing worth going on with, and the folder goes."""
        for file in (self._data, self._journal):
            if file is not None:
                file.flush()
                os.fsync(file.fileno())
                file.close()
        if not keep:
            self.remove()

    def remove(self) -> None:
        """Everything is in the output now."""
        self.entries.clear()
        shutil.rmtree(self.folder, ignore_errors=True)


def _parsed(text: str) -> dict[str, Any] | None:
    """A whole line of the journal, None for one that was cut off."""
    try:
        found = json.loads(text) if text.endswith("\n") else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _whole(stored: Any, line: Mapping[str, Any]) -> bool:  # noqa: ANN401  a binary file
    """Whether the data of a line are what they were."""
    checksum, left = 0, line["stop"] - line["start"]
    while left:
        data = stored.read(min(BLOCK, left))
        if not data:
            return False
        checksum, left = zlib.crc32(data, checksum), left - len(data)
    return bool(checksum == line["crc"])
