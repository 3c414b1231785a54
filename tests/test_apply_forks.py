"""apply with processes forked from this one: the same bytes, the same report and the same errors as with threads."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from lorasurgery import errors
from lorasurgery.models import open_model
from lorasurgery.verbs.apply import ApplyOptions, ApplyReport, apply, read_source
from lorasurgery.verbs.apply.forks import Forks
from lorasurgery.verbs.apply.produce import Producer
from tests.applied import LINEAR1, PROJ, QKV, SWAPPED, Added, Base, stem
from tests.test_apply import hadamard, kronecker

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")

NAMES = (QKV, PROJ, LINEAR1, SWAPPED)


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorasurgery.verbs.apply.writing.WORTH", 0)
    monkeypatch.setattr("lorasurgery.verbs.apply.forks.STEP", 1)


def mixed(folder: Path) -> Path:
    """A file with every family that has a step of its own."""
    adapter, base = Added("BF16"), Base.make()
    adapter.lora(stem(QKV), base.weights[QKV].shape, 3, 2.0)
    kronecker(adapter, stem(PROJ), *base.weights[PROJ].shape)
    hadamard(adapter, stem(LINEAR1), *base.weights[LINEAR1].shape)
    adapter.lora(stem(SWAPPED), base.weights[SWAPPED].shape, 2, 1.0)
    return adapter.save(folder / "mixed.safetensors")


def run(model: Path, adapter: Path, out: Path, progress: Callable[[int, int], None] | None = None, **how: Any) -> ApplyReport:
    """Apply at weight 0.8."""
    opened = open_model(model)
    source = read_source(adapter, opened.architecture, 0.8)
    return apply(opened, [source], out, ApplyOptions(**how), progress=progress)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F8_E4M3"])
@pytest.mark.parametrize("how", [{}, {"rounding": "stochastic", "seed": 3}, {"unapply": True}])
def test_processes_write_what_threads_write(tmp_path: Path, dtype: str, how: dict[str, Any]) -> None:
    path, adapter = Base.make(dtype).save(tmp_path / "m.safetensors"), mixed(tmp_path)
    told: list[tuple[int, int]] = []
    forked = run(path, adapter, tmp_path / "forked.safetensors", lambda *own: told.append(own), fork=True, workers=3, **how)
    here = run(path, adapter, tmp_path / "here.safetensors", workers=3, **how)
    assert (tmp_path / "forked.safetensors").read_bytes() == (tmp_path / "here.safetensors").read_bytes()
    assert forked.tensors == here.tensors
    assert len(forked.tensors) >= len(NAMES)
    assert told[-1][1] == forked.bytes
    data = sum(weight.tensor.nbytes for weight in open_model(path).weights.values())
    assert max(done for done, _ in told) == data


def test_work_is_done_in_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, adapter = Base.make().save(tmp_path / "m.safetensors"), mixed(tmp_path)
    seen = tmp_path / "pids"
    seen.mkdir()
    make = Producer._make

    def noted(self: Producer, *own: Any) -> Any:
        (seen / f"{os.getpid()}").touch()
        return make(self, *own)

    monkeypatch.setattr(Producer, "_make", noted)
    run(path, adapter, tmp_path / "o.safetensors", fork=True, workers=2)
    assert os.getpid() not in {int(own.name) for own in seen.iterdir()}
    run(path, adapter, tmp_path / "p.safetensors", fork=True, workers=1)
    assert os.getpid() in {int(own.name) for own in seen.iterdir()}


def test_a_weight_that_must_be_whole_in_memory_is_changed_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = Base.make("F32"), Added("F32")
    rows = base.weights[PROJ].shape[0]
    adapter.put(f"{stem(PROJ)}.oft_blocks", 2, rows // 2, rows // 2)
    adapter.number(f"{stem(PROJ)}.alpha", 1e-3)
    path, source = base.save(tmp_path / "m.safetensors"), adapter.save(tmp_path / "oft.safetensors")
    run(path, source, tmp_path / "whole.safetensors", fork=True, workers=2)
    monkeypatch.setattr("lorasurgery.verbs.apply.produce.BIG", 0)
    monkeypatch.setattr(Forks, "call", lambda *_: pytest.fail("not here"))
    run(path, source, tmp_path / "big.safetensors", fork=True, workers=2)
    assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / "big.safetensors").read_bytes()


def test_an_error_in_a_process_is_the_error_of_a_thread(tmp_path: Path) -> None:
    base = Base.make("F32")
    base.weights[PROJ][3, 5] = np.nan
    path, adapter = base.save(tmp_path / "m.safetensors"), mixed(tmp_path)
    found = []
    for fork in (True, False):
        with pytest.raises(errors.BrokenModuleError, match=r"\[3, 5\] is NaN or infinite in the model") as caught:
            run(path, adapter, tmp_path / "o.safetensors", fork=fork, workers=2)
        found.append(vars(caught.value))
        assert sorted(own.name for own in tmp_path.iterdir()) == ["m.safetensors", "mixed.safetensors"]
    assert found[0] == found[1]


def test_a_process_that_is_killed_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, adapter = Base.make().save(tmp_path / "m.safetensors"), mixed(tmp_path)
    here = os.getpid()

    def dying(*_: object) -> None:
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Producer, "_make", dying)
    with pytest.raises(errors.RequestError, match=r"killed by signal 9.*--workers 1"):
        run(path, adapter, tmp_path / "o.safetensors", fork=True, workers=2)
    assert sorted(own.name for own in tmp_path.iterdir()) == ["m.safetensors", "mixed.safetensors"]


def test_a_system_that_starts_no_more_processes_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, adapter = Base.make().save(tmp_path / "m.safetensors"), mixed(tmp_path)
    fork, begun = os.fork, list[int]()

    def second() -> int:
        if begun:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        begun.append(fork())
        return begun[0]

    monkeypatch.setattr(os, "fork", second)
    with pytest.raises(BlockingIOError):
        run(path, adapter, tmp_path / "o.safetensors", fork=True, workers=3)
    with pytest.raises(ProcessLookupError):
        os.kill(begun[0], 0)
    assert sorted(own.name for own in tmp_path.iterdir()) == ["m.safetensors", "mixed.safetensors"]


def test_a_full_disk_in_a_process_names_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, adapter = Base.make().save(tmp_path / "m.safetensors"), mixed(tmp_path)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match=r"o\.safetensors") as caught:
        run(path, adapter, tmp_path / "o.safetensors", fork=True, workers=2)
    assert caught.value.errno == errno.ENOSPC
    assert sorted(own.name for own in tmp_path.iterdir()) == ["m.safetensors", "mixed.safetensors"]


def test_a_system_without_fork_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, adapter = Base.make().save(tmp_path / "m.safetensors"), mixed(tmp_path)
    monkeypatch.delattr(os, "fork")
    with pytest.raises(errors.RequestError, match="cannot fork"):
        run(path, adapter, tmp_path / "o.safetensors", fork=True)


def test_every_error_survives_the_way_from_a_process() -> None:
    made = [
        errors.BrokenModuleError("m", key="k", path="p", hint="h"),
        errors.NotRepresentableError("m", module="x", hint="h"),
        errors.DroppedKeysError("m", keys=["a", "b"], path="p"),
        errors.UnknownArchitectureError("m", candidates=[("flux", 0.5)]),
        errors.RequestError("m", path="p"),
    ]
    for own in made:
        again = pickle.loads(pickle.dumps(own))  # noqa: S301  our own bytes
        assert type(again) is type(own)
        assert str(again) == str(own)
        assert vars(again) == vars(own)
        assert again.args == own.args
    with pytest.raises(errors.BrokenModuleError):
        raise pickle.loads(pickle.dumps(made[0]))  # noqa: S301
