"""LoKr q, k, v of one Z-Image layer to one LoRA: ours against the thin SVD of the dense fused matrix.

    python scripts/bench_parts/lokr_qkv.py [--rounds 3] [--json]

Both run in this process in turn, with one BLAS thread each. The peer is what today's converters do: ``torch.kron``
three times, ``torch.cat``, ``torch.linalg.svd(full_matrices=False)`` in float32 of 11520 x 3840, 15-30 s for each round
and layer. Its time ends with the SVD; ours ends with the finished float32 factors. ``error`` is measured on the dense
matrix in float64 with those factors; ``excess`` is that over the optimum at the same rank, minus 1, the optimum being
that of the dense float64 matrix (eigenvalues of ``A^T A``).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from lorasurgery.linalg.kronecker import KroneckerPart, stacked_kronecker_svd
from lorasurgery.linalg.low_rank import tail_error
from lorasurgery.linalg.threads import one_blas_thread

if TYPE_CHECKING:
    from lorasurgery.linalg.factors import Array, Factors

OUTER, INNER = 60, 64  # the factors of 3840 that LyCORIS chooses
KINDS: dict[str, tuple[int | None, tuple[dict[str, float], ...]]] = {
    "w2 rank 4": (4, ({"energy": 0.9999}, {"rank": 64})),
    "w2 rank 16": (16, ({"rank": 64},)),
    "w2 full": (None, ({"rank": 64},)),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One request on one kind of layer; times in seconds, medians over the rounds."""

    kind: str
    request: str
    rank: int
    peer_s: float
    ours_s: float
    ratio: float
    ratio_range: tuple[float, float]
    relative_error: float
    excess: float


def layer(rank: int | None, seed: int) -> list[KroneckerPart]:
    """Random q, k, v: (60, 60) x (64, 64), w2 of this rank or full."""
    rng = np.random.default_rng(seed)

    def normal(rows: int, columns: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        return rng.standard_normal((rows, columns)).astype(np.float32)

    if rank is None:
        return [KroneckerPart(normal(OUTER, OUTER), normal(INNER, INNER)) for _ in range(3)]
    return [KroneckerPart(normal(OUTER, OUTER), normal(INNER, rank), w2_b=normal(rank, INNER)) for _ in range(3)]


def peer(parts: list[KroneckerPart]) -> float:
    """Seconds for the dense route."""
    started = time.perf_counter()
    blocks = []
    for part in parts:
        w2 = torch.from_numpy(part.w2) if part.w2_b is None else torch.from_numpy(part.w2) @ torch.from_numpy(part.w2_b)
        blocks.append(torch.kron(torch.from_numpy(part.w1), w2))
    torch.linalg.svd(torch.cat(blocks), full_matrices=False)
    return time.perf_counter() - started


def ours(parts: list[KroneckerPart], request: dict[str, float]) -> tuple[float, Factors]:
    """Seconds for the factored route, to the finished float32 factors, and those factors."""
    started = time.perf_counter()
    rank = request.get("rank")
    found = stacked_kronecker_svd(parts, rank=None if rank is None else int(rank), energy=request.get("energy"))
    return time.perf_counter() - started, found


def dense(parts: list[KroneckerPart]) -> Array:
    """The fused matrix (11520, 3840) in float64."""
    rights = [part.w2 if part.w2_b is None else part.w2.astype(np.float64) @ part.w2_b for part in parts]
    return np.vstack([np.kron(part.w1.astype(np.float64), w2) for part, w2 in zip(parts, rights, strict=True)])


def spectrum(matrix: Array) -> Array:
    """All singular values, from the Gram matrix."""
    values: Array = np.linalg.eigvalsh(matrix.T @ matrix)[::-1]
    return np.sqrt(np.maximum(values, 0.0))


def measure(kind: str, rounds: int) -> list[Row]:
    """Alternate the peer and every request on this kind of layer."""
    w2_rank, requests = KINDS[kind]
    parts = layer(w2_rank, seed=0)
    peer_times: list[float] = []
    our_times: list[list[float]] = [[] for _ in requests]
    found: list[Factors] = []
    for _ in range(rounds):
        peer_times.append(peer(parts))
        found.clear()
        for times, request in zip(our_times, requests, strict=True):
            seconds, factors = ours(parts, request)
            times.append(seconds)
            found.append(factors)
    matrix = dense(parts)
    values = spectrum(matrix)
    rows = []
    for request, times, factors in zip(requests, our_times, found, strict=True):
        error = float(np.linalg.norm(matrix - factors.up.astype(np.float64) @ factors.down) / np.linalg.norm(matrix))
        rows.append(summary(kind, request, peer_times, times, (factors.rank, error, tail_error(values, factors.rank))))
    return rows


def summary(
    kind: str,
    request: dict[str, float],
    peer_times: list[float],
    our_times: list[float],
    quality: tuple[int, float, float],
) -> Row:
    """Medians, and the ratio of each round's pair; ``quality`` is rank, error, best possible error."""
    rank, error, optimum = quality
    ratios = [a / b for a, b in zip(peer_times, our_times, strict=True)]
    return Row(
        kind=kind,
        request=", ".join(f"{name} {value:g}" for name, value in request.items()),
        rank=rank,
        peer_s=statistics.median(peer_times),
        ours_s=statistics.median(our_times),
        ratio=statistics.median(ratios),
        ratio_range=(min(ratios), max(ratios)),
        relative_error=error,
        excess=error / optimum - 1.0,
    )


def main() -> None:
    """Measure every kind and print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with one_blas_thread():
        rows = [row for kind in KINDS for row in measure(kind, options.rounds)]
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    print("layer       request          rank   peer s   ours s  ratio  range             error    excess")
    for row in rows:
        low, high = row.ratio_range
        print(
            f"{row.kind:12}{row.request:16}{row.rank:5}{row.peer_s:9.2f}{row.ours_s:9.3f}{row.ratio:7.0f}  "
            f"{f'{low:.0f}-{high:.0f}':12}{row.relative_error:11.6f}{row.excess:10.1e}"
        )


if __name__ == "__main__":
    main()
