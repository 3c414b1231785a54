"""`lorasurgery inspect`: output, exit codes, batches, what it imports, and damaged headers."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from lorasurgery.cli.app import app
from lorasurgery.errors import SurgeryError
from lorasurgery.inspection import describe
from tests.headers import FLUX, HERE, hollow, lora

if TYPE_CHECKING:
    from pathlib import Path

SAMPLE = HERE / "samples" / "z_image_lokr.safetensors"
run = CliRunner()


def inspect(*arguments: object) -> Any:
    return run.invoke(app, ["inspect", *map(str, arguments)])


def test_summary_says_what_it_is() -> None:
    result = inspect(SAMPLE, "--modules", "--keys", "--tags", "--spectrum")
    assert result.exit_code == 0
    for words in ("Z-Image (z-image), 100% explained", "sd-scripts", "shapes imply -1; they agree", "musubi-tuner",
                  "lora_unet_layers_0_attention_to_k", "lokr_w2_a", "energy kept", "90 % rank"):  # fmt: skip
        assert words in result.stdout, words


def test_json_is_one_object() -> None:
    own = json.loads(inspect(SAMPLE, "--json").stdout)
    assert (own["schema"], own["kind"], own["architecture"], own["layout"]) == (1, "adapter", "z-image", "sd-scripts")
    assert own["keys"] is None
    assert own["spectrum"] is None
    own = json.loads(inspect(SAMPLE, "--json", "--keys", "--spectrum", "--tags").stdout)
    assert len(own["keys"]) == own["tensors"]
    assert len(own["spectrum"]["modules"]) == len(own["modules"])
    assert own["tags"] == []


def test_strict_fails_on_warnings(tmp_path: Path) -> None:
    path = hollow(tmp_path / "x.safetensors", lora(FLUX), {"ss_network_dim": "99"})
    assert inspect(path).exit_code == 0
    assert inspect(path, "--strict").exit_code == 1
    assert inspect(SAMPLE, "--strict").exit_code == 0


def test_unreadable_file_is_exit_code_1(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"<html>no</html>")
    result = inspect(path, "--json")
    assert result.exit_code == 1
    assert "HTML" in result.stderr
    assert json.loads(result.stdout)["kind"] == "unreadable"
    assert inspect(tmp_path / "none.safetensors").exit_code == 1
    assert inspect(tmp_path / "none*.safetensors").exit_code == 2


def test_folder_has_a_line_a_file_and_goes_on(tmp_path: Path) -> None:
    hollow(tmp_path / "a.safetensors", lora(FLUX))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.safetensors").write_bytes(b"\0" * 20)
    hollow(tmp_path / "sub" / "c.safetensors", {"model.diffusion_model.x.weight": [2, 2]})
    (tmp_path / ".hidden.safetensors").write_bytes(b"")
    result = inspect(tmp_path, "--json")
    assert result.exit_code == 3
    kinds = [json.loads(line)["kind"] for line in result.stdout.splitlines()]
    assert kinds == ["adapter", "unreadable", "model"]
    plain = inspect(tmp_path / "a.safetensors", tmp_path / "sub" / "c.safetensors")
    assert plain.exit_code == 0
    assert "an adapter for FLUX.1 dev in sd-scripts layout: 6 lora modules, rank 8" in plain.stdout


def test_many_files_are_read_by_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(4):
        hollow(tmp_path / f"{i}.safetensors", lora(FLUX))
    (tmp_path / "9.safetensors").write_bytes(b"x")
    monkeypatch.setattr("lorasurgery.cli.inspect._workers", lambda files: 2)
    result = inspect(tmp_path, "--json")
    assert result.exit_code == 3
    assert [json.loads(line)["path"][-13:-12] for line in result.stdout.splitlines()] == ["0", "1", "2", "3", "9"]


def test_peft_folder_is_one_adapter_and_a_collection_is_not() -> None:
    own = json.loads(inspect(HERE / "producers" / "peft_lora", "--json").stdout)
    assert (own["container"], own["layout"], own["metadata"]["adapter_config.json"]["value"]["peft_type"]) == (
        "peft-folder", "peft", "LORA",
    )  # fmt: skip


def test_keys_from_a_file_cannot_steer_the_terminal(tmp_path: Path) -> None:
    shapes = lora({"lora_unet_\x1b[2J[red]x_0_y": [8, 8]})
    result = inspect(hollow(tmp_path / "x.safetensors", shapes, {"a\x1b]0;": "\x1b[31m[bold]"}), "--modules", "--keys")
    assert result.exit_code == 0
    assert "\x1b[2J" not in result.stdout
    assert "\x1b[31m" not in result.stdout
    assert "[red]x_0_y" in result.stdout


@pytest.mark.parametrize("arguments", [["--json", "--keys", "--tags"], ["--modules"]])
def test_neither_torch_nor_numpy_is_imported(arguments: list[str]) -> None:
    code = (
        "import sys; from lorasurgery.cli.app import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as e: assert not e.code\n"
        "bad = {'torch', 'numpy', 'safetensors'} & sys.modules.keys(); assert not bad, bad"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(SAMPLE), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# damaged headers ----------------------------------------------------------------------------------------------------------

GOOD = b"""{"a.lora_down.weight":{"dtype":"F16","shape":[2,4],"data_offsets":[0,16]},
"a.lora_up.weight":{"dtype":"F16","shape":[4,2],"data_offsets":[16,32]}}"""


def file_of(path: Path, text: bytes, data: bytes = bytes(32)) -> Path:
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def described(path: Path) -> bool:
    """Whether it is described; anything but a SurgeryError is a failure of the test."""
    try:
        json.dumps(describe(path, keys=True, tags=True).to_json(), allow_nan=False)
    except SurgeryError:
        return False
    return True


@pytest.mark.parametrize(
    "text",
    [
        GOOD.replace(b"up", b"down"), GOOD.replace(b"[16,32]", b"[8,24]"), GOOD.replace(b"[16,32]", b"[20,36]"),
        GOOD.replace(b"[4,2]", b"[4,-2]"), GOOD.replace(b"[4,2]", b"[4,3]"), GOOD.replace(b"F16", b"F17"),
        GOOD.replace(b"[4,2]", b"[1e300,2]"), GOOD.replace(b"[4,2]", b"[true,2]"), GOOD.replace(b"[2,4]", b'"x"'),
        GOOD[:-1], b"[]", b"null", b'"x"', b"", b"{" * 5000, b"[" * 100_000, b'{"a":' * 3000 + b"1" + b"}" * 3000,
        b"\xff\xfe" + GOOD, GOOD.replace(b"a.lora_up", b"\xe9.lora_up"), b'{"__metadata__":{"a":1}}', b'{"__metadata__":[]}',
        b'{"x":{"dtype":"F16","shape":[%s],"data_offsets":[0,32]}}' % (b"9" * 5000),
    ],
    ids=range(22),
)  # fmt: skip
def test_damaged_headers_are_errors(text: bytes, tmp_path: Path) -> None:
    assert not described(file_of(tmp_path / "x.safetensors", text))


def test_a_huge_claim_reads_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((100_000_000_000).to_bytes(8, "little") + b"{")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert not described(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


@settings(max_examples=300)
@given(data=st.data())
def test_changed_bytes_give_an_answer_or_a_clean_error(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    text = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text) - 1))
        kind = data.draw(st.sampled_from(["set", "cut", "add"]))
        new = data.draw(st.binary(min_size=1, max_size=6))
        text[at : at + (0 if kind == "add" else len(new))] = b"" if kind == "cut" else new
    described(file_of(tmp_path_factory.getbasetemp() / "fuzz.safetensors", bytes(text) or b"{}"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
SS_KEYS = (
    "ss_tag_frequency", "ss_datasets", "ss_dataset_dirs", "ss_bucket_info", "lora_adapter_metadata", "ot_config", "software",
    "training_info", "ss_network_dim", "ss_training_started_at", "ss_training_finished_at", "ss_lokr_factor",
)  # fmt: skip


@settings(max_examples=200)
@given(metadata=st.dictionaries(st.sampled_from(SS_KEYS), st.text(max_size=20) | JSON.map(json.dumps), max_size=5))
def test_any_metadata_is_described(metadata: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "meta.safetensors"
    entries = json.loads(GOOD)
    try:
        json.dumps(metadata, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return
    file_of(path, json.dumps({"__metadata__": metadata, **entries}).encode())
    assert described(path)
