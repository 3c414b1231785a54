"""Whole processes: resize of an SDXL LoRA, against the dense decompositions of other tools.

    python scripts/bench_parts/resize.py [--rounds 3] [--cases 32:16 128:32] [--peers sd-scripts svd_lowrank] [--json]

The file is a LoRA in sd-scripts layout (fp16, generated from the architecture's table; 700 modules for SDXL's UNet). Ours
is the whole process: start, read, decompose, choose, write, hash. The peers are the decompositions alone,
in float32 on one thread for each core of ours (``--threads``), without start, reading and writing:

- ``sd-scripts``: ``torch.linalg.svd(up @ down)`` with full matrices, as ``networks/resize_lora.py`` does it;
- ``svd_lowrank``: ``torch.svd_lowrank(up @ down, q=rank, niter=7)``, as KJNodes' ``LoraReduceRankKJ`` does it.

Both are timed on one module of each shape and weighted by the shapes' counts; sd-scripts' in the first round only. Rounds
alternate. ``excess`` is the largest error of a module over the optimum, minus 1, measured in float64 on the written file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

OURS = """
import os, sys
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"
from lorasurgery.api import load, save
from lorasurgery.report import Report
from lorasurgery.surgery.resize import ResizeOptions, resize
adapter = load(sys.argv[1])
result, _ = resize(adapter, ResizeOptions(rank=int(sys.argv[3]), workers=int(sys.argv[4])))
save(result, sys.argv[2], report=Report(input=sys.argv[1], source_layout=adapter.layout))
"""


def shapes(arch: str) -> dict[str, tuple[int, ...]]:
    """Module name -> (out, in): the transformer blocks' matrices, as sd-scripts trains them."""
    from lorasurgery.architectures import named

    table = named(arch)[0].shapes
    parts = ("transformer_blocks.", "double_blocks.", "single_blocks.")
    return {n: s for n, s in table.items() if len(s) == 2 and any(part in n for part in parts)}


def make(path: Path, rank: int, arch: str) -> None:
    """The file. Singular values fall by 100 over the rank. Runs in a process of its own: memory is not given back."""
    import numpy as np

    from lorasurgery.architectures.table import flat
    from lorasurgery.io.tensors import of_array, scalar
    from lorasurgery.io.writer import write_safetensors

    rng = np.random.default_rng(0)
    decay = np.geomspace(1.0, 0.01, rank, dtype=np.float32)
    tensors = {}
    for name, (out, width) in shapes(arch).items():
        stem = f"lora_unet_{flat(name)}"
        tensors[f"{stem}.lora_down.weight"] = of_array(rng.standard_normal((rank, width), np.float32) / 30, "F16")
        tensors[f"{stem}.lora_up.weight"] = of_array(rng.standard_normal((out, rank), np.float32) * decay / 30, "F16")
        tensors[f"{stem}.alpha"] = scalar(rank * 0.3, "F16")
    write_safetensors(path, tensors, {"ss_network_module": "networks.lora"}, hashes=True)


def apart(function: Any, *args: object) -> Any:  # noqa: ANN401  whatever the function returns
    """Call it in a fresh process, so that this one stays small: a child's peak memory counts its parent's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def ours(source: Path, out: Path, rank: int, workers: int) -> tuple[float, float]:
    """Seconds and peak MiB of the whole process."""
    started = time.perf_counter()
    out.unlink(missing_ok=True)
    command = [sys.executable, "-c", OURS, str(source), str(out), str(rank), str(workers)]
    process = subprocess.Popen(command)  # noqa: S603  our own interpreter
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit("resize failed")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def peer(name: str, old: int, new: int, threads: int, arch: str) -> float:
    """Seconds for all modules: one of each shape, times how many there are."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    total = 0.0
    for (out, width), count in Counter(shapes(arch).values()).items():
        up, down = torch.randn(out, old), torch.randn(old, width)
        up *= torch.logspace(0, -2, old)
        started = time.perf_counter()
        product = up @ down
        if name == "sd-scripts":
            torch.linalg.svd(product)
        else:
            torch.svd_lowrank(product, q=new, niter=7)
        total += (time.perf_counter() - started) * count
    return total


def excess(source: Path, out: Path, rank: int) -> float:
    """The largest ``error / optimum - 1`` of a module, from the Gram matrices of the factors in float64."""
    import numpy as np

    from lorasurgery.io.header import read_safetensors
    from lorasurgery.linalg.low_rank import difference_norm, factored_svd

    old, new = read_safetensors(source).tensors, read_safetensors(out).tensors
    worst = 0.0
    for key in [k for k in old if k.endswith(".lora_up.weight")][::10]:
        stem = key.removesuffix(".lora_up.weight")
        factors = [
            (t[key].f64() * (t[f"{stem}.alpha"].item() / t[key].shape[1]), t[f"{stem}.lora_down.weight"].f64())
            for t in (old, new)
        ]
        optimum = float(np.linalg.norm(factored_svd(*factors[0])[1][rank:]))
        worst = max(worst, difference_norm(*factors[0], *factors[1]) / optimum - 1.0)
    return worst


def measure(folder: Path, case: str, options: argparse.Namespace) -> dict[str, Any]:
    """One case, ``old:new``: medians over the rounds."""
    old, new = map(int, case.split(":"))
    source, out = folder / f"{old}.safetensors", folder / "out.safetensors"
    apart(make, source, old, options.arch)
    ours(source, out, new, options.threads)  # warms the page cache
    runs: list[tuple[float, float]] = []
    peers: dict[str, list[float]] = {name: [] for name in options.peers}
    for number in range(options.rounds):
        runs.append(ours(source, out, new, options.threads))
        for name in options.peers:
            if number == 0 or name != "sd-scripts":
                peers[name].append(apart(peer, name, old, new, options.threads, options.arch))
    seconds = statistics.median(s for s, _ in runs)
    return {
        "ranks": f"{old} -> {new}",
        "input_mb": round(source.stat().st_size / 1e6),
        "ours_s": round(seconds, 2),
        "range_s": [round(min(s for s, _ in runs), 2), round(max(s for s, _ in runs), 2)],
        "peak_mib": round(max(m for _, m in runs)),
        "input_mib": round(source.stat().st_size / 2**20),
        "excess": apart(excess, source, out, new),
        "peers": {
            n: {"seconds": round(statistics.median(t), 1), "ratio": round(statistics.median(t) / seconds, 1)}
            for n, t in peers.items()
        },
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", default=["32:16", "128:32"])
    parser.add_argument("--arch", default="sdxl", help="sdxl, flux1-dev, ...")
    parser.add_argument("--peers", nargs="*", default=["sd-scripts", "svd_lowrank"])
    parser.add_argument("--threads", type=int, default=min(os.cpu_count() or 1, 2))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(Path(folder), case, options) for case in options.cases]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print(
            f"{row['ranks']}, {row['input_mb']} MB: {row['ours_s']} s ({row['range_s']}), peak {row['peak_mib']} MiB "
            f"(input {row['input_mib']}), excess {row['excess']:.1e}"
        )
        for name, found in row["peers"].items():
            print(f"    {name:12} {found['seconds']:>8} s  {found['ratio']:>7} x")


if __name__ == "__main__":
    main()
