"""Whole processes: ``lorasurgery inspect`` on one file and on a folder, against importing what any command line needs.

    python scripts/bench_parts/headers.py [--rounds 5] [--json]

One file is a FLUX.1 adapter of 912 keys (sparse, 2 GB); the folder holds 1,000 headers of five different key sets. Every
round runs each command once, in turn; figures are medians of wall time.
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

from lorasurgery.architectures import named
from lorasurgery.architectures.table import flat
from lorasurgery.io.header import header_bytes
from lorasurgery.io.tensors import Tensor, scalar, zeros


def sparse(path: Path, rank: int, skip: int = 0) -> None:
    """A FLUX.1 adapter whose data region is a hole: real header, no bytes on the disk. ``skip`` leaves modules out."""
    arch = named("flux1-dev")[0]
    tensors: dict[str, Tensor] = {}
    names = [n for n, s in arch.shapes.items() if len(s) == 2 and n.startswith(("double", "single"))]
    for name in names[skip:]:
        out, width = arch.shapes[name]
        stem = f"lora_unet_{flat(name)}"
        tensors[f"{stem}.lora_down.weight"] = zeros("BF16", (rank, width))
        tensors[f"{stem}.lora_up.weight"] = zeros("BF16", (out, rank))
        tensors[f"{stem}.alpha"] = scalar(1.0, "BF16")
    head = header_bytes(tensors, {"ss_network_module": "networks.lora_flux"})
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + sum(tensor.nbytes for tensor in tensors.values()))


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
        big, many = Path(folder) / "big.safetensors", Path(folder) / "many"
        many.mkdir()
        sparse(big, 208)
        for i in range(1000):
            sparse(many / f"{i:04}.safetensors", 4, skip=i % 5)
        tool = [sys.executable, "-m", "lorasurgery", "inspect"]
        commands = {
            "import typer, rich": [sys.executable, "-c", "import typer, rich"],
            "one file": [*tool, str(big)],
            "one file --json": [*tool, str(big), "--json"],
            "1000 files --json": [*tool, str(many), "--json"],
        }
        found: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(options.rounds):
            for name, command in commands.items():
                found[name].append(run(command))
        size = big.stat().st_size / 1e9
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    rows = [
        {"command": name, "seconds": round(seconds, 3), "ratio": round(seconds / medians["import typer, rich"], 2)}
        for name, seconds in medians.items()
    ]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"one file: {size:.1f} GB\n{'command':20} {'median s':>9} {'ratio':>7}")
    for row in rows:
        print(f"{row['command']:20} {row['seconds']:>9} {row['ratio']:>7}")


if __name__ == "__main__":
    main()
