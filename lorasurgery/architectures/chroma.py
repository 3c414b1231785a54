"""Chroma: FLUX.1's blocks without modulation weights, which a small guidance network computes instead."""

from lorasurgery.architectures.flux1 import DOUBLE, QKV, SINGLE, SLICES, WHOLE_NORMS, D
from lorasurgery.architectures.table import Architecture, Encoder, block, row

G = 5120

TABLES = (
    Architecture(
        id="chroma",
        usage=2_000,
        variant="",
        name="Chroma",
        source="ComfyUI comfy/ldm/chroma/model.py (2026-05), Diffusers ChromaTransformer2DModel 0.42",
        no_bias=r"_norm$|\.norms\.\d+$",
        comfyui_split="transformer.",
        encoders=(Encoder("t5_xxl", "lora_te1", "text_encoder", "text_encoders.t5xxl.transformer"),),
        aliases=(QKV,),
        comfyui_slices=SLICES,
        replaced_norms=WHOLE_NORMS,
        metadata_names=("chroma", "chroma", "Chroma1"),  # sd-scripts' two keys, and OneTrainer
        rows=(
            row("img_in", (D, 64), "x_embedder"),
            row("txt_in", (D, 4096), "context_embedder"),
            row("distilled_guidance_layer.in_proj", (G, 64)),
            block(
                "distilled_guidance_layer.layers.{i}",
                (row("in_layer", (G, G), "linear_1"), row("out_layer", (G, G), "linear_2")),
                5,
            ),
            block("distilled_guidance_layer.norms.{i}", (row("", (G,)),), 5),
            row("distilled_guidance_layer.out_proj", (D, G)),
            block("double_blocks.{i}", DOUBLE, 19, diffusers="transformer_blocks.{i}"),
            block("single_blocks.{i}", SINGLE, 38, diffusers="single_transformer_blocks.{i}"),
            row("final_layer.linear", (64, D), "proj_out"),
        ),
    ),
)
