"""Types of less than a byte, and the newer 8-bit ones: described and carried, never computed with."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from lorasurgery.cli.app import app
from lorasurgery.errors import FileFormatError, SurgeryError
from lorasurgery.inspection import describe
from lorasurgery.io.dtypes import BITS, CARRIED
from lorasurgery.io.header import header_bytes, read_safetensors
from lorasurgery.io.tensors import of_bytes

if TYPE_CHECKING:
    from pathlib import Path

STEM = "diffusion_model.layers.0.attention.out"
WIDTH = 3840


def lora(path: Path, dtype: str, rank: int = 8) -> Path:
    """A LoRA of one layer with every byte different from its neighbours."""
    size = WIDTH * rank * BITS[dtype] // 8
    data = bytes(i % 251 for i in range(size))
    tensors = {
        f"{STEM}.lora_A.weight": of_bytes(dtype, (rank, WIDTH), data),
        f"{STEM}.lora_B.weight": of_bytes(dtype, (WIDTH, rank), data[::-1]),
    }
    path.write_bytes(header_bytes(tensors, {}) + data + data[::-1])
    return path


@pytest.mark.parametrize("dtype", sorted(CARRIED))
def test_such_a_file_is_described(dtype: str, tmp_path: Path) -> None:
    own = describe(lora(tmp_path / "x.safetensors", dtype))
    assert (own.kind, own.architecture, own.families) == ("adapter", "z-image", {"lora": 1})
    assert own.dtype == {dtype: 2 * 8 * WIDTH}
    assert own.modules[0].bytes == 2 * 8 * WIDTH * BITS[dtype] // 8
    assert own.modules[0].rank == 8


@pytest.mark.parametrize("dtype", sorted(CARRIED))
def test_a_rename_carries_the_bytes(dtype: str, tmp_path: Path) -> None:
    source, out = lora(tmp_path / "x.safetensors", dtype), tmp_path / "out.safetensors"
    done = CliRunner().invoke(app, ["convert", str(source), str(out), "--target", "onetrainer"])
    assert done.exit_code == 0, done.stderr
    before, after = read_safetensors(source).tensors, read_safetensors(out).tensors
    for word, other in (("lora_A", "lora_down"), ("lora_B", "lora_up")):
        (new,) = (t for key, t in after.items() if f".{other}." in key)
        old = before[f"{STEM}.{word}.weight"]
        assert (new.dtype, new.shape, new.tobytes()) == (old.dtype, old.shape, old.tobytes())


@pytest.mark.parametrize("dtype", sorted(CARRIED))
def test_what_needs_the_values_is_refused(dtype: str, tmp_path: Path) -> None:
    source, out = lora(tmp_path / "x.safetensors", dtype), tmp_path / "out.safetensors"
    commands = (
        ["convert", str(source), str(out), "--target", "comfyui", "--dtype", "fp16"],
        ["inspect", str(source), "--spectrum"],
        ["resize", str(source), str(out), "--rank", "2"],
    )
    for command in commands:
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 1, command
        assert f"{dtype} values are carried as bytes" in done.stderr
        assert not out.exists()


def test_the_library_writes_what_is_read_here(tmp_path: Path) -> None:
    """safetensors' own F4: torch packs two to a byte, the header counts both."""
    values = torch.arange(WIDTH * 4).to(torch.uint8)
    packed = values.reshape(8, WIDTH // 2).view(torch.float4_e2m1fn_x2)
    up = values.flip(0).reshape(WIDTH, 4).view(torch.float4_e2m1fn_x2)
    save_file({f"{STEM}.lora_A.weight": packed, f"{STEM}.lora_B.weight": up}, tmp_path / "x.safetensors")
    own = read_safetensors(tmp_path / "x.safetensors").tensors[f"{STEM}.lora_A.weight"]
    assert (own.dtype, own.shape) == ("F4", (8, WIDTH))
    assert own.tobytes() == packed.view(torch.uint8).numpy().tobytes()


def test_half_a_byte_is_no_tensor_and_no_row(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    text = json.dumps({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0")
    with pytest.raises(FileFormatError, match="12 bits, no whole number of bytes"):
        read_safetensors(path)
    rows = of_bytes("F4", (2, 3), b"\1\2\3")
    assert rows.rows([(0, 2)]) is rows
    with pytest.raises(SurgeryError, match="no whole number of bytes"):
        rows.rows([(1, 2)])
    assert of_bytes("F6_E2M3", (2, 4), b"abcdef").rows([(1, 2)]).tobytes() == b"def"
