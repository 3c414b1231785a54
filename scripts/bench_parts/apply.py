"""Whole processes: a LoRA applied to a checkpoint of several gigabytes, against ``cp`` of the same file.

    python scripts/bench_parts/apply.py [--arch sdxl] [--rounds 3] [--double 3 --single 6] [--rank 32] [--dtype BF16] [--json]

The checkpoint is FLUX.1's table with fewer blocks (3.7 GB in bf16 as it stands), or SDXL's whole, with text encoders and VAE as
bytes (6.9 GB in fp16: ``--dtype F16``); the LoRA sd-scripts' with every matrix of the blocks that it trains (``typical``: of
FLUX.1 nearly all bytes change, of SDXL six tenths) or with the attention of one block (``few``: nearly all are copied). Ours
is the whole process: start, match, compute, write. Rounds alternate with ``cp``; everything is in the page cache, and outputs
are removed between runs. ``peak`` is the memory of all its processes, in a run of its own, ``bound`` 300 MiB + 3x the largest
tensor.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

POOL = 1 << 24
"""Random values that the tensors are cut from, at different places."""


REST = 1_800_000_000
"""Bytes of SDXL's text encoders and VAE in 16 bits, about."""


class Kind(NamedTuple):
    """Of an architecture: what its LoRA changes."""

    prefix: str
    """Of a checkpoint's keys."""
    typical: str
    few: str
    """Expressions that names of matrices match."""


KINDS = {
    "flux1-dev": Kind("", r"_blocks\.", r"double_blocks\.0\.img_attn"),
    "sdxl": Kind("model.diffusion_model.", r"transformer_blocks\.|proj_(in|out)$", r"input_blocks\.4\.1\..*attn1"),
}


def shapes(arch: str, double: int, single: int) -> dict[str, tuple[int, ...]]:
    """Original names of the weights; of FLUX.1 with so many blocks."""
    from lorasurgery.architectures import named

    def kept(name: str) -> bool:
        part, number = ([*name.split("."), "", ""])[:2]
        return {"double_blocks": double, "single_blocks": single}.get(part, 10**6) > (int(number) if number.isdigit() else 0)

    return {name: shape for name, shape in named(arch)[0].shapes.items() if kept(name)}


