"""Ranks by block on files: what becomes of every module, what 0 means, the metadata, and the same in merge and extract."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest

import lorasurgery
from lorasurgery.errors import RequestError
from lorasurgery.operations.cut import ResizeOptions, resize
from tests import oracle
from tests.builders import Builder
from tests.edges import run
from tests.extracting import changed, grid, whole_low_rank
from tests.models.small import save
from tests.oracle import read
from tests.test_rank_lists import trained_index

if TYPE_CHECKING:
    from pathlib import Path

SD1_LAYERS = (
    "down_blocks.0.attentions.0.proj_in", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.resnets.0.conv1", "down_blocks.0.downsamplers.0.conv", "down_blocks.2.attentions.1.proj_out",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.2", "mid_block.resnets.1.conv2",
    "up_blocks.1.upsamplers.0.conv", "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_v",
    "up_blocks.3.attentions.2.proj_in", "up_blocks.3.resnets.2.conv1",
)  # fmt: skip
"""In the blocks 1, 1, 1, 3, 8, 12, 12, 18, 18, 24, 24 of sd-scripts' list."""
ENCODER = ("clip_l", "text_model.encoder.layers.0.mlp.fc1")
OLD, ALPHA = 6, 3.0


def sd1_file(folder: Path, metadata: dict[str, str] | None = None, dtype: str = "F16") -> tuple[Path, list[str]]:
    """Modules in several blocks, 1x1 and 3x3 convolutions, a text encoder; their stems, the encoder's last."""
    builder = Builder.start(oracle.model("sd1"), "sd-scripts", dtype, seed=2)
    stems = [builder.add(name, "lora", rank=OLD, alpha=ALPHA) for name in SD1_LAYERS]
    stems.append(builder.add_encoder(*ENCODER, "lora", rank=OLD, alpha=ALPHA))
    builder.made.metadata |= metadata or {}
    return builder.made.save(folder), stems


class Change(NamedTuple):
    """``up @ down`` of a module at its strength, in float64."""

    up: Any
    down: Any

    @property
    def rank(self) -> int:
        return len(self.down)

    def dot(self, other: Change) -> float:
        """The sum of the products of all elements."""
        return float(np.sum((self.up.T @ other.up) * (self.down @ other.down.T)))

    def tail(self, rank: int) -> float:
        """The squared error of the best approximation of a rank."""
        squares = np.linalg.eigvals((self.up.T @ self.up) @ (self.down @ self.down.T)).real
        return float(np.sum(np.sort(squares)[::-1][rank:]))


def changes(path: Path) -> dict[str, Change]:
    """Stem -> what its module does."""
    found = {}
    for stem, parts in oracle.modules(read(path)[0])[0].items():
        up, down = (parts.slots[side].f64().reshape(len(parts.slots[side].f64()), -1) for side in ("up", "down"))
        found[stem] = Change(parts.slots["alpha"].item() / len(down) * up, down)
    return found


def values(**own: int) -> str:
    """A list of 25 ranks: 4 but for these blocks."""
    return ",".join(str(own.get(f"at{i}", 4)) for i in range(25))


