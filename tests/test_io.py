"""Reading and writing: the serialiser's own bytes, nothing at the output until it is whole, hashes as sd-scripts has them."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import threading
import tracemalloc
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors import deserialize
from safetensors.torch import save as library_save

from lorasurgery.errors import BrokenModuleError, ValueRangeError
from lorasurgery.io.blame import blamed_on
from lorasurgery.io.dtypes import BITS, cast_array
from lorasurgery.io.header import MAX_HEADER, RawFile, header_bytes, read_safetensors
from lorasurgery.io.peft_folder import read_peft_folder, write_peft_folder
from lorasurgery.io.tensors import Tensor, computed, of_array, of_bytes, scalar, stack, zeros
from lorasurgery.io.torchfile import read_torch
from lorasurgery.io.writer import write_safetensors
from lorasurgery.verbs.apply.folder import replacing_folder
from tests.edges import listing, lora, save

if TYPE_CHECKING:
    from pathlib import Path

    from lorasurgery.io.tensors import Array

TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPES = list(TORCH)


def random_tensors() -> dict[str, Tensor]:
    random = np.random.default_rng(7)
    found = {}
    for i, dtype in enumerate(DTYPES):
        for j, shape in enumerate(((3, 5), (), (2, 0), (4,))):
            size = int(np.prod(shape)) * BITS[dtype] // 8
            found[f"{'zyx'[j % 3]}.{i}é.{j}"] = of_bytes(dtype, shape, random.integers(0, 2, size, "u1").tobytes())
    return found


# header -------------------------------------------------------------------------------------------------------------------


def test_what_we_write_is_what_the_library_writes(tmp_path: Path) -> None:
    tensors = random_tensors()
    theirs = {
        key: torch.frombuffer(bytearray(own.tobytes() or b"\0"), dtype=torch.uint8)[: own.nbytes]
        .view(TORCH[own.dtype])
        .reshape(own.shape)
        for key, own in tensors.items()
    }
    ours = tmp_path / "ours.safetensors"
    write_safetensors(ours, tensors, {"one": "1"})
    assert ours.read_bytes() == library_save(theirs, {"one": "1"})
    head = header_bytes(tensors, None)
    assert library_save(theirs)[: len(head)] == head
    again = read_safetensors(ours)
    assert again.metadata == {"one": "1"}
    assert {k: (t.dtype, t.shape, t.tobytes()) for k, t in again.tensors.items()} == {
        k: (t.dtype, t.shape, t.tobytes()) for k, t in tensors.items()
    }
    assert {k: (e["dtype"], tuple(e["shape"])) for k, e in deserialize(ours.read_bytes())} == {
        k: (t.dtype, t.shape) for k, t in tensors.items()
    }


def test_header_padding_and_order_are_not_taken_for_granted(tmp_path: Path) -> None:
    """Writers pad with any number of spaces, and some lay tensors out in another order than the header lists them."""
    entries = {
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    }
    for pad in (0, 3, 16):
        text = json.dumps(entries).encode() + b" " * pad
        path = tmp_path / "padded.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + np.array([1, 2], "f4").tobytes())
        found = read_safetensors(path).tensors
        assert (found["a"].item(), found["b"].item()) == (1.0, 2.0)
    assert MAX_HEADER == 100_000_000


# hashes -------------------------------------------------------------------------------------------------------------------


def test_model_hash_is_the_hash_of_the_data(tmp_path: Path) -> None:
    path = tmp_path / "hashed.safetensors"
    written = write_safetensors(path, random_tensors(), {"ss_network_dim": "4"}, hashes=True)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert written["sshs_model_hash"] == hashlib.sha256(content[8 + length :]).hexdigest()
    assert len(written["sshs_legacy_hash"]) == 8
    assert read_safetensors(path).metadata == written


# writing ------------------------------------------------------------------------------------------------------------------


def failing() -> Array:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_leaves_nothing_behind(existing: bool, tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    if existing:
        path.write_text("precious")
    before = listing(tmp_path)
    good, bad = of_array(np.ones(4, "f4"), "F32"), computed("F16", (4,), failing)
    with pytest.raises(OSError, match="No space"):
        write_safetensors(path, {"a": good, "b": bad}, {})
    with pytest.raises(BrokenModuleError, match="b comes out with NaN"):
        write_safetensors(path, {"a": good, "b": computed("F16", (4,), lambda: np.full(4, np.nan))}, {})
    assert listing(tmp_path) == before


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted() -> Array:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(tmp_path / "out.safetensors", {"b": computed("F16", (4,), interrupted)}, {})
    assert listing(tmp_path) == {}


def full_disk(fd: int, data: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_blamed_on_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorasurgery.io.writer.os.write", full_disk)
    tensors = {"a.lora_up.weight": zeros("F32", (2, 2))}
    with pytest.raises(OSError, match="No space left") as file:
        write_safetensors(tmp_path / "out.safetensors", tensors, {})
    assert file.value.filename == str(tmp_path / "out.safetensors")
    with pytest.raises(OSError, match="No space left") as folder:
        write_peft_folder(tmp_path / "out", {"": ({}, tensors)}, {})
    assert folder.value.filename == str(tmp_path / "out" / "adapter_model.safetensors")
    with pytest.raises(OSError, match="No space left") as model, replacing_folder(tmp_path / "model") as made:
        write_safetensors(made / "transformer" / "x.safetensors", tensors, {})
    assert model.value.filename == str(tmp_path / "model" / "transformer" / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_other_errors_keep_their_own_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as missing, blamed_on(tmp_path / "out"):
        (tmp_path / "in").read_bytes()
    assert missing.value.filename == str(tmp_path / "in")


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_safetensors(tmp_path / "out.safetensors", {"a": scalar(1.0)}, {})
        write_peft_folder(tmp_path / "peft", {"": ({}, {"a": scalar(1.0)})}, {"format": "pt"})
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "out.safetensors").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "peft").stat().st_mode) == 0o750


def test_copies_without_the_kernels_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = read_safetensors(save(tmp_path / "in.safetensors", lora(out=300_000, inp=300_000)))
    plain = tmp_path / "plain.safetensors"
    write_safetensors(plain, source.tensors, {})

    def refuse(*_args: object, **_kwargs: object) -> int:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    write_safetensors(tmp_path / "copied.safetensors", source.tensors, {})
    assert (tmp_path / "copied.safetensors").read_bytes() == plain.read_bytes()


def test_the_input_may_vanish_after_it_is_opened(tmp_path: Path) -> None:
    path = save(tmp_path / "in.safetensors", lora())
    raw = read_safetensors(path)
    data = {key: t.tobytes() for key, t in raw.tensors.items()}
    path.unlink()
    write_safetensors(tmp_path / "out.safetensors", raw.tensors, {})
    assert {key: t.tobytes() for key, t in read_safetensors(tmp_path / "out.safetensors").tensors.items()} == data


def test_an_input_that_shrinks_is_an_error(tmp_path: Path) -> None:
    path = save(tmp_path / "in.safetensors", lora())
    raw = read_safetensors(path)
    with path.open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(OSError, match="ended at byte"):
        write_safetensors(tmp_path / "out.safetensors", raw.tensors, {})
    assert sorted(listing(tmp_path)) == ["in.safetensors"]


def streams(folder: Path) -> dict[str, Tensor]:
    """Stored and computed tensors between a byte and several blocks, in turns."""
    rng = np.random.default_rng(3)
    sizes = (1, 70_000, (1 << 20) - 3, 1 << 20, (1 << 20) + 1, 3_000_000, 5, 200_000, 9 << 20)
    arrays = {f"t{i}": rng.integers(0, 256, size, "u1") for i, size in enumerate(sizes)}
    write_safetensors(folder / "stored.safetensors", {k: of_array(a, "U8") for k, a in arrays.items()}, {})
    stored = read_safetensors(folder / "stored.safetensors").tensors
    return {k: computed("U8", a.shape, a.copy) if i % 2 else stored[k] for i, (k, a) in enumerate(arrays.items())}


@pytest.mark.parametrize("hashes", [False, True])
@pytest.mark.parametrize("kinds", ["both", "stored", "computed"])
def test_streams_of_any_sizes_arrive_in_order(hashes: bool, kinds: str, tmp_path: Path) -> None:
    tensors = streams(tmp_path)
    if kinds != "both":
        tensors = {k: t for k, t in tensors.items() if (t.compute is None) == (kinds == "stored")}
    out = tmp_path / "out.safetensors"
    written = write_safetensors(out, tensors, {}, hashes=hashes)
    found = read_safetensors(out).tensors
    assert {k: t.tobytes() for k, t in found.items()} == {k: t.tobytes() for k, t in tensors.items()}
    if hashes:
        content = out.read_bytes()
        assert written["sshs_model_hash"] == hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


@pytest.mark.parametrize("hashes", [False, True])
@pytest.mark.parametrize("after", [0, 3 << 20, 14 << 20])
def test_a_full_disk_leaves_nothing_behind(hashes: bool, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, left = streams(tmp_path), [after]
    before, write = listing(tmp_path), os.write

    def full(fd: int, data: memoryview) -> int:
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return write(fd, data)

    def no_kernel(*_args: object, **_kwargs: object) -> int:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "write", full)
    monkeypatch.setattr(os, "copy_file_range", no_kernel, raising=False)
    with pytest.raises(OSError, match="No space"):
        write_safetensors(tmp_path / "out.safetensors", tensors, {}, hashes=hashes)
    assert listing(tmp_path) == before


def test_any_failure_of_the_other_thread_arrives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """More blocks follow than may wait: nobody may wait for a thread that is gone."""
    arrays = {f"t{i}": computed("U8", (900_000,), lambda: np.zeros(900_000, "u1")) for i in range(12)}
    arrays["big"] = computed("U8", (9 << 20,), lambda: np.zeros(9 << 20, "u1"))

    def broken(_fd: int, _data: memoryview) -> int:
        if threading.current_thread() is threading.main_thread():
            return len(_data)
        raise MemoryError("no more")

    monkeypatch.setattr(os, "write", broken)
    with pytest.raises(MemoryError, match="no more"):
        write_safetensors(tmp_path / "out.safetensors", arrays, {}, hashes=True)
    assert listing(tmp_path) == {}


def test_few_large_tensors_are_in_memory_at_once(tmp_path: Path) -> None:
    size = 24 << 20
    tensors = {f"t{i}": computed("U8", (size,), lambda: np.ones(size, "u1")) for i in range(8)}
    tracemalloc.start()
    try:
        write_safetensors(tmp_path / "out.safetensors", tensors, {}, hashes=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2.5 * size


# tensors ------------------------------------------------------------------------------------------------------------------


def test_rows_columns_stacks_and_casts(tmp_path: Path) -> None:
    values = np.arange(24, dtype="f4").reshape(6, 4)
    stored = read_safetensors(save(tmp_path / "in.safetensors", {"w": values})).tensors["w"]
    for own in (stored, computed("F32", (6, 4), lambda: values)):
        assert np.array_equal(own.rows([(4, 6), (0, 1)]).array(), values[[4, 5, 0]])
        assert np.array_equal(own.columns([(1, 3)]).array(), values[:, 1:3])
        assert np.array_equal(
            stack([own.rows([(0, 2)]), zeros("F32", (1, 4))]).array(), np.vstack([values[:2], np.zeros((1, 4))])
        )
        assert np.array_equal(own.reshape(4, 6).array(), values.reshape(4, 6))
        assert own.cast("F16").array().dtype == np.float16
        assert own.rows([(0, 6)]) is own
    assert stored.rows([(0, 3)]).rows([(1, 2)]).compute is None
    with pytest.raises(ValueError, match="cannot see"):
        stored.reshape(5, 5)
    with pytest.raises(ValueError, match="cannot stack"):
        stack([zeros("F32", (1, 4)), zeros("F32", (1, 5))])


@pytest.mark.parametrize(("dtype", "largest"), [("F16", 65504.0), ("F8_E5M2", 57344.0), ("F8_E4M3", 448.0), ("BF16", 3.3e38)])
def test_a_cast_that_overflows_is_an_error_and_nan_is_none(dtype: str, largest: float) -> None:
    fits = np.array([largest, -largest, 0.0])
    assert np.isfinite(cast_array(fits, dtype).astype("f8")).all()
    with pytest.raises(ValueRangeError, match=f"is beyond the range of {dtype}"):
        cast_array(fits * 10, dtype)
    assert np.isnan(cast_array(np.array([np.nan]), dtype).astype("f8")).all()


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != "BOOL"])
def test_scalars(dtype: str) -> None:
    assert scalar(4, dtype).item() == 4.0


# PEFT folders, torch files ------------------------------------------------------------------------------------------------


def test_peft_folders(tmp_path: Path) -> None:
    weights = {"base_model.model.a.lora_A.weight": of_array(np.ones((1, 2)), "F16")}
    write_peft_folder(tmp_path / "one", {"transformer": ({"r": 1}, weights)}, {"format": "pt"})
    raw, configs = read_peft_folder(tmp_path / "one")
    assert (list(raw.tensors), configs) == (list(weights), {"": {"r": 1}})
    write_peft_folder(
        tmp_path / "two", {"transformer": ({"r": 1}, weights), "text_encoder": ({"r": 2}, weights)}, {"format": "pt"}
    )
    raw, configs = read_peft_folder(tmp_path / "two")
    assert sorted(raw.tensors) == ["text_encoder.a.lora_A.weight", "transformer.a.lora_A.weight"]
    assert configs == {"transformer": {"r": 1}, "text_encoder": {"r": 2}}
    write_peft_folder(tmp_path / "one", {"": ({"r": 3}, weights)}, {"format": "pt"})
    assert json.loads((tmp_path / "one" / "adapter_config.json").read_text()) == {"r": 3}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


def test_a_peft_folder_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    weights = {"a": of_array(np.ones((1, 2)), "F16")}
    write_peft_folder(tmp_path / "one", {"": ({"r": 1}, weights)}, {"format": "pt"})
    before = listing(tmp_path)
    with pytest.raises(OSError, match="No space"):
        write_peft_folder(tmp_path / "one", {"": ({"r": 2}, {"a": computed("F16", (4,), failing)})}, {"format": "pt"})
    assert listing(tmp_path) == before


def test_torch_files_of_every_dtype(tmp_path: Path) -> None:
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
    tensors = {str(kind): torch.arange(6).to(kind).reshape(2, 3).t() for kind in kinds}
    torch.save({**tensors, "note": "text", "epoch": 3}, tmp_path / "all.pt")
    raw = read_torch(tmp_path / "all.pt")
    assert isinstance(raw, RawFile)
    assert raw.metadata == {"note": "text"}
    for name, value in tensors.items():
        assert raw.tensors[name].shape == (3, 2)
        assert np.array_equal(raw.tensors[name].f64(), value.to(torch.float64).numpy())
