"""Other programs' numbers, reproduced: PEFT's own code, sd-scripts' formulas, and how far both are from the sum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from lorasurgery.errors import NotRepresentableError, RequestError
from lorasurgery.operations.cut import ResizeOptions
from lorasurgery.verbs.merge import MergeOptions, Source, merge, parse_weight
from tests.test_resize import ARCH, Maker, dense, every

if TYPE_CHECKING:
    from lorasurgery.adapter import Adapter
    from lorasurgery.verbs.merge import MergeReport

NAMES = ("mlp.up", "narrow", "conv")
ALPHAS, WEIGHTS = (3.0, 7.0), (0.7, -0.4)


def files(ranks: tuple[int, int] = (4, 4)) -> list[Adapter]:
    """Two LoRAs; a module that only the first has."""
    found = []
    for seed, (rank, alpha) in enumerate(zip(ranks, ALPHAS, strict=True)):
        make = Maker("F32", seed)
        for name in NAMES:
            make.lora(name, rank=rank, alpha=alpha)
        if seed == 0:
            make.lora("mlp.down", rank=rank, alpha=alpha)
        found.append(make.adapter())
    return found


def merged(adapters: list[Adapter], weights: tuple[float, ...] = WEIGHTS, **how: Any) -> tuple[dict[str, Any], MergeReport]:
    sources = [Source(a, parse_weight([str(w)]), f"f{i}") for i, (a, w) in enumerate(zip(adapters, weights, strict=False))]
    result, report = merge(sources, MergeOptions(**how))
    return {m.name: m for m in every(result)}, report


class Tiny(torch.nn.Module):
    """The modules of the table as PEFT sees them."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = torch.nn.ModuleDict({"up": self.layer("mlp.up"), "down": self.layer("mlp.down")})
        self.narrow, self.conv = self.layer("narrow"), self.layer("conv")

    @staticmethod
    def layer(name: str) -> torch.nn.Module:
        out, inside, *kernel = ARCH.shapes[name]
        if kernel:
            return torch.nn.Conv2d(inside, out, kernel, bias=False)  # type: ignore[arg-type]
        return torch.nn.Linear(inside, out, bias=False)


def in_peft(adapters: list[Adapter], **how: Any) -> dict[str, tuple[Any, Any]]:
    """Module name -> (B, A) of PEFT's add_weighted_adapter; alpha is the rank."""
    model: Any = None
    for i, (adapter, alpha) in enumerate(zip(adapters, ALPHAS, strict=True)):
        names = [module.name for module in every(adapter)]
        rank = every(adapter)[0].delta.rank
        config = LoraConfig(r=rank, lora_alpha=int(alpha), target_modules=names, lora_dropout=0.0)
        if model is None:
            model = get_peft_model(Tiny(), config, adapter_name="f0")
        else:
            model.add_adapter(f"f{i}", config)
        for module in every(adapter):
            layer = model.base_model.model.get_submodule(module.name)
            layer.lora_A[f"f{i}"].weight.data = torch.from_numpy(module.delta.down.f32())
            layer.lora_B[f"f{i}"].weight.data = torch.from_numpy(module.delta.up.f32())
    model.add_weighted_adapter([f"f{i}" for i in range(len(adapters))], list(WEIGHTS), "merged", **how)
    found = {}
    for name in (*NAMES, "mlp.down"):
        layer = model.base_model.model.get_submodule(name)
        assert layer.scaling["merged"] == 1.0
        found[name] = tuple(side["merged"].weight.detach().double().flatten(1).numpy() for side in (layer.lora_B, layer.lora_A))
    return found


@pytest.mark.parametrize(
    ("method", "theirs"),
    [
        ("sum", {"combination_type": "linear"}),
        ("ties", {"combination_type": "ties", "density": 0.4}),
        ("ties", {"combination_type": "ties", "density": 0.4, "majority_sign_method": "frequency"}),
        ("magnitude-prune", {"combination_type": "magnitude_prune", "density": 0.4}),
    ],
)
def test_pefts_factors_are_reproduced(method: str, theirs: dict[str, Any]) -> None:
    adapters = files()
    how = {"density": theirs.get("density", 0.5), "majority": theirs.get("majority_sign_method", "total")}
    found, report = merged(adapters, method=method, compat="peft", **how)
    for name, (up, down) in in_peft(adapters, **theirs).items():
        delta = found[name].delta
        assert np.allclose(delta.up.f64().reshape(len(up), -1), up, rtol=1e-5, atol=1e-7), name
        assert np.allclose(delta.down.f64().reshape(len(down), -1), down, rtol=1e-5, atol=1e-7), name
        assert found[name].scale.value == 1.0
    assert any("another's A" in fault for fault in report.faults)


def test_how_far_pefts_linear_is_from_the_sum_is_told() -> None:
    adapters = files()
    found, report = merged(adapters, compat="peft")
    exact, _ = merged(adapters)
    for module in report.modules:
        truth = dense(exact[module.name])
        off = np.linalg.norm(dense(found[module.name]) - truth) / np.linalg.norm(truth)
        assert module.error == pytest.approx(off, rel=1e-5, abs=1e-6)
    assert report.deviation is not None
    assert report.deviation > 0.5  # cross terms of the size of the terms
    assert next(m.error for m in report.modules if m.name == "mlp.down") == pytest.approx(0.0, abs=1e-6)  # one file alone