def resized(source: Path, *more: object) -> tuple[dict[str, Change], dict[str, Any], dict[str, Any]]:
    """What came out, the report, and ``ss_network_args``."""
    out = source.parent / "out.safetensors"
    outcome = run("resize", source, out, "--force", "--json", *more)
    assert outcome.code == 0, outcome.err
    return changes(out), json.loads(outcome.out), json.loads(read(out)[1].get("ss_network_args", "{}"))


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_a_list_on_a_file(dtype: str, tmp_path: Path) -> None:
    source, stems = sd1_file(tmp_path, {"ss_network_args": json.dumps({"conv_dim": "6", "dropout": "0.1"})}, dtype)
    before = changes(source)
    lists = (
        "--rank",
        f"blocks={values(at1=2, at8=0, at24=5)}",
        "--conv-rank",
        f"blocks={values(at3=0, at12=1, at18=3, at24=9)}",
    )
    after, report, args = resized(source, *lists, "--dtype", "fp32")
    wanted = dict(zip(stems, (2, 2, 4, 0, 0, 4, 1, 3, 4, 5, OLD, OLD), strict=True))
    assert {stem: own.rank for stem, own in after.items()} == {stem: rank for stem, rank in wanted.items() if rank}
    lost = norm = 0.0
    for stem in stems[:-1]:
        old, best = before[stem], before[stem].tail(wanted[stem])
        lost, norm = lost + best, norm + old.dot(old)
        if stem in after:
            error = old.dot(old) - 2 * old.dot(after[stem]) + after[stem].dot(after[stem])
            assert error <= best * 1.001 + 1e-6 * old.dot(old)
    assert report["resize"]["relative_error"] == pytest.approx(math.sqrt(lost / norm), rel=1e-4)
    assert report["resize"]["actions"]["left out"] == 2
    assert {m["name"]: m["relative_error"] for m in report["resize"]["modules"] if m["action"] == "left out"} == {
        stems[3]: 1.0, stems[4]: 1.0
    }  # fmt: skip
    assert report["way"].startswith("conv blocks 4,4,4,0,4")
    assert args == {
        "dropout": "0.1",
        "block_dims": "0,2,0,0,0,0,0,0,0,0,0,0,4,0,0,0,0,0,4,0,0,0,0,0,5",
        "block_alphas": "0,1,0,0,0,0,0,0,0,0,0,0,2,0,0,0,0,0,2,0,0,0,0,0,2.5",
        "conv_block_dims": "0,4,0,0,0,0,0,0,0,0,0,0,1,0,0,0,0,0,3,0,0,0,0,0,6",
        "conv_block_alphas": "0,2,0,0,0,0,0,0,0,0,0,0,0.5,0,0,0,0,0,1.5,0,0,0,0,0,3",
    }
    assert run("meta", "verify", tmp_path / "out.safetensors").code == 0


def test_what_stands_beside_a_list(tmp_path: Path) -> None:
    source, stems = sd1_file(tmp_path)
    linear = [f"blocks={values(at1=2)}"]

    def ranks(*more: object) -> list[int]:
        after, _, _ = resized(source, *more)
        return [after[stem].rank if stem in after else 0 for stem in stems]

    assert ranks("--rank", *linear) == [2, 2, 2, 4, 4, 4, 4, 4, 4, 4, 4, OLD]  # convolutions too, no text encoder
    assert ranks("--rank", *linear, "--conv-rank", 1, "--te", "--rank", 3) == [2, 2, 1, 1, 4, 4, 1, 1, 4, 4, 1, 3]
    assert ranks("--rank", *linear, "--pointwise-rank", 1) == [1, 2, 2, 4, 1, 4, 4, 4, 4, 1, 4, OLD]
    assert ranks("--rank", "mid:1", "--rank", *linear, "--rank", "out=0") == [2, 2, 2, 4, 4, 1, 1, 4, 4, 4, 4, OLD]
    assert ranks("--rank", 5, "--conv-rank", "mid=1", "--conv-rank", 2) == [5, 5, 2, 2, 5, 5, 1, 2, 5, 5, 2, OLD]
    assert ranks("--rank", 5, "--rank", "OUT11=0", "--exclude", "resnets") == [5, 5, OLD, 5, 5, 5, OLD, 5, 5, 0, OLD, OLD]
    assert ranks("--rank", f"blocks={','.join('3' * 26)}", "--te") == [3] * 12  # BASE is the text encoder
    assert ranks("--rank", f"blocks={','.join('3' * 17)}") == [3, 3, 3, OLD, 3, 3, 3, 3, 3, 3, 3, OLD]
    assert ranks("--rank", "out=1,1,1,1,1,2,1,1,1,1,1,3", "--rank", 6) == [6] * 7 + [2, 2, 3, 3, OLD]
    assert ranks("--rank", *linear, "--size", "400KiB")[:3] == [2, 2, 2]


