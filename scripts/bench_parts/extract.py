"""The decomposition that ``extract`` makes, against the dense decompositions of other tools: one thread, alternated.

    python scripts/bench_parts/extract.py [--rounds 3] [--archs sdxl flux1-dev] [--ranks 32 64] [--small] [--json]

One matrix of each shape, weighted by how many there are in the model; the differences of two models as float32:

- ``baked``: a bf16 weight and itself with an adapter of the rank asked for, whose smallest singular value is about the
  largest of the bf16 rounding noise;
- ``slow``: 256 singular values i^-0.8 on a bf16 weight, in rounding noise;
- ``steep``: 256 singular values e^(-i/6) in float32.

The peers are ``torch.linalg.svd(full_matrices=True)`` (sd-scripts, LyCORIS), the same without full matrices (musubi-tuner,
mergekit), and ``torch.svd_lowrank(q=rank, niter=7)`` (KJNodes). Full matrices are tried up to ``--full`` numbers in the
larger of the matrices it makes, thin up to ``--thin`` numbers, both once for each shape: their time does not depend on the
numbers, and beyond that one takes minutes.
``excess`` is the Frobenius error over the optimum, minus 1, from all eigenvalues of the smaller Gram matrix in float64;
a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from lorasurgery.architectures import named
from lorasurgery.linalg.dense import full_spectrum, torch_threads, truncated_svd

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Shape = tuple[int, int]

SPECTRA = ("baked", "slow", "steep")
SMALL = {"sdxl": ((640, 640), (1280, 1280)), "flux1-dev": ((3072, 3072),)}
EDGE = 0.33
"""With an adapter of this size, in units of the noise, ``s_rank / s_(rank+1)`` is 1.02 to 1.1."""
PARTS = ("transformer_blocks.", "double_blocks.", "single_blocks.")


@dataclass(frozen=True, slots=True)
class Row:
    """One matrix at one rank. Seconds are medians, ratios (peer over ours) medians of the rounds' ratios."""

    arch: str
    shape: Shape
    count: int
    spectrum: str
    rank: int
    gap: float
    """``s_rank / s_(rank+1)``"""
    ours_s: float
    lowrank_s: float
    lowrank_ratio: float
    thin_s: float | None
    full_s: float | None
    passes: int
    excess: float
    estimated_excess: float
    lowrank_excess: float


def counted(arch: str, *, small: bool) -> list[tuple[Shape, int]]:
    """The shapes (out, in) of the blocks' matrices and how many of each the model has."""
    table = named(arch)[0].shapes
    counts = Counter((s[0], s[1]) for n, s in table.items() if len(s) == 2 and any(part in n for part in PARTS))
    return [(shape, count) for shape, count in sorted(counts.items()) if not small or shape in SMALL[arch]]


def difference(spectrum: str, shape: Shape, rank: int) -> Tensor:
    """What tuning changed, (out, in) in float32."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    def product(values: Tensor) -> Tensor:
        up, down = (torch.linalg.qr(normal(side, len(values)))[0] for side in shape)
        made: Tensor = (up * values) @ down.T
        return made

    if spectrum == "steep":
        return product(torch.exp(-torch.arange(256) / 6.0))
    weight = (0.03 * normal(*shape)).bfloat16()

    def rounded(change: Tensor) -> Tensor:
        return (weight + change).bfloat16().float() - weight.float()

    if spectrum == "slow":
        return rounded(product(0.3 * torch.arange(1, 257) ** -0.8))
    edge = float(rounded(1e-4 * normal(*shape)).std()) * (shape[0] ** 0.5 + shape[1] ** 0.5)
    return rounded(product(torch.logspace(1.3, 0.0, rank) * edge * EDGE))


def timed(function: Callable[[], object]) -> float:
    """Seconds."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def error(matrix: Tensor, u: Tensor, s: Tensor, v: Tensor) -> float:
    """``||matrix - u s v^T||_F`` in float64, some rows at a time."""
    right = (v.double() * s.double()).T
    squares = 0.0
    for start in range(0, len(matrix), 1024):
        part = slice(start, start + 1024)
        squares += float((matrix[part].double() - u[part].double() @ right).square().sum())
    return float(squares**0.5)


def peers(shape: Shape, matrix: Tensor, options: argparse.Namespace) -> tuple[float | None, float | None]:
    """Seconds of the thin SVD and of that with full matrices, where they are tried."""
    thin = full = None
    if matrix.numel() <= options.thin:
        thin = timed(lambda: torch.linalg.svd(matrix, full_matrices=False))
    if max(shape) ** 2 <= options.full:
        full = timed(lambda: torch.linalg.svd(matrix))
    return thin, full


