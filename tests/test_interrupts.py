"""Ctrl-C at any moment: no traceback and no temporary file. 30 moments; INTERRUPTS=300 tries as many."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from lorasurgery.interrupts import held
from tests.applied import LINEAR1, PROJ, QKV, Added, Base, stem
from tests.edges import lora, save

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the terminal's signals are those of Linux")

MOMENTS = int(os.environ.get("INTERRUPTS", "30"))
READY = """
import sys
from lorasurgery.cli.stopping import quiet
quiet()
sys.stdout.write(".")
sys.stdout.flush()
"""
"""Says when the command has its first step behind it: until then an interrupt is Python's own."""
RUN = "from lorasurgery.__main__ import main\nmain()\n"
SMALL = """
from lorasurgery.interrupts import held
with held():
    from lorasurgery.verbs.apply import writing
    writing.WORTH = 0  # processes for a model of any size
"""


def apply_files(folder: Path) -> list[str]:
    base, adapter = Base.make("BF16"), Added("BF16")
    for name in (QKV, PROJ, LINEAR1):
        adapter.lora(stem(name), base.weights[name].shape, 3, 2.0)
    model = base.save(folder / "model.safetensors")
    return ["apply", str(model), str(adapter.save(folder / "lora.safetensors")), "-o", str(folder / "out" / "o.safetensors")]


def resize_files(folder: Path) -> list[str]:
    source = save(folder / "a.safetensors", lora(rank=8), {})
    return ["resize", str(source), "-o", str(folder / "out" / "o.safetensors"), "--rank", "2", "--workers", "2"]


def inspect_files(folder: Path) -> list[str]:
    home = folder / "in"
    home.mkdir()
    for number in range(220):
        save(home / f"{number}.safetensors", lora(), {})
    return ["inspect", str(home)]


def one_to_one(*words: str) -> Callable[[Path], list[str]]:
    """A command that reads a LoRA and writes another file."""

    def files(folder: Path) -> list[str]:
        source = save(folder / "a.safetensors", lora(rank=8), {})
        return [words[0], str(source), "-o", str(folder / "out" / "o.safetensors"), *words[1:]]

    return files


def extract_files(folder: Path) -> list[str]:
    base, tuned = Base.make("BF16"), Base.make("BF16", seed=1)
    models = [str(own.save(folder / f"{name}.safetensors")) for name, own in (("base", base), ("tuned", tuned))]
    return ["extract", *models, "-o", str(folder / "out" / "o.safetensors"), "--rank", "4"]


COMMANDS = {
    "apply": apply_files, "resize": resize_files, "inspect": inspect_files, "extract": extract_files,
    "convert": one_to_one("convert", "--target", "comfyui"), "merge": one_to_one("merge"),
    "prune": one_to_one("prune", "--negate"),
}  # fmt: skip


def interrupted(arguments: list[str], folder: Path, after: float, prelude: str = "") -> tuple[int, str]:
    """The exit code and stderr of a command that the terminal interrupts so many seconds after it began."""
    child = subprocess.Popen(
        [sys.executable, "-c", READY + prelude + RUN, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, cwd=folder,
    )  # fmt: skip
    assert child.stdout is not None
    child.stdout.read(1)
    time.sleep(after)
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGINT)
    _, error = child.communicate(timeout=60)
    return child.returncode, error


@pytest.mark.parametrize("name", COMMANDS)
def test_an_interrupt_at_any_moment_leaves_no_trace(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    arguments, prelude = COMMANDS[name](tmp_path), SMALL if name == "apply" else ""
    started, rng = time.monotonic(), random.Random(0)
    whole = subprocess.run(
        [sys.executable, "-c", READY + prelude + RUN, *arguments], cwd=tmp_path, capture_output=True, check=True
    )
    assert len(whole.stdout) > 1
    took = time.monotonic() - started
    for number in range(MOMENTS if name == "apply" else MOMENTS // 5):
        shutil.rmtree(out)
        out.mkdir()
        code, error = interrupted(arguments, tmp_path, rng.random() * took, prelude)
        assert "Traceback" not in error, (number, error)
        assert "ignored" not in error, (number, error)
        assert code in (130, -signal.SIGINT, 0), (number, code, error)
        left = sorted(path.name for path in out.iterdir())
        resumable = ["o.safetensors.partial"] if name == "extract" else []
        assert left in ([], ["o.safetensors"], resumable), (number, left)


def interrupted_here(error: Exception | None = None) -> list[str]:
    """What was done after an interrupt that had to wait."""
    done: list[str] = []
    try:
        with held():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            done.append("inside")
            if error is not None:
                raise error
        done.append("after")
    except KeyboardInterrupt as raised:
        done.append(f"interrupt of {raised.__context__!r}")
    return done


@pytest.mark.parametrize("error", [None, ValueError("first")])
def test_an_interrupt_waits_until_what_holds_it_is_done(error: Exception | None) -> None:
    assert interrupted_here(error) == ["inside", f"interrupt of {error!r}"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())


def test_what_is_started_meanwhile_never_gets_one() -> None:
    program = "import os, signal; os.kill(os.getpid(), signal.SIGINT); print('alive')"
    with held():
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "alive\n")


def test_on_other_threads_nothing_is_held() -> None:
    found = []

    def work() -> None:
        with held():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]
