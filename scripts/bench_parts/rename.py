"""Whole processes: a rename, a folded scale and a hash, against ``cp`` and plain sha256 of the same file.

    python scripts/bench_parts/rename.py [--rounds 5] [--sizes 300 1000] [--json]

The file is a Wan 2.1 14B LoRA in sd-scripts layout (bf16, 400 modules). ``rename`` converts it to ComfyUI, ``fold``
to musubi-tuner's ``other`` with the scale (not a power of two) folded in, ``hash`` is a rename that also computes the
sshs hashes. Every round runs each command once, in turn, from the page cache; figures are medians and peak memory.
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
from pathlib import Path

SHA256 = """
import hashlib, sys
digest = hashlib.sha256()
with open(sys.argv[1], "rb", buffering=0) as file:
    while chunk := file.read(1 << 20):
        digest.update(chunk)
"""


def make(path: Path, megabytes: int, *, hashes: bool) -> None:
    """A LoRA of about this size. Runs in a process of its own: a child's peak memory counts its parent's."""
    import numpy as np

    from lorasurgery.architectures import named
    from lorasurgery.architectures.table import flat
    from lorasurgery.io.tensors import of_array, scalar
    from lorasurgery.io.writer import write_safetensors

    arch = named("wan-2.1-t2v-14b")[0]
    shapes = {n: s for n, s in arch.shapes.items() if n.startswith("blocks.") and len(s) == 2}
    per_rank = 2 * sum(sum(shape) for shape in shapes.values())
    rank = max(megabytes * 1_000_000 // per_rank, 1)
    rng = np.random.default_rng(0)
    tensors = {}
    for name, (out, width) in shapes.items():
        stem = f"lora_unet_{flat(name)}"
        tensors[f"{stem}.lora_down.weight"] = of_array(rng.standard_normal((rank, width), np.float32), "BF16")
        tensors[f"{stem}.lora_up.weight"] = of_array(rng.standard_normal((out, rank), np.float32), "BF16")
        tensors[f"{stem}.alpha"] = scalar(rank * 0.3, "BF16")
    write_safetensors(path, tensors, {"ss_network_module": "networks.lora_wan"}, hashes=hashes)


def run(command: list[str]) -> tuple[float, float]:
    """Seconds and peak MiB of one process."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: S603  our own command lines
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return seconds, usage.ru_maxrss / 1024


def measure(folder: Path, megabytes: int, rounds: int) -> list[dict[str, object]]:
    """The medians of one size."""
    plain, hashed, out = folder / "plain.safetensors", folder / "hashed.safetensors", folder / "out.safetensors"
    for path, hashes in ((plain, False), (hashed, True)):
        maker = multiprocessing.get_context("spawn").Process(target=make, args=(path, megabytes), kwargs={"hashes": hashes})
        maker.start()
        maker.join()
    tool = [sys.executable, "-m", "lorasurgery", "convert"]
    commands = {
        "cp": ["cp", str(plain), str(out)],
        "rename": [*tool, str(plain), str(out), "--target", "comfyui"],
        "fold": [*tool, str(plain), str(out), "--target", "other"],
        "sha256": [sys.executable, "-S", "-c", SHA256, str(hashed)],
        "hash": [*tool, str(hashed), str(out), "--target", "comfyui"],
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(rounds + 1):  # the first round only warms the page cache
        for name, command in commands.items():
            out.unlink(missing_ok=True)
            found[name].append(run(command))
    medians = {name: statistics.median(seconds for seconds, _ in runs[1:]) for name, runs in found.items()}
    against = {"cp": "cp", "rename": "cp", "fold": "cp", "sha256": "sha256", "hash": "sha256"}
    return [
        {
            "size_mb": round(plain.stat().st_size / 1e6),
            "command": name,
            "seconds": round(medians[name], 3),
            "ratio": round(medians[name] / medians[against[name]], 2),
            "against": against[name],
            "peak_mib": round(max(memory for _, memory in runs[1:])),
        }
        for name, runs in found.items()
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[300, 1000], help="megabytes")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for size in options.sizes for row in measure(Path(folder), size, options.rounds)]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'size':>8} {'command':8} {'median s':>9} {'ratio':>7}  {'against':8} {'peak MiB':>8}")
    for row in rows:
        head = f"{row['size_mb']:>5} MB {row['command']:8} {row['seconds']:>9}"
        print(f"{head} {row['ratio']:>7}  {row['against']:8} {row['peak_mib']:>8}")


if __name__ == "__main__":
    main()
