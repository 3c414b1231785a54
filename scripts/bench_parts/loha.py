"""LoHa to LoRA, the factored SVD of its Khatri-Rao factors against the thin SVD of the dense product; and the nearest LoHa.

    python scripts/bench_parts/loha.py [--rounds 3] [--json]

Both run in this process in turn, with one BLAS thread each, from random factors (a flat spectrum, the hard case). The peer is
what converters do: both arms multiplied out, ``torch.linalg.svd(full_matrices=False)`` in float32; its time ends with the
SVD, ours with the finished factors. ``error / optimum`` is measured in float64 against the dense float64 optimum.

The nearest LoHa has no peer: its time is the process's, and its error stands beside that of the best LoRA of the rank.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import ml_dtypes
import numpy as np
import torch

from lorasurgery.linalg.hadamard import khatri_rao
from lorasurgery.linalg.hadamard_target import hadamard_of_dense
from lorasurgery.linalg.low_rank import truncate
from lorasurgery.linalg.nearest_hadamard import nearest_hadamard
from lorasurgery.linalg.threads import one_blas_thread

CASES = ((1280, 8, 63), (1280, 16, 64), (3072, 8, 63), (3072, 16, 64))
"""(side, rank of the LoHa, rank of the LoRA)."""
NEAREST = (
    ("decaying", 640, 8),
    ("decaying", 1280, 4),
    ("decaying", 1280, 16),
    ("LoHa + noise", 640, 4),
    ("LoHa, bf16", 1280, 4),
)
"""(matrix, side, rank)."""
TOLERANCE = 1e-4
"""As ``extract`` and ``convert`` ask for it."""


def measure(side: int, rank: int, wanted: int, rounds: int) -> dict[str, Any]:
    """Medians over the rounds."""
    rng = np.random.default_rng(0)
    arms = [rng.standard_normal(shape, np.float32) for shape in ((side, rank), (rank, side)) * 2]
    peers, ours = [], []
    up = down = np.zeros(0)
    for _ in range(rounds):
        started = time.perf_counter()
        w1_a, w1_b, w2_a, w2_b = map(torch.from_numpy, arms)
        torch.linalg.svd((w1_a @ w1_b) * (w2_a @ w2_b), full_matrices=False)
        peers.append(time.perf_counter() - started)
        started = time.perf_counter()
        up, down, _ = truncate(*khatri_rao(*arms), wanted)
        ours.append(time.perf_counter() - started)
    dense = (arms[0].astype(np.float64) @ arms[1]) * (arms[2].astype(np.float64) @ arms[3])
    squares = np.linalg.eigvalsh(dense @ dense.T)[::-1]
    ratios = [a / b for a, b in zip(peers, ours, strict=True)]
    return {
        "case": f"{side} x {side}, rank {rank} -> {wanted}",
        "thin_svd_s": statistics.median(peers),
        "ours_s": statistics.median(ours),
        "ratio": statistics.median(ratios),
        "range": [min(ratios), max(ratios)],
        "error_over_optimum": float(np.linalg.norm(dense - up @ down) / np.sqrt(np.sum(squares[wanted:]))),
    }


def nearest(kind: str, side: int, rank: int, rounds: int) -> dict[str, Any]:
    """The nearest LoHa of one matrix, the median time of the rounds."""
    rng = np.random.default_rng(0)
    if kind == "decaying":
        left, right = (np.linalg.qr(rng.standard_normal((side, side)))[0] for _ in range(2))
        matrix = (left * np.arange(1, side + 1) ** -0.6) @ right
    else:
        arms = [rng.standard_normal(shape) for shape in ((side, rank), (rank, side)) * 2]
        matrix = (arms[0] @ arms[1]) * (arms[2] @ arms[3]) / rank
        noise = 0.3 * rng.standard_normal(matrix.shape)
        matrix = matrix + noise if kind == "LoHa + noise" else matrix.astype(ml_dtypes.bfloat16).astype(np.float64)
    taken, norm = [], float(np.sum(matrix**2))
    for _ in range(rounds):
        started = time.process_time()
        found = nearest_hadamard(hadamard_of_dense(matrix), rank, tolerance=TOLERANCE)
        taken.append(time.process_time() - started)
    return {
        "case": f"{kind}, {side} x {side}, rank {rank}",
        "cpu_s": statistics.median(taken),
        "error": float(np.sqrt(found.error / norm)),
        "lora_error": float(np.sqrt(found.lora_error / norm)),
    }


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with one_blas_thread():
        rows = [measure(*case, options.rounds) for case in CASES]
        others = [nearest(*case, options.rounds) for case in NEAREST]
    if options.json:
        print(json.dumps({"to_lora": rows, "nearest": others}, indent=2))
        return
    print(f"{'LoHa to LoRA':32}{'thin SVD':>10}{'ours':>10}{'ratio':>8}  {'range':14}error / optimum")
    for row in rows:
        low, high = row["range"]
        print(
            f"{row['case']:32}{row['thin_svd_s']:8.2f} s{row['ours_s']:8.4f} s{row['ratio']:8.0f}  "
            f"{f'{low:.0f}-{high:.0f}':14}{row['error_over_optimum']:.6f}"
        )
    print(f"\n{'nearest LoHa':36}{'CPU':>10}{'error':>9}  best LoRA of the rank")
    for row in others:
        print(f"{row['case']:36}{row['cpu_s']:8.2f} s{row['error']:9.4f}  {row['lora_error']:.4f}")


if __name__ == "__main__":
    main()
