"""`inspect` on PyTorch files: real ``torch.save`` of state dicts, nested ones, and pickles that would run code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from lorasurgery.cli.app import app
from lorasurgery.errors import FileFormatError
from lorasurgery.inspection import describe

if TYPE_CHECKING:
    from lorasurgery.inspection import Description

SOURCE = Path(__file__).parent / "fixtures" / "producers" / "lycoris_locon.safetensors"
SAME = (
    "architecture",
    "layout",
    "families",
    "components",
    "rank",
    "alpha",
    "scale",
    "dtype",
    "tensors",
    "parameters",
    "modules",
)


def saved(path: Path, *, inside: str = "", **more: Any) -> Path:
    state = load_file(SOURCE) | more
    torch.save({inside: state, "epoch": 3} if inside else state, path)
    return path


def as_the_source(own: Description) -> None:
    source = describe(SOURCE)
    assert [getattr(own, name) for name in SAME] == [getattr(source, name) for name in SAME]
    assert (own.kind, own.container, own.coverage) == ("adapter", "pytorch", 1.0)


@pytest.mark.parametrize("name", ["lora.pt", "lora.ckpt", "lora.bin", "lora.pth"])
def test_a_state_dict_is_described_as_its_safetensors_twin(name: str, tmp_path: Path) -> None:
    as_the_source(describe(saved(tmp_path / name)))


@pytest.mark.parametrize("inside", ["state_dict", "model", "lora"])
def test_a_nested_state_dict(inside: str, tmp_path: Path) -> None:
    as_the_source(describe(saved(tmp_path / "lora.ckpt", inside=inside)))


def test_strings_beside_the_tensors_are_metadata(tmp_path: Path) -> None:
    own = describe(saved(tmp_path / "lora.pt", ss_network_dim="99"))
    assert own.metadata["ss_network_dim"] == {"type": "int", "value": 99}
    assert {warning.code for warning in own.warnings} == {"network-dim"}


def test_another_model_is_said_to_be_one(tmp_path: Path) -> None:
    torch.save({"first_stage_model.encoder.conv_in.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "vae.pt")
    assert describe(tmp_path / "vae.pt").kind != "adapter"


class Evil:
    """A pickle that would write a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.path, "owned"))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    target = tmp_path / "owned"
    torch.save({"a.lora_down.weight": torch.zeros(2, 2), "evil": Evil(target)}, tmp_path / "evil.ckpt")
    with pytest.raises(FileFormatError, match="weights-only loader refuses it"):
        describe(tmp_path / "evil.ckpt")
    assert not target.exists()
    done = CliRunner().invoke(app, ["inspect", str(tmp_path / "evil.ckpt"), "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["kind"] == "unreadable"
    assert "may run any code" in done.stderr


def test_a_folder_of_both_kinds(tmp_path: Path) -> None:
    saved(tmp_path / "a.pt")
    (tmp_path / "b.safetensors").write_bytes(SOURCE.read_bytes())
    done = CliRunner().invoke(app, ["inspect", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.stderr
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert (first["container"], second["container"]) == ("pytorch", "safetensors")
    assert first["modules"] == second["modules"]
