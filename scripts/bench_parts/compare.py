"""Whole processes: compare of two SDXL LoRAs, against the dense differences of their modules.

    python scripts/bench_parts/compare.py [--rounds 3] [--rank 32] [--json]

The file is a LoRA in sd-scripts layout (fp16, 700 modules, generated from the architecture's table); it is compared with a
copy, with an unrelated one, and with its conversion to Diffusers' layout, whose factors are rounded anew. Ours is the whole
process (`lorasurgery compare`). *dense* is the norm of ``up @ down - up' @ down'`` alone, in float32 with numpy on one
thread, timed on one module of each shape and weighted by the shapes' counts. Rounds alternate.
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

CASES = ("copy", "unrelated", "converted")
EXIT = {"copy": 0, "unrelated": 1, "converted": 0}


def shapes() -> dict[str, tuple[int, ...]]:
    """Module name -> (out, in) of the transformer blocks' matrices."""
    from lorasurgery.architectures import named

    return {n: s for n, s in named("sdxl")[0].shapes.items() if len(s) == 2 and "transformer_blocks." in n}


def make(folder: Path, rank: int) -> None:
    """The files, in a process of its own: memory is not given back."""
    import numpy as np

    from lorasurgery import convert, load, save
    from lorasurgery.architectures.table import flat
    from lorasurgery.io.tensors import of_array, scalar
    from lorasurgery.io.writer import write_safetensors

    for seed, name in enumerate(("source", "unrelated")):
        rng, tensors = np.random.default_rng(seed), {}
        for module, (out, width) in shapes().items():
            stem = f"lora_unet_{flat(module)}"
            for word, shape in (("lora_down", (rank, width)), ("lora_up", (out, rank))):
                tensors[f"{stem}.{word}.weight"] = of_array(rng.standard_normal(shape, np.float32) / 30, "F16")
            tensors[f"{stem}.alpha"] = scalar(rank * 0.3, "F16")
        write_safetensors(folder / f"{name}.safetensors", tensors, {}, hashes=True)
    (folder / "copy.safetensors").write_bytes((folder / "source.safetensors").read_bytes())
    converted, report = convert(load(folder / "source.safetensors"), "diffusers")
    save(converted, folder / "converted.safetensors", report=report)


def ours(folder: Path, case: str) -> tuple[float, float]:
    """Seconds and peak MiB of the whole process."""
    files = [str(folder / f"{name}.safetensors") for name in ("source", case)]
    started = time.perf_counter()
    command = [sys.executable, "-m", "lorasurgery", "compare", *files]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: S603  our own interpreter
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status) != EXIT[case]:
        raise SystemExit(f"compare went wrong: {case}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def dense(rank: int) -> float:
    """Seconds for all modules."""
    import numpy as np

    rng, total = np.random.default_rng(0), 0.0
    for (out, width), count in Counter(shapes().values()).items():
        ups = [rng.standard_normal((out, rank), np.float32) for _ in range(2)]
        downs = [rng.standard_normal((rank, width), np.float32) for _ in range(2)]
        started = time.perf_counter()
        np.linalg.norm(ups[0] @ downs[0] - ups[1] @ downs[1])
        total += (time.perf_counter() - started) * count
    return total


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    runs: dict[str, list[tuple[float, float]]] = {case: [] for case in CASES}
    others = []
    with tempfile.TemporaryDirectory() as text, multiprocessing.get_context("spawn").Pool(1) as pool:
        folder = Path(text)
        pool.apply(make, (folder, options.rank))
        for case in CASES:
            ours(folder, case)  # warms the page cache
        for _ in range(options.rounds):
            for case in CASES:
                runs[case].append(ours(folder, case))
            others.append(pool.apply(dense, (options.rank,)))
        size = round((folder / "source.safetensors").stat().st_size / 2**20)
    rows: list[dict[str, Any]] = [
        {
            "case": case,
            "seconds": round(statistics.median(s for s, _ in own), 2),
            "range": [round(min(own)[0], 2), round(max(own)[0], 2)],
            "peak_mib": round(max(m for _, m in own)),
        }
        for case, own in runs.items()
    ]
    reference = round(statistics.median(others), 2)
    if options.json:
        print(json.dumps({"file_mib": size, "dense_seconds": reference, "rows": rows}, indent=2))
        return
    print(f"two files of {size} MiB; dense differences alone: {reference} s")
    for row in rows:
        print(f"{row['case']:<10} {row['seconds']:>6} s  {row['range']}  peak {row['peak_mib']} MiB")


if __name__ == "__main__":
    main()
