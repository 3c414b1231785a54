"""FLUX.2: dev and the two klein sizes (their base and distilled editions have the same weights)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasurgery.architectures.flux1 import SLICES, STREAMS
from lorasurgery.architectures.table import Architecture, block, row

if TYPE_CHECKING:
    from lorasurgery.architectures.table import Block, Row


def _rows(d: int, text: int, double: int, single: int, embedders: tuple[str, ...]) -> tuple[Row | Block, ...]:
    """``text``: width of the stacked text encoder layers."""
    streams = (
        r
        for s, qkv, out, norm, ff, _ in STREAMS
        for r in (
            row(f"{s}_attn.qkv", (3 * d, d), qkv),
            row(f"{s}_attn.norm.query_norm", (128,), norm.format("q")),
            row(f"{s}_attn.norm.key_norm", (128,), norm.format("k")),
            row(f"{s}_attn.proj", (d, d), out),
            row(f"{s}_mlp.0", (6 * d, d), f"{ff}.linear_in"),
            row(f"{s}_mlp.2", (d, 3 * d), f"{ff}.linear_out"),
        )
    )
    fused = (
        row("linear1", (9 * d, d), "attn.to_qkv_mlp_proj"),
        row("linear2", (d, 4 * d), "attn.to_out"),
        row("norm.query_norm", (128,), "attn.norm_q"),
        row("norm.key_norm", (128,), "attn.norm_k"),
    )
    return (
        row("img_in", (d, 128), "x_embedder"),
        row("txt_in", (d, text), "context_embedder"),
        *(
            row(f"{e}_in.{layer}", (d, width), f"time_guidance_embed.{e.replace('time', 'timestep')}_embedder.{linear}")
            for e in embedders
            for layer, linear, width in (("in_layer", "linear_1", 256), ("out_layer", "linear_2", d))
        ),
        row("double_stream_modulation_img.lin", (6 * d, d), "double_stream_modulation_img.linear"),
        row("double_stream_modulation_txt.lin", (6 * d, d), "double_stream_modulation_txt.linear"),
        row("single_stream_modulation.lin", (3 * d, d), "single_stream_modulation.linear"),
        block("double_blocks.{i}", tuple(streams), double, diffusers="transformer_blocks.{i}"),
        block("single_blocks.{i}", fused, single, diffusers="single_transformer_blocks.{i}"),
        row("final_layer.linear", (128, d), "proj_out"),
        row("final_layer.adaLN_modulation.1", (2 * d, d), "norm_out.linear", swap_halves=True),
    )


TABLES = tuple(
    Architecture(
        id="flux2",
        variant=variant,
        name=f"FLUX.2 {variant}",
        source="ComfyUI comfy/ldm/flux/model.py (2026-05), Diffusers Flux2Transformer2DModel 0.42",
        no_bias=r"^",
        comfyui_split="transformer.",
        onetrainer="dotted",
        usage=usage,
        metadata_names=(*known_as, "flux2", "Flux.2"),
        diffusers_families=frozenset({"lokr"}),
        diffusers_fused=r"\.to_(added_)?qkv$",
        aliases=(
            ("single_blocks.{i}.linear1_qkv", ("single_blocks.{i}.linear1", (0, 3 * d))),  # ComfyUI
            ("transformer_blocks.{i}.attn.to_qkv", "double_blocks.{i}.img_attn.qkv"),  # Diffusers' fuse_qkv_projections
            ("transformer_blocks.{i}.attn.to_added_qkv", "double_blocks.{i}.txt_attn.qkv"),
        ),
        comfyui_slices=SLICES,
        rows=rows,
    )
    for variant, usage, d, known_as, rows in (
        ("dev", 2_000, 6144, ("flux_2_dev", "Flux.2-dev"), _rows(6144, 15360, 8, 48, ("time", "guidance"))),
        ("klein-9b", 8_000, 4096, ("flux_2_klein_9b", "flux2_klein_9b"), _rows(4096, 12288, 8, 24, ("time",))),
        ("klein-4b", 4_000, 3072, ("flux_2_klein_4b", "flux2_klein_4b"), _rows(3072, 7680, 5, 20, ("time",))),
    )
)
