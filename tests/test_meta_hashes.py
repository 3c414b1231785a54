"""Hashes against an independent computation: safetensors.torch.save and hashlib, as sd-scripts does it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file

from lorasurgery.io.header import read_safetensors
from lorasurgery.operations.notes.hashes import NOTHING, verify
from tests.edges import run, with_header

PRODUCERS = Path(__file__).parent / "fixtures" / "producers"
SS = {"ss_network_dim": "4", "ss_tag_frequency": json.dumps({"10_cat": {"a": 1}}), "ss_comment": 'é "\\\n\x01'}
OTHER = {"format": "pt", "modelspec.title": "x", "sshs_model_hash": "0", "note": "n"}
MIXED = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.float64, torch.int8, torch.bool, torch.uint8,
         torch.int16, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2)  # fmt: skip


def reference(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> tuple[str, str]:
    """What sd-scripts' precalculate_safetensors_hashes returns."""
    data = safetensors.torch.save(tensors, {k: v for k, v in metadata.items() if k.startswith("ss_")})
    start = 8 + int.from_bytes(data[:8], "little")
    return hashlib.sha256(data[start:]).hexdigest(), hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]


def tensors_of(case: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    if case == "mixed":
        return {f"m{i % 5}.{i}": torch.randint(0, 2, (3, 7)).to(d) for i, d in enumerate(MIXED)} | {"a": torch.tensor(3)}
    if case == "header over 1 MiB":
        return {f"lora_unet_block_{i}_" + "x" * 200: torch.randn(64) for i in range(4000)}
    if case == "nothing":
        return {}
    wide = {"mixed large": 400, "large": 1200, "just over": 512}[case]
    found = {f"b.{i}": torch.randn(wide, wide).to(d) for i, d in enumerate((torch.float16, torch.float32))}
    return found if case == "mixed large" else {"w": torch.randn(wide, wide)}


CASES = ("mixed", "mixed large", "large", "just over", "header over 1 MiB", "nothing")


@pytest.mark.parametrize("metadata", [SS | OTHER, OTHER, SS, None], ids=["all", "no ss_", "only ss_", "none"])
@pytest.mark.parametrize("case", CASES)
def test_equal_to_sd_scripts(tmp_path, case, metadata):
    tensors, path = tensors_of(case), tmp_path / "a.safetensors"
    save_file(tensors, path, metadata)
    found = verify(read_safetensors(path))
    data = path.read_bytes()
    model, legacy = reference(tensors, metadata or {})
    assert [s.expected for s in found.stored[:2]] == [model, legacy]
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    assert found.data_sha256 == hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    assert found.autov1 == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    assert found.serialiser_order
    if metadata is None:
        assert found.verdict == "absent"


def save_in_order(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """A file whose data lies in the order of the dict (musubi-tuner's mem_eff_save_file)."""
    names = {torch.float32: "F32", torch.float16: "F16"}
    entries: dict[str, object] = {"__metadata__": metadata}
    data = b""
    for name, tensor in tensors.items():
        raw = tensor.numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        entries[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    path.write_bytes(with_header(entries, data))


@pytest.mark.parametrize("wide", [8, 700])
def test_data_in_another_order(tmp_path, wide):
    torch.manual_seed(1)
    tensors = {"z": torch.randn(wide, wide), "b": torch.randn(wide, wide).half(), "a": torch.randn(wide, wide)}
    model, legacy = reference(tensors, SS)
    on_disk = hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors.values())).hexdigest()
    by_name = hashlib.sha256(b"".join(tensors[n].numpy().tobytes() for n in sorted(tensors))).hexdigest()
    for value, verdict in ((model, "right"), (on_disk, "right"), (by_name, "stale")):
        save_in_order(tmp_path / "a.safetensors", tensors, SS | {"sshs_model_hash": value, "sshs_legacy_hash": legacy})
        found = verify(read_safetensors(tmp_path / "a.safetensors"))
        assert not found.serialiser_order
        assert [(s.verdict, s.expected) for s in found.stored[:2]] == [(verdict, model), ("right", legacy)]
        assert found.data_sha256 == on_disk
    for value in (model, on_disk, by_name):
        save_in_order(tmp_path / "a.safetensors", tensors, {"modelspec.hash_sha256": "0x" + value.upper()})
        assert verify(read_safetensors(tmp_path / "a.safetensors")).stored[2].verdict == "right"
    assert "another order" in run("meta", "verify", tmp_path / "a.safetensors").out


def test_stale_right_absent_and_fix(tmp_path):
    path, tensors = tmp_path / "a.safetensors", tensors_of("large")
    metadata = SS | {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "e3b0c442", "modelspec.hash_sha256": "0x" + NOTHING}
    save_file(tensors, path, metadata)
    before = path.read_bytes()
    outcome = run("meta", "verify", path)
    assert outcome.code == 0
    assert outcome.out.count("stale  ") == 3
    assert "hash of nothing" in outcome.out
    assert run("meta", "verify", path, "--strict").code == 1
    dry = run("meta", "fix", path, "--dry-run")
    assert (dry.code, path.read_bytes()) == (0, before)
    assert "header rewritten in place" in run("meta", "fix", path, "--in-place").out
    model, legacy = reference(tensors, metadata)
    assert {"sshs_model_hash": model, "sshs_legacy_hash": legacy}.items() <= read_safetensors(path).metadata.items()
    result = json.loads(run("meta", "verify", path, "--strict", "--json").out)
    assert (result["verdict"], [s["verdict"] for s in result["stored"]]) == ("right", ["right"] * 3)
    assert result["autov3"] == model[:12]
    assert "unchanged" in run("meta", "fix", path, "--in-place").out


def test_fix_adds_absent_ones(tmp_path):
    path, tensors = tmp_path / "a.safetensors", tensors_of("mixed large")
    save_file(tensors, path, SS)
    assert "unchanged" in run("meta", "fix", path, "--in-place").out
    assert run("meta", "fix", path, "--in-place", "--add").code == 0
    metadata = read_safetensors(path).metadata
    assert (metadata["sshs_model_hash"], metadata["sshs_legacy_hash"]) == reference(tensors, SS)


def test_small_file_has_the_hash_of_nothing(tmp_path):
    save_file(tensors_of("mixed"), tmp_path / "a.safetensors", {"sshs_legacy_hash": "e3b0c442"})
    out = run("meta", "verify", tmp_path / "a.safetensors").out
    assert "every such file has it" in out
    assert "right  e3b0c442" in out


def test_random_metadata_order_cannot_be_checked(tmp_path):
    path = tmp_path / "a.safetensors"
    metadata = {"ss_tag_frequency": "x" * 1_100_000, "ss_network_dim": "4", "sshs_legacy_hash": "01234567"}
    save_file(tensors_of("large"), path, metadata)
    found = verify(read_safetensors(path))
    assert (found.stored[1].verdict, found.stored[1].expected) == ("cannot be checked", None)
    assert run("meta", "verify", path, "--strict").code == 0
    single = {"ss_tag_frequency": "x" * 1_100_000}
    save_file(tensors_of("large"), path, single)
    assert verify(read_safetensors(path)).stored[1].expected == reference(tensors_of("large"), single)[1]


def test_lycoris_own_hash_is_told_apart(tmp_path):
    source = PRODUCERS / "lycoris_lokr.safetensors"
    found = verify(read_safetensors(source)).stored[0]
    assert found.verdict == "cannot be checked"
    assert "LyCORIS" in found.note
    assert json.loads(run("meta", "fix", source, "--dry-run", "--json").out)["changed"] == []
    assert run("meta", "fix", source, "--all", "-o", tmp_path / "out.safetensors").code == 0
    fixed = read_safetensors(tmp_path / "out.safetensors").metadata["sshs_model_hash"]
    assert fixed == reference(safetensors.torch.load_file(source), {})[0]


def test_edit_of_ss_keys_keeps_the_legacy_hash_true(tmp_path):
    path, tensors = tmp_path / "a.safetensors", tensors_of("large")
    _, legacy = reference(tensors, SS)
    save_file(tensors, path, SS | {"sshs_legacy_hash": legacy})
    done = run("meta", "unset", path, "ss_tag*", "--in-place")
    assert "computed again" in done.out
    left = {key: value for key, value in SS.items() if key != "ss_tag_frequency"}
    assert read_safetensors(path).metadata["sshs_legacy_hash"] == reference(tensors, left)[1] != legacy
    run("meta", "set", path, "sshs_legacy_hash=00000000", "--in-place")
    run("meta", "set", path, "ss_epoch=3", "--in-place")
    assert read_safetensors(path).metadata["sshs_legacy_hash"] == "00000000"  # it was wrong before, fix is for that


def test_folder_goes_on_after_a_bad_file(tmp_path):
    save_file(tensors_of("mixed"), tmp_path / "good.safetensors", {"sshs_model_hash": "1"})
    (tmp_path / "deep").mkdir()
    save_file(tensors_of("mixed"), tmp_path / "deep" / "b.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"<html>")
    outcome = run("meta", "verify", tmp_path)
    assert (outcome.code, len(outcome.out.splitlines()), len(outcome.err.splitlines())) == (3, 2, 1)
    lines = [json.loads(line) for line in run("meta", "verify", tmp_path / "*.safetensors", "--json").out.splitlines()]
    assert [("error" in line, line["file"].endswith("good.safetensors")) for line in lines] == [(True, False), (False, True)]
    (tmp_path / "bad.safetensors").unlink()
    assert run("meta", "verify", tmp_path).code == 0
    assert run("meta", "verify", tmp_path, "--strict").code == 3
    assert run("meta", "verify", tmp_path / "good.safetensors", "--strict").code == 1


def old_hash(tensors: dict[str, torch.Tensor], metadata: dict[str, str], era: str) -> str:
    """What sd-scripts computed with an old safetensors: 0.2 sorted by name and did not pad, 0.3.0 padded by the remainder."""
    ranks = {torch.float32: (0, "F32"), torch.float16: (1, "F16")}
    names = sorted(tensors, key=lambda n: n if era == "0.2" else (ranks[tensors[n].dtype][0], n))
    entries: dict[str, object] = {"__metadata__": {k: v for k, v in metadata.items() if k.startswith("ss_")}}
    data = b""
    for name in names:
        own = tensors[name].numpy().tobytes()
        offsets = [len(data), len(data) + len(own)]
        kind = ranks[tensors[name].dtype][1]
        entries[name] = {"dtype": kind, "shape": list(tensors[name].shape), "data_offsets": offsets}
        data += own
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (0 if era == "0.2" else len(text) % 8)
    return hashlib.sha256((len(text).to_bytes(8, "little") + text + data)[0x100000:0x110000]).hexdigest()[:8]


@pytest.mark.parametrize("era", ["0.2", "0.3.0"])
@pytest.mark.parametrize("comment", ["", "1", "12", "123", "1234", "12345", "123456", "1234567"])
@pytest.mark.parametrize("order", ["serialiser", "names"])
def test_hashes_of_the_time_before_headers_were_padded_are_right(tmp_path, era, comment, order):
    torch.manual_seed(1)
    tensors = {"a.up": torch.randn(700, 300).half(), "a.wide": torch.randn(500, 500), "b.up": torch.randn(300, 700).half()}
    metadata = SS | {"ss_comment": comment}
    legacy, path = old_hash(tensors, metadata, era), tmp_path / "a.safetensors"
    stored = metadata | {"sshs_legacy_hash": legacy}
    if order == "names":
        save_in_order(path, dict(sorted(tensors.items())), stored)
    else:
        save_file(tensors, path, stored)
    found = verify(read_safetensors(path)).stored[1]
    now = reference(tensors, metadata)[1]
    assert (found.verdict, found.expected) == ("right", now)
    assert (era in found.note) == (legacy != now)
    assert run("meta", "fix", path, "--in-place").code == 0
    assert read_safetensors(path).metadata["sshs_legacy_hash"] == legacy
    assert run("meta", "set", path, "--title", "x", "--in-place").code == 0
    assert read_safetensors(path).metadata["sshs_legacy_hash"] == legacy  # it hangs on ss_ keys alone
    assert run("meta", "set", path, "ss_comment=a longer one", "--in-place").code == 0
    assert (
        read_safetensors(path).metadata["sshs_legacy_hash"] == reference(tensors, metadata | {"ss_comment": "a longer one"})[1]
    )


def test_a_wrong_legacy_hash_is_still_stale(tmp_path):
    tensors = tensors_of("large")
    save_file(tensors, tmp_path / "a.safetensors", SS | {"sshs_legacy_hash": "01234567"})
    found = verify(read_safetensors(tmp_path / "a.safetensors")).stored[1]
    assert (found.verdict, found.expected) == ("stale", reference(tensors, SS)[1])
