"""Whole processes: resize of an SDXL or FLUX.1 LoRA, against the dense decompositions of other tools.

    python scripts/bench_parts/resize.py [--rounds 3] [--cases 32:16 128:32] [--peers sd-scripts svd_lowrank] [--json]
    python scripts/bench_parts/resize.py --arch flux1-dev --cases 128:32 --peers          memory: 494 modules

The file is a LoRA (fp16) of every matrix in the transformer blocks, generated from the architecture's table: SDXL's UNet in
sd-scripts layout (700 modules), others by Diffusers' names, q, k and v apart (FLUX.1: 494). Of every hundred modules one
has an up of zeros, one is rank-deficient, one has badly scaled factors. Ours is the whole process: start, read, decompose,
choose, write, hash. The peers are the decompositions alone, in float32 on one thread for each core of ours (``--threads``),
without start, reading and writing:

- ``sd-scripts``: ``torch.linalg.svd(up @ down)`` with full matrices, as ``networks/resize_lora.py`` does it;
- ``svd_lowrank``: ``torch.svd_lowrank(up @ down, q=rank, niter=7)``, as KJNodes' ``LoraReduceRankKJ`` does it.

Both are timed on one module of each shape and weighted by the shapes' counts; sd-scripts' in the first round only. Rounds
alternate. ``error / optimum`` is the largest over all modules, measured in float64 on the written file by Gram matrices of
the stored factors (Eckart-Young, true to 1e-12 for the spectra here); for a module of zeros it is 1 when zeros come back.
Two limits for the peak memory are shown: the input plus 64 MiB, and the largest module's factors times four plus 200 MiB.
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
from lorasurgery.api import save
from lorasurgery.files.opened import load
from lorasurgery.report import Report
from lorasurgery.operations.cut import ResizeOptions, resize
adapter = load(sys.argv[1])
result, _ = resize(adapter, ResizeOptions(rank=int(sys.argv[3]), workers=int(sys.argv[4])))
save(result, sys.argv[2], report=Report(input=sys.argv[1], source_layout=adapter.layout))
"""


def shapes(arch: str) -> dict[str, tuple[int, ...]]:
    """Module name -> (out, in): the transformer blocks' matrices, for SDXL as sd-scripts trains them."""
    from lorasurgery.architectures import named
    from lorasurgery.architectures.table import DIFFUSERS

    table = named(arch)[0]
    parts = ("transformer_blocks.",) if arch == "sdxl" else ("blocks.", "layers.")
    found = table.shapes
    if arch != "sdxl":
        found = {name: table.module_shape(spans) for name, spans in table.namings[DIFFUSERS].items()}
    return {n: s for n, s in found.items() if len(s) == 2 and any(part in n for part in parts)}


def make(path: Path, rank: int, arch: str, seed: int = 0) -> None:
    """The file. Singular values fall by 100 over the rank. Runs in a process of its own: memory is not given back."""
    import numpy as np

    from lorasurgery.architectures.table import flat
    from lorasurgery.io.tensors import of_array, scalar
    from lorasurgery.io.writer import write_safetensors

    rng = np.random.default_rng(seed)
    decay = np.geomspace(1.0, 0.01, rank, dtype=np.float32)
    tensors = {}
    for number, (name, (out, width)) in enumerate(shapes(arch).items()):
        up, down = (
            rng.standard_normal((out, rank), np.float32) * decay / 30,
            rng.standard_normal((rank, width), np.float32) / 30,
        )
        _hard(number % 100, up, down)
        if arch == "sdxl":
            stem = f"lora_unet_{flat(name)}"
            tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = of_array(down, "F16"), of_array(up, "F16")
            tensors[f"{stem}.alpha"] = scalar(rank * 0.3, "F16")
        else:
            tensors[f"transformer.{name}.lora_A.weight"] = of_array(down, "F16")
            tensors[f"transformer.{name}.lora_B.weight"] = of_array(up, "F16")
    write_safetensors(path, tensors, {"ss_network_module": "networks.lora"} if arch == "sdxl" else {}, hashes=arch == "sdxl")


