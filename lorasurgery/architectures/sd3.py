"""Stable Diffusion 3 and 3.5. Medium 3.5 has a second attention in its first 13 blocks; only 3.5 has norms."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasurgery.architectures.table import Architecture, Encoder, block, row

if TYPE_CHECKING:
    from lorasurgery.architectures.table import Block, Row


def _rows(d: int, depth: int, dual: int, *, norms: bool) -> tuple[Row | Block, ...]:
    """``dual``: number of blocks with a second attention, which come first. The last block drops its context."""
    qk = ("q", "k") if norms else ()
    image = (
        row("x_block.attn.qkv", (3 * d, d), ("attn.to_q", "attn.to_k", "attn.to_v")),
        *(row(f"x_block.attn.ln_{p}", (64,), f"attn.norm_{p}") for p in qk),
        row("x_block.attn.proj", (d, d), "attn.to_out.0"),
        row("x_block.mlp.fc1", (4 * d, d), "ff.net.0.proj"),
        row("x_block.mlp.fc2", (d, 4 * d), "ff.net.2"),
    )
    second = (
        row("x_block.attn2.qkv", (3 * d, d), ("attn2.to_q", "attn2.to_k", "attn2.to_v")),
        *(row(f"x_block.attn2.ln_{p}", (64,), f"attn2.norm_{p}") for p in qk),
        row("x_block.attn2.proj", (d, d), "attn2.to_out.0"),
        row("x_block.adaLN_modulation.1", (9 * d, d), "norm1.linear"),
    )
    first = (row("x_block.adaLN_modulation.1", (6 * d, d), "norm1.linear"),)
    context = (
        row("context_block.attn.qkv", (3 * d, d), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
        *(row(f"context_block.attn.ln_{p}", (64,), f"attn.norm_added_{p}") for p in qk),
    )
    full = (
        row("context_block.attn.proj", (d, d), "attn.to_add_out"),
        row("context_block.mlp.fc1", (4 * d, d), "ff_context.net.0.proj"),
        row("context_block.mlp.fc2", (d, 4 * d), "ff_context.net.2"),
        row("context_block.adaLN_modulation.1", (6 * d, d), "norm1_context.linear"),
    )
    last = (row("context_block.adaLN_modulation.1", (2 * d, d), "norm1_context.linear", swap_halves=True),)
    blocks = (
        ((*image, *second, *context, *full), 0, dual),
        ((*image, *first, *context, *full), dual, depth - 1),
        ((*image, *first, *context, *last), depth - 1, depth),
    )
    return (
        row("x_embedder.proj", (d, 16, 2, 2), "pos_embed.proj"),
        row("t_embedder.mlp.0", (d, 256), "time_text_embed.timestep_embedder.linear_1"),
        row("t_embedder.mlp.2", (d, d), "time_text_embed.timestep_embedder.linear_2"),
        row("y_embedder.mlp.0", (d, 2048), "time_text_embed.text_embedder.linear_1"),
        row("y_embedder.mlp.2", (d, d), "time_text_embed.text_embedder.linear_2"),
        row("context_embedder", (d, 4096)),
        *(
            block("joint_blocks.{i}", rows, stop - start, start=start, diffusers="transformer_blocks.{i}")
            for rows, start, stop in blocks
            if stop > start
        ),
        row("final_layer.linear", (64, d), "proj_out"),
        row("final_layer.adaLN_modulation.1", (2 * d, d), "norm_out.linear", swap_halves=True),
    )


TABLES = tuple(
    Architecture(
        id="sd3",
        variant=variant,
        name=name,
        source="ComfyUI comfy/ldm/modules/diffusionmodules/mmdit.py (2026-05), Diffusers SD3Transformer2DModel 0.42",
        no_bias=r"\.ln_[qk]$",
        comfyui_split="transformer.",
        diffusers_encoders=("text_encoder", "text_encoder_2"),
        encoders=(
            Encoder("clip_l", "lora_te1", "text_encoder", "text_encoders.clip_l.transformer"),
            Encoder("clip_g", "lora_te2", "text_encoder_2", "text_encoders.clip_g.transformer"),
            Encoder("t5_xxl", "lora_te3", "text_encoder_3", "text_encoders.t5xxl.transformer"),
        ),
        usage=usage,
        metadata_names=(*known_as, "sd_3"),
        rows=rows,
    )
    for variant, name, usage, known_as, rows in (
        (
            "medium",
            "Stable Diffusion 3 Medium",
            200,
            ("medium", "stable-diffusion-3-medium", "stable-diffusion-v3-medium"),
            _rows(1536, 24, 0, norms=False),
        ),
        (
            "3.5-medium",
            "Stable Diffusion 3.5 Medium",
            500,
            ("5-medium", "stable-diffusion-3-5-medium", "stable-diffusion-v3.5"),
            _rows(1536, 24, 13, norms=True),
        ),
        (
            "3.5-large",
            "Stable Diffusion 3.5 Large",
            700,
            ("5-large", "stable-diffusion-3-5-large", "stable-diffusion-v3.5"),
            _rows(2432, 38, 0, norms=True),
        ),
    )
)
