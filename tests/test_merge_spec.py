"""The words for files and weights: our own, the web UIs' tags, and paths with colons."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorasurgery.adapter import Module, Scale
from lorasurgery.architectures import named
from lorasurgery.architectures.table import Span
from lorasurgery.errors import RequestError
from lorasurgery.site import Site
from lorasurgery.verbs.merge import Weight, parse_source, parse_weight

ENCODER = ("text_model.encoder.layers.0.mlp.fc1", "clip_l")
PLACES = {
    "te": ENCODER, "te2": ("text_model.encoder.layers.0.mlp.fc1", "clip_g"), "in": ("input_blocks.4.1.proj_in", "denoiser"),
    "in3": ("input_blocks.3.0.op", "denoiser"), "mid": ("middle_block.1.proj_in", "denoiser"),
    "out": ("output_blocks.5.1.proj_in", "denoiser"), "time": ("time_embed.0", "denoiser"),
}  # fmt: skip


def numbers(weight: Weight) -> dict[str, float]:
    """What an SDXL file's modules are multiplied by."""
    of = weight.of(named("sdxl")[0])
    return {
        short: of(Module(Site(component, (Span(name, 0, 1),)), name, None, Scale(1.0, "none (1.0)")))
        for short, (name, component) in PLACES.items()
    }


def only(text: str) -> tuple[str, Weight]:
    (found,) = parse_source(text)
    return found.path.as_posix(), found.weight


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.7", "a.safetensors", 0.7),
        ("a.safetensors:-1e-1", "a.safetensors", -0.1),
        ("dir/a b.safetensors:.5", "dir/a b.safetensors", 0.5),
        ("name:with:colons.safetensors:2", "name:with:colons.safetensors", 2.0),
        ("peft_folder:0.5", "peft_folder", 0.5),
        ("http://x/y.safetensors", "http://x/y.safetensors", 1.0),
    ],
)
def test_paths_end_where_the_file_does(text: str, path: str, value: float) -> None:
    found, weight = only(text)
    assert (Path(found), weight.value, weight.rules) == (Path(path), value, ())


@pytest.mark.parametrize("text", [r"C:\loras\x.safetensors:0.5", r"C:\x.safetensors:0.5", "C:/x.safetensors:0.5", "c:x.pt:0.5"])
def test_windows_drives_are_no_files(text: str) -> None:
    (found,) = parse_source(text)
    assert str(found.path) == text.rsplit(":", 1)[0]
    assert found.weight.value == 0.5


def test_the_longest_beginning_that_exists_is_the_file(tmp_path: Path) -> None:
    plain, odd = tmp_path / "a", tmp_path / "a:0.5"
    plain.write_text("")
    assert only(f"{plain}:0.5") == (plain.as_posix(), parse_weight(["0.5"]))
    odd.write_text("")
    assert only(f"{plain}:0.5")[0] == odd.as_posix()
    assert only(f"{plain}:0.5:2")[1].value == 2.0


@pytest.mark.parametrize(
    ("text", "others", "said"),
    [
        ("0.7:te=0.5:unet=1", 1.0, {"te": 0.5, "te2": 0.5}),
        ("0.7:te=0.5", 0.7, {"te": 0.5, "te2": 0.5}),
        ("te2=0:te=2", 1.0, {"te": 2.0, "te2": 2.0}),
        ("te=2:te2=0", 1.0, {"te": 2.0, "te2": 0.0}),
        ("0.5:in=0:mid=-1:out=2", 0.5, {"in": 0.0, "in3": 0.0, "mid": -1.0, "out": 2.0}),
        ("0:in=4-8:1", 0.0, {"in": 1.0}),
        ("0:in=3,5-8:1", 0.0, {"in3": 1.0}),
        ("0:in=4=3", 0.0, {"in": 3.0}),
        ("0:IN04:0.5:OUT05:0.25", 0.0, {"in": 0.5, "out": 0.25}),
        (r"1:re=proj_in$:0.5:mid=2", 1.0, {"in": 0.5, "out": 0.5, "mid": 2.0}),
        (r"1:re=(?:time|label)_:0.5", 1.0, {"time": 0.5}),
        (r"1:re=^time=4", 1.0, {"time": 4.0}),
        ("2:lbw=0.5,1,1,1,1,0,1,1,1,1,1,3", 2.0, {"te": 1.0, "te2": 1.0, "mid": 0.0, "out": 6.0}),
        ("2:mid=4:lbw=0.5,1,1,1,1,0.5,1,1,1,1,1,1", 2.0, {"te": 1.0, "te2": 1.0, "mid": 2.0}),
    ],
)
def test_parts_have_their_own_weights(text: str, others: float, said: dict[str, float]) -> None:
    assert numbers(parse_weight(text.split(":"))) == dict.fromkeys(PLACES, others) | said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("0.7:x", "'x' is no weight"),
        ("nan", "'nan' is no weight"),
        ("0.7:te=", "'te=' is no weight"),
        ("0.7:te=a", "'te=a' is no weight"),
        ("1:dyn=0", "dyn is a number of ranks"),
        ("1:lbw=OUTD", "neither a list of block weights nor a known name"),
        ("1:te=0.5@0,1@1", "one weight for all of them"),
        ("0.5@0.2", "one weight for all of them"),
        ("1:step=0-10", "one weight for all of them"),
        ("1:re=(:1", "is no weight"),
        ("1:re=*:1", "is no weight"),
    ],
)
def test_other_words_are_errors(words: str, says: str) -> None:
    with pytest.raises(RequestError) as error:
        parse_weight(words.split(":"))
    assert says in str(error.value)