def test_refusals(tmp_path: Path) -> None:
    source, _ = sd1_file(tmp_path)
    for rank, says in (
        ("blocks=4,4", "25 values (sd-scripts' block_dims): IN00-IN11"),
        ("blocks=4,4,x", "blocks=4,4,8,... for each block"),
    ):
        outcome = run("resize", source, tmp_path / "no.safetensors", "--rank", rank)
        assert outcome.code == 2
        assert says in outcome.err
    assert not (tmp_path / "no.safetensors").exists()


def test_a_bias_of_a_block_that_is_left_out_stays(tmp_path: Path) -> None:
    builder = Builder.start(oracle.model("sd1"), "comfyui", "F32", seed=4)
    kept = builder.add("input_blocks.1.1.proj_in", "lora", rank=4, alpha=2.0)
    gone = builder.add("input_blocks.2.1.proj_in", "lora", rank=4, alpha=2.0)
    builder.made.tensors[f"{gone}.diff_b"] = builder.random(320)
    adapter = lorasurgery.load(builder.made.save(tmp_path))
    result, report = resize(adapter, ResizeOptions(rank=2, ranks=(("in=2", 0),)))
    assert {m.name: (m.action, m.new_rank) for m in report.modules} == {kept: ("resized", 2), gone: ("left out", 0)}
    left = next(module for module in result.modules.values() if module.name == gone)
    assert left.delta is None
    assert left.bias is not None
    alone = Builder.start(oracle.model("sd1"), "comfyui", "F32", seed=4)
    alone.add("input_blocks.1.1.proj_in", "lora", rank=4, alpha=2.0)
    (tmp_path / "alone").mkdir()
    with pytest.raises(RequestError, match="no module would be left"):
        resize(lorasurgery.load(alone.made.save(tmp_path / "alone")), ResizeOptions(ranks=(("in=1", 0),)))


# metadata -----------------------------------------------------------------------------------------------------------------


def test_lists_in_the_metadata_stay_true_or_go(tmp_path: Path) -> None:
    lists = {"block_dims": values(), "block_alphas": values(), "network_reg_dims": "x=4", "conv_dim": "6"}
    source, _ = sd1_file(tmp_path, {"ss_network_args": json.dumps(lists)})
    _, _, args = resized(source, "--rank", 3, "--rank", "mid=2")
    assert args["block_dims"].split(",")[12] == "2"
    assert set(args["block_dims"].split(",")) == {"0", "2", "3"}
    assert "conv_dim" not in args
    assert "network_reg_dims" not in args
    _, _, args = resized(source, "--rank", 3, "--rank", "attn1=2")  # block 1 now has two ranks
    assert not [key for key in args if "block" in key]
    assert args["conv_dim"] == "3"


@pytest.mark.parametrize("metadata", [{}, {"ss_network_module": "lycoris.kohya", "ss_network_args": "{}"}])
def test_only_sd_scripts_own_network_has_the_lists(metadata: dict[str, str], tmp_path: Path) -> None:
    builder = Builder.start(oracle.model("sdxl"), "sd-scripts" if metadata else "diffusers", "F16", seed=3)
    block = "input_blocks.4.1" if metadata else "down_blocks.1.attentions.0"
    builder.add(f"{block}.transformer_blocks.0.attn2.to_k", "lora", rank=4, alpha=2.0)
    builder.made.metadata |= metadata
    source = builder.made.save(tmp_path)
    out = tmp_path / "out.safetensors"
    assert run("resize", source, out, "--rank", f"blocks={','.join('2' * 23)}").code == 0
    assert "block_dims" not in read(out)[1].get("ss_network_args", "")
    if not metadata:  # in its layout it is its network
        target = ("--target", "sd-scripts", "--force")
        assert run("resize", source, out, "--rank", f"blocks={','.join('2' * 23)}", *target).code == 0
        assert json.loads(read(out)[1]["ss_network_args"])["block_alphas"] == ",".join(
            "2" if i == 5 else "0" for i in range(23)
        )


