"""PyTorch files (``.pt``, ``.ckpt``, ``.bin``), through torch's weights-only loader and nothing else."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.errors import FileFormatError
from lorasurgery.io.header import RawFile
from lorasurgery.io.sniff import a_folder, explain_torch
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
    if path.is_dir():
        raise a_folder(path)
    with path.open("rb") as file:
        head = file.read(512)
    other = explain_torch(path, head, path.stat().st_size)
    if other is not None:
        raise other
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the pickle's protocol; what cannot be read is refused below
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle fails in any way there is
        reason = _first_sentence(str(error)) or type(error).__name__
        raise FileFormatError(
            f"torch's weights-only loader refuses it ({reason}); a pickle may run any code, so it is not opened another way",
            path=path,
            hint="a .safetensors version of the file",
        ) from error
    state = {name: value for name, value in _state_dict(loaded).items() if isinstance(name, str)}
    tensors = {name: _tensor(path, name, value) for name, value in state.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise FileFormatError("it holds no tensors by name", path=path, hint="a .safetensors version of the file")
    return RawFile(path, tensors, {k: v for k, v in state.items() if isinstance(v, str)})


def _first_sentence(text: str) -> str:
    """torch's own advice, to load with weights_only=False, is left out: it is the one thing not to do."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    unsupported = next((line for line in lines if "Unsupported" in line or "GLOBAL" in line), "")
    line = unsupported or (lines[0] if lines else "")
    line = line[line.index("Unsupported") :] if "Unsupported" in line else line
    return line.split(". ")[0].split(" Please use")[0].rstrip(".")


def _state_dict(loaded: Any) -> dict[Any, Any]:  # noqa: ANN401  whatever the file holds
    if not isinstance(loaded, dict):
        return {}
    for name in _CONTAINERS:
        if isinstance(loaded.get(name), dict):
            return dict(loaded[name])
    return dict(loaded)


def _tensor(path: Path, key: str, value: torch.Tensor) -> Tensor:
    import torch

    name = _NAMES.get(str(value.dtype).removeprefix("torch."))
    if name is None or value.layout != torch.strided or value.is_meta:
        kind = value.dtype if name is None else value.layout if not value.is_meta else "meta"
        raise FileFormatError(
            f"{key} is a {kind} tensor, which no adapter uses", path=path, hint="a .safetensors version of the file"
        )
    raw = value.detach().contiguous().reshape(-1).view(torch.uint8)
    return of_bytes(name, tuple(value.shape), bytes(raw.numpy().tobytes()))
