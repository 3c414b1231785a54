"""The base model beside an adapter: its weights by site, read one at a time, and their norms, remembered by content.

A weight is put together from the rows that the files hold, so it does not matter whether q, k and v are fused there (the
original layout, ComfyUI's, an all-in-one checkpoint) and split in the adapter (Diffusers), or the other way round.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.api import read_any
from lorasurgery.errors import RequestError
from lorasurgery.io.tensors import FLOATS
from lorasurgery.io.writer import replacing
from lorasurgery.linalg.policies import References
from lorasurgery.linalg.randomized import dense_svd
from lorasurgery.surgery.resize.base_names import Piece, located

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from lorasurgery.adapter import Site
    from lorasurgery.architectures.table import Architecture
    from lorasurgery.io.header import RawFile
    from lorasurgery.io.tensors import Tensor
    from lorasurgery.linalg.factors import AnyArray, Array
    from lorasurgery.surgery.resize.subject import Subject

CHUNK = 1024
"""Rows converted at a time."""
SAMPLES, SAMPLE = 64, 4096
"""Places and bytes that a content id looks at, beside names, dtypes and shapes."""
SCALES = (".scale_weight", ".weight_scale")
"""Where fp8 checkpoints keep the factor of a weight. Source: ComfyUI ``comfy/ops.py`` and ``quant_ops.py`` (2026-05)."""


@dataclass(slots=True)
class NormCache:
    """Norms of base weights by content id, in a JSON file; without a path only in memory."""

    path: Path | None = None
    _norms: dict[str, dict[str, float]] = field(default_factory=dict)
    _changed: bool = False

    def __post_init__(self) -> None:
        if self.path is not None and self.path.is_file():
            try:
                stored = json.loads(self.path.read_text("utf-8"))
                self._norms = {str(k): {str(n): float(v) for n, v in own.items()} for k, own in stored.items()}
            except (ValueError, AttributeError, TypeError):  # a cache that cannot be read is made again
                self._norms = {}

    def get(self, content: str, name: str, compute: Callable[[], float]) -> float:
        """The remembered number, or ``compute()``, which is remembered."""
        own = self._norms.setdefault(content, {})
        if name not in own:
            own[name] = compute()
            self._changed = True
        return own[name]

    def save(self) -> None:
        """Write the file if something is new."""
        if self.path is None or not self._changed:
            return
        with replacing(self.path) as fd, open(fd, "w", encoding="utf-8", closefd=False) as file:
            json.dump(self._norms, file)
        self._changed = False


@dataclass(slots=True)
class BaseModel:
    """Weights of a base model by component and original weight name."""

    path: Path
    content: str
    """Names, dtypes, shapes and samples of the data, hashed: the same for a copy, another for a finetune."""
    pieces: Mapping[tuple[str, str], Sequence[Piece]]
    cache: NormCache

    def weight(self, site: Site) -> Callable[[], AnyArray]:
        """A function that reads the weight of a site as (out, in*k*k) in float32.

        Raises RequestError when the base model lacks any of its rows.
        """
        parts = self._parts(site)
        return lambda: np.concatenate([rows for part in parts for rows in _rows(*part)])

    def frobenius(self, site: Site) -> float:
        """``||W||_F``."""
        squares = (np.sum(rows.astype(np.float64) ** 2) for part in self._parts(site) for rows in _rows(*part))
        return self._norm("fro", site, lambda: float(np.sqrt(sum(squares))))

    def spectral(self, site: Site) -> float:
        """The largest singular value of W, to 1e-3."""
        weight = self.weight(site)
        return self._norm("spn", site, lambda: float(dense_svd(weight(), rank=1).singular_values[0]))

    def along(self, subject: Subject) -> Array:
        """``u_i^T W v_i`` for every singular pair of the module; raises RequestError for a LoKr that stays one."""
        module, source = subject.module, subject.source
        if subject.form != "lora":
            raise RequestError(
                f"{module.name}: only a LoRA has the directions that the score subspace looks at", hint="as LoRA"
            )
        every = np.arange(len(source.values))
        left, right = (side(every, np.ones(len(every))) for side in (source.left, source.right))
        found, at = np.zeros(len(every)), 0
        for part in self._parts(module.site):
            for rows in _rows(*part):
                found += np.sum((rows @ right.T) * left[at : at + len(rows)], axis=0)
                at += len(rows)
        return found

    def references(self, subject: Subject) -> References:
        """What the scores of a module are measured against."""
        site = subject.module.site
        return References(
            subject.per_rank, lambda: self.spectral(site), lambda: self.frobenius(site), lambda: self.along(subject)
        )

    def _norm(self, kind: str, site: Site, compute: Callable[[], float]) -> float:
        name = ",".join(f"{span.weight}[{span.start}:{span.stop}]" for span in site.spans)
        return self.cache.get(self.content, f"{kind}:{site.component}:{name}", compute)

    def _parts(self, site: Site) -> list[tuple[Tensor, float]]:
        """(rows, their scale) in the order of the site."""
        found: list[tuple[Tensor, float]] = []
        for span in site.spans:
            at = span.start
            for piece in sorted(self.pieces.get((site.component, span.weight), ()), key=lambda p: p.start):
                if piece.start <= at < min(piece.stop, span.stop):
                    stop = min(piece.stop, span.stop)
                    first = piece.offset - piece.start
                    found.append((piece.tensor.rows([(first + at, first + stop)]), piece.scale))
                    at = stop
            if at < span.stop:
                raise RequestError(
                    f"the base model has no rows {at}:{span.stop} of {site.component} {span.weight}", path=self.path,
                    hint="the model it was trained on; for text encoders an all-in-one file, or the pipeline's folder",
                )  # fmt: skip
        return found


def open_base(path: str | Path, architecture: Architecture, cache: NormCache | None = None) -> BaseModel:
    """A base model from a checkpoint, in any layout, or from the folder of a Diffusers pipeline; only headers are read.

    Raises RequestError when none of its weights is one of the architecture's, FileFormatError and OSError for the files.
    """
    path = Path(path)
    pieces: dict[tuple[str, str], list[Piece]] = {}
    digest = hashlib.sha256()
    for prefix, raw in _files(path):
        _identify(digest, raw)
        for name, tensor in raw.tensors.items():
            place = located(prefix + name, architecture) if tensor.dtype in FLOATS else None
            if place is None:
                continue
            scale = _scale(raw, name.removesuffix(".weight"))
            offset = 0
            for span in place.spans:
                rows = span.stop - span.start
                piece = Piece(span.start, span.stop, tensor, offset, scale)
                pieces.setdefault((place.component, span.weight), []).append(piece)
                offset += rows
    if not pieces:
        raise RequestError(
            f"no weight of {architecture.name} is in it", path=path, hint="the base model that the adapter was trained on"
        )
    return BaseModel(path, digest.hexdigest(), pieces, cache or NormCache())


def _files(path: Path) -> Iterator[tuple[str, RawFile]]:
    """(prefix, file): a file itself, or every safetensors file of a folder with its subfolder's name before its keys."""
    if not path.is_dir():
        yield "", read_any(path)
        return
    for file in sorted(path.rglob("*.safetensors")):
        folder = file.parent.relative_to(path).parts
        yield f"{folder[0]}." if folder else "", read_any(file)


