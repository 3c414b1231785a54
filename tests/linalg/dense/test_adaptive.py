"""The torch SVD of dense matrices to an energy or an error, against numpy's in float64."""

import numpy as np
import pytest
import torch

from lorasurgery.linalg.dense import adaptive, svd_until, truncated
from lorasurgery.linalg.dense.power import subspaces
from tests.linalg.dense.matrices import SPECTRA, baked, error, with_spectrum


@pytest.fixture(autouse=True)
def iterate(monkeypatch):
    """Small matrices go through the iteration too, in small blocks."""
    monkeypatch.setattr(truncated, "EXACT_SIZE", 0)
    monkeypatch.setattr(truncated, "EXACT_SHARE", 1)
    monkeypatch.setattr(adaptive, "FIRST_RANK", 4)


def smallest_rank(matrix, share):
    """The smallest rank that leaves at most this share of the squared norm."""
    squares = np.linalg.svd(matrix, compute_uv=False) ** 2
    tails = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
    return int(np.argmax(tails <= share * tails[0]))


def matrix_of(name, rows=240, columns=300):
    return baked(rows, columns, 12) if name == "baked" else with_spectrum(SPECTRA[name](min(rows, columns)), rows, columns)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", ["baked", *SPECTRA])
@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99])
def test_the_smallest_rank_that_keeps_an_energy(name, energy, exact):
    matrix = matrix_of(name)
    found = svd_until(torch.from_numpy(matrix), energy=energy, exact=exact)
    expected = smallest_rank(matrix, 1 - energy)
    assert expected <= found.rank <= expected + max(1, expected // 50)
    assert error(matrix, found) ** 2 <= (1 - energy) * np.linalg.norm(matrix) ** 2 * (1 + 1e-9)


@pytest.mark.parametrize("limit", [0.5, 0.1, 1e-3])
def test_the_smallest_rank_within_an_error(limit):
    matrix = matrix_of("steep")
    found = svd_until(torch.from_numpy(matrix.astype(np.float32)), error=limit)
    expected = smallest_rank(matrix, limit**2)
    assert expected <= found.rank <= expected + 1
    assert found.relative_error() <= limit


def test_the_cap_holds_and_the_basis_grows():
    matrix = torch.from_numpy(matrix_of("slow"))
    assert svd_until(matrix, energy=0.999, max_rank=10).rank == 10
    grown = svd_until(matrix, error=0.3)
    assert not grown.exact
    assert grown.rank > 4
    assert svd_until(matrix, error=1.0).rank == 1
    assert svd_until(torch.zeros(30, 40), energy=0.9).rank == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_of_it_is_the_numerical_rank(dtype):
    rng = np.random.default_rng(0)
    matrix = torch.from_numpy(rng.standard_normal((300, 9)) @ rng.standard_normal((9, 200))).to(dtype)
    assert svd_until(matrix, energy=1.0).rank == 9
    assert svd_until(matrix, error=0.0).rank == 9


def test_a_hopeless_search_ends_after_the_first_try(monkeypatch):
    tries = []

    def counted(*args):
        tries.append(args)
        return subspaces(*args)

    monkeypatch.setattr(truncated, "EXACT_SHARE", 4)
    monkeypatch.setattr(adaptive, "subspaces", counted)
    assert svd_until(torch.from_numpy(matrix_of("flat")), energy=0.9).exact
    assert len(tries) == 1


@pytest.mark.parametrize(
    "options",
    [{}, {"energy": 0.5, "error": 0.5}, {"energy": 0.0}, {"energy": 1.1}, {"error": -0.1}, {"error": 1.1},
     {"energy": 0.5, "max_rank": 0}, {"energy": 0.5, "tolerance": 0.0}],
)  # fmt: skip
def test_refusals(options):
    with pytest.raises(ValueError, match=r"energy|error|rank|tolerance"):
        svd_until(torch.ones(4, 4), **options)
