"""Z-Image and Z-Image-Turbo (identical keys and shapes)."""

from lorasurgery.architectures.table import Architecture, block, row

D, F = 3840, 10240

ATTENTION = (
    row("attention.qkv", (3 * D, D), ("attention.to_q", "attention.to_k", "attention.to_v")),
    row("attention.out", (D, D), "attention.to_out.0"),
    row("attention.q_norm", (128,), "attention.norm_q"),
    row("attention.k_norm", (128,), "attention.norm_k"),
    *(row(n, (D,)) for n in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")),
    row("feed_forward.w1", (F, D)),
    row("feed_forward.w2", (D, F)),
    row("feed_forward.w3", (F, D)),
)
MODULATED = (*ATTENTION, row("adaLN_modulation.0", (4 * D, 256)))

TABLES = (
    Architecture(
        id="z-image",
        variant="",
        name="Z-Image",
        source="ComfyUI comfy/ldm/lumina/model.py (2026-05), Diffusers ZImageTransformer2DModel 0.40",
        no_bias=r"norm\d?$|\.(attention|feed_forward)\.|^cap_embedder\.0$",
        sd_scripts="diffusers",
        diffusers_families=frozenset({"lokr"}),
        comfyui_split="diffusion_model.",
        onetrainer="dotted",
        usage=18_000,
        metadata_names=("z_image", "Z-Image", "zimage"),
        rows=(
            row("x_embedder", (D, 64), "all_x_embedder.2-1"),
            row("cap_embedder.0", (2560,)),
            row("cap_embedder.1", (D, 2560)),
            row("t_embedder.mlp.0", (1024, 256)),
            row("t_embedder.mlp.2", (256, 1024)),
            block("noise_refiner.{i}", MODULATED, 2),
            block("context_refiner.{i}", ATTENTION, 2),
            block("layers.{i}", MODULATED, 30),
            row("final_layer.linear", (64, D), "all_final_layer.2-1.linear"),
            row("final_layer.adaLN_modulation.1", (D, 256), "all_final_layer.2-1.adaLN_modulation.1"),
        ),
    ),
)
