"""HiDream-I1 (full, dev and fast have the same weights): the same names everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasurgery.architectures.table import Architecture, Encoder, block, row

if TYPE_CHECKING:
    from lorasurgery.architectures.table import Block, Row

D, F, SHARED = 2560, 6912, 3584

FEED_FORWARD = (row("w1", (F, D)), row("w2", (D, F)), row("w3", (F, D)))
SINGLE: tuple[Row | Block, ...] = (
    *(row(f"attn1.{p}", (D, D)) for p in ("to_q", "to_k", "to_v", "to_out")),
    *(row(f"attn1.{p}", (D,)) for p in ("q_rms_norm", "k_rms_norm")),
    row("ff_i.shared_experts.w1", (SHARED, D)),
    row("ff_i.shared_experts.w2", (D, SHARED)),
    row("ff_i.shared_experts.w3", (SHARED, D)),
    block("ff_i.experts.{i}", FEED_FORWARD, 4),
    row("ff_i.gate", (4, D)),
)
DOUBLE: tuple[Row | Block, ...] = (
    *SINGLE,
    *(row(f"attn1.{p}", (D, D)) for p in ("to_q_t", "to_k_t", "to_v_t", "to_out_t")),
    *(row(f"attn1.{p}", (D,)) for p in ("q_rms_norm_t", "k_rms_norm_t")),
    block("ff_t", FEED_FORWARD),
)

TABLES = (
    Architecture(
        id="hidream",
        variant="",
        name="HiDream-I1",
        source="ComfyUI comfy/ldm/hidream/model.py (2026-05), Diffusers HiDreamImageTransformer2DModel 0.42",
        no_bias=r"_rms_norm|\.ff_[it]\.|^caption_projection\.",
        usage=400,
        metadata_names=("hidream_i1", "hidream-i1"),
        encoders=(
            Encoder("clip_l", "lora_te1", "text_encoder", "text_encoders.clip_l.transformer"),
            Encoder("clip_g", "lora_te2", "text_encoder_2", "text_encoders.clip_g.transformer"),
            Encoder("t5_xxl", "lora_te3", "text_encoder_3", "text_encoders.t5xxl.transformer"),
        ),
        rows=(
            row("t_embedder.timestep_embedder.linear_1", (D, 256)),
            row("t_embedder.timestep_embedder.linear_2", (D, D)),
            row("p_embedder.pooled_embedder.linear_1", (D, 2048)),
            row("p_embedder.pooled_embedder.linear_2", (D, D)),
            row("x_embedder.proj", (D, 64)),
            block("caption_projection.{i}", (row("linear", (D, 4096)),), 49),
            block(
                "double_stream_blocks.{i}.block",
                (*DOUBLE, row("adaLN_modulation.1", (12 * D, D))),
                16,
            ),
            block(
                "single_stream_blocks.{i}.block",
                (*SINGLE, row("adaLN_modulation.1", (6 * D, D))),
                32,
            ),
            row("final_layer.linear", (64, D)),
            row("final_layer.adaLN_modulation.1", (2 * D, D)),
        ),
    ),
)