def test_ranks_of_parts_of_a_transformer_go(tmp_path: Path) -> None:
    builder = Builder.start(oracle.model("flux1-dev"), "sd-scripts", "F16", seed=3)
    names = ("double_blocks.0.img_attn.proj", "double_blocks.18.img_attn.proj", "single_blocks.37.linear2")
    stems = [builder.add(name, "lora", rank=4, alpha=2.0) for name in names]
    args = {"img_attn_dim": "4", "in_dims": "[4,4,4,4,4]", "train_blocks": "all"}
    builder.made.metadata["ss_network_args"] = json.dumps(args)
    source = builder.made.save(tmp_path)
    after, _, args = resized(source, "--rank", f"double={','.join(map(str, [*range(2, 20), 3]))}", "--rank", "single=0-37:1")
    assert [after[stem].rank for stem in stems] == [2, 3, 1]
    assert args == {"train_blocks": "all"}
    whole = ["3"] * 61
    whole[22:60] = ["2"] * 38
    after, _, _ = resized(source, "--rank", f"blocks={','.join(whole)}")
    assert [after[stem].rank for stem in stems] == [3, 3, 2]


# merge and extract --------------------------------------------------------------------------------------------------------


def test_merge_takes_the_same(tmp_path: Path) -> None:
    source, stems = sd1_file(tmp_path)
    out = tmp_path / "merged.safetensors"
    args = ("--rank", f"blocks={values(at1=2, at24=0)}", "--conv-rank", "mid:1", "--rank", 3)
    outcome = run("merge", f"{source}:0.5", f"{source}:0.25", "-o", out, *args)
    assert outcome.code == 0, outcome.err
    found = changes(out)
    assert [found[stem].rank if stem in found else 0 for stem in stems] == [2, 2, 2, 4, 4, 4, 1, 4, 4, 0, 0, 3]


def test_extract_takes_the_same(tmp_path: Path) -> None:
    base = grid("sd1")
    paths = [
        save(tmp_path / f"{name}.safetensors", own)
        for name, own in (("base", base), ("tuned", changed(base, whole_low_rank(3))))
    ]
    out = tmp_path / "out.safetensors"
    args: tuple[object, ...] = ("--rank", 2, "--rank", f"blocks={values(at1=1, at8=0)}", "--lora-only")
    args += ("--conv-rank", f"block_dims={values(at12=1)}")
    dry = json.loads(run("extract", *paths, out, *args, "--dry-run", "--json").out)
    outcome = run("extract", *paths, out, *args, "--json", "--quiet")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert set(dry["tensors"]) == {m["name"] for m in report["modules"]}
    for module in report["modules"]:
        name = module["name"].removeprefix("lora_unet_")
        index = trained_index(name, sdxl=False)
        special = {12: 1} if module["kind"] == "conv" else {1: 1}
        wanted = 2 if index < 0 and name != "conv_in" else special.get(index, 4)
        assert module["rank"] == min(wanted, *module["shape"][:1], math.prod(module["shape"][1:])), module["name"]
    gone = {one["name"] for one in report["left_out"] if one["reason"] == "rank 0 is asked for it"}
    assert {trained_index(name.removeprefix("lora_unet_"), sdxl=False) for name in gone} == {8}
    assert report["operation"].endswith(f"conv block_dims {values(at12=1)}, blocks {values(at1=1, at8=0)}")
    written = json.loads(read(out)[1]["ss_network_args"])
    assert written["block_dims"].split(",")[:3] == ["0", "1", "4"]
    assert written["block_dims"].split(",")[8] == "0"
