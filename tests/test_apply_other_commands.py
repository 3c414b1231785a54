"""What the other commands make of files whose families multiply the weight: the same file by other names, or a reason."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from typer.testing import CliRunner

import lorasurgery
from lorasurgery.cli.app import application
from lorasurgery.errors import BrokenModuleError, NotAnAdapterError, NotRepresentableError
from lorasurgery.models import open_model
from lorasurgery.operations.onto.inputs import source_of
from lorasurgery.verbs.apply import ApplyOptions, apply, read_source
from tests.applied import read
from tests.multiplied import FILES, base, save
from tests.oracle import raw, write

if TYPE_CHECKING:
    from pathlib import Path

    from typer.testing import Result

NAME = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
NOWHERE_ELSE = ("peft_oft", "peft_coft", "peft_earl", "peft_bat", "peft_boft", "peft_ia3_conv")
"""Only the configuration says what they mean, or only PEFT reads them."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model") / "unet.safetensors", base())


def call(*words: object) -> Result:
    return CliRunner().invoke(application(), [str(word) for word in words])


def applied(model: Path, adapter: Path, out: Path) -> dict[str, bytes]:
    opened = open_model(model, arch="sd1")
    apply(opened, [read_source(adapter, opened.architecture, 0.6)], out, ApplyOptions(), force=True)
    return {name: tensor.data for name, tensor in read(out).items()}


@pytest.mark.parametrize("adapter", FILES, ids=lambda path: path.name)
def test_a_converted_file_makes_the_same_weights_or_is_refused(tmp_path: Path, model: Path, adapter: Path) -> None:
    own, out = lorasurgery.load(adapter, arch="sd1"), tmp_path / "c.safetensors"
    if adapter.name.startswith(NOWHERE_ELSE):
        with pytest.raises(NotRepresentableError, match="ComfyUI does not load"):
            lorasurgery.save(own, out, layout="comfyui")
        return
    lorasurgery.save(own, out, layout="comfyui")
    assert applied(model, out, tmp_path / "o.safetensors") == applied(model, adapter, tmp_path / "p.safetensors")


@pytest.mark.parametrize("adapter", FILES, ids=lambda path: path.name)
def test_inspect_knows_the_family_and_sums_and_cuts_say_why_not(tmp_path: Path, adapter: Path) -> None:
    modules = list(lorasurgery.load(adapter, arch="sd1").modules.values())
    found = call("inspect", adapter, "--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.output)["families"] == {modules[0].family: len(modules)}
    out = tmp_path / ("o" if adapter.is_dir() else "o.safetensors")
    for words, reason in (
        (("merge", f"{adapter}:0.5", f"{adapter}:0.5"), "acts on the base weight"),
        (("resize", adapter, "--rank", "2"), "needs the base weight"),
    ):
        refused = call(*words, "-o", out, "--arch", "sd1")
        assert refused.exit_code in {1, 2}, refused.output
        assert reason in " ".join(refused.output.split())
        assert not out.exists()


@pytest.mark.parametrize("adapter", FILES, ids=lambda path: path.name)
def test_compare_reads_the_same_configuration_as_apply(adapter: Path) -> None:
    own = lorasurgery.load(adapter, arch="sd1")
    asked = read_source(adapter, own.architecture)
    for module in own.modules.values():
        assert source_of(own).rules_of(module) == asked.rules_of(module)


def test_onetrainer_is_said_to_read_its_own_mark() -> None:
    adapter = next(path for path in FILES if path.name == "onetrainer_oft_scaled.safetensors")
    assert "loads completely" in call("check", adapter, "--for", "onetrainer").output
    assert "nothing loads" in call("check", adapter, "--for", "comfyui").output


@pytest.mark.parametrize(
    ("suffix", "shape", "what"),
    [
        ("vera_lambda_b", (320,), "shared random matrices"), ("fourierft_spectrum", (10,), "random frequencies"),
        ("hra_u", (320, 4), "reflections"), ("c3a_kernel", (10, 10, 32), "C3A of PEFT"),
        ("hira_A", (4, 320), "element by element"),
    ],
)  # fmt: skip
def test_types_of_peft_that_are_not_read_are_called_what_they_are(
    tmp_path: Path, suffix: str, shape: tuple[int, ...], what: str
) -> None:
    write(tmp_path / "a.safetensors", {f"{NAME}.{suffix}": raw(np.ones(shape), "F32")})
    with pytest.raises(NotAnAdapterError, match=what):
        lorasurgery.load(tmp_path / "a.safetensors")


def test_adalora_is_no_lora(tmp_path: Path) -> None:
    shapes = {"lora_A": (4, 320), "lora_B": (320, 4), "lora_E": (4, 1)}
    write(tmp_path / "a.safetensors", {f"{NAME}.{slot}": raw(np.ones(shape), "F32") for slot, shape in shapes.items()})
    with pytest.raises(BrokenModuleError, match="AdaLoRA"):
        lorasurgery.load(tmp_path / "a.safetensors")
