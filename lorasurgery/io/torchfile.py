"""PyTorch files (``.pt``, ``.ckpt``, ``.bin``), through torch's weights-only loader and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.errors import FileFormatError
from lorasurgery.io.header import RawFile
from lorasurgery.io.sniff import explain_torch
from lorasurgery.io.tensors import Tensor, of_bytes

if TYPE_CHECKING:
    import torch

_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
_CONTAINERS = ("state_dict", "model", "module", "lora", "params")


def read_torch(path: str | Path) -> RawFile:
    """The tensors of a PyTorch file, in memory, and its string metadata.

    Raises FileFormatError when it is no such file or holds anything but plain tensors, numbers and strings.
    """
    path = Path(path)
    with path.open("rb") as file:
        head = file.read(512)
    other = explain_torch(path, head, path.stat().st_size)
    if other is not None:
        raise other
    import pickle

    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise FileFormatError(
            f"torch's weights-only loader refuses it ({reason}); a pickle may run any code, so it is not opened another way",
            path=path,
            hint="a .safetensors version of the file",
        ) from error
    state = _state_dict(loaded)
    tensors = {name: _tensor(value) for name, value in state.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise FileFormatError("it holds no tensors by name", path=path, hint="a .safetensors version of the file")
    return RawFile(path, tensors, {k: v for k, v in state.items() if isinstance(v, str)})


def _state_dict(loaded: Any) -> dict[str, Any]:  # noqa: ANN401  whatever the file holds
    if not isinstance(loaded, dict):
        return {}
    for name in _CONTAINERS:
        if isinstance(loaded.get(name), dict):
            return dict(loaded[name])
    return dict(loaded)


def _tensor(value: torch.Tensor) -> Tensor:
    import torch

    name = _NAMES.get(str(value.dtype).removeprefix("torch."))
    if name is None:
        value, name = value.float(), "F32"
    raw = value.detach().contiguous().reshape(-1).view(torch.uint8)
    return of_bytes(name, tuple(value.shape), bytes(raw.numpy().tobytes()))
