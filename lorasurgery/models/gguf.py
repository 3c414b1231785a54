"""GGUF models, through the ``gguf`` library: each tensor's rows are dequantised when they are read.

A diffusion model in GGUF has its original names. Tensors of more than four axes are stored flat, with their shape in the
metadata. Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, gguf 0.19 ``gguf_reader.py`` and ``quants.py``, and
city96/ComfyUI-GGUF ``loader.py`` for ``comfy.gguf.orig_shape``.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from lorasurgery.errors import FileFormatError, RequestError
from lorasurgery.io.header import RawFile
from lorasurgery.io.sources import FileSource, Region
from lorasurgery.io.tensors import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gguf import GGUFReader, ReaderTensor

    from lorasurgery.io.tensors import Array, Ranges, Shape

PLAIN = {"F64": "F64", "F32": "F32", "F16": "F16", "BF16": "BF16", "I8": "I8", "I16": "I16", "I32": "I32", "I64": "I64"}
"""ggml types that are stored as safetensors stores them."""
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
AGAIN = "download it again, or save it again with the program that made it"


@dataclass(frozen=True)
class Quantised(Tensor):
    """A tensor in ggml's blocks, float32 to whoever reads it; rows are dequantised alone."""

    kind: str = ""
    """ggml's name: ``Q4_K``."""
    decode: Callable[[int, int], Array] | None = None
    """Rows ``start:stop`` of axis 0, in float32."""

    def rows(self, ranges: Ranges) -> Tensor:
        """The rows of axis 0 in ``ranges``, in that order, dequantised when they are asked for."""
        shape = (sum(stop - start for start, stop in ranges), *self.shape[1:])
        return Tensor("F32", shape, compute=lambda: self._taken(ranges).reshape(shape))

    def _taken(self, ranges: Ranges) -> Array:
        import numpy as np

        return np.concatenate([self._decoded(start, stop) for start, stop in ranges])

    def _decoded(self, start: int, stop: int) -> Array:
        if self.decode is None:
            raise ValueError("no decoder")
        return self.decode(start, stop)


def read_gguf(path: Path) -> RawFile:
    """The tensors of a GGUF file, still on disk, and its string metadata.

    Raises RequestError when the ``gguf`` library is not installed, FileFormatError when the file is damaged or of a kind
    that the library cannot dequantise, OSError when it cannot be opened.
    """
    reader = _opened(path)
    if reader.byte_order == "S":
        raise FileFormatError("its numbers are in the other byte order", path=path, hint="a GGUF file for this machine")
    source = FileSource(path)
    tensors = {tensor.name: _tensor(path, source, reader, tensor) for tensor in reader.tensors}
    if int(_value(reader, "split.count") or 1) > 1:
        raise FileFormatError("this is one part of a split GGUF model", path=path, hint="llama-gguf-split --merge")
    metadata = {key: str(_value(reader, key)) for key, field in reader.fields.items() if key.startswith("general.") and field}
    return RawFile(path, tensors, metadata)


def _opened(path: Path) -> GGUFReader:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise FileFormatError("this is no GGUF file", path=path, hint="download it again")
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise RequestError(
            "GGUF models are read with the gguf library, which is not installed", path=path, hint="pip install gguf"
        ) from error
    try:
        return GGUFReader(path)
    except Exception as error:  # the library checks little: a cut or damaged file fails in any way there is
        raise FileFormatError(f"the gguf library cannot read it ({error})", path=path, hint=AGAIN) from error


def _value(reader: GGUFReader, key: str) -> Any:  # noqa: ANN401  a number, a string or a list of them
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _tensor(path: Path, source: FileSource, reader: GGUFReader, tensor: ReaderTensor) -> Tensor:
    kind = tensor.tensor_type.name
    stored = tuple(int(n) for n in reversed(tensor.shape.tolist()))
    original = _value(reader, ORIGINAL_SHAPE + tensor.name)
    shape = stored if original is None else tuple(int(n) for n in original)
    if prod(shape) != prod(stored):
        raise FileFormatError(f"{tensor.name}: its shape {list(stored)} cannot be {list(shape)}", path=path, hint=AGAIN)
    region = Region(source, int(tensor.data_offset), int(tensor.n_bytes))
    if region.offset + region.length > source.size():
        raise FileFormatError(f"truncated: {tensor.name} lies beyond the end of the file", path=path, hint="download it again")
    if kind in PLAIN:
        return Tensor(PLAIN[kind], shape, (region,))
    return _quantised(path, region, shape, tensor)


def _quantised(path: Path, region: Region, shape: Shape, tensor: ReaderTensor) -> Quantised:
    """Blocks run along the stored rows; the rows of the true shape are whole runs of blocks, or the tensor is read whole."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    kind = tensor.tensor_type
    block, size = GGML_QUANT_SIZES[kind]
    try:
        dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError as error:
        raise FileFormatError(
            f"{tensor.name} is {kind.name}, which the gguf library cannot dequantise", path=path, hint="another version"
        ) from error
    width = prod(shape[1:])

    def decode(start: int, stop: int) -> Array:
        first, last = start * width // block, -(-stop * width // block)
        data = region.source.read(region.offset + first * size, (last - first) * size)
        blocks = np.frombuffer(data, np.uint8).reshape(last - first, size)
        values = dequantize(blocks, kind).reshape(-1)[start * width - first * block :][: (stop - start) * width]
        return values.reshape(stop - start, *shape[1:])

    return Quantised("F32", shape, (region,), lambda: decode(0, shape[0]), kind.name, decode)
