"""Without ``--target`` a command that changes numbers changes no name: every fixture of a real program, every real key list."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lorasurgery.adapter import written_in
from lorasurgery.errors import SurgeryError
from lorasurgery.files.opened import together
from lorasurgery.files.taken import Unparsed
from lorasurgery.layouts.emit import emit
from lorasurgery.report import Report
from tests.edges import run
from tests.oracle import raw as numbers
from tests.oracle import read, write
from tests.test_wild import facts, raw

FIXTURES = Path(__file__).parent / "fixtures"
FILES = sorted(path for path in (FIXTURES / "producers").glob("*.safetensors") if ".truth" not in path.name)
LISTS = [
    name
    for name in sorted(path.name.removesuffix(".json.gz") for path in (FIXTURES / "wild").glob("*.json.gz"))
    if all(facts(name)["keys"].values())
]
COMMANDS = (
    ("prune", "{}", "--negate", "-o"), ("prune", "{}", "--scale", 0.5, "-o"), ("merge", "{}:0.5", "-o"), ("merge", "{}", "-o"),
    ("resize", "{}", "--rank", 2, "--te", "-o"),
)  # fmt: skip
REFUSED = ("handmade_sd15_lora_unet_unet_underscore_suffix", "invoke_anima_lora_peft_format")
"""Mangled keys; shapes that were made up."""
REFUSALS = ("depends on the base", "acts on the base", "nothing to resize", "DoRA")


@pytest.mark.parametrize("source", FILES, ids=lambda path: path.stem)
def test_files_of_real_programs(source: Path, tmp_path: Path) -> None:
    out, keys = tmp_path / "out.safetensors", read(source)[0].keys()
    for command in COMMANDS:
        outcome = run(*(str(word).format(source) for word in command), out, "--force")
        if outcome.code:
            assert any(word in outcome.err for word in REFUSALS), outcome.err
        elif command[0] != "resize" or "lokr" not in source.name:  # whose cut needs two factors where there was one
            assert read(out)[0].keys() == keys, command[0]
    outcome = run("split", source, "--by", "component", "-o", tmp_path / "part")
    assert outcome.code == 0, outcome.err
    parts = [read(path)[0] for path in tmp_path.glob("part-*.safetensors")]
    assert {key: own for part in parts for key, own in part.items()} == read(source)[0]


@pytest.mark.parametrize("name", LISTS)
def test_real_key_lists(name: str) -> None:
    """Every key list that can be read is written as it was, whatever mixture of spellings it is."""
    file = raw(name)
    try:
        adapter = together([Unparsed(file)])[0]
    except SurgeryError:
        assert name in REFUSED
        return
    written = emit(adapter, written_in(adapter), Report()).tensors
    carried = {left.key for left in adapter.leftovers}
    assert written.keys() | carried == file.tensors.keys()
    assert not written.keys() & carried
    assert all(tensor is file.tensors[key] or tensor == file.tensors[key] for key, tensor in written.items())
    ledger = adapter.ledger
    assert {**ledger.used, **ledger.harmless, **ledger.lost}.keys() == file.tensors.keys()


NORMS = {".diff": ".diff_b", ".w_norm": ".b_norm"}


@pytest.mark.parametrize(("prefix", "join"), [("diffusion_model.", "."), ("lora_unet_", "_")])
@pytest.mark.parametrize("first", NORMS)
@pytest.mark.parametrize("other", NORMS)
def test_a_merged_norm_is_spelled_as_in_the_first_file(first: str, other: str, prefix: str, join: str, tmp_path: Path) -> None:
    norm, layer = (prefix + join.join(("blocks", "0", *parts)) for parts in (("norm3",), ("self_attn", "q")))
    paths = []
    for i, word in enumerate((first, other)):
        keys = {
            f"{norm}{word}": (5120,), f"{norm}{NORMS[word]}": (5120,), f"{layer}.lora_down.weight": (2, 5120),
            f"{layer}.lora_up.weight": (5120, 2),
        }  # fmt: skip
        paths.append(tmp_path / f"{i}.safetensors")
        write(paths[-1], {key: numbers(np.full(shape, 0.5 + i), "F32") for key, shape in keys.items()})
    out = tmp_path / "out.safetensors"
    assert run("merge", f"{paths[0]}:1", f"{paths[1]}:0.5", "-o", out).code == 0
    tensors = read(out)[0]
    assert set(tensors) == set(read(paths[0])[0])
    for word in (first, NORMS[first]):
        assert np.allclose(tensors[norm + word].f64(), 0.5 + 0.75)
