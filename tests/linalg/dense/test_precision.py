"""float32 products stay float32, whatever a program has allowed, and what it has allowed comes back."""

from __future__ import annotations

import pytest
import torch

from lorasurgery.linalg.dense import full_precision

MATMUL = {name: getattr(torch.backends, name).matmul for name in ("cuda", "mkldnn")}


def allowed():
    return [own.fp32_precision for own in MATMUL.values()]


@pytest.fixture
def as_before():
    before = allowed()
    yield
    torch.set_float32_matmul_precision("highest")
    for own, value in zip(MATMUL.values(), before, strict=True):
        own.fp32_precision = value


@pytest.mark.usefixtures("as_before")
def test_nothing_is_touched_where_nothing_is_allowed():
    before = allowed()
    with full_precision():
        assert allowed() == before
    assert allowed() == before


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_for_all_backends_together(precision):
    torch.set_float32_matmul_precision(precision)
    with full_precision():
        assert allowed() == ["ieee", "ieee"]
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == precision
    assert allowed()[0] == "tf32"


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize(("name", "value"), [("cuda", "tf32"), ("mkldnn", "bf16")])
def test_for_one_backend(name, value):
    MATMUL[name].fp32_precision = value
    with full_precision():
        assert allowed() == ["ieee", "ieee"]
    assert MATMUL[name].fp32_precision == value
