"""A base model: every tensor by its place, and readers of any rows of the original weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from lorasurgery.architectures.from_base import CUSTOM
from lorasurgery.architectures.table import ORIGINAL
from lorasurgery.errors import FileFormatError, RequestError
from lorasurgery.io.dtypes import FLOATS
from lorasurgery.layouts.peft_keys import transposed
from lorasurgery.models.content import content_id
from lorasurgery.models.detect import recognised, with_own_names
from lorasurgery.models.encoders import TURNED
from lorasurgery.models.files import model_files
from lorasurgery.models.names import BIAS, OTHER, WEIGHT, Located, in_lone_encoder, located
from lorasurgery.models.quantised import refuse_quantised
from lorasurgery.models.reading import Piece, assembled, parts_of
from lorasurgery.models.scales import is_number_of_another, scale_of
from lorasurgery.models.weights import Weight
from lorasurgery.site import DENOISER

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from lorasurgery.architectures.table import Architecture, Shape, Spans
    from lorasurgery.models.detect import Recognised
    from lorasurgery.models.files import ModelFile
    from lorasurgery.models.reading import Reader

Pieces = dict[tuple[str, str], list[Piece]]


@dataclass(frozen=True)
class Model:
    """A base model whose tensors are still on disk."""

    path: Path
    architecture: Architecture
    """A table's, that table with this model's own sizes, or one made of the file's names for a model no table knows."""
    layout: str
    """``original``, ``comfyui``, ``all-in-one``, ``diffusers``, or ``unknown`` for a model no table knows."""
    files: tuple[ModelFile, ...]
    weights: Mapping[str, Weight]
    """By prefix + key, in file order."""
    prefix: str = ""
    """What stands before the names of the denoiser in :attr:`weights`, or of the encoder that the model is."""
    component: str = DENOISER
    """The denoiser; of a model that is one text encoder, the encoder's table."""

    naming: str = ORIGINAL
    """Whose names the denoiser's weights have, as in :attr:`Architecture.namings`."""

    @cached_property
    def extended(self) -> Architecture:
        """The table with everything that this model has and the table has not, under the model's own names."""
        return self.architecture if self.component != DENOISER else with_own_names(self.files, self.architecture, self.naming)

    @property
    def of_diffusers(self) -> bool:
        """Whether it is as Diffusers saves a model or a pipeline: its names, and its folder or its configuration."""
        if self.layout != "diffusers":
            return False
        if self.architecture.id == CUSTOM:  # transformers' folders look the same
            return any(file.class_name for file in self.files)
        return self.path.is_dir() or any(file.with_config for file in self.files)

    @cached_property
    def content(self) -> str:
        """Names, dtypes, shapes and samples of the data, hashed: the same for a copy, another for a finetune."""
        return content_id({name: weight.tensor for name, weight in self.weights.items()})

    def reader(self, component: str, spans: Spans) -> Reader:
        """Rows of weights and norms, put together in the order of ``spans``, however the files fuse, split or permute them.

        Raises RequestError when the model lacks any of the rows, FileFormatError when the tensors are of several widths.
        """
        found = self._reader(component, spans, self._pieces)
        if isinstance(found, str):
            raise RequestError(
                f"the base model has no rows {found}", path=self.path,
                hint="the model it was trained on; for text encoders their own file, an all-in-one file, or a pipeline",
            )  # fmt: skip
        return found

    def bias_reader(self, component: str, spans: Spans) -> Reader | None:
        """The biases of the same rows; None when the model has none for them.

        Raises RequestError when it has them for some of the rows only.
        """
        found = self._reader(component, spans, self._bias_pieces)
        if not isinstance(found, str):
            return found
        if any(self._bias_pieces.get((component, span.weight)) for span in spans):
            raise RequestError(f"the base model has no biases {found}", path=self.path, hint="a complete model")
        return None

    def sites(self) -> Iterator[tuple[str, Spans]]:
        """(component, spans) of every weight and norm that a table has, as finely as the files divide them."""
        for weight in self.weights.values():
            if weight.place is not None and weight.listed and weight.role not in {BIAS, OTHER}:
                yield weight.place.component, weight.place.spans

    @cached_property
    def _pieces(self) -> Pieces:
        return _by_weight(_upright(w) for w in self.weights.values() if w.role not in {BIAS, OTHER})

    @cached_property
    def _bias_pieces(self) -> Pieces:
        return _by_weight(w for w in self.weights.values() if w.role == BIAS)

    def _reader(self, component: str, spans: Spans, pieces: Pieces) -> Reader | str:
        """The reader, or the rows that are not there."""
        parts = parts_of(spans, [pieces.get((component, span.weight), ()) for span in spans])
        if not isinstance(parts, list):
            return f"{parts.start}:{parts.stop} of {component} {parts.weight}"
        try:
            return assembled(parts)
        except ValueError as error:
            shapes = ", ".join(f"{p.weight.key} {list(p.weight.shape)}" for p in parts)
            raise FileFormatError(f"{error}: {shapes} stand for parts of one weight", path=self.path) from error


def open_model(path: str | Path, *, arch: str | Architecture | None = None) -> Model:
    """A base model from a file, an index of shards, a model's folder or a pipeline's; only headers are read.

    ``arch`` overrides detection: a family or variant (``flux1-dev``), whose table takes on this model's own sizes, or a
    table to be used as it is. Raises FileFormatError for broken, incomplete and quantised files, RequestError for a folder
    that is no model and for an unknown ``arch``, OSError.
    """
    path = Path(path)
    files = model_files(path)
    for file in files:
        refuse_quantised(file.raw)
    known = recognised(files, path, arch)
    weights = MappingProxyType(_weights(files, known))
    return Model(path, known.architecture, known.layout, files, weights, known.prefix, known.component, known.naming)


def _weights(files: Iterable[ModelFile], known: Recognised) -> dict[str, Weight]:
    """Every tensor by prefix + key; raises FileFormatError for a key that two files have and a scale that fits no weight."""
    weights: dict[str, Weight] = {}
    for file in files:
        for key, tensor in file.raw.tensors.items():
            name = file.prefix + key
            if name in weights:
                raise FileFormatError(
                    f"{key} is in {weights[name].file.path.name} too", path=file.path, hint="the shards of one model only"
                )
            place = _located(name, tensor.shape, known)
            if is_number_of_another(key, file.raw.tensors) or not (place.listed or tensor.dtype in FLOATS):
                place = Located(None, OTHER)  # not a parameter: a scale, or integers
            scale = scale_of(key, file.raw.tensors, file.path)
            weights[name] = Weight(key, file, tensor, place.place, place.role, scale, listed=place.listed)
    return weights


def _located(name: str, shape: Shape, known: Recognised) -> Located:
    if known.component != DENOISER:
        return in_lone_encoder(name, shape, known.component, known.prefix)
    return located(name, shape, known.architecture, known.naming, known.prefix)


def _upright(weight: Weight) -> Weight:
    """The weight as (out, in)."""
    return replace(weight, tensor=transposed(weight.tensor), role=WEIGHT) if weight.role == TURNED else weight


def _by_weight(weights: Iterable[Weight]) -> Pieces:
    """The pieces of every original weight, by their first row."""
    found: Pieces = {}
    for weight in weights:
        offset = 0
        for span in weight.place.spans if weight.place is not None else ():
            component = weight.place.component if weight.place is not None else ""
            found.setdefault((component, span.weight), []).append(Piece(span.start, span.stop, weight, offset))
            offset += span.stop - span.start
    for pieces in found.values():
        pieces.sort(key=_first_row)
    return found


def _first_row(piece: Piece) -> int:
    return piece.start
