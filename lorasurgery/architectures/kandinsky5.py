"""Kandinsky 5: Video Lite, Video Pro and Image Lite, with the same names everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasurgery.architectures.table import Architecture, block, row

if TYPE_CHECKING:
    from lorasurgery.architectures.table import Row


def _attention(name: str, d: int, head: int) -> tuple[Row, ...]:
    return (
        *(row(f"{name}.{p}", (d, d)) for p in ("to_query", "to_key", "to_value", "out_layer")),
        *(row(f"{name}.{n}", (head,)) for n in ("query_norm", "key_norm")),
    )


def _feed_forward(d: int) -> tuple[Row, Row]:
    return row("feed_forward.in_layer", (4 * d, d)), row("feed_forward.out_layer", (d, 4 * d))


TABLES = tuple(
    Architecture(
        id="kandinsky5",
        variant=variant,
        name=name,
        source="ComfyUI comfy/ldm/kandinsky5/model.py (2026-05), Diffusers Kandinsky5Transformer3DModel 0.42",
        no_bias=r"_norm$|\.feed_forward\.",
        usage=100,
        metadata_names=("kandinsky5", "Kandinsky-5"),
        rows=(
            row("time_embeddings.in_layer", (time, d)),
            row("time_embeddings.out_layer", (time, time)),
            row("text_embeddings.in_layer", (d, 3584)),
            row("text_embeddings.norm", (d,)),
            row("pooled_text_embeddings.in_layer", (time, 768)),
            row("pooled_text_embeddings.norm", (time,)),
            row("visual_embeddings.in_layer", (d, patch)),
            block(
                "text_transformer_blocks.{i}",
                (
                    row("text_modulation.out_layer", (6 * d, time)),
                    *_attention("self_attention", d, head),
                    *_feed_forward(d),
                ),
                text_blocks,
            ),
            block(
                "visual_transformer_blocks.{i}",
                (
                    row("visual_modulation.out_layer", (9 * d, time)),
                    *_attention("self_attention", d, head),
                    *_attention("cross_attention", d, head),
                    *_feed_forward(d),
                ),
                blocks,
            ),
            row("out_layer.modulation.out_layer", (2 * d, time)),
            row("out_layer.out_layer", (64, d)),
        ),
    )
    for variant, name, d, time, text_blocks, blocks, patch, head in (
        ("lite", "Kandinsky 5 Video Lite", 1792, 512, 2, 32, 4 * 33, 16 + 24 + 24),
        ("pro", "Kandinsky 5 Video Pro", 4096, 1024, 4, 60, 4 * 33, 32 + 48 + 48),
        ("image", "Kandinsky 5 Image Lite", 2560, 512, 2, 50, 4 * 16, 32 + 48 + 48),
    )
)
