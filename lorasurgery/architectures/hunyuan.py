"""HunyuanVideo, HunyuanVideo 1.5 and HunyuanImage 2.1.

sd-scripts and musubi-tuner train Tencent's own models, whose names ComfyUI changes; 1.5 there has separate q, k and v.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasurgery.architectures.flux1 import STREAMS
from lorasurgery.architectures.table import SD_SCRIPTS, Architecture, block, row

if TYPE_CHECKING:
    from lorasurgery.architectures.table import Block, Row

BYT5 = 1472


def _embedder(name: str, diffusers: str, d: int, width: int, layers: str = "mlp") -> tuple[Row, Row]:
    first, second = ("linear_1", "linear_2") if layers == "linear" else (f"{layers}.0", f"{layers}.2")
    return (
        row(f"{name}.in_layer", (d, width), f"{diffusers}.linear_1", sd_scripts=f"{name}.{first}"),
        row(f"{name}.out_layer", (d, d), f"{diffusers}.linear_2", sd_scripts=f"{name}.{second}"),
    )


def _double(d: int, *, split: bool = False) -> tuple[Row, ...]:
    """``split``: the trained model has q, k and v apart."""
    return tuple(
        r
        for s, qkv, out, norm, ff, modulation in STREAMS
        for r in (
            row(f"{s}_mod.lin", (6 * d, d), f"{modulation}.linear", sd_scripts=f"{s}_mod.linear"),
            row(
                f"{s}_attn.qkv",
                (3 * d, d),
                qkv,
                sd_scripts=[f"{s}_attn_{p}" for p in "qkv"] if split else f"{s}_attn_qkv",
            ),
            row(f"{s}_attn.norm.query_norm", (128,), norm.format("q"), sd_scripts=f"{s}_attn_q_norm"),
            row(f"{s}_attn.norm.key_norm", (128,), norm.format("k"), sd_scripts=f"{s}_attn_k_norm"),
            row(f"{s}_attn.proj", (d, d), out, sd_scripts=f"{s}_attn_proj"),
            row(f"{s}_mlp.0", (4 * d, d), f"{ff}.net.0.proj", sd_scripts=f"{s}_mlp.fc1"),
            row(f"{s}_mlp.2", (d, 4 * d), f"{ff}.net.2", sd_scripts=f"{s}_mlp.fc2"),
        )
    )


def _single(d: int) -> tuple[Row, ...]:
    return (
        row("linear1", (7 * d, d), (("attn.to_q", d), ("attn.to_k", d), ("attn.to_v", d), ("proj_mlp", 4 * d))),
        row("linear2", (d, 5 * d), "proj_out"),
        row("norm.query_norm", (128,), "attn.norm_q", sd_scripts="q_norm"),
        row("norm.key_norm", (128,), "attn.norm_k", sd_scripts="k_norm"),
        row("modulation.lin", (3 * d, d), "norm.linear", sd_scripts="modulation.linear"),
    )


def _text(d: int, text: int) -> tuple[Row | Block, ...]:
    """The token refiner."""
    time = "context_embedder.time_text_embed"
    refiner = (
        row("norm1", (d,)),
        row("norm2", (d,)),
        row("adaLN_modulation.1", (2 * d, d), "norm_out.linear"),
        row("self_attn.qkv", (3 * d, d), ("attn.to_q", "attn.to_k", "attn.to_v"), sd_scripts="self_attn_qkv"),
        row("self_attn.proj", (d, d), "attn.to_out.0", sd_scripts="self_attn_proj"),
        row("mlp.0", (4 * d, d), "ff.net.0.proj", sd_scripts="mlp.fc1"),
        row("mlp.2", (d, 4 * d), "ff.net.2", sd_scripts="mlp.fc2"),
    )
    return (
        row("txt_in.input_embedder", (d, text), "context_embedder.proj_in"),
        *_embedder("txt_in.t_embedder", f"{time}.timestep_embedder", d, 256),
        *_embedder("txt_in.c_embedder", f"{time}.text_embedder", d, text, "linear"),
        block(
            "txt_in.individual_token_refiner.blocks.{i}",
            refiner,
            2,
            diffusers="context_embedder.token_refiner.refiner_blocks.{i}",
        ),
    )


def _byt5(d: int) -> tuple[Row, ...]:
    return (
        row("byt5_in.layernorm", (BYT5,), "context_embedder_2.norm"),
        row("byt5_in.fc1", (2048, BYT5), "context_embedder_2.linear_1"),
        row("byt5_in.fc2", (2048, 2048), "context_embedder_2.linear_2"),
        row("byt5_in.fc3", (d, 2048), "context_embedder_2.linear_3"),
    )


def _final(d: int, out: int) -> tuple[Row, Row]:
    return (
        row("final_layer.linear", (out, d), "proj_out"),
        row("final_layer.adaLN_modulation.1", (2 * d, d), "norm_out.linear", swap_halves=True),
    )


VIDEO, VIDEO_15, IMAGE = 3072, 2048, 3584

TABLES = (
    Architecture(
        id="hunyuan-video",
        variant="",
        name="HunyuanVideo",
        source="ComfyUI comfy/ldm/hunyuan_video/model.py (2026-05), Diffusers HunyuanVideoTransformer3DModel 0.42",
        no_bias=r"_norm$",
        sd_scripts=SD_SCRIPTS,
        usage=3_000,
        metadata_names=("hunyuan_video", "hunyuan-video"),
        rows=(
            row("img_in.proj", (VIDEO, 16, 1, 2, 2), "x_embedder.proj"),
            *_embedder("time_in", "time_text_embed.timestep_embedder", VIDEO, 256),
            row("vector_in.in_layer", (VIDEO, 768), "time_text_embed.text_embedder.linear_1"),
            row("vector_in.out_layer", (VIDEO, VIDEO), "time_text_embed.text_embedder.linear_2"),
            *_embedder("guidance_in", "time_text_embed.guidance_embedder", VIDEO, 256),
            *_text(VIDEO, 4096),
            block("double_blocks.{i}", _double(VIDEO), 20, diffusers="transformer_blocks.{i}"),
            block("single_blocks.{i}", _single(VIDEO), 40, diffusers="single_transformer_blocks.{i}"),
            *_final(VIDEO, 64),
        ),
    ),
    Architecture(
        id="hunyuan-video-1.5",
        variant="",
        name="HunyuanVideo 1.5",
        source="ComfyUI comfy/ldm/hunyuan_video/model.py (2026-05), Diffusers HunyuanVideo15Transformer3DModel 0.42",
        no_bias=r"_norm$|^cond_type_embedding$",
        sd_scripts=SD_SCRIPTS,
        aliases=tuple(  # ComfyUI also takes Tencent's names with q, k and v fused
            (f"double_blocks.{{i}}.{s}_attn_qkv", f"double_blocks.{{i}}.{s}_attn.qkv") for s in ("img", "txt")
        ),
        usage=700,
        metadata_names=("hunyuan_video_1_5", "hunyuan-video-1.5"),
        rows=(
            row("img_in.proj", (VIDEO_15, 65, 1, 1, 1), "x_embedder.proj"),
            *_embedder("time_in", "time_embed.timestep_embedder", VIDEO_15, 256),
            *_text(VIDEO_15, 3584),
            *_byt5(VIDEO_15),
            row("vision_in.proj.0", (1152,), "image_embedder.norm_in"),
            row("vision_in.proj.1", (1152, 1152), "image_embedder.linear_1"),
            row("vision_in.proj.3", (VIDEO_15, 1152), "image_embedder.linear_2"),
            row("vision_in.proj.4", (VIDEO_15,), "image_embedder.norm_out"),
            row("cond_type_embedding", (3, VIDEO_15), "cond_type_embed"),
            block("double_blocks.{i}", _double(VIDEO_15, split=True), 54, diffusers="transformer_blocks.{i}"),
            *_final(VIDEO_15, 32),
        ),
    ),
    Architecture(
        id="hunyuan-image",
        variant="",
        name="HunyuanImage 2.1",
        source="ComfyUI comfy/ldm/hunyuan_video/model.py (2026-05), Diffusers HunyuanImageTransformer2DModel 0.42",
        no_bias=r"_norm$",
        sd_scripts=SD_SCRIPTS,
        usage=100,
        metadata_names=("hunyuan-image-2.1", "hunyuan-image"),
        rows=(
            row("img_in.proj", (IMAGE, 64, 1, 1), "x_embedder.proj"),
            *_embedder("time_in", "time_guidance_embed.timestep_embedder", IMAGE, 256),
            *_text(IMAGE, 3584),
            *_byt5(IMAGE),
            block("double_blocks.{i}", _double(IMAGE), 20, diffusers="transformer_blocks.{i}"),
            block("single_blocks.{i}", _single(IMAGE), 40, diffusers="single_transformer_blocks.{i}"),
            *_final(IMAGE, 64),
        ),
    ),
)
