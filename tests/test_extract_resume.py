"""An extraction that was stopped goes on and gives the same file, wherever it was stopped."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import numpy as np
import pytest

from lorasurgery.errors import OutputExistsError, RequestError
from lorasurgery.operations.cut import ResizeOptions
from lorasurgery.verbs.extract import ExtractOptions, Running, extract
from tests.models.small import save
from tests.oracle import read, write

OPTIONS = ExtractOptions(cut=ResizeOptions(rank=3, dtype="fp32"), jobs=2)
POLICY = ExtractOptions(cut=ResizeOptions(policy="energy", param=0.9, dtype="bf16"), jobs=2)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    rng = np.random.default_rng(0)
    base = {f"blocks.{i}.{part}": rng.standard_normal((24, 20)) for i in range(4) for part in ("a.weight", "b.weight")}
    base |= {f"blocks.{i}.a.bias": rng.standard_normal(24) for i in range(4)}
    tuned = {name: w + 0.1 * rng.standard_normal(w.shape) for name, w in base.items()}
    return save(folder / "base.safetensors", base), save(folder / "tuned.safetensors", tuned)


def taken(paths, out, options, running=None):
    base, tuned = paths
    return extract(base, tuned, out, options, running)


class StoppedError(Exception):
    """Stands for a full disk, ctrl-C, or anything else."""


def stopping(after):
    steps = []

    def progress(step):
        steps.append(step.name)
        if len(steps) == after:
            raise StoppedError

    return progress


@pytest.mark.parametrize("options", [OPTIONS, POLICY])
@pytest.mark.parametrize("after", [1, 5, 11])
def test_a_stopped_extraction_goes_on(models, options, after, tmp_path):
    whole, out = tmp_path / "whole" / "out.safetensors", tmp_path / "out.safetensors"
    taken(models, whole, options)
    with pytest.raises(StoppedError):
        taken(models, out, options, Running(progress=stopping(after)))
    assert not out.exists()
    assert (tmp_path / "out.safetensors.partial").is_dir()
    with pytest.raises(OutputExistsError, match="--resume"):
        taken(models, out, options)
    report = taken(models, out, options, Running(resume=True))
    assert out.read_bytes() == whole.read_bytes()
    assert report.resumed >= after
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.safetensors", "whole"]


@pytest.mark.parametrize("cut", ["journal", "data", "both", "garbled", "nothing"])
def test_what_a_kill_cuts_off_is_done_again(models, cut, tmp_path):
    whole, out = tmp_path / "whole" / "out.safetensors", tmp_path / "out.safetensors"
    taken(models, whole, OPTIONS)
    with pytest.raises(StoppedError):
        taken(models, out, OPTIONS, Running(progress=stopping(7)))
    folder = tmp_path / "out.safetensors.partial"
    journal, data = folder / "journal.jsonl", folder / "data.bin"
    if cut in ("journal", "both"):
        journal.write_bytes(journal.read_bytes()[:-20])
    if cut in ("data", "both"):
        data.write_bytes(data.read_bytes()[:-30])
    if cut == "garbled":  # a power cut can leave zeros where the data should be
        data.write_bytes(data.read_bytes()[:-200] + bytes(200))
    if cut == "nothing":
        data.unlink()
    taken(models, out, OPTIONS, Running(resume=True))
    assert out.read_bytes() == whole.read_bytes()


def test_a_killed_process_goes_on(models, tmp_path):
    whole, out = tmp_path / "whole" / "out.safetensors", tmp_path / "out.safetensors"
    taken(models, whole, OPTIONS)
    program = f"""
import os, signal
from lorasurgery.verbs.extract import ExtractOptions, Running, extract
from lorasurgery.operations.cut import ResizeOptions
steps = []
def progress(step):
    steps.append(step)
    if len(steps) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
extract({str(models[0])!r}, {str(models[1])!r}, {str(out)!r},
        ExtractOptions(cut=ResizeOptions(rank=3, dtype="fp32"), jobs=2), Running(progress=progress))
"""
    killed = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    lines = (tmp_path / "out.safetensors.partial" / "journal.jsonl").read_text().splitlines()
    assert len(lines) == 7
    assert json.loads(lines[-1])["stop"] == (tmp_path / "out.safetensors.partial" / "data.bin").stat().st_size
    report = taken(models, out, OPTIONS, Running(resume=True))
    assert report.resumed == 6
    assert out.read_bytes() == whole.read_bytes()


def test_a_size_that_cannot_be_met_costs_nothing(models, tmp_path):
    """What was decomposed serves another size."""
    out = tmp_path / "out.safetensors"
    tight, wide = (ExtractOptions(cut=ResizeOptions(size=size, dtype="bf16"), jobs=2) for size in (1000, 9000))
    with pytest.raises(RequestError, match="the smallest file there is"):
        taken(models, out, tight)
    report = taken(models, out, wide, Running(resume=True))
    assert report.resumed == 12
    taken(models, tmp_path / "fresh.safetensors", wide)
    assert out.stat().st_size <= 9000
    first, fresh = (read(path)[0] for path in (out, tmp_path / "fresh.safetensors"))
    assert first == fresh


def test_another_extraction_is_not_gone_on_with(models, tmp_path):
    out = tmp_path / "out.safetensors"
    with pytest.raises(StoppedError):
        taken(models, out, OPTIONS, Running(progress=stopping(3)))
    with pytest.raises(RequestError, match="another extraction \\(options not the same\\)"):
        taken(models, out, POLICY, Running(resume=True))
    other = _like(models[1], tmp_path / "other.safetensors")
    with pytest.raises(RequestError, match="tuned not the same"):
        extract(models[0], other, out, OPTIONS, Running(resume=True))
    taken(models, out, POLICY, Running(force=True))
    assert out.exists()
    taken(models, tmp_path / "fresh.safetensors", OPTIONS, Running(resume=True))  # nothing to go on with is no error
    assert (tmp_path / "fresh.safetensors").exists()


def _like(model, path):
    """The same names with other values."""
    tensors, metadata = read(model)
    write(path, {name: t._replace(data=bytes(len(t.data))) for name, t in tensors.items()}, metadata)
    return path
