"""Cosmos-Predict2, and Anima, which adds an adapter for its text encoder (Diffusers: a component of its own)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasurgery.architectures.table import Architecture, Encoder, block, row

if TYPE_CHECKING:
    from lorasurgery.architectures.table import Block, Row

LORA, TEXT, ADAPTER = 256, 1024, 1024
ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "output_proj": "to_out.0"}
NORMS = {"q_norm": "norm_q", "k_norm": "norm_k"}


def _rows(d: int, layers: int, channels: int) -> tuple[Row | Block, ...]:
    """``channels``: latent, mask and condition channels of one pixel of a 2 x 2 patch."""
    attentions = tuple(
        r
        for a, diffusers, context in (("self_attn", "attn1", d), ("cross_attn", "attn2", TEXT))
        for r in (
            *(
                row(f"{a}.{p}", (d, context if p in ("k_proj", "v_proj") else d), f"{diffusers}.{name}")
                for p, name in ATTENTION.items()
            ),
            *(row(f"{a}.{n}", (128,), f"{diffusers}.{name}") for n, name in NORMS.items()),
        )
    )
    modulations = tuple(
        r
        for m, norm in (("self_attn", "norm1"), ("cross_attn", "norm2"), ("mlp", "norm3"))
        for r in (
            row(f"adaln_modulation_{m}.1", (LORA, d), f"{norm}.linear_1"),
            row(f"adaln_modulation_{m}.2", (3 * d, LORA), f"{norm}.linear_2"),
        )
    )
    mlp = row("mlp.layer1", (4 * d, d), "ff.net.0.proj"), row("mlp.layer2", (d, 4 * d), "ff.net.2")
    return (
        row("t_embedder.1.linear_1", (d, d), "time_embed.t_embedder.linear_1"),
        row("t_embedder.1.linear_2", (3 * d, d), "time_embed.t_embedder.linear_2"),
        row("t_embedding_norm", (d,), "time_embed.norm"),
        row("x_embedder.proj.1", (d, 4 * channels), "patch_embed.proj"),
        block("blocks.{i}", (*attentions, *mlp, *modulations), layers, diffusers="transformer_blocks.{i}"),
        row("final_layer.linear", (64, d), "proj_out"),
        row("final_layer.adaln_modulation.1", (LORA, d), "norm_out.linear_1"),
        row("final_layer.adaln_modulation.2", (2 * d, LORA), "norm_out.linear_2"),
    )


ADAPTER_BLOCK = (
    *(row(f"norm_{n}", (ADAPTER,)) for n in ("self_attn", "cross_attn", "mlp")),
    *(row(f"{a}_attn.{p}", (ADAPTER, ADAPTER)) for a in ("self", "cross") for p in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(row(f"{a}_attn.{n}", (64,)) for a in ("self", "cross") for n in NORMS),
    row("mlp.0", (4 * ADAPTER, ADAPTER)),
    row("mlp.2", (ADAPTER, 4 * ADAPTER)),
)
SOURCE = "ComfyUI comfy/ldm/cosmos/predict2.py (2026-05), Diffusers CosmosTransformer3DModel 0.42"

TABLES = (
    Architecture(
        id="anima",
        variant="",
        name="Anima",
        source=f"{SOURCE} and AnimaTextConditioner",
        no_bias=r"^(?!llm_adapter\.(blocks\.\d+\.mlp\.|out_proj$))",
        encoders=(Encoder("qwen3_06b", "lora_te", "text_encoder", "text_encoders.qwen3_06b.transformer.model"),),
        diffusers_roots=(("llm_adapter.", "text_conditioner"),),
        usage=5_000,
        metadata_names=("anima", "anima-preview", "anima-unknown"),
        rows=(
            *_rows(2048, 28, 17),
            row("llm_adapter.embed", (32128, ADAPTER)),
            block("llm_adapter.blocks.{i}", ADAPTER_BLOCK, 6),
            row("llm_adapter.out_proj", (ADAPTER, ADAPTER)),
            row("llm_adapter.norm", (ADAPTER,)),
        ),
    ),
    *(
        Architecture(
            id="cosmos-predict2",
            variant=f"{size}{task}",
            name=f"Cosmos-Predict2 {size.upper()}{' Video2World' if task else ' Text2Image'}",
            source=SOURCE,
            no_bias=r"^",
            usage=usage,
            rows=_rows(d, layers, channels),
        )
        for task, channels, usage in (("", 17, 60), ("-video", 18, 40))
        for size, d, layers in (("2b", 2048, 28), ("14b", 5120, 36))
    ),
)
