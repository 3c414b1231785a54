"""MiSS and Bone: the same block of rows for every r inputs, exactly a LoRA; against dense float64 deltas.

What PEFT itself computes of its files is in test_producers.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import lorasurgery
from lorasurgery.deltas.base import CannotError
from lorasurgery.deltas.miss import Miss
from lorasurgery.errors import BrokenModuleError, NotRepresentableError
from lorasurgery.io.tensors import of_array
from lorasurgery.operations.cut import ResizeOptions, resize
from tests.edges import run
from tests.oracle import raw, write

if TYPE_CHECKING:
    from pathlib import Path

STEM = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = WIDTH = 320


def restated(block: Any, out: int, width: int) -> Any:
    """Element by element."""
    found = np.empty((out, width))
    for i in range(out):
        for j in range(width):
            found[i, j] = block[j % len(block), i % block.shape[1]]
    return found


def file(folder: Path, shape: tuple[int, ...], dtype: str = "F16", word: str = "miss_block") -> Path:
    block = np.random.default_rng(0).standard_normal(shape) * 0.1
    write(folder / "in.safetensors", {f"{STEM}.{word}": raw(block, dtype)}, {})
    return folder / "in.safetensors"


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize(("columns", "rank", "width"), [(24, 4, 12), (24, 5, 12), (8, 3, 11), (24, 12, 12)])
def test_it_is_what_its_formula_says_and_exactly_a_lora(columns: int, rank: int, width: int, dtype: str) -> None:
    tensor = of_array(np.random.default_rng(1).standard_normal((rank, columns)).astype(np.float32), dtype)
    delta = Miss(tensor).over((24, width))
    expected = restated(tensor.f64(), 24, width)
    np.testing.assert_array_equal(delta.dense(), expected)
    low = delta.to_low_rank()
    assert (low.rank, low.up.dtype, low.down.dtype) == (rank, dtype, dtype)
    np.testing.assert_array_equal(low.dense(), expected)
    np.testing.assert_array_equal(delta.rows([(16, 24), (2, 7)]).dense(), expected[[*range(16, 24), *range(2, 7)]])
    np.testing.assert_array_equal(delta.scaled(0.5).dense(), expected / 2)


def test_a_block_of_another_layer() -> None:
    for shape in ((20, 12), (24, 3), (24, 12, 3, 3)):
        with pytest.raises(CannotError, match="block"):
            Miss(of_array(np.ones((4, 24), np.float32), "F32")).over(shape)


@pytest.mark.parametrize("word", ["miss_block", "bone_block", "miss_block.default"])
def test_files_are_read_under_both_names_and_become_lora(word: str, tmp_path: Path) -> None:
    source = file(tmp_path, (6, OUT), word=word)
    adapter = lorasurgery.load(source)
    ((_, module),) = adapter
    assert (module.family, module.scale.value) == ("miss", 1.0)
    with pytest.raises(NotRepresentableError, match="MiSS"):
        lorasurgery.convert(adapter, "comfyui")
    converted, report = lorasurgery.convert(adapter, "comfyui", lorasurgery.Options(as_lora=True))
    lorasurgery.save(converted, tmp_path / "out.safetensors", report=report)
    assert report.exact
    ((_, made),) = lorasurgery.load(tmp_path / "out.safetensors", arch="sd1")
    np.testing.assert_array_equal(made.dense(), module.dense())


def test_resize_finds_the_best_lora(tmp_path: Path) -> None:
    adapter = lorasurgery.load(file(tmp_path, (6, 64), "F32"))
    result, report = resize(adapter, ResizeOptions(rank=3))
    before, after = (next(iter(own.modules.values())).dense() for own in (adapter, result))
    best = np.sqrt(np.sum(np.linalg.svd(before, compute_uv=False)[3:] ** 2))
    assert np.linalg.norm(before - after) <= best * 1.0001
    assert report.modules[0].action == "to LoRA"
    for family in ("loha", "lokr", "full"):
        other = lorasurgery.convert(adapter, "sd-scripts", lorasurgery.Options(family=family))[0]
        assert next(iter(other.modules.values())).family == family


def test_what_multiplies_the_base_and_what_does_not_fit_is_named(tmp_path: Path) -> None:
    outcome = run("convert", file(tmp_path, (40, 8, 8)), tmp_path / "o.safetensors", "--target", "comfyui", "--as", "lora")
    assert outcome.code == 1
    assert "BAT" in outcome.err
    with pytest.raises(BrokenModuleError, match="none of a layer"):
        lorasurgery.load(file(tmp_path, (6, 300)))