def _scale(raw: RawFile, stem: str) -> float:
    """The factor of an fp8 weight, 1 for others."""
    found = next((raw.tensors[stem + suffix] for suffix in SCALES if stem + suffix in raw.tensors), None)
    return found.item() if found is not None and found.size == 1 else 1.0


def _rows(tensor: Tensor, scale: float) -> Iterator[AnyArray]:
    """A weight in blocks of rows, (rows, in*k*k), float32."""
    width = prod(tensor.shape[1:])
    for at in range(0, tensor.shape[0], CHUNK):
        rows = tensor.rows([(at, min(at + CHUNK, tensor.shape[0]))])
        block = rows.f32().reshape(rows.shape[0], width)
        yield block * np.float32(scale) if scale != 1.0 else block


def _identify(digest: hashlib._Hash, raw: RawFile) -> None:
    """Add names, dtypes, shapes and evenly spaced samples of a file; neither its name nor its time."""
    names = sorted(raw.tensors)
    for name in names:
        digest.update(f"{name} {raw.tensors[name].dtype} {raw.tensors[name].shape}\n".encode())
    for name in names[:: max(len(names) // SAMPLES, 1)]:
        for region in raw.tensors[name].regions:
            middle = max((region.length - SAMPLE) // 2, 0)
            digest.update(region.source.read(region.offset + middle, min(SAMPLE, region.length)))
