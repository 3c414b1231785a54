"""One module: two LoKr with whole factors added and cut to a rank, against dense decompositions of the sum.

    python -m scripts.bench_parts.lokr_merge [--rounds 3] [--rank 32] [--peers svd svd_lowrank] [--json]

Ours is reading both files, the sum, the cut and its factors, as ``lorasurgery merge --rank`` does it. The peers are the
decomposition of the dense sum alone, in float32: ``torch.linalg.svd(full_matrices=False)`` and ``torch.svd_lowrank(niter=7)``.
One thread each, alternated; processor seconds. ``excess`` is the error over the optimum, minus 1, in float64.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

MODULES = {"sdxl": ("output_blocks.0.1.transformer_blocks.0.attn1.to_q", 1280), "z-image": ("layers.0.attention.out", 3840)}
"""Architecture -> (a square module, its side)."""
FACTOR = 16


def write(folder: Path, name: str, side: int) -> list[Path]:
    """Two files with one LoKr each, in float32."""
    from lorasurgery.io.tensors import of_array
    from lorasurgery.io.writer import write_safetensors

    rng, paths = np.random.default_rng(0), []
    for number in range(2):
        w1, w2 = rng.standard_normal((FACTOR, FACTOR)), rng.standard_normal((side // FACTOR, side // FACTOR)) / 100
        stem = "lycoris_" + name.replace(".", "_")
        tensors = {f"{stem}.lokr_w1": of_array(w1, "F32"), f"{stem}.lokr_w2": of_array(w2, "F32")}
        paths.append(folder / f"{number}.safetensors")
        write_safetensors(paths[-1], tensors, {})
    return paths


def ours(paths: list[Path], arch: str, rank: int) -> Any:  # noqa: ANN401  (up, down)
    """The factors of the cut sum."""
    from lorasurgery import load
    from lorasurgery.operations.cut import ResizeOptions
    from lorasurgery.verbs.merge import MergeOptions, merge

    options = MergeOptions(dtype="fp32", resize=ResizeOptions(rank=rank, workers=1))
    result, _ = merge([(load(path, arch=arch), 0.5) for path in paths], options)
    module = next(iter(result.modules.values()))
    assert module.delta is not None  # noqa: S101  a cut makes factors
    up, down = (module.delta.tensors[slot].f64() for slot in ("up", "down"))
    return up * module.scale.value, down


def dense(paths: list[Path]) -> Any:  # noqa: ANN401  an array
    """The average."""
    from lorasurgery.io.header import read_safetensors

    found = [[t.f64() for key, t in sorted(read_safetensors(path).tensors.items())] for path in paths]
    return sum(np.kron(w1, w2) for w1, w2 in found) / 2


def peer(name: str, matrix: Any, rank: int) -> float:  # noqa: ANN401  a tensor
    """Processor seconds."""
    import torch

    started = time.process_time()
    torch.svd_lowrank(matrix, q=rank, niter=7) if name == "svd_lowrank" else torch.linalg.svd(matrix, full_matrices=False)
    return time.process_time() - started


def measure(arch: str, options: argparse.Namespace) -> dict[str, Any]:
    """Medians over the rounds."""
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(1)
    name, side = MODULES[arch]
    own: list[float] = []
    peers: dict[str, list[float]] = {peer: [] for peer in options.peers}
    with tempfile.TemporaryDirectory() as folder, threadpool_limits(1):
        paths = write(Path(folder), name, side)
        whole = dense(paths)
        for number in range(options.rounds):
            started = time.process_time()
            up, down = ours(paths, arch, options.rank)
            own.append(time.process_time() - started)
            for other, times in peers.items():
                if number == 0 or other != "svd":
                    times.append(peer(other, torch.from_numpy(whole.astype(np.float32)), options.rank))
        error = float(np.linalg.norm(whole - up @ down))
        tail = float(np.linalg.norm(np.linalg.svd(whole, compute_uv=False)[options.rank :])) if side < 2000 else float("nan")
    seconds = statistics.median(own)
    return {
        "arch": arch, "side": side, "seconds": round(seconds, 2), "excess": error / tail - 1.0,
        "peers": {n: {"seconds": round(statistics.median(t), 2), "ratio": round(statistics.median(t) / seconds, 1)}
                  for n, t in peers.items()},
    }  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--archs", nargs="+", default=list(MODULES))
    parser.add_argument("--peers", nargs="*", default=["svd", "svd_lowrank"])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [measure(arch, options) for arch in options.archs]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print(f"{row['arch']}, {row['side']} square: {row['seconds']} s, excess over the optimum {row['excess']:.1e}")
        for name, found in row["peers"].items():
            print(f"    {name:12} {found['seconds']:>8} s  {found['ratio']:>7} x")


if __name__ == "__main__":
    main()