def shape_rows(arch: str, shape: Shape, count: int, options: argparse.Namespace) -> list[Row]:
    """One shape with every spectrum and rank."""
    rows: list[Row] = []
    dense: tuple[float | None, float | None] | None = None
    for spectrum in options.spectra:
        for rank in options.ranks:
            if rank == options.ranks[0] or spectrum == "baked":
                matrix = difference(spectrum, shape, rank)
                values = full_spectrum(matrix)
            dense = dense or peers(shape, matrix, options)
            ours, lowrank = alternated(matrix, rank, options.rounds)
            best = float((values[rank:] ** 2).sum()) ** 0.5
            found = truncated_svd(matrix, rank)
            row = Row(
                arch=arch,
                shape=shape,
                count=count,
                spectrum=spectrum,
                rank=rank,
                gap=round(float(values[rank - 1] / values[rank]), 3),
                ours_s=statistics.median(ours),
                lowrank_s=statistics.median(lowrank),
                lowrank_ratio=statistics.median(b / a for a, b in zip(ours, lowrank, strict=True)),
                thin_s=dense[0],
                full_s=dense[1],
                passes=found.passes,
                excess=error(matrix, found.u, found.s, found.v) / best - 1,
                estimated_excess=found.excess,
                lowrank_excess=error(matrix, *torch.svd_lowrank(matrix, q=rank, niter=7)) / best - 1,
            )
            rows.append(row)
            if not options.json:
                print(line(row), flush=True)
    return rows


def alternated(matrix: Tensor, rank: int, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of ours and of ``svd_lowrank``, in turn, after one call that warms up."""
    ours: list[float] = []
    lowrank: list[float] = []
    truncated_svd(matrix, rank)
    for _ in range(rounds):
        ours.append(timed(lambda: truncated_svd(matrix, rank)))
        lowrank.append(timed(lambda: torch.svd_lowrank(matrix, q=rank, niter=7)))
    return ours, lowrank


def total(rows: list[Row], peer: str) -> float | None:
    """Seconds of the peer over ours for all modules of the shapes that the peer was tried on."""
    tried = [row for row in rows if getattr(row, peer) is not None]
    if not tried:
        return None
    return float(sum(getattr(row, peer) * row.count for row in tried) / sum(row.ours_s * row.count for row in tried))


def line(row: Row) -> str:
    """One row as text."""
    peers = "".join(
        f"  {name} {'-' if seconds is None else f'{seconds / row.ours_s:.0f}x':>5}"
        for name, seconds in (("thin", row.thin_s), ("full", row.full_s))
    )
    found = f"excess {row.excess:8.1e} (estimated {row.estimated_excess:.0e}, svd_lowrank {row.lowrank_excess:.0e})"
    return (
        f"{row.shape!s:>14} x{row.count:<4}{row.spectrum:6} r{row.rank:<4}gap {row.gap:<6} {row.ours_s * 1e3:8.1f} ms"
        f"  svd_lowrank {row.lowrank_ratio:5.2f}x{peers}"
        f"  {found}, {row.passes} passes"
    )


def summary(rows: list[Row]) -> str:
    """All modules of one model at one rank with one spectrum."""
    peers = {name: total(rows, f"{name}_s") for name in ("lowrank", "thin", "full")}
    ratios = ", ".join(f"{name} {'-' if ratio is None else f'{ratio:.1f}x'}" for name, ratio in peers.items())
    seconds = sum(row.ours_s * row.count for row in rows)
    worst, other = max(row.excess for row in rows), max(row.lowrank_excess for row in rows)
    first = rows[0]
    return (
        f"{first.arch} {first.spectrum} rank {first.rank}: {sum(row.count for row in rows)} modules, {seconds:.1f} s; {ratios};"
        f" worst excess {worst:.1e}, svd_lowrank {other:.1e}"
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--archs", nargs="+", default=["sdxl", "flux1-dev"], choices=list(SMALL))
    parser.add_argument("--ranks", nargs="+", type=int, default=[32, 64])
    parser.add_argument("--spectra", nargs="+", default=list(SPECTRA), choices=SPECTRA)
    parser.add_argument("--small", action="store_true", help="three shapes only")
    parser.add_argument("--thin", type=float, default=3e7, help="numbers in the matrix")
    parser.add_argument("--full", type=float, default=1.1e8, help="numbers in the larger square matrix")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch_threads(1):
        shapes = [(arch, *one) for arch in options.archs for one in counted(arch, small=options.small)]
        rows = [row for arch, shape, count in shapes for row in shape_rows(arch, shape, count, options)]
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    for arch, spectrum, rank in itertools.product(options.archs, options.spectra, options.ranks):
        print(summary([row for row in rows if (row.arch, row.spectrum, row.rank) == (arch, spectrum, rank)]))


if __name__ == "__main__":
    main()
