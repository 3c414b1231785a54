"""Spectra against dense singular values of the dense changes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import save_file

import lorasurgery
from lorasurgery.deltas.full import Opaque
from lorasurgery.inspection import describe
from tests.headers import FLUX, HERE, lora

if TYPE_CHECKING:
    from pathlib import Path

NAMES = [
    "lycoris_locon", "lycoris_locon_tucker", "lycoris_loha", "lycoris_lokr", "lycoris_lokr_both", "lycoris_lokr_tucker",
    "lycoris_lokr_whole", "lycoris_norms", "diffusers_sd15_dora",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_singular_values_are_those_of_the_dense_change(name: str) -> None:
    path = HERE / "producers" / f"{name}.safetensors"
    found = describe(path, spectrum=True).spectrum
    own = {m.name: m for m in found.modules}
    for _, module in lorasurgery.load(path):
        assert module.delta is not None
        assert not isinstance(module.delta, Opaque)
        dense = module.dense().reshape(module.delta.shape[0], -1)
        values = np.linalg.svd(dense, compute_uv=False) if dense.shape[1] > 1 else np.array([np.linalg.norm(dense)])
        row = own[module.name]
        assert row.norm == pytest.approx(np.linalg.norm(dense), rel=1e-6)
        assert row.complete
        kept = len(row.singular_values)
        np.testing.assert_allclose(row.singular_values, values[:kept], rtol=1e-5, atol=1e-6 * values[0])
        shares = values[values > 1e-12 * values[0]] / values.sum()
        assert row.effective_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)
        assert row.energy(2) == pytest.approx(((values[:2] / np.linalg.norm(values)) ** 2).sum(), rel=1e-5)
        for share, rank in row.ranks:
            assert row.energy(rank) >= share - 1e-6
            assert row.energy(rank - 1) < share


def test_dead_and_not_finite_modules(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {k: rng.standard_normal(s).astype("f4") for k, s in lora(FLUX, rank=2).items()}
    tensors["lora_unet_img_in.lora_up.weight"][:] = 0
    tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"][0, 0] = np.nan
    save_file(tensors, tmp_path / "x.safetensors")
    found = describe(tmp_path / "x.safetensors", spectrum=True)
    assert found.spectrum.dead == ("lora_unet_img_in",)
    assert found.spectrum.not_finite == ("lora_unet_double_blocks_0_img_attn_qkv",)
    assert found.spectrum.energy[-1] == (2, pytest.approx(1.0))
    json.dumps(found.to_json(), allow_nan=False)


def test_full_differences_have_their_largest_values_only() -> None:
    found = describe(HERE / "producers" / "lycoris_full.safetensors", spectrum=True).spectrum
    assert all(not m.complete and len(m.singular_values) == 128 for m in found.modules)


def test_families_that_need_the_base_are_unknown() -> None:
    found = describe(HERE / "producers" / "lycoris_ia3.safetensors", spectrum=True).spectrum
    assert {m.state for m in found.modules} == {"unknown"}
    assert found.energy == ()
