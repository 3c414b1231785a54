"""Small adapter files, whole and broken, and the command line run on them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from typer.testing import CliRunner

from lorasurgery.cli.app import app

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    Arrays = dict[str, NDArray[np.generic]]

TO_Q = "lora_unet_layers_0_attention_to_q"
"""A Z-Image module (3840 x 3840) as musubi-tuner spells it."""
DIM = 3840
_NAMES = {"f8": "F64", "f4": "F32", "f2": "F16", "i8": "I64", "i1": "I8"}


class Outcome(NamedTuple):
    """How a run of the command line ended."""

    code: int
    out: str
    err: str


def run(*args: object) -> Outcome:
    """The command line, in this process."""
    result = CliRunner().invoke(app, [str(arg) for arg in args], env={"COLUMNS": "120", "NO_COLOR": "1"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


def to_bytes(tensors: Mapping[str, NDArray[np.generic]], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file."""
    entries: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    data = b""
    for name, array in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        dtype = _NAMES[array.dtype.str[1:]]
        entries[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return with_header(entries, data)


def with_header(entries: object, data: bytes = b"") -> bytes:
    """A file with this header, right or wrong."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


def save(path: Path, tensors: Mapping[str, NDArray[np.generic]], metadata: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors file and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(to_bytes(tensors, metadata))
    return path


def lora(stem: str = TO_Q, out: int = DIM, inp: int = DIM, *, rank: int = 2, alpha: float | None = 1.0) -> Arrays:
    """One LoRA module in kohya's words, in fp16."""
    random = np.random.default_rng(len(stem))
    tensors: Arrays = {
        f"{stem}.lora_down.weight": random.standard_normal((rank, inp)).astype("f2"),
        f"{stem}.lora_up.weight": random.standard_normal((out, rank)).astype("f2"),
    }
    if alpha is not None:
        tensors[f"{stem}.alpha"] = np.array(alpha, "f4")
    return tensors


def lokr(stem: str = TO_Q, out: int = DIM, inp: int = DIM, *, block: int = 60) -> Arrays:
    """One LoKr module: w1 whole, w2 of rank 2."""
    random = np.random.default_rng(len(stem))
    return {
        f"{stem}.lokr_w1": random.standard_normal((block, block)).astype("f2"),
        f"{stem}.lokr_w2_a": random.standard_normal((out // block, 2)).astype("f2"),
        f"{stem}.lokr_w2_b": random.standard_normal((2, inp // block)).astype("f2"),
        f"{stem}.alpha": np.array(1.0, "f4"),
    }


def loha(stem: str = TO_Q, out: int = DIM, inp: int = DIM) -> Arrays:
    """One LoHa module of rank 2."""
    random = np.random.default_rng(len(stem))
    tensors: Arrays = {f"{stem}.hada_w{i}_a": random.standard_normal((out, 2)).astype("f2") for i in (1, 2)}
    tensors |= {f"{stem}.hada_w{i}_b": random.standard_normal((2, inp)).astype("f2") for i in (1, 2)}
    return tensors


def dotted(tensors: Arrays) -> Arrays:
    """The same keys as ComfyUI has them, where the module names have no underscores of their own."""
    return {
        key.replace("lora_unet_layers_0_attention_to_q", "diffusion_model.layers.0.attention.to_q"): t
        for key, t in tensors.items()
    }


def listing(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its content: nothing may appear, vanish or change."""
    found = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in found}


def refused(folder: Path, args: Sequence[object], *texts: str, code: int = 1) -> str:
    """Run, and expect one line on stderr with these texts, nothing on stdout, no file touched; returns the line."""
    before = listing(folder)
    outcome = run(*args)
    assert outcome.code == code, outcome
    assert outcome.out == ""
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("error: ")
    missing = [text for text in texts if text not in lines[0]]
    assert not missing, (missing, lines[0])
    assert listing(folder) == before, "a refused run left something behind"
    return lines[0]


def calm(warnings: Sequence[str]) -> list[str]:
    """Warnings but for those that tell how far the result is from what was cut."""
    return [text for text in warnings if not text.startswith("large error: ")]
