"""Whole processes: ``lorasurgery inspect`` on one file and on a folder, against importing what any command line needs.

    python scripts/bench_parts/headers.py [--rounds 5] [--json]

One file is a FLUX.1 adapter of 912 keys (sparse, 2 GB). One folder holds 1,000 headers of five different key sets; in the
other no two files have the same keys: SDXL, FLUX.1, Wan, Qwen-Image and Z-Image adapters of 675 to 2,100 keys, 1,330 on
average. Every round runs each command once, in turn; figures are medians of wall time. ``its header`` is what of ``one
file`` is reading and understanding the header, model tables included, measured inside a process; ``without it`` is the rest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.architectures import named
from lorasurgery.architectures.table import DIFFUSERS, ORIGINAL, flat
from lorasurgery.io.header import header_bytes
from lorasurgery.io.tensors import Tensor, scalar, zeros

if TYPE_CHECKING:
    from collections.abc import Container


class Kind(NamedTuple):
    """A model and how a trainer spells its modules."""

    arch: str
    naming: str
    prefix: str


FLUX = Kind("flux1-dev", ORIGINAL, "lora_unet_")
KINDS = (
    Kind("sdxl", ORIGINAL, "lora_unet_"),
    FLUX,
    Kind("sdxl", DIFFUSERS, "lora_unet_"),
    Kind("wan-2.1-t2v-14b", ORIGINAL, "diffusion_model."),
    Kind("qwen-image", DIFFUSERS, "transformer."),
    Kind("z-image", DIFFUSERS, "lora_unet_"),
)


def sparse(path: Path, kind: Kind, rank: int, skip: Container[int] = ()) -> None:
    """An adapter whose data region is a hole: real header, no bytes on the disk. ``skip``: modules that are left out."""
    arch = named(kind.arch)[0]
    down, up = (".lora_down.weight", ".lora_up.weight") if kind.prefix == "lora_unet_" else (".lora_A.weight", ".lora_B.weight")
    tensors: dict[str, Tensor] = {}
    for i, (name, spans) in enumerate(arch.namings[kind.naming].items()):
        shape = arch.module_shape(spans)
        if len(shape) != 2 or i in skip:
            continue
        stem = kind.prefix + (flat(name) if kind.prefix.endswith("_") else name)
        tensors[stem + down], tensors[stem + up] = zeros("BF16", (rank, shape[1])), zeros("BF16", (shape[0], rank))
        if kind.prefix.endswith("_"):
            tensors[f"{stem}.alpha"] = scalar(1.0, "BF16")
    head = header_bytes(tensors, {"ss_network_module": "networks.lora"})
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + sum(tensor.nbytes for tensor in tensors.values()))


def folders(root: Path) -> tuple[Path, Path]:
    """A thousand headers of five key sets, and a thousand of which no two are alike."""
    five, all_different = root / "five", root / "different"
    five.mkdir()
    all_different.mkdir()
    for i in range(1000):
        sparse(five / f"{i:04}.safetensors", FLUX, 4, skip=range(i % 5))
        sparse(all_different / f"{i:04}.safetensors", KINDS[i % len(KINDS)], 4, skip={i // len(KINDS), (7 * i) % 211})
    return five, all_different


HEADER = """
import gc, sys, time
gc.set_threshold(100_000, 50, 50)
from lorasurgery.inspection.describe import describe
from pathlib import Path
started = time.perf_counter()
describe(Path(sys.argv[1]))
print(time.perf_counter() - started)
"""


def reading(path: Path) -> float:
    """Seconds that a fresh process takes for a file's header."""
    done = subprocess.run([sys.executable, "-c", HEADER, str(path)], capture_output=True, check=True, text=True)  # noqa: S603
    return float(done.stdout)


def run(command: list[str]) -> float:
    """Seconds of one process."""
    started = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)  # noqa: S603  our own command lines
    return time.perf_counter() - started


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        big = Path(folder) / "big.safetensors"
        sparse(big, FLUX, 208)
        many, different = folders(Path(folder))
        tool = [sys.executable, "-m", "lorasurgery", "inspect"]
        commands = {
            "import typer, rich": [sys.executable, "-c", "import typer, rich"],
            "one file": [*tool, str(big)],
            "one file --json": [*tool, str(big), "--json"],
            "1000 files, 5 key sets": [*tool, str(many), "--json"],
            "1000 files, 1000 sets": [*tool, str(different), "--json"],
        }
        found: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(options.rounds):
            for name, command in commands.items():
                found[name].append(run(command))
            found.setdefault("  its header", []).append(reading(big))
        size = big.stat().st_size / 1e9
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    medians["  without it"] = medians["one file"] - medians["  its header"]
    rows = [
        {"command": name, "seconds": round(seconds, 3), "ratio": round(seconds / medians["import typer, rich"], 2)}
        for name, seconds in medians.items()
    ]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"one file: {size:.1f} GB\n{'command':24} {'median s':>9} {'ratio':>7}")
    for row in rows:
        print(f"{row['command']:24} {row['seconds']:>9} {row['ratio']:>7}")


if __name__ == "__main__":
    main()
