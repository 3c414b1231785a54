"""Blocks of models: selections by component, block and expression, and the web UIs' lists of block weights."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from lorasurgery.adapter import Module, Scale
from lorasurgery.architectures import named
from lorasurgery.architectures.table import Span
from lorasurgery.errors import RequestError
from lorasurgery.operations.select.block_lists import listed, read_presets
from lorasurgery.operations.select.blocks import chooser, member, parse_selection
from lorasurgery.site import Site

if TYPE_CHECKING:
    from pathlib import Path


SINGLES = [f"single{i}" for i in range(38)]


def module(weight: str, component: str = "denoiser", name: str = "") -> Module:
    """A module that only has a place."""
    return Module(Site(component, (Span(weight, 0, 1),)), name or weight, None, Scale(1.0, "none (1.0)"))


SDXL = [
    module("input_blocks.4.1.transformer_blocks.0.attn1.to_q"), module("input_blocks.0.0"),
    module("middle_block.1.proj_in"), module("output_blocks.5.1.proj_in"), module("time_embed.0"),
    module("text_model.encoder.layers.0.mlp.fc1", "clip_l"), module("text_model.encoder.layers.0.mlp.fc1", "clip_g"),
]  # fmt: skip
FLUX = [
    module("double_blocks.0.img_attn.qkv"), module("double_blocks.18.img_mlp.0"), module("single_blocks.7.linear1"),
    module("single_blocks.37.linear2"), module("final_layer.linear"),
    module("encoder.block.0.layer.0.SelfAttention.q", "t5_xxl"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arch", "text", "chosen"),
    [
        ("sdxl", "te", {5, 6}),
        ("sdxl", "BASE", {5, 6}),
        ("sdxl", "te2", {6}),
        ("sdxl", "text_encoder", {5}),
        ("sdxl", "clip_g", {6}),
        ("sdxl", "unet", {0, 1, 2, 3, 4}),
        ("sdxl", "in", {0, 1}),
        ("sdxl", "in=1-8", {0}),
        ("sdxl", "IN04", {0}),
        ("sdxl", "mid", {2}),
        ("sdxl", "M00", {2}),
        ("sdxl", "out=3,5-6", {3}),
        ("sdxl", "down_blocks=1", {0}),
        ("sdxl", r"re=attn1", {0}),
        ("sdxl", r"re=^(?:time|label)_", {4}),
        ("flux1-dev", "double=0-18", {0, 1}),
        ("flux1-dev", "double_blocks", {0, 1}),
        ("flux1-dev", "single=7-9,30-37", {2, 3}),
        ("flux1-dev", "single_transformer_blocks=7", {2}),
        ("flux1-dev", "transformer_blocks=18", {1}),
        ("flux1-dev", "te3", {5}),
        ("flux1-dev", "transformer", {0, 1, 2, 3, 4}),
    ],
)
def test_a_selection_has_its_modules_and_no_others(arch: str, text: str, chosen: set[int]) -> None:
    modules = SDXL if arch == "sdxl" else FLUX
    within = member(parse_selection(text), named(arch)[0])
    assert {i for i, own in enumerate(modules) if within(own)} == chosen


def test_sd1_has_one_encoder_with_two_names() -> None:
    encoder = module("text_model.encoder.layers.0.mlp.fc1", "clip_l")
    assert all(member(parse_selection(text), named("sd1")[0])(encoder) for text in ("te", "te1", "text_encoder"))


def test_an_expression_sees_the_name_in_the_file_and_in_the_model() -> None:
    one = module("layers.3.attention.qkv", name="lora_unet_layers_3_attention_to_q")
    arch = named("z-image")[0]
    assert member(parse_selection("re=attention_to_q$"), arch)(one)
    assert member(parse_selection(r"re=^layers\.3\."), arch)(one)


def test_the_last_selection_that_fits_decides() -> None:
    choose = chooser([parse_selection("unet"), parse_selection("in"), parse_selection("IN04")], named("sdxl")[0])
    assert [choose(own) for own in SDXL] == [2, 1, 0, 0, 0, None, None]


@pytest.mark.parametrize(
    ("arch", "text", "says"),
    [
        ("flux1-dev", "in", "FLUX.1 dev has no component or blocks of that name"),
        ("flux1-dev", "double=19", "has no block 19 there. Try: 0 to 18"),
        ("flux1-dev", "te2", "double_blocks=0-18, single_blocks=0-37"),
        ("sdxl", "te=3", "te has no numbered blocks"),
        ("sdxl", "attn", "Try: te1, te2, unet, in=0-8, mid, out=0-8, re=REGEX"),
    ],
)
def test_what_a_model_does_not_have_is_an_error(arch: str, text: str, says: str) -> None:
    with pytest.raises(RequestError) as error:
        member(parse_selection(text), named(arch)[0])
    assert says in str(error.value)


@pytest.mark.parametrize("text", ["", "in=", "in=4-", "in=8-4", "in=a", "=3", "double=0.5", "re=(", "a b"])
def test_what_names_nothing_is_an_error(text: str) -> None:
    with pytest.raises(RequestError):
        parse_selection(text)


def factors(arch: str, values: str, modules: list[Module], others: float = 1.0) -> list[float]:
    rows = listed(values, named(arch)[0], others=others)
    choose = chooser([selection for selection, _ in rows], named(arch)[0])
    return [1.0 if (i := choose(own)) is None else rows[i][1] for own in modules]


@pytest.mark.parametrize(
    ("arch", "count", "order"),
    [  # as sd-webui-lora-block-weight and sd-scripts have them
        ("sdxl", 12, "te in4 in5 in7 in8 mid out0 out1 out2 out3 out4 out5"),
        ("sd1", 17, "te in1 in2 in4 in5 in7 in8 mid out3 out4 out5 out6 out7 out8 out9 out10 out11"),
        ("sdxl", 20, "te in0 in1 in2 in3 in4 in5 in6 in7 in8 mid out0 out1 out2 out3 out4 out5 out6 out7 out8"),
        ("sd1", 26, "te " + " ".join(f"in{i}" for i in range(12)) + " mid " + " ".join(f"out{i}" for i in range(12))),
        ("flux1-dev", 61, " ".join(["clip t5 first", *(f"double{i}" for i in range(19)), *SINGLES, "last"])),
    ],
)  # fmt: skip
def test_every_value_of_a_list_is_for_its_block(arch: str, count: int, order: str) -> None:
    weights = {
        "te": ("text_model.encoder.layers.0.mlp.fc1", "clip_l"), "clip": ("text_model.encoder.layers.0.mlp.fc1", "clip_l"),
        "t5": ("encoder.block.0.layer.0.SelfAttention.q", "t5_xxl"), "first": ("img_in",), "last": ("final_layer.linear",),
        "mid": ("middle_block.1.proj_in",),
    }  # fmt: skip
    shapes = named(arch)[0].shapes
    modules = []
    for place in order.split():
        kind, index = place.rstrip("0123456789"), place.lstrip("abcdefghijklmnopqrstuvwxyz")
        prefix = {"in": "input_blocks", "out": "output_blocks", "double": "double_blocks", "single": "single_blocks"}.get(kind)
        own = weights.get(place) or (next(name for name in shapes if name.startswith(f"{prefix}.{index}.")),)
        modules.append(module(*own))
    values = [round(0.01 * (i + 1), 2) for i in range(count)]
    assert factors(arch, ",".join(map(str, values)), modules) == values


def test_blocks_a_list_leaves_out_get_the_given_factor() -> None:
    outside = [module("input_blocks.3.0.op"), module("output_blocks.0.0.in_layers.2"), module("time_embed.0")]
    assert factors("sd1", ",".join(["0.5"] * 17), outside, others=0.0) == [0.0, 0.0, 1.0]
    assert factors("sd1", ",".join(["0.5"] * 17), outside, others=1.0) == [1.0, 1.0, 1.0]


def test_a_list_of_every_block_fits_the_smaller_unet() -> None:
    assert factors("sdxl", ",".join(["0.5"] * 26), SDXL) == [0.5, 0.5, 0.5, 0.5, 1.0, 0.5, 0.5]


@pytest.mark.parametrize(
    ("arch", "values", "says"),
    [
        ("sdxl", "1,1", "a list of 2 block weights does not fit Stable Diffusion XL. Try: 12, 17, 20 or 26 values"),
        ("flux1-dev", ",".join("1" * 17), "does not fit FLUX.1 dev. Try: 61 values"),
        ("z-image", ",".join("1" * 17), "Try: ranges of blocks"),
        ("sdxl", ",".join("1" * 61), "does not fit"),
        ("sdxl", ",".join(["R"] * 12), "R stands for a number that is drawn"),
        ("sdxl", ",".join(["x"] * 12), "drawn"),
        ("sdxl", ",".join(["nan"] * 12), "is no number"),
    ],
)
def test_lists_that_do_not_fit_are_refused(arch: str, values: str, says: str) -> None:
    with pytest.raises(RequestError) as error:
        listed(values, named(arch)[0], others=1.0)
    assert says in str(error.value)


def test_presets_are_read_by_name(tmp_path: Path) -> None:
    path = tmp_path / "lbwpresets.txt"
    path.write_text("# mine\nNONE:0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0\n\nMINE: 1,0,0,0,1,1,1,1,1,1,1,1 \nwrong:1,2\n")
    assert dict(read_presets(path)) == {"NONE": ",".join("0" * 17), "MINE": "1,0,0,0,1,1,1,1,1,1,1,1"}
    path.write_text("nothing\n")
    with pytest.raises(RequestError, match="no lines such as"):
        read_presets(path)


def test_blocks_need_no_numpy() -> None:
    code = "import sys; from lorasurgery.operations.select import block_lists, blocks; print('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
