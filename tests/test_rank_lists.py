"""Lists with a rank for each block: which places of them hold which modules, and ranks as text."""

from __future__ import annotations

import re

import pytest

from lorasurgery.adapter import Module, Scale
from lorasurgery.architectures import named
from lorasurgery.architectures.table import Span
from lorasurgery.errors import RequestError
from lorasurgery.operations.cut import ResizeOptions, block_ranks, parse_rank, parse_ranks
from lorasurgery.operations.select.block_lists import places, rank_lists
from lorasurgery.operations.select.blocks import member
from lorasurgery.site import Site
from tests import oracle


def trained_index(name: str, *, sdxl: bool) -> int:
    """sd-scripts' ``get_block_index`` as it is described: a place among 23 or 25 values, -1 for none."""
    flat = name.replace(".", "_")
    if sdxl:
        first = {"time_embed": 0, "label_emb": 0, "input_blocks": 1, "middle_block": 10, "output_blocks": 13, "out": 22}
        found = re.match(r"(time_embed|label_emb|input_blocks|middle_block|output_blocks|out)_(\d+)", flat)
        assert found is not None
        return first[found[1]] + (int(found[2]) if "block" in found[1] else 0)
    found = re.match(r"(up|down)_blocks_(\d+)_(resnets|upsamplers|downsamplers|attentions)_(\d+)_", flat)
    if found is None:
        return 12 if flat.startswith("mid_block_") else -1
    index = 3 * int(found[2]) + (2 if "samplers" in found[3] else int(found[4]))
    return 1 + index if found[1] == "down" else 13 + index


@pytest.mark.parametrize(("key", "count"), [("sd1", 25), ("sd2", 25), ("sdxl", 23)])
def test_the_trainers_list_has_its_blocks(key: str, count: int) -> None:
    arch = named(key)[0]
    tests = [member(selection, arch) for selection in places("block_dims", count, arch) if selection is not None]
    seen = set()
    for name, place in oracle.model(key).names("trained").items():
        module = Module(Site("denoiser", (Span(place[0].weight, 0, 1),)), name, None, Scale(1.0, "none (1.0)"))
        wanted = trained_index(name, sdxl=key == "sdxl")
        found = [i for i, holds in enumerate(tests) if holds(module)]
        if place[0].weight != "input_blocks.0.0":  # has no LoRA there; ours is the first of the input blocks
            assert found == ([] if wanted < 0 else [wanted]), name
        seen.update(found)
    assert len(tests) == count
    assert seen == set(range(count))


@pytest.mark.parametrize(
    ("key", "name", "count", "says"),
    [
        ("sdxl", "blocks", 25, "23 values (sd-scripts' block_dims): time_embed and label_emb, IN00-IN08, middle_block=0-2, O"),
        ("sdxl", "blocks", 3, "12 values: BASE, IN04-IN05, IN07-IN08, M00, OUT00-OUT05"),
        ("sd1", "blocks", 23, "25 values (sd-scripts' block_dims): IN00-IN11, M00, OUT00-OUT11"),
        ("flux1-dev", "blocks", 57, "61 values: clip_l, t5_xxl, img_in to guidance_in, D00-D18, S00-S37, final_layer"),
        ("flux1-dev", "double", 2, "has 19 blocks, the list has 2 ranks. Try: 19 values"),
        ("z-image", "blocks", 30, "layers=N,N,... (30 values)"),
        ("wan-2.1-t2v-14b", "blocks", 39, "'blocks' of Wan 2.1 and 2.2 T2V 14B has 40 blocks"),
        ("sdxl", "te", 2, "te has no numbered blocks"),
        ("sdxl", "nothing", 2, "no component or blocks of that name"),
    ],
)  # fmt: skip
def test_lists_of_another_length_say_what_is_taken(key: str, name: str, count: int, says: str) -> None:
    with pytest.raises(RequestError) as error:
        places(name, count, named(key)[0])
    assert says in str(error.value)


def test_lists_of_merge_are_taken_too() -> None:
    sdxl = named("sdxl")[0]
    assert list(rank_lists(sdxl)) == [23, 12, 17, 20, 26]
    found = places("blocks", 26, sdxl)
    assert [str(selection) for selection in found if selection is not None][:3] == ["BASE", "IN00", "IN01"]
    assert found[10] is found[11] is found[12] is None  # IN09 to IN11
    assert [str(s) for s in places("single", 38, named("flux1-dev")[0])][::37] == ["single=0", "single=37"]
    assert len(places("blocks", 30, named("wan-2.1-t2v-1.3b")[0])) == 30


def test_ranks_are_read_from_text() -> None:
    assert parse_rank("double=0-9:16") == ("double=0-9", 16)
    assert parse_rank("double=0,3=16") == ("double=0,3", 16)
    assert parse_rank("(?:a|b)=4") == ("(?:a|b)", 4)
    assert parse_ranks(["8", "mid:0", "in=4, 4 ,8"]) == (8, (("mid", 0), *block_ranks([4, 4, 8], "in")))
    plain, by_name = parse_ranks(["6", "mid=2"], conv=True)
    assert (plain, [str(pattern) for pattern, _ in by_name]) == (6, ["conv mid"])
    for bad in ("blocks=4,x", "blocks=4,-1", "blocks=4,", "a b=4,4", "=4,4"):
        with pytest.raises(RequestError, match="no rank"):
            parse_ranks([bad])
    with pytest.raises(RequestError, match="or 0 to leave modules out"):
        ResizeOptions(ranks=(("mid", -1),)).check()
