"""Conversions leave every delta what it was: architecture by family by pair of layouts by dtype, against the oracle."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasurgery.errors import NotRepresentableError
from tests.builders import (
    DTYPES,
    Builder,
    Made,
    convert,
    convolutions,
    fused_weights,
    layouts_of,
    modules_of,
    plain_weights,
    subset,
    swapped_weights,
)
from tests.oracle import LAYOUTS, REFERENCES, Model, assert_same, model, relative_errors

every_model = pytest.mark.parametrize("key", sorted(REFERENCES))
HOLDS = {
    "diffusers": {"lora", "dora"},
    "peft": {"lora", "dora", "loha", "lokr"},
}
ROUNDING = {"BF16": 2.0**-8, "F16": 2.0**-10, "F32": 2.0**-22}
REWRITTEN_ALPHA = 3e-7
"""A scale that is written anew is an alpha in float32."""


def interesting(of: Model, rng: np.random.Generator) -> list[str]:
    """A few weights of every kind a model has."""
    kinds = [fused_weights(of), fused_weights(of)[::-1], swapped_weights(of), convolutions(of), plain_weights(of)]
    return list(dict.fromkeys(str(rng.choice(kind[:40])) for kind in kinds if kind))


def random_file(of: Model, layout: str, family: str, dtype: str, seed: int) -> Made:
    """A file with modules of every kind, of unequal ranks and alphas, some members missing."""
    builder = Builder.start(of, layout, dtype, seed)
    rng = builder.rng
    equal = rng.random() < 0.3
    for weight in interesting(of, rng):
        kernel = of.shapes[weight][2:]
        names = modules_of(of, layout, weight)
        for name in names if family == "dora" else subset(names, rng):
            rank = 2 if equal else int(rng.integers(1, 5))
            alpha = float(rng.choice([1.0, 2.0, 0.7, 3.0, rank]))
            how = {}
            if kernel and np.prod(kernel) > 1 and rng.random() < 0.5 and family in ("loha", "lokr"):
                how["tucker"] = True
            if family == "lokr":
                how["whole1"] = bool(rng.random() < 0.7)
                how["whole2"] = bool(rng.random() < 0.3) and not how.get("tucker")
            builder.add(name, family, rank=rank, alpha=alpha, **how)
    if layout == "peft":
        config = builder.made.configs[""]
        config["peft_type"] = {"dora": "LORA"}.get(family, family.upper())
        if config["peft_type"] != "LORA":
            config["alpha"] = config.pop("lora_alpha")
    return builder.made


def check(made: Made, target: str, dtype: str, folder: Path, **how: object) -> None:
    """Convert, and compare what both files say."""
    output = convert(made, target, folder, **how)
    before, after = made.meaning(), output.meaning()
    assert not before.unknown
    assert not after.unknown, after.unknown
    report = output.report
    assert not report.dropped
    if report.exact:
        assert_same(before, after, REWRITTEN_ALPHA)
    else:
        errors = relative_errors(before, after)
        assert max(errors.values()) < 4 * ROUNDING[dtype]
        assert report.losses.total() < 2 * ROUNDING[dtype]
    assert sum(report.actions().values()) == len(report.changes)


@every_model
@pytest.mark.parametrize("family", ["lora", "dora", "loha", "lokr"])
def test_equal_deltas(key: str, family: str) -> None:
    of = model(key)

    @settings(max_examples=8)
    @given(st.sampled_from(layouts_of(of)), st.sampled_from(layouts_of(of)), st.sampled_from(DTYPES), st.integers(0, 10**6))
    def run(source: str, target: str, dtype: str, seed: int) -> None:
        if family not in HOLDS.get(source, {family}):
            return
        made = random_file(of, source, family, dtype, seed)
        with TemporaryDirectory() as folder:
            if may_refuse(family, target):
                with suppress(NotRepresentableError):
                    check(made, target, dtype, Path(folder))
            else:
                check(made, target, dtype, Path(folder))

    run()


def may_refuse(family: str, target: str) -> bool:
    """A LoKr may be impossible to fuse or to give to PEFT; other families only have targets that do not hold them."""
    return family not in HOLDS.get(target, {family}) or family == "lokr"


@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("target", LAYOUTS)
def test_every_pair_of_layouts(source: str, target: str, tmp_path: Path) -> None:
    """A fused weight, a permuted one and plain ones, of every family the source has."""
    seed = LAYOUTS.index(source) * 7 + LAYOUTS.index(target)
    for i, family in enumerate(("lora", "dora", "loha")):
        if family in HOLDS.get(source, {family}) and family in HOLDS.get(target, {family}):
            key = ("flux1-dev", "z-image", "sd3-medium", "hunyuan-video")[(seed + i) % 4]
            check(random_file(model(key), source, family, DTYPES[i], seed), target, DTYPES[i], tmp_path)


@pytest.mark.parametrize("target", ["diffusers", "peft"])
def test_families_a_target_does_not_hold_are_refused(target: str, tmp_path: Path) -> None:
    for family in ("loha", "lokr", "full"):
        builder = Builder.start(model("flux1-dev"), "sd-scripts")
        builder.add("vector_in.in_layer", family, alpha=1.0)
        if family in HOLDS[target]:
            check(builder.made, target, "BF16", tmp_path)
            continue
        with pytest.raises(NotRepresentableError, match="lora_unet_vector_in_in_layer") as refused:
            convert(builder.made, target, tmp_path)
        assert "--as lora" in str(refused.value)
    assert not list(tmp_path.glob("*/out.safetensors"))


@pytest.mark.parametrize("target", ["diffusers", "peft"])
def test_dora_beside_lora_is_refused_where_one_switch_rules_all(target: str, tmp_path: Path) -> None:
    """PEFT gives a layer without a magnitude its base weight's norms, which is another delta."""
    builder = Builder.start(model("flux1-dev"), "onetrainer")
    builder.add("transformer_blocks.3.attn.to_out.0", "dora", alpha=1.0)
    builder.add("transformer_blocks.3.ff.net.2", "lora", alpha=1.0)
    with pytest.raises(NotRepresentableError, match="no magnitude"):
        convert(builder.made, target, tmp_path)
