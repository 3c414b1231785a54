"""Qwen-Image: the base model, Edit (all editions) and Layered have the same weights."""

from lorasurgery.architectures.table import Architecture, block, row

D, F = 3072, 12288

BLOCK = (
    *(row(f"attn.{p}", (D, D)) for p in ("to_q", "to_k", "to_v", "to_out.0")),
    *(row(f"attn.{p}", (D, D)) for p in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(row(f"attn.{n}", (128,)) for n in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")),
    row("img_mod.1", (6 * D, D)),
    row("img_mlp.net.0.proj", (F, D)),
    row("img_mlp.net.2", (D, F)),
    row("txt_mod.1", (6 * D, D)),
    row("txt_mlp.net.0.proj", (F, D)),
    row("txt_mlp.net.2", (D, F)),
)

TABLES = (
    Architecture(
        id="qwen-image",
        variant="",
        name="Qwen-Image",
        source="ComfyUI comfy/ldm/qwen_image/model.py (2026-05), Diffusers QwenImageTransformer2DModel 0.42",
        no_bias=r"norm(_(added_)?[qk])?$",
        onetrainer="dotted",
        usage=18_000,
        metadata_names=(
            "qwen_image",
            "qwen_image_edit",
            "qwen_image_layered",
            "Qwen-Image",
            "Qwen-Image-Edit",
            "Qwen-Image-Edit-Plus",
            "Qwen-Image-Edit-2511",
            "Qwen-Image-Layered",
        ),
        rows=(
            row("time_text_embed.timestep_embedder.linear_1", (D, 256)),
            row("time_text_embed.timestep_embedder.linear_2", (D, D)),
            row("img_in", (D, 64)),
            row("txt_norm", (3584,)),
            row("txt_in", (D, 3584)),
            block("transformer_blocks.{i}", BLOCK, 60),
            row("norm_out.linear", (2 * D, D)),
            row("proj_out", (64, D)),
        ),
    ),
)