def _hard(kind: int, up: Any, down: Any) -> None:  # noqa: ANN401  numpy arrays, which are imported where they are used
    """Three modules of a hundred: an up of zeros, three quarters of the rank, components whose factors are scaled apart."""
    rank = len(down)
    if kind == 1:
        up[:] = 0.0
    elif kind == 2:
        up[:, rank - rank // 4 :] = up[:, : rank // 4]
    elif kind == 3:
        for i in range(rank):
            factor = 10.0 ** (4 * i / (rank - 1) - 2)
            up[:, i] *= factor
            down[i] /= factor


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


def worst_ratio(source: Path, out: Path, rank: int) -> float:
    """The largest ``error / optimum`` of a module, over all of them."""
    from lorasurgery.io.header import read_safetensors
    from lorasurgery.linalg.threads import one_blas_thread

    old, new = read_safetensors(source).tensors, read_safetensors(out).tensors
    ends = (".lora_up.weight", ".lora_down.weight") if any(k.endswith(".lora_up.weight") for k in old) else (
        ".lora_B.weight", ".lora_A.weight",
    )  # fmt: skip
    stems = [key.removesuffix(ends[0]) for key in old if key.endswith(ends[0])]
    with one_blas_thread():
        return max(_ratio(old, new, stem, ends, rank) for stem in stems)


def _ratio(old: Any, new: Any, stem: str, ends: tuple[str, str], rank: int) -> float:  # noqa: ANN401  files' tensors
    import numpy as np

    def factors(tensors: Any) -> tuple[Any, Any]:  # noqa: ANN401
        up, down = (tensors[stem + end].f64() for end in ends)
        alpha = tensors[f"{stem}.alpha"].item() if f"{stem}.alpha" in tensors else len(down)
        return up * (alpha / len(down)), down

    (up, down), (new_up, new_down) = factors(old), factors(new)
    root = np.linalg.eigh(down @ down.T)
    root = root.eigenvectors * np.sqrt(np.maximum(root.eigenvalues, 0.0))
    squares = np.maximum(np.linalg.eigvalsh(root.T @ (up.T @ up) @ root)[::-1], 0.0)
    both, below = np.hstack([up, new_up]), np.vstack([down, -new_down])
    optimum, error = float(np.sum(squares[rank:])) ** 0.5, max(float(np.sum(both.T @ both * (below @ below.T))), 0.0) ** 0.5
    return error / optimum if optimum else 1.0 if error == 0.0 else float("inf")


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
    modules = shapes(options.arch)
    size, largest = source.stat().st_size / 2**20, max(2 * old * sum(shape) for shape in modules.values()) / 2**20
    return {
        "arch": options.arch,
        "ranks": f"{old} -> {new}",
        "modules": len(modules),
        "input_mb": round(source.stat().st_size / 1e6),
        "ours_s": round(seconds, 2),
        "range_s": [round(min(s for s, _ in runs), 2), round(max(s for s, _ in runs), 2)],
        "peak_mib": round(max(m for _, m in runs)),
        "limits_mib": [round(size + 64), round(4 * largest + 200)],
        "error_over_optimum": apart(worst_ratio, source, out, new),
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
            f"{row['arch']} {row['ranks']}, {row['modules']} modules, {row['input_mb']} MB: {row['ours_s']} s "
            f"({row['range_s'][0]}-{row['range_s'][1]}), peak {row['peak_mib']} MiB (input + 64: {row['limits_mib'][0]}; "
            f"4 x largest + 200: {row['limits_mib'][1]}), error / optimum at most {row['error_over_optimum']:.6f}"
        )
        for name, found in row["peers"].items():
            print(f"    {name:12} {found['seconds']:>8} s  {found['ratio']:>7} x")


if __name__ == "__main__":
    main()