def make_model(path: Path, arch: str, double: int, single: int, dtype: str) -> None:
    """The checkpoint. In a process of its own: memory is not given back."""
    import numpy as np

    from lorasurgery.io.dtypes import BITS, numpy_dtype
    from lorasurgery.io.sources import MemorySource, Region
    from lorasurgery.io.tensors import Tensor
    from lorasurgery.io.writer import write_safetensors

    pool = (np.random.default_rng(0).standard_normal(POOL, np.float32) * 0.02).astype(numpy_dtype(dtype))
    source, size = MemorySource(pool.tobytes()), BITS[dtype] // 8
    tensors, own = {}, dict(shapes(arch, double, single))
    if arch == "sdxl":
        own["first_stage_model.rest"] = (REST // size // 1024, 1024)
    for i, (name, shape) in enumerate(own.items()):
        left, regions, at = int(np.prod(shape)), [], (i * 9973) % (POOL // 2)
        while left:
            count = min(left, POOL - at)
            regions.append(Region(source, at * size, count * size))
            left, at = left - count, 0
        suffix = ".scale" if name.endswith("_norm") else ".weight"
        prefix = "" if name.startswith("first_stage") else KINDS[arch].prefix
        tensors[prefix + name + suffix] = Tensor(dtype, shape, tuple(regions))
    write_safetensors(path, tensors, {"format": "pt"})


def make_lora(path: Path, arch: str, double: int, single: int, rank: int, only: str) -> None:
    """An sd-scripts LoRA for the matrices whose names match ``only``."""
    import numpy as np

    from lorasurgery.architectures.table import flat
    from lorasurgery.io.tensors import of_array, scalar
    from lorasurgery.io.writer import write_safetensors

    rng = np.random.default_rng(1)
    tensors = {}
    for name, shape in shapes(arch, double, single).items():
        if len(shape) != 2 or not re.search(only, name):
            continue
        stem = f"lora_unet_{flat(name)}"
        tensors[f"{stem}.lora_down.weight"] = of_array(rng.standard_normal((rank, shape[1]), np.float32) / 30, "BF16")
        tensors[f"{stem}.lora_up.weight"] = of_array(rng.standard_normal((shape[0], rank), np.float32) / 30, "BF16")
        tensors[f"{stem}.alpha"] = scalar(rank / 2, "F32")
    write_safetensors(path, tensors, {"ss_network_module": "networks.lora_flux" if arch == "flux1-dev" else "networks.lora"})


def apart(function: Any, *args: object) -> Any:  # noqa: ANN401  whatever the function returns
    """Call it in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def timed(command: list[str], out: Path) -> float:
    """Seconds of a process that writes ``out``, which is removed before and after; the second of two runs.

    The first leaves memory behind that the second takes up again: on a virtual machine, pages that another kind of program
    left may have to come from the host first, which took up to three times as long as the writing.
    """
    seconds = 0.0
    for _ in range(2):
        out.unlink(missing_ok=True)
        os.sync()  # what was written before would be flushed at this process's cost
        started = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)  # noqa: S603  our own words
        seconds = time.perf_counter() - started
    out.unlink(missing_ok=True)
    return seconds


def peak(command: list[str], out: Path) -> float:
    """Largest MiB of a process and those that it forks, what they share counted once; looked at twenty times a second."""
    most = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:  # noqa: S603
        while process.poll() is None:
            with suppress(OSError):  # one of them has just ended
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                texts = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in (process.pid, *children)]
                most = max(most, sum(int(kib) for text in texts for kib in re.findall(r"^Pss:\s+(\d+)", text, re.MULTILINE)))
            time.sleep(0.05)
    out.unlink(missing_ok=True)
    return most / 1024


def measure(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Both LoRAs."""
    model, out = folder / "model.safetensors", folder / "out.safetensors"
    size, kind = (options.arch, options.double, options.single), KINDS[options.arch]
    apart(make_model, model, *size, options.dtype)
    largest = max(shapes(*size).values(), key=lambda s: s[0] * (s[1] if len(s) > 1 else 1))
    bound = 300 + 3 * largest[0] * largest[1] * (2 if options.dtype in {"BF16", "F16"} else 1) / 2**20
    found = []
    for name, only in (("typical", kind.typical), ("few", kind.few)):
        lora = folder / f"{name}.safetensors"
        apart(make_lora, lora, *size, options.rank, only)
        command = [sys.executable, "-m", "lorasurgery", "apply", str(model), f"{lora}:0.8", "-o", str(out)]
        timed(["cp", str(model), str(out)], out)  # warms the page cache
        ours, copies = [], []
        for _ in range(options.rounds):
            copies.append(timed(["cp", str(model), str(out)], out))
            ours.append(timed(command, out))
        seconds, copying = statistics.median(ours), statistics.median(copies)
        found.append(
            {
                "lora": name,
                "model_gb": round(model.stat().st_size / 1e9, 2),
                "ours_s": round(seconds, 2),
                "range_s": [round(min(ours), 2), round(max(ours), 2)],
                "cp_s": round(copying, 2),
                "ratio": round(seconds / copying, 2),
                "peak_mib": round(peak(command, out)),
                "bound_mib": round(bound),
            }
        )
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="flux1-dev", choices=list(KINDS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--double", type=int, default=3, help="double blocks of the model")
    parser.add_argument("--single", type=int, default=6, help="single blocks")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--dtype", default="BF16", help="BF16, F16, F8_E4M3, ...")
    parser.add_argument("--folder", type=Path, help="where the files go; default: the system's temporary folder")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = measure(Path(folder), options)
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print(
            f"{row['lora']:8} {row['model_gb']} GB: {row['ours_s']} s ({row['range_s']}), cp {row['cp_s']} s, "
            f"{row['ratio']} x cp, peak {row['peak_mib']} MiB (bound {row['bound_mib']})"
        )


if __name__ == "__main__":
    main()
