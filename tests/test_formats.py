"""Formats that real programs write, from small tensors under real names, against formulas of their own in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from typer.testing import CliRunner

from lorasurgery.api import save
from lorasurgery.architectures import architectures, named
from lorasurgery.architectures.table import DIFFUSERS
from lorasurgery.architectures.text_encoders import TEXT_ENCODERS
from lorasurgery.checking.comfyui import COMFYUI
from lorasurgery.checking.engine import check
from lorasurgery.checking.subject import subject_of
from lorasurgery.cli.app import app
from lorasurgery.deltas.full import is_gain
from lorasurgery.errors import (
    FileFormatError,
    NotAnAdapterError,
    NotRepresentableError,
    UnknownArchitectureError,
)
from lorasurgery.files.opened import load
from lorasurgery.files.read import parse
from lorasurgery.inspection import describe
from lorasurgery.io.tensors import of_array
from lorasurgery.layouts.foreign import known_unmangled
from lorasurgery.layouts.group import build, group
from lorasurgery.layouts.wrappers import unwrapped
from lorasurgery.verbs.meta.meta import read_metadata
from tests.format_files import KOHYA, RNG, control, file, lora, some, wan_control, written, xlabs

if TYPE_CHECKING:
    from pathlib import Path

    from lorasurgery.io.tensors import Tensor

# names and rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_xlabs_single_blocks(prefix: str) -> None:
    source = {prefix + key: tensor for key, tensor in xlabs().items()}
    adapter = parse(file(source))
    assert len(adapter) == 4
    assert not adapter.leftovers
    diffusers = written(adapter, "diffusers")
    for i in (0, 37):
        up = source[f"{prefix}single_blocks.{i}.processor.qkv_lora.up.weight"].array()
        for at, part in enumerate("qkv"):
            stem = f"transformer.single_transformer_blocks.{i}.attn.to_{part}"
            assert np.array_equal(diffusers[f"{stem}.lora_B.weight"].array(), up[3072 * at : 3072 * (at + 1)])
        proj = diffusers[f"transformer.single_transformer_blocks.{i}.proj_out.lora_A.weight"]
        assert proj.tobytes() == source[f"{prefix}single_blocks.{i}.processor.proj_lora.down.weight"].tobytes()
    assert len(diffusers) == 2 * 2 * (3 + 1)
    fused = written(adapter, "comfyui")["diffusion_model.single_blocks.37.linear1.lora_up.weight"].array()
    assert np.array_equal(fused[:9216], source[f"{prefix}single_blocks.37.processor.qkv_lora.up.weight"].array())
    assert not fused[9216:].any()


@pytest.mark.parametrize(
    ("key", "width"), [("flux1-dev", 3072), ("chroma", 3072), ("flux2-dev", 6144), ("flux2-klein-9b", 4096)]
)
def test_comfyuis_name_for_rows_of_a_weight(key: str, width: int) -> None:
    tensors = lora("diffusion_model.single_blocks.3.linear1_qkv", 3 * width, width, words=KOHYA)
    (module,) = parse(file(tensors), among=named(key)).modules.values()
    assert [tuple(span) for span in module.site.spans] == [("single_blocks.3.linear1", 0, 3 * width)]


@pytest.mark.parametrize("beside", [False, True])
def test_comfyuis_name_stays_where_a_family_cannot_be_fused(beside: bool) -> None:
    """A LoKr of the attention rows alone is none of the whole weight; ComfyUI reads the rows under their own name."""
    stems = {"diffusion_model.single_blocks.3.linear1_qkv": (576, 192)}
    if beside:
        stems["transformer.single_transformer_blocks.3.proj_mlp"] = (768, 192)
    source = {f"{stem}.lokr_{n}": some(*shape) for stem, own in stems.items() for n, shape in (("w1", (16, 16)), ("w2", own))}
    adapter = parse(file(source), among=named("flux1-dev"))
    tensors = written(adapter, "comfyui")
    assert {key: tensor.tobytes() for key, tensor in tensors.items()} == {k: tensor.tobytes() for k, tensor in source.items()}
    assert check(subject_of(file(tensors)), COMFYUI).complete
    with pytest.raises(NotRepresentableError, match="Kronecker"):
        written(adapter, "sd-scripts")


def test_ltx2_text_projection() -> None:
    """Its own component in Diffusers, and no part of the denoiser for anybody."""
    stem = "text_embedding_projection.aggregate_embed"
    block = lora("diffusion_model.transformer_blocks.0.attn1.to_q", 4096, 4096)
    source = lora(stem, 3840, 188160, 1) | block
    adapter = parse(file(source))
    assert not adapter.leftovers
    assert {key.rpartition(".lora")[0] for key in written(adapter, "diffusers")} == {
        "connectors.text_proj_in", "transformer.transformer_blocks.0.attn1.to_q",
    }  # fmt: skip
    own = "text_encoders.text_embedding_projection"  # ComfyUI's comfy/text_encoders/lt.py: a Linear of its text encoder
    assert f"{own}.lora_down.weight" in written(adapter, "comfyui")
    assert f"{stem}.lora_A.weight" in written(adapter, "other")
    assert parse(file(written(adapter, "comfyui"))).modules.keys() == adapter.modules.keys()
    for prefix in ("diffusion_model.", ""):
        bare = {key.replace("diffusion_model.", prefix).replace(stem, own): tensor for key, tensor in source.items()}
        assert parse(file(bare)).modules.keys() == adapter.modules.keys()
        assert check(subject_of(file(bare)), COMFYUI).counts == {"loads": 2}
    assert check(subject_of(file(source)), COMFYUI).counts == {"loads": 1, "ignored": 1}
    back = parse(file(written(adapter, "diffusers")), among=named("ltx2"))
    assert written(back, "comfyui").keys() == written(adapter, "comfyui").keys()


def test_ltx2_connectors_have_the_projection() -> None:
    import torch
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

    with torch.device("meta"):
        shape = LTX2TextConnectors().get_submodule("text_proj_in").weight.shape
    assert tuple(shape) == architectures()["ltx2"].shapes["text_embedding_projection.aggregate_embed"]


WRAPPERS = (
    "pipe.dit.", "pipe.", "module.", "_orig_mod.", "dit.", "base_model.model.model.", "model.", "module._orig_mod.",
    "base_model.model.pipe.dit.", "student.generator.net.", "model.model.diffusion_model.", "module.transformer.",
)  # fmt: skip


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_around_the_names(wrapper: str) -> None:
    attention, parts = ("attn1", ("to_q", "to_k", "to_v")) if wrapper.endswith("transformer.") else ("self_attn", tuple("qkvo"))
    source: dict[str, Tensor] = {}
    for i in range(2):
        for part in parts:
            source |= lora(f"{wrapper}blocks.{i}.{attention}.{part}", 5120, 5120)
    adapter = parse(file(source))
    assert adapter.architecture.id == "wan"
    assert (len(adapter), adapter.leftovers) == (2 * len(parts), ())
    keys = [entry.key for own in group(file(source))[0].values() for entry in own.entries.values()]
    assert sorted(keys) == sorted(source)  # as spelled


def test_a_wrapper_holds_the_text_encoder_too() -> None:
    stems = [f"pipe.unet.down_blocks.0.attentions.0.transformer_blocks.0.attn{n}.to_{x}" for n in (1, 2) for x in "qkv"]
    encoder = "pipe.text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    assert unwrapped([*stems, encoder])[encoder] == encoder.removeprefix("pipe.")


def test_compiled_blocks() -> None:
    stems = [f"diffusion_model.blocks.{i}._orig_mod.self_attn.q" for i in range(2)]
    assert list(unwrapped(stems).values()) == [stem.replace("._orig_mod", "") for stem in stems]
    flat = "lora_unet__orig_mod_blocks_0_self_attn_q"
    assert unwrapped([flat]) == {flat: "lora_unet_blocks_0_self_attn_q"}


def test_an_added_branch_is_no_wrapper() -> None:
    """What only some names begin with is a part of the model."""
    main = [f"diffusion_model.blocks.{i}.self_attn.{x}" for i in range(4) for x in "qkvo"]
    assert unwrapped([*main, *(f"diffusion_model.control.blocks.{i}.self_attn.q" for i in range(4))]) == {}
    assert unwrapped(["base_model.model.model.layers.0.self_attn.q_proj", "base_model.model.model.layers.0.mlp.up_proj"]) == {}
    assert unwrapped(main) == {}


# norms and bare parameters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "is_one"),
    [
        ("blocks.0.cross_attn.norm_k_img", (5120,), True), ("blocks.0.modulation", (1, 6, 5120), True),
        ("lora_unet_blocks_0_modulation", (6, 5120), True), ("transformer_blocks.0.scale_shift_table", (6, 2048), True),
        ("blocks.0.self_attn.q", (5120, 5120), False), ("conv", (320, 320, 3, 3), False), ("conv1d", (8, 4, 3), False),
        ("single_blocks.0.modulation.lin", (9216, 3072), False), ("gate", (), True),
        ("x.scale_shift_table_a2v_ca_video", (5, 4096), True),
    ],
)  # fmt: skip
def test_differences_of_norms(name: str, shape: tuple[int, ...], is_one: bool) -> None:
    assert is_gain(name, shape) is is_one
    groups, _ = group(file({f"{name}.diff": some(*shape)}))
    delta = build(groups[name], None)
    assert delta is not None
    assert delta.family == ("norm" if is_one else "full")
    assert list(delta.tensors) == ["diff"]


def test_a_norms_difference_has_the_options_of_norms() -> None:
    source = lora("diffusion_model.blocks.0.cross_attn.k_img", 5120, 5120)
    source["diffusion_model.blocks.0.cross_attn.norm_k_img.diff"] = some(5120)
    adapter = parse(file(source))
    with pytest.raises(NotRepresentableError, match="NORM") as caught:
        written(adapter, "diffusers")
    assert "--lossy" in str(caught.value)
    assert len(written(adapter, "diffusers", lossy=True)) == 2
    for target, word in (("comfyui", "diff"), ("lycoris", "w_norm"), ("sd-scripts", "w_norm")):
        tensors = written(adapter, target, as_lora=True)
        (key,) = (key for key in tensors if "norm" in key)
        assert key.endswith(f".{word}")
        assert tensors[key].tobytes() == source["diffusion_model.blocks.0.cross_attn.norm_k_img.diff"].tobytes()


@pytest.mark.parametrize(
    ("key", "stem"),
    [
        ("blocks.0.diff_m", "blocks.0.modulation"), ("head.diff_m", "head.modulation"),
        ("diffusion_model.blocks.7.diff_m", "diffusion_model.blocks.7.modulation"),
        ("lora_unet_blocks_0.diff_m", "lora_unet_blocks_0.modulation"),
    ],
)  # fmt: skip
def test_difference_of_a_modulation(key: str, stem: str) -> None:
    groups, _ = group(file({key: some(1, 6, 64)}))
    (own,) = groups.values()
    assert own.stem.replace("_0_modulation", "_0.modulation") == stem
    assert own.key() == key


def test_text_encoder_norms() -> None:
    stem = "text_encoders.t5xxl.transformer.encoder.block.13.layer.0.layer_norm"
    source = lora("diffusion_model.double_blocks.0.img_attn.proj", 3072, 3072) | {f"{stem}.diff": some(4096)}
    adapter = parse(file(source))
    assert not adapter.leftovers
    assert {site.component for site in adapter.modules} == {"denoiser", "t5_xxl"}


@pytest.mark.parametrize("table", TEXT_ENCODERS)
def test_text_encoder_norms_and_biases_are_the_models(table: str) -> None:
    import torch
    import transformers as hf

    clip = {"clip_l": 768, "clip_g": 1280, "clip_h": 1024}
    if table in clip:
        made = hf.CLIPTextModelWithProjection, hf.CLIPTextConfig(
            hidden_size=clip[table], intermediate_size=4 * clip[table], num_hidden_layers=1, num_attention_heads=16,
            projection_dim=clip[table],
        )  # fmt: skip
    elif table == "t5_xxl":
        made = hf.T5EncoderModel, hf.T5Config(d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=1, vocab_size=32128,
                                              feed_forward_proj="gated-gelu")  # fmt: skip
    elif table == "qwen3_06b":
        made = hf.Qwen3Model, hf.Qwen3Config(vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=1,
                                             num_attention_heads=16, num_key_value_heads=8, head_dim=128)  # fmt: skip
    else:
        made = hf.Gemma2Model, hf.Gemma2Config(vocab_size=256000, hidden_size=2304, intermediate_size=9216, head_dim=256,
                                               num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=4)  # fmt: skip
    with torch.device("meta"):
        parameters = {key: tuple(value.shape) for key, value in made[0](made[1]).named_parameters()}
    own = TEXT_ENCODERS[table]
    names = {key.removesuffix(".weight"): shape for key, shape in parameters.items() if key.endswith(".weight")}
    in_table = {name: shape for name, shape in own.shapes.items() if not any(f".{i}." in name for i in range(2, 40))}
    for name, shape in names.items():
        if len(shape) == 1:
            assert in_table[name] == shape
        if name in in_table:
            assert own.has_bias(name) is (f"{name}.bias" in parameters)


def test_replaced_norms_of_a_control_lora_both_ways() -> None:
    source = control()
    adapter = parse(file(source), among=named("flux1"))
    assert not adapter.leftovers
    assert adapter.architecture.key == "flux1-control"
    comfyui = written(adapter, "comfyui")
    moved = comfyui["diffusion_model.double_blocks.0.txt_attn.norm.query_norm.set_weight"]
    assert moved.tobytes() == source["transformer.transformer_blocks.0.attn.norm_added_q.weight"].tobytes()
    back = written(parse(file(comfyui), among=named("flux1")), "diffusers")
    assert {key: tensor.tobytes() for key, tensor in back.items()} == {key: t.tobytes() for key, t in source.items()}
    bfl = {f"{n}.scale": some(128) for n in ("double_blocks.0.img_attn.norm.key_norm", "single_blocks.5.norm.query_norm")}
    bfl |= lora("double_blocks.0.img_attn.qkv", 9216, 3072) | lora("img_in", 3072, 128)
    norms = {key for key in written(parse(file(bfl), among=named("flux1")), "diffusers") if "norm" in key}
    assert norms == {
        "transformer.transformer_blocks.0.attn.norm_k.weight", "transformer.single_transformer_blocks.5.attn.norm_q.weight",
    }  # fmt: skip


def test_diffusers_loads_no_other_replacement() -> None:
    source = lora("diffusion_model.double_blocks.0.img_attn.proj", 3072, 3072, words=KOHYA)
    source["diffusion_model.final_layer.linear.set_weight"] = some(64, 3072)
    with pytest.raises(NotRepresentableError, match="replaced weights"):
        written(parse(file(source), among=named("flux1-dev")), "diffusers")


def test_a_models_own_norms_are_no_adapter() -> None:
    weights = {f"blocks.{i}.{name}.weight": some(16) for i in range(9) for name in ("norm1", "norm2", "norm3")}
    with pytest.raises(NotAnAdapterError):
        parse(file(weights | lora("blocks.0.attn.q", 16, 16)))


# numbered modules ---------------------------------------------------------------------------------------------------------

ATTENTIONS = [[f"attn{n}.to_{x}" for x in ("q", "k", "v", "out.0")] for n in (1, 2)]
ORDERS = {
    "before": [*ATTENTIONS[0], "ff.net.0.proj", *ATTENTIONS[1]],
    "after": [*ATTENTIONS[0], *ATTENTIONS[1], "ff.net.0.proj"],
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("model", ["sd1", "sd2"])
def test_numbered_modules_by_shape(order: str, model: str) -> None:
    arch = named(model)[0]
    blocks = [f"down_blocks.{i}.attentions.{j}" for i in range(3) for j in range(2)]
    blocks += [f"up_blocks.{i}.attentions.{j}" for i in range(1, 4) for j in range(3)] + ["mid_block.attentions.0"]
    names = [f"{block}.transformer_blocks.0.{leaf}" for block in blocks for leaf in ORDERS[order]]
    assert len(names) == 144
    source: dict[str, Tensor] = {}
    for number, name in enumerate(names):
        out, columns, *_ = arch.module_shape(arch.namings[DIFFUSERS][name])
        source |= {f"unet:{number}:up": some(out, 1), f"unet:{number}:down": some(1, columns)}
    groups, others = group(file(source))
    assert not others
    for number, name in enumerate(names):
        own = groups[f"unet.{name}"]
        assert own.spelled == f"unet:{number}"
        assert sorted(entry.key for entry in own.entries.values()) == [f"unet:{number}:down", f"unet:{number}:up"]
    adapter = parse(file(source))
    assert adapter.architecture.id == model
    assert len(adapter) == 144


def test_the_header_of_numbered_modules(tmp_path: Path) -> None:
    """cloneofsimo/lora makes its layers by the ranks in the header and knows no tensor without its entry there."""
    said = {"unet": '["CrossAttention", "Attention", "GEGLU"]', "text_encoder": '["CLIPAttention"]', "<s1>": "<embed>"}

    def saved(name: str, rank: int, *, token: bool) -> Path:
        tensors: dict[str, Any] = {"<s1>": RNG.standard_normal(768).astype("f4")} if token else {}
        for stem, width in (("unet:0", 320), ("text_encoder:0", 768), ("text_encoder:1", 768)):
            tensors |= {f"{stem}:up": some(width, rank).array(), f"{stem}:down": some(rank, width).array()}
        ranks = {f"{key.rpartition(':')[0]}:rank": str(rank) for key in tensors if ":" in key}
        save_file(tensors, tmp_path / name, metadata={**ranks, **{k: v for k, v in said.items() if token or k != "<s1>"}})
        return tmp_path / name

    first, second, out = saved("a.safetensors", 4, token=False), saved("b.safetensors", 3, token=True), tmp_path / "out"
    assert describe(first).layout == "cloneofsimo"
    for command, ranks in (
        (["resize", first, "--rank", "2", "-o"], [4, 4, 2]), (["rerank", first, "--rank", "2", "-o"], [2, 2, 2]),
        (["merge", f"{first}:0.5", second, "-o"], [7, 7, 7]), (["merge", first, "--rank", "3", "-o"], [3, 3, 3]),
        (["prune", first, "--drop", "unet", "-o"], [4, 4]), (["prune", first, "--keep", "unet", "-o"], [4]),
        (["convert", second, "--target", "comfyui", "-o"], []),
    ):  # fmt: skip
        result = CliRunner().invoke(app, [str(word) for word in (*command, out, "--force")])
        assert result.exit_code == 0, result.output
        with safe_open(out, "np") as made:
            keys, header = list(made.keys()), made.metadata()
            tensors = {f"{key.rpartition(':')[0]}:rank": str(made.get_tensor(key).shape[0]) for key in keys if ":down" in key}
        assert {key: value for key, value in header.items() if key.endswith(":rank")} == tensors
        assert sorted(map(int, tensors.values()), reverse=True) == ranks
        assert {key for key in ("unet", "text_encoder") if key in header} == {key.split(":")[0] for key in tensors}
        assert ("<s1>" in header) == ("<s1>" in keys)
    asked = [
        "convert",
        str(second),
        str(out),
        "--target",
        "onetrainer",
        "--force",
    ]  # whose loader refuses what it does not know
    refused = CliRunner().invoke(app, asked)
    assert (refused.exit_code, "<s1>" in refused.output) == (1, True)
    assert CliRunner().invoke(app, [*asked, "--lossy"]).exit_code == 0
    with safe_open(out, "np") as made:
        assert "<s1>" not in made.keys()  # noqa: SIM118  safe_open is no mapping
    named_module = tmp_path / "named.safetensors"
    conv = "unet.down_blocks.0.resnets.0.conv1.lora"
    save_file(
        {f"{conv}.down.weight": some(4, 320, 3, 3).array(), f"{conv}.up.weight": some(320, 4, 1, 1).array()}, named_module
    )
    result = CliRunner().invoke(app, ["merge", str(first), str(named_module), "-o", str(out), "--force"])
    assert result.exit_code == 1
    assert "cloneofsimo/lora numbers its modules and has no number for it" in result.output


# files that are something else --------------------------------------------------------------------------------------------


def test_draw_things(tmp_path: Path) -> None:
    for name in ("some_lora_f16.ckpt", "some.safetensors"):
        path = tmp_path / name
        path.write_bytes(b"SQLite format 3\0" + bytes(4080))
        with pytest.raises(FileFormatError, match="Draw Things") as caught:
            load(path)
        assert "rename" not in str(caught.value)
        with pytest.raises(FileFormatError, match="Draw Things"):
            read_metadata(path)


@pytest.mark.parametrize(
    "tensors",
    [
        {"transformer_blocks.0.mlp_fc1.lora_down": (3072, 16), "transformer_blocks.0.mlp_fc1.lora_up": (12288, 16)},
        {"single_transformer_blocks.3.qkv_proj.lora_down": (3072, 32), "x_embedder.lora_A.weight": (4, 64)},
        {"transformer_blocks.0.attn.to_out.0.lora_down": (3072, 32), "transformer_blocks.0.attn.to_out.0.lora_up": (3072, 32)},
        {"transformer_blocks.0.attn.to_qkv.proj_down": (3072, 128), "transformer_blocks.0.attn.to_qkv.proj_up": (9216, 128)},
    ],
)
def test_packed_for_nunchaku(tensors: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    source = {key: of_array(np.zeros(shape), "BF16") for key, shape in tensors.items()}
    with pytest.raises(NotAnAdapterError, match="packed for Nunchaku") as caught:
        parse(file(source))
    assert "renam" not in str(caught.value)
    from tests.oracle import raw, write

    write(tmp_path / "packed.safetensors", {key: raw(np.zeros(shape), "BF16") for key, shape in tensors.items()})
    assert describe(tmp_path / "packed.safetensors").kind == "packed-adapter"


def test_names_that_are_mangled_and_names_that_are_not() -> None:
    good = "lora_unet_double_blocks_0_img_attn_proj"
    assert known_unmangled(f"{good}_") == good
    assert (
        known_unmangled("lora_unet_unet_down_blocks_0_attentions_0_proj_in") == "lora_unet_down_blocks_0_attentions_0_proj_in"
    )
    for name in ("lora_unet_transformer_blocks_0_some_thing", "lora_unet_transformer_h_0_c_attn", good, "foo_"):
        assert known_unmangled(name) == ""
    with pytest.raises(UnknownArchitectureError, match=f"looks mangled, expected {good} "):
        parse(file(lora(f"{good}_", 3072, 3072, words=KOHYA)))
    with pytest.raises(UnknownArchitectureError) as caught:
        parse(file(lora("lora_unet_transformer_blocks_0_some_thing", 3000, 3072, words=KOHYA)))
    assert "mangled" not in str(caught.value)


def test_new_formats_are_written_and_read_again(tmp_path: Path) -> None:
    """Through real files: what was understood of the one is what is understood of the other."""
    from safetensors.numpy import save_file

    for name, source in (("xlabs", xlabs()), ("control", control()), ("wan", wan_control())):
        path, out = tmp_path / f"{name}.safetensors", tmp_path / f"{name}-comfyui.safetensors"
        save_file({key: tensor.array() for key, tensor in source.items()}, path)
        own = describe(path)
        assert (own.kind, own.unexplained, own.coverage) == ("adapter", (), 1.0)
        report = save(load(path), out, layout="comfyui")
        assert report.exact
        assert describe(out).architecture == own.architecture