TAGS = [  # what A1111 and SD.Next make of them: text encoders, UNet, (in, mid, out)
    ("<lora:cat:0.8>", 0.8, 0.8, {}),
    ("<lyco:cat>", 1.0, 1.0, {}),
    ("<lora:cat:0.8:0.5>", 0.8, 0.5, {}),
    ("<lora:cat:te=0.25:unet=2>", 0.25, 2.0, {}),
    ("<lora:cat:0.8:te=0.5>", 0.5, 0.5, {}),
    ("<lora:cat:0.8:unet=0.5>", 0.8, 0.5, {}),
    ("<lora:cat:0.8:in=0:mid=1:out=0.5>", 0.8, 0.8, {"in": 0.0, "in3": 0.0, "mid": 1.0, "out": 0.5}),
    ("<lora:cat:1:1:lbw=0.5,1,1,1,1,0,1,1,1,1,1,3>", 0.5, 1.0, {"mid": 0.0, "out": 3.0, "in3": 0.0}),
    ("<lora:cat:0.5:lbw=MINE>", 0.5, 0.5, {"mid": 0.0, "in3": 0.0}),
    ("<lora:cat:0.5:0.5:MINE>", 0.5, 0.5, {"mid": 0.0, "in3": 0.0}),
]
MINE = {"MINE": "1,1,1,1,1,0,1,1,1,1,1,1"}


@pytest.fixture
def loras(tmp_path: Path) -> Path:
    for name in ("cat.safetensors", "sub/dog.safetensors", "one/twin.safetensors", "two/twin.pt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    return tmp_path


@pytest.mark.parametrize(("text", "te", "unet", "said"), TAGS)
def test_tags_mean_what_the_web_uis_make_of_them(
    loras: Path, text: str, te: float, unet: float, said: dict[str, float]
) -> None:
    (found,) = parse_source(text, loras, MINE)
    assert found.path == loras / "cat.safetensors"
    own = {"te": te, "te2": te, **dict.fromkeys(("in", "in3", "mid", "out", "time"), unet)}
    assert numbers(found.weight) == own | said


def test_a_prompt_names_several_files(loras: Path) -> None:
    found = parse_source("<lora:cat:0.8> <lora:sub/dog.safetensors:0.5:0.5:16>,", loras)
    assert [w.path.name for w in found] == ["cat.safetensors", "dog.safetensors"]
    assert [(w.weight.value, w.weight.dyn) for w in found] == [(0.8, None), (0.5, 16)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<lora:bird:1>", "no file called bird"),
        ("<lora:twin:1>", "more than one file called twin"),
        ("<lora:cat:0.8@0,1@0.5>", "one weight for all of them"),
        ("<lora:cat:1:stop=10>", "one weight for all of them"),
        ("<lora:cat:1:lbwe=X>", "lbwe= is not known"),
        ("<lora:cat:high>", "'high' is no weight. Try: <lora:name:0.8>"),
        ("<hypernet:cat:1>", "is no tag of a LoRA. Try: <lora:name:0.8>"),
        ("<lora::1>", "names no file"),
        ("a cat <lora:cat:1>", "'a cat' stands beside the tags"),
        ("<lora:cat:1:lbw=NONE>", "one of MINE"),
    ],
)
def test_tags_that_cannot_be_baked_are_errors(loras: Path, text: str, says: str) -> None:
    with pytest.raises(RequestError) as error:
        parse_source(text, loras, MINE)
    assert says in str(error.value)


def test_a_wrong_weight_says_of_which_file() -> None:
    with pytest.raises(RequestError, match=r"^dir/cat\.safetensors: 'x' is no weight"):
        parse_source("dir/cat.safetensors:x")


def test_tags_need_a_folder() -> None:
    with pytest.raises(RequestError, match="--lora-dir"):
        parse_source("<lora:cat:1>")
