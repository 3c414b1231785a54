"""Wan 2.1 and 2.2. The two experts of Wan 2.2 (high and low noise) have the same names and shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasurgery.architectures.table import Architecture, block, row

if TYPE_CHECKING:
    from lorasurgery.architectures.table import Block, Row

IMAGE = 1280


def _rows(d: int, f: int, layers: int, latent: int, out: int, *, clip_image: bool = False) -> tuple[Row | Block, ...]:
    """``latent``: channels of the patch embedding; ``clip_image``: cross attention to a CLIP image embedding."""
    attentions = (
        r
        for a, diffusers in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for r in (
            *(row(f"{a}.{p}", (d, d), f"{diffusers}.to_{p}") for p in "qkv"),
            row(f"{a}.o", (d, d), f"{diffusers}.to_out.0"),
            *(row(f"{a}.norm_{p}", (d,), f"{diffusers}.norm_{p}") for p in "qk"),
        )
    )
    image = (
        row("cross_attn.k_img", (d, d), "attn2.add_k_proj"),
        row("cross_attn.v_img", (d, d), "attn2.add_v_proj"),
        row("cross_attn.norm_k_img", (d,), "attn2.norm_added_k"),
    )
    embedder = (
        row("img_emb.proj.0", (IMAGE,), "condition_embedder.image_embedder.norm1"),
        row("img_emb.proj.1", (IMAGE, IMAGE), "condition_embedder.image_embedder.ff.net.0.proj"),
        row("img_emb.proj.3", (d, IMAGE), "condition_embedder.image_embedder.ff.net.2"),
        row("img_emb.proj.4", (d,), "condition_embedder.image_embedder.norm2"),
    )
    layer = (
        *attentions,
        *(image if clip_image else ()),
        row("ffn.0", (f, d), "ffn.net.0.proj"),
        row("ffn.2", (d, f), "ffn.net.2"),
        row("norm3", (d,), "norm2"),
    )
    return (
        row("patch_embedding", (d, latent, 1, 2, 2)),
        row("text_embedding.0", (d, 4096), "condition_embedder.text_embedder.linear_1"),
        row("text_embedding.2", (d, d), "condition_embedder.text_embedder.linear_2"),
        row("time_embedding.0", (d, 256), "condition_embedder.time_embedder.linear_1"),
        row("time_embedding.2", (d, d), "condition_embedder.time_embedder.linear_2"),
        row("time_projection.1", (6 * d, d), "condition_embedder.time_proj"),
        *(embedder if clip_image else ()),
        block("blocks.{i}", layer, layers),
        row("head.head", (4 * out, d), "proj_out"),
    )


TABLES = tuple(
    Architecture(
        id="wan",
        variant=variant,
        name=name,
        source="ComfyUI comfy/ldm/wan/model.py (2026-05), Diffusers WanTransformer3DModel 0.42",
        no_bias=r"\.norm_",
        usage=usage,
        metadata_names=("wan", "wan2.1", "wan_2.1", *known_as),
        rows=rows,
    )
    for variant, name, usage, known_as, rows in (
        ("2.1-t2v-14b", "Wan 2.1 and 2.2 T2V 14B", 15_000, ("wan_2.2_14b",), _rows(5120, 13824, 40, 16, 16)),
        ("2.1-t2v-1.3b", "Wan 2.1 T2V 1.3B", 2_000, (), _rows(1536, 8960, 30, 16, 16)),
        ("2.1-i2v-14b", "Wan 2.1 I2V 14B", 5_000, (), _rows(5120, 13824, 40, 36, 16, clip_image=True)),
        ("2.2-i2v-14b", "Wan 2.2 I2V 14B", 14_000, ("wan_2.2_14b",), _rows(5120, 13824, 40, 36, 16)),
        ("2.2-ti2v-5b", "Wan 2.2 TI2V 5B", 2_000, ("wan_2.2_5b",), _rows(3072, 14336, 30, 48, 48)),
    )
)
