"""PixArt: Sigma, and Alpha at 1024 pixels, which also embeds resolution and aspect ratio."""

from lorasurgery.architectures.table import Architecture, Encoder, block, row

D, F = 1152, 4608

BLOCK = (
    row("attn.qkv", (3 * D, D), ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
    row("attn.proj", (D, D), "attn1.to_out.0"),
    row("cross_attn.q_linear", (D, D), "attn2.to_q"),
    row("cross_attn.kv_linear", (2 * D, D), ("attn2.to_k", "attn2.to_v")),
    row("cross_attn.proj", (D, D), "attn2.to_out.0"),
    row("mlp.fc1", (F, D), "ff.net.0.proj"),
    row("mlp.fc2", (D, F), "ff.net.2"),
)
SIZE = tuple(
    row(f"{name}.mlp.{n}", (D // 3, width), f"adaln_single.emb.{diffusers}.linear_{n // 2 + 1}")
    for name, diffusers in (("csize_embedder", "resolution_embedder"), ("ar_embedder", "aspect_ratio_embedder"))
    for n, width in ((0, 256), (2, D // 3))
)

TABLES = tuple(
    Architecture(
        id="pixart",
        variant=variant,
        name=f"PixArt-{variant.title()}",
        source="ComfyUI comfy/utils.py pixart_to_diffusers (2026-05), Diffusers PixArtTransformer2DModel 0.42",
        no_bias=r"(?!)",
        comfyui_split="transformer.",
        encoders=(Encoder("t5_xxl", "lora_te1", "text_encoder", "text_encoders.t5xxl.transformer"),),
        usage=20,
        metadata_names=("pixart", f"pixart-{variant}"),
        rows=(
            row("x_embedder.proj", (D, 4, 2, 2), "pos_embed.proj"),
            row("t_embedder.mlp.0", (D, 256), "adaln_single.emb.timestep_embedder.linear_1"),
            row("t_embedder.mlp.2", (D, D), "adaln_single.emb.timestep_embedder.linear_2"),
            *sizes,
            row("t_block.1", (6 * D, D), "adaln_single.linear"),
            row("y_embedder.y_proj.fc1", (D, 4096), "caption_projection.linear_1"),
            row("y_embedder.y_proj.fc2", (D, D), "caption_projection.linear_2"),
            block("blocks.{i}", BLOCK, 28, diffusers="transformer_blocks.{i}"),
            row("final_layer.linear", (32, D), "proj_out"),
        ),
    )
    for variant, sizes in (("sigma", ()), ("alpha", SIZE))
)