def test_pefts_cat_and_svd_are_the_sum_and_its_best_approximation() -> None:
    """As of PEFT 0.21; nothing has to be reproduced."""
    adapters = files((4, 6))
    exact, _ = merged(adapters)
    for name, (up, down) in in_peft(adapters, combination_type="cat").items():
        truth = dense(exact[name])
        assert np.allclose(up @ down, truth, atol=1e-6 * np.abs(truth).max()), name
    cut, _ = merged(adapters, resize=ResizeOptions(rank=5))
    for name, (up, down) in in_peft(adapters, combination_type="svd", svd_rank=5).items():
        if name != "mlp.down":  # of rank 4: PEFT gives it five
            assert np.allclose(up @ down, dense(cut[name]), atol=3e-6 * np.abs(up @ down).max()), name


def test_pefts_older_svd_counts_the_scale_twice() -> None:
    """Up to 0.20: ``delta_i`` has the scale, and so has the weight it is multiplied by."""
    adapters = files((4, 6))
    found, report = merged(adapters, compat="peft", resize=ResizeOptions(rank=5))
    for name in NAMES:
        terms = [
            w * m.scale.value * dense(m) for a, w in zip(adapters, WEIGHTS, strict=True) for m in every(a) if m.name == name
        ]
        left, values, right = np.linalg.svd(sum(terms), full_matrices=False)
        truth = left[:, :5] * values[:5] @ right[:5]
        assert np.allclose(dense(found[name]), truth, atol=1e-6 * np.abs(truth).max())
    assert any("squared" in fault for fault in report.faults)


def kohya(adapters: list[Adapter], name: str, *, concat: bool) -> Any:
    """sd-scripts' merge_lora.py, tensor by tensor as its loop does it: the dense result."""
    up: Any = None
    down: Any = None
    base_alpha = 0.0
    for adapter, ratio in zip(adapters, WEIGHTS, strict=True):
        module = next((m for m in every(adapter) if m.name == name), None)
        if module is None:
            continue
        alpha = module.scale.value * module.delta.rank
        base_alpha = base_alpha or alpha
        scale = (alpha / base_alpha) ** 0.5 * ratio
        one = module.delta.up.f64().reshape(module.delta.up.shape[0], -1) * abs(scale)
        other = module.delta.down.f64().reshape(module.delta.rank, -1) * scale
        if up is None:
            up, down = one, other
        elif concat:
            up, down = np.concatenate([up, one], axis=1), np.concatenate([down, other])
        else:
            up, down = up + one, down + other
    return up @ down * (base_alpha / down.shape[0])


@pytest.mark.parametrize("concat", [False, True])
def test_sd_scripts_results_are_reproduced(concat: bool) -> None:
    adapters = files((4, 6) if concat else (4, 4))
    found, report = merged(adapters, compat="kohya-concat" if concat else "kohya")
    for name in (*NAMES, "mlp.down"):
        truth = kohya(adapters, name, concat=concat)
        assert np.allclose(dense(found[name]), truth, atol=1e-6 * np.abs(truth).max()), name
    assert report.deviation is not None
    assert report.deviation > 0.3
    assert any("squared" in fault for fault in report.faults)


def test_one_file_shows_the_square_of_the_weight() -> None:
    (first, _) = files()
    found, _ = merged([first], (0.5,), compat="kohya")
    plain, _ = merged([first], (1.0,))
    right, _ = merged([first], (0.5,))
    assert np.allclose(dense(found["conv"]), 0.25 * dense(plain["conv"]), rtol=1e-6)
    assert np.allclose(dense(right["conv"]), 0.5 * dense(plain["conv"]), rtol=1e-6)


@pytest.mark.parametrize(("first", "second"), [(0.0, 2.0), (3.0, -2.0)])
def test_alphas_that_stop_sd_scripts_are_refused(first: float, second: float) -> None:
    adapters = [Maker("F32", seed).lora("conv", rank=4, alpha=a).adapter() for seed, a in enumerate((first, second))]
    with pytest.raises(NotRepresentableError, match="no root"):
        merged(adapters, compat="kohya")


@pytest.mark.parametrize(
    "how",
    [
        {"compat": "kohya", "resize": ResizeOptions(rank=2)},
        {"compat": "peft", "resize": ResizeOptions(size=9000)},
        {"compat": "peft", "resize": ResizeOptions(rank=2, conv_rank=3)},
        {"compat": "peft", "method": "ties", "resize": ResizeOptions(rank=2)},
        {"compat": "peft", "factor": 0.5},
    ],
)
def test_what_they_do_not_have_is_not_left_out_silently(how: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=how["compat"]):
        merged(files(), **how)


def test_what_they_cannot_merge_is_refused() -> None:
    with pytest.raises(NotRepresentableError, match="equal rank"):
        merged(files((4, 6)), compat="kohya")
    with pytest.raises(NotRepresentableError, match="equal rank"):
        merged(files((4, 6)), compat="peft")
    tucker = Maker("F32", 3)
    from lorasurgery.deltas.low_rank import LowRank

    core = LowRank(tucker.tensor(48, 4, 1, 1), tucker.tensor(4, 16, 1, 1), tucker.tensor(4, 4, 3, 3))
    with pytest.raises(NotRepresentableError, match="plain LoRA"):
        merged([tucker.add("conv", core).adapter()], (1.0,), compat="kohya")
