"""Whole processes: two SDXL LoRAs merged exactly, and merged and cut to a rank, against dense sums and SVDs.

    python -m scripts.bench_parts.merge [--rounds 3] [--rank 32] [--peers sd-scripts svd] [--json]

The files are LoRAs of one rank in sd-scripts layout (fp16, generated from the architecture's table; 700 modules for SDXL's
UNet), with weights 0.7 and -0.4. Ours is the whole process: start, read, merge, decompose, write, hash. The peers are the sum
and the decomposition alone, in float32 on one thread for each core of ours (``--threads``), without start, reading and
writing, timed on one module of each shape and weighted by the shapes' counts:

- ``sd-scripts``: ``torch.linalg.svd`` of the dense sum with full matrices, as ``networks/svd_merge_lora.py`` and PEFT's
  ``add_weighted_adapter`` (its default) do it; in the first round only;
- ``svd``: the same with ``full_matrices=False``.

The exact merge is measured against a process that reads both files, hashes them and writes them into one. Rounds alternate.
``excess`` is the largest error of a module over the optimum for the sum, minus 1, in float64 on the written file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from scripts.bench_parts.resize import apart, make, shapes

WEIGHTS = (0.7, -0.4)
COPY = """
import hashlib, sys
from queue import Queue
from threading import Thread
digest, queue = hashlib.sha256(), Queue(64)
def hashing():
    while (block := queue.get()) is not None:
        digest.update(block)
thread = Thread(target=hashing)
thread.start()
with open(sys.argv[3], "wb", buffering=0) as out:
    for path in sys.argv[1:3]:
        with open(path, "rb", buffering=0) as source:
            while block := source.read(1 << 20):
                if sys.argv[4] == "hash":
                    queue.put(block)
                out.write(block)
queue.put(None)
thread.join()
"""


def process(*args: object) -> tuple[float, float]:
    """Seconds and peak MiB of a whole process of this interpreter."""
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, *map(str, args)], stdout=subprocess.DEVNULL)  # noqa: S603  our own words
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit("it failed")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def peer(name: str, rank: int, threads: int, arch: str) -> float:
    """Seconds for all modules: one of each shape, times how many there are."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    total = 0.0
    for (out, width), count in Counter(shapes(arch).values()).items():
        factors = [(torch.randn(out, rank) * torch.logspace(0, -2, rank), torch.randn(rank, width)) for _ in WEIGHTS]
        started = time.perf_counter()
        whole = sum(w * (up @ down) for w, (up, down) in zip(WEIGHTS, factors, strict=True))
        torch.linalg.svd(whole, full_matrices=name == "sd-scripts")
        total += (time.perf_counter() - started) * count
    return total


def excess(files: tuple[Path, Path], out: Path, rank: int) -> float:
    """The largest ``error / optimum - 1`` of a module, from the Gram matrices of the factors in float64."""
    import numpy as np

    from lorasurgery.io.header import read_safetensors
    from lorasurgery.linalg.low_rank import difference_norm, factored_svd

    old, new = [read_safetensors(path).tensors for path in files], read_safetensors(out).tensors
    worst = 0.0
    for key in [k for k in new if k.endswith(".lora_up.weight")][::10]:
        stem = key.removesuffix(".lora_up.weight")

        def factors(tensors: Any, weight: float = 1.0, *, key: str = key, stem: str = stem) -> Any:  # noqa: ANN401
            scale = weight * tensors[f"{stem}.alpha"].item() / tensors[key].shape[1]
            return tensors[key].f64() * scale, tensors[f"{stem}.lora_down.weight"].f64()

        pairs = [factors(tensors, weight) for tensors, weight in zip(old, WEIGHTS, strict=True)]
        truth = np.hstack([up for up, _ in pairs]), np.vstack([down for _, down in pairs])
        optimum = float(np.linalg.norm(factored_svd(*truth)[1][rank:]))
        worst = max(worst, difference_norm(*truth, *factors(new)) / optimum - 1.0)
    return worst


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Medians over the rounds."""
    files, out = (folder / "a.safetensors", folder / "b.safetensors"), folder / "out.safetensors"
    for seed, path in enumerate(files):
        apart(make, path, options.rank, options.arch, seed)
    runs: dict[str, list[tuple[float, float]]] = {}
    peers: dict[str, list[float]] = {name: [] for name in options.peers}

    def run(name: str, *args: object) -> None:
        out.unlink(missing_ok=True)
        runs.setdefault(name, []).append(process(*args))

    merge = ("-m", "lorasurgery", "merge", *(f"{path}:{w}" for path, w in zip(files, WEIGHTS, strict=True)), "-o", out)
    for number in range(options.rounds + 1):  # the first warms the page cache
        run("copy, hashed", "-c", COPY, *files, out, "hash")
        run("exact, sd-scripts", *merge, "--target", "sd-scripts")
        run("copy", "-c", COPY, *files, out, "plain")
        run("exact, comfyui", *merge, "--target", "comfyui")
        run("cut", *merge, "--target", "sd-scripts", "--rank", options.rank)
        for name in options.peers if number else ():
            if number == 1 or name != "sd-scripts":
                peers[name].append(apart(peer, name, options.rank, options.threads, options.arch))
    seconds = {name: statistics.median(s for s, _ in own[1:]) for name, own in runs.items()}
    return {
        "input_mib": round(sum(path.stat().st_size for path in files) / 2**20),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "peak_mib": {name: round(max(m for _, m in own)) for name, own in runs.items()},
        "exact / copy": round(seconds["exact, comfyui"] / seconds["copy"], 2),
        "exact / copy, hashed": round(seconds["exact, sd-scripts"] / seconds["copy, hashed"], 2),
        "excess": apart(excess, files, out, options.rank) if options.arch == "sdxl" else float("nan"),
        "peers": {
            name: {"seconds": round(statistics.median(own), 1), "ratio": round(statistics.median(own) / seconds["cut"], 1)}
            for name, own in peers.items()
        },
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--arch", default="sdxl", help="sdxl, flux1-dev, ...")
    parser.add_argument("--peers", nargs="*", default=["sd-scripts", "svd"])
    parser.add_argument("--threads", type=int, default=min(os.cpu_count() or 1, 2))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    print(f"two files of rank {options.rank}, {found['input_mib']} MiB together")
    for name, seconds in found["seconds"].items():
        print(f"    {name:20} {seconds:>8} s, peak {found['peak_mib'][name]} MiB")
    print(f"    exact / copy: {found['exact / copy']}, hashed: {found['exact / copy, hashed']}")
    print(f"    cut to {options.rank}: excess over the optimum {found['excess']:.1e}")
    for name, own in found["peers"].items():
        print(f"    {name:20} {own['seconds']:>8} s  {own['ratio']:>7} x")


if __name__ == "__main__":
    main()
