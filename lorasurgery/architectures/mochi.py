"""Mochi 1: 48 joint blocks, whose last one has no text output."""

from lorasurgery.architectures.table import Architecture, Encoder, block, row

H, T = 3072, 1536  # video and text width

ATTENTION = tuple(
    entry
    for s, width, names, norm in (
        ("x", H, "attn1.to_{}", "attn1.norm_{}"),
        ("y", T, "attn1.add_{}_proj", "attn1.norm_added_{}"),
    )
    for entry in (
        row(f"attn.qkv_{s}", (3 * H, width), tuple(names.format(part) for part in "qkv")),
        row(f"attn.q_norm_{s}", (128,), norm.format("q")),
        row(f"attn.k_norm_{s}", (128,), norm.format("k")),
    )
)
VIDEO = (
    row("mod_x", (4 * H, H), "norm1.linear"),
    row("attn.proj_x", (H, H), "attn1.to_out.0"),
    row("mlp_x.w1", (16384, H), "ff.net.0.proj", swap_halves=True),
    row("mlp_x.w2", (H, 8192), "ff.net.2"),
)
TEXT = (
    row("mod_y", (4 * T, H), "norm1_context.linear"),
    row("attn.proj_y", (T, H), "attn1.to_add_out"),
    row("mlp_y.w1", (8192, T), "ff_context.net.0.proj", swap_halves=True),
    row("mlp_y.w2", (T, 4096), "ff_context.net.2"),
)

TABLES = (
    Architecture(
        id="mochi",
        variant="",
        name="Mochi 1",
        source="Diffusers MochiTransformer3DModel and convert_mochi_transformer_checkpoint_to_diffusers 0.42",
        no_bias=r"_norm_[xy]$|\.qkv_[xy]$|\.mlp_[xy]\.",
        encoders=(Encoder("t5_xxl", "lora_te1", "text_encoder", "text_encoders.t5xxl.transformer"),),
        usage=10,
        rows=(
            row("x_embedder.proj", (H, 12, 2, 2), "patch_embed.proj"),
            row("t_embedder.mlp.0", (H, 256), "time_embed.timestep_embedder.linear_1"),
            row("t_embedder.mlp.2", (H, H), "time_embed.timestep_embedder.linear_2"),
            row("t5_y_embedder.to_kv", (8192, 4096), "time_embed.pooler.to_kv"),
            row("t5_y_embedder.to_q", (4096, 4096), "time_embed.pooler.to_q"),
            row("t5_y_embedder.to_out", (H, 4096), "time_embed.pooler.to_out"),
            row("t5_yproj", (T, 4096), "time_embed.caption_proj"),
            block("blocks.{i}", (*ATTENTION, *VIDEO, *TEXT), 47, diffusers="transformer_blocks.{i}"),
            block(
                "blocks.{i}",
                (*ATTENTION, *VIDEO, row("mod_y", (T, H), "norm1_context.linear_1")),
                start=47,
                diffusers="transformer_blocks.{i}",
            ),
            row("final_layer.mod", (2 * H, H), "norm_out.linear", swap_halves=True),
            row("final_layer.linear", (48, H), "proj_out"),
        ),
    ),
)
