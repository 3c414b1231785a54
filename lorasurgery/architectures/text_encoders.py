"""The text encoders that adapters are trained on, under Hugging Face's module names."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from lorasurgery.architectures.table import EncoderTable, block, row

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lorasurgery.architectures.table import Block, Row


def _clip(d: int, layers: int) -> tuple[Row | Block, ...]:
    layer = (
        *(row(f"self_attn.{p}", (d, d)) for p in ("q_proj", "k_proj", "v_proj", "out_proj")),
        row("mlp.fc1", (4 * d, d)),
        row("mlp.fc2", (d, 4 * d)),
        *(row(f"layer_norm{n}", (d,)) for n in (1, 2)),
    )
    return (
        row("text_model.embeddings.token_embedding", (49408, d)),
        row("text_model.embeddings.position_embedding", (77, d)),
        block("text_model.encoder.layers.{i}", layer, layers),
        row("text_model.final_layer_norm", (d,)),
    )


def _decoder(
    vocabulary: int, d: int, q: int, kv: int, f: int, layers: int, norms: tuple[tuple[str, int], ...]
) -> tuple[Row | Block, ...]:
    """A language model with grouped keys and values. ``q``, ``kv``: widths; ``f``: feed-forward width; a layer's ``norms``."""
    layer = (
        row("self_attn.q_proj", (q, d)),
        row("self_attn.k_proj", (kv, d)),
        row("self_attn.v_proj", (kv, d)),
        row("self_attn.o_proj", (d, q)),
        row("mlp.gate_proj", (f, d)),
        row("mlp.up_proj", (f, d)),
        row("mlp.down_proj", (d, f)),
        *(row(name, (width,)) for name, width in (*norms, ("input_layernorm", d), ("post_attention_layernorm", d))),
    )
    return row("embed_tokens", (vocabulary, d)), block("layers.{i}", layer, layers), row("norm", (d,))


HEADS = tuple((f"self_attn.{x}_norm", 128) for x in "qk")
AROUND = tuple((f"{x}_feedforward_layernorm", 2304) for x in ("pre", "post"))
T5_D, T5_F = 4096, 10240
T5 = (
    row("shared", (32128, T5_D)),
    row("encoder.embed_tokens", (32128, T5_D)),
    row("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", (32, 64)),
    block(
        "encoder.block.{i}",
        (
            *(row(f"layer.0.SelfAttention.{p}", (T5_D, T5_D)) for p in "qkvo"),
            row("layer.1.DenseReluDense.wi_0", (T5_F, T5_D)),
            row("layer.1.DenseReluDense.wi_1", (T5_F, T5_D)),
            row("layer.1.DenseReluDense.wo", (T5_D, T5_F)),
            *(row(f"layer.{n}.layer_norm", (T5_D,)) for n in (0, 1)),
        ),
        24,
    ),
    row("encoder.final_layer_norm", (T5_D,)),
)

CLIP, NONE = r"_embedding$|^text_projection$", r"^"
"""What has no bias."""
TEXT_ENCODERS: Mapping[str, EncoderTable] = MappingProxyType(
    {
        table.id: table
        for table in (
            EncoderTable("clip_l", _clip(768, 12), "transformers CLIPTextModel, openai/clip-vit-large-patch14", CLIP),
            EncoderTable(
                "clip_g",
                (*_clip(1280, 32), row("text_projection", (1280, 1280))),
                "transformers CLIPTextModelWithProjection, OpenCLIP bigG",
                CLIP,
            ),
            EncoderTable("clip_h", _clip(1024, 23), "transformers CLIPTextModel, OpenCLIP ViT-H less its last layer", CLIP),
            EncoderTable("t5_xxl", T5, "transformers T5EncoderModel, google/t5-v1_1-xxl", NONE),
            EncoderTable(
                "qwen3_06b", _decoder(151936, 1024, 2048, 1024, 3072, 28, HEADS), "transformers Qwen3Model, 0.6B", NONE
            ),
            EncoderTable(
                "gemma2_2b", _decoder(256000, 2304, 2048, 1024, 9216, 26, AROUND), "transformers Gemma2Model, 2B", NONE
            ),
        )
    }
)
