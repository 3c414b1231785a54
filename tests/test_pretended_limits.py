"""The code for GPUs on devices that are only pretended: the host seldom waits, memory is bounded, and may be too little."""

from __future__ import annotations

import os
from threading import Event

import numpy as np
import pytest
import torch

from lorasurgery.errors import NoRoomError
from lorasurgery.linalg.dense import truncated_svds
from lorasurgery.linalg.halving import in_halves
from lorasurgery.operations.cut import ResizeOptions, device, resize
from lorasurgery.operations.cut.batches import Numpy
from lorasurgery.verbs.extract import Running, decompose, work
from tests.edges import run
from tests.extracting import relative, said
from tests.pretended import pretend
from tests.test_extract import falling, options, pair, taken
from tests.test_pretended_cuda import models
from tests.test_resize import D, Maker
from tests.test_resize_device import mixed


def batch_of(count, *, rank=None):
    """Matrices of one spectrum, so that they finish in the same round; ``rank``: products whose residual is formed itself."""
    rng = np.random.default_rng(4)
    made = [falling("", (230, 250), rng) for _ in range(count)]
    if rank is not None:
        made = [rng.standard_normal((230, rank)) @ rng.standard_normal((rank, 250)) for _ in range(count)]
    return torch.from_numpy(np.stack(made).astype(np.float32))


@pytest.mark.parametrize("rank", [None, 5])
def test_the_host_waits_no_more_often_for_a_larger_batch(rank, monkeypatch):
    board, waits, passes = pretend(monkeypatch), [], []
    for count in (2, 9):
        before, batch = board.waits, batch_of(count, rank=rank)
        found = truncated_svds(batch.to("cuda"), 12)
        waits.append(board.waits - before)
        passes.append(found[0].passes)
    assert passes[0] == passes[1]
    assert waits[0] == waits[1] <= 10 * passes[0] // 2 + 6


def test_an_extracted_batch_travels_in_three_copies(tmp_path, monkeypatch):
    """However many modules it has: to the device, where nobody waits for it, and both factors back."""
    board, waits, sent = pretend(monkeypatch), [], []
    for count in (2, 6):
        rng, before, copies = np.random.default_rng(6), board.waits, len(board.copies)
        base = {f"{i}.weight": np.zeros((220, 200)) for i in range(count)}
        tuned = {name: falling(name, values.shape, rng) for name, values in base.items()}
        paths = pair(tmp_path, base, {name: values.astype(np.float16) for name, values in tuned.items()}, "F16")
        taken(paths, tmp_path / f"{count}.safetensors", options(8, device="cuda"))
        waits.append(board.waits - before)
        sent.append([copy.bytes for copy in board.copies[copies:] if not copy.waits])
        back = sum(copy.bytes == 4 * count * 8 * side for copy in board.copies[copies:] for side in (220, 200))
        assert back == 2
    assert waits[0] == waits[1]
    assert sent == [[4 * count * 220 * 200] for count in (2, 6)]


def on_one_job(folder, board):
    """The most bytes on the device during an extraction, and what the result says."""
    board.peak.clear()
    paths, wanted = models(folder, "BF16")
    how = options(8, device="cuda", jobs=1)
    taken(paths, folder / "out.safetensors", how, Running(hashes=False, force=True))
    return board.peak["cuda:0"], said(folder / "out.safetensors", wanted)


@pytest.mark.parametrize("count", [2, 6])
def test_memory_is_bounded_by_the_batch(count, tmp_path, monkeypatch):
    board, limit = pretend(monkeypatch), count * 4 * 220 * 200
    monkeypatch.setattr(work, "BATCH_BYTES", limit)
    assert limit < on_one_job(tmp_path, board)[0] < 5 * limit


def test_a_full_device_gets_halves(tmp_path, monkeypatch):
    board = pretend(monkeypatch)
    most, first = on_one_job(tmp_path, board)
    board.limit = most // 3
    less, second = on_one_job(tmp_path, board)
    assert board.refused
    assert less <= most // 3
    assert relative(second, first) < 1e-4


def test_a_unit_without_room_is_tried_alone(tmp_path, monkeypatch):
    """Two jobs that fit on the device only one after the other."""
    second = Event()
    at_work: list[object] = []
    refused: list[object] = []
    monkeypatch.setattr(work, "BATCH_BYTES", 1)
    _, first = on_one_job(tmp_path, pretend(monkeypatch))

    def one_at_a_time(*args):
        if at_work:
            second.set()
            refused.append(args)
            raise NoRoomError("cuda has too little memory left")
        at_work.append(args)
        second.wait(2)
        found = decompose.decomposed(*args)
        at_work.clear()
        return found

    monkeypatch.setattr(work, "decomposed", one_at_a_time)
    paths, wanted = models(tmp_path, "BF16")
    taken(paths, tmp_path / "two.safetensors", options(8, device="cuda", jobs=2))
    assert refused
    assert relative(said(tmp_path / "two.safetensors", wanted), first) < 1e-4


def test_what_does_not_fit_is_named(tmp_path, monkeypatch):
    board = pretend(monkeypatch)
    on_one_job(tmp_path, board)
    board.limit = 150_000
    with pytest.raises(NoRoomError, match=r"lora_unet_\w+: cuda has too little memory left for .* \d+ x \d+.*--jobs 1"):
        on_one_job(tmp_path, board)
    assert not board.alive["cuda:0"]


def test_on_the_command_line(tmp_path, monkeypatch):
    board, (paths, _) = pretend(monkeypatch), models(tmp_path, "BF16")
    asked = ("extract", *paths, tmp_path / "out.safetensors", "--rank", 8, "--device")
    done = run(*asked, "cuda:0,cuda:1")
    assert done.code == 0, done.err
    assert board.peak["cuda:0"]
    assert board.peak["cuda:1"]
    assert run(*asked, "cuda:7", "--force").code == 2
    board.limit = 150_000
    full = run(*asked, "cuda", "--force")
    assert full.code == 1
    assert "Try: --jobs 1, or --device cpu" in full.err


def test_other_faults_are_not_taken_for_a_full_device():
    tried = []

    def work_on(items):
        tried.append(items)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        in_halves([1, 2, 3], work_on)
    assert len(tried) == 1


def test_a_resize_in_little_memory_takes_halves(monkeypatch):
    make = Maker()
    deltas = [make.low_rank((D, 4 * D), 12) for _ in range(7)]
    sides = [delta.up for delta in deltas], [delta.down for delta in deltas]
    wanted, _ = Numpy().cores(*sides, 4)
    board = pretend(monkeypatch)
    gpu = device.Device("cuda")
    gpu.cores(*sides, 4)
    board.limit = board.peak["cuda:0"] // 3
    found, _ = gpu.cores(*sides, 4)
    assert board.refused == 3
    assert found.accurate.tolist() == [True] * 7
    np.testing.assert_allclose(found.values, wanted.values, rtol=1e-6)
    np.testing.assert_allclose(found.bounds, wanted.bounds)
    board.limit = 2000
    with pytest.raises(NoRoomError, match=r"cuda has too little memory left for factors of \d+ x 12 and 12 x \d+"):
        resize(mixed().adapter(), ResizeOptions(rank=5, device="cuda"))


def test_how_many_work_at_a_time(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    for where, family, jobs in (
        ("cuda", "lora", 4),
        ("cuda:0,cuda:1", "locon", 8),
        ("mps", "lora", 1),
        ("cpu", "lora", 8),
        ("cuda", "lokr", 8),
    ):
        assert work.jobs_of([], options(8, device=where, family=family)) == jobs
