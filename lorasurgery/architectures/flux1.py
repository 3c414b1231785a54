"""FLUX.1: dev (Kontext and Krea have the same weights), schnell, Fill and the structural control models."""

from lorasurgery.architectures.table import Architecture, Encoder, block, row

D, F = 3072, 12288
STREAMS = (  # original prefix, and Diffusers' q, k, v, out, qk norm, feed-forward and modulation
    ("img", ("attn.to_q", "attn.to_k", "attn.to_v"), "attn.to_out.0", "attn.norm_{}", "ff", "norm1"),
    (
        "txt",
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "attn.to_add_out",
        "attn.norm_added_{}",
        "ff_context",
        "norm1_context",
    ),
)

DOUBLE = tuple(
    r
    for s, qkv, out, norm, ff, _ in STREAMS
    for r in (
        row(f"{s}_attn.qkv", (3 * D, D), qkv),
        row(f"{s}_attn.norm.query_norm", (128,), norm.format("q")),
        row(f"{s}_attn.norm.key_norm", (128,), norm.format("k")),
        row(f"{s}_attn.proj", (D, D), out),
        row(f"{s}_mlp.0", (F, D), f"{ff}.net.0.proj"),
        row(f"{s}_mlp.2", (D, F), f"{ff}.net.2"),
    )
)
DOUBLE_MODULATION = tuple(row(f"{s}_mod.lin", (6 * D, D), f"{n}.linear") for s, _, _, _, _, n in STREAMS)
SINGLE = (
    row("linear1", (3 * D + F, D), (("attn.to_q", D), ("attn.to_k", D), ("attn.to_v", D), ("proj_mlp", F))),
    row("linear2", (D, D + F), "proj_out"),
    row("norm.query_norm", (128,), "attn.norm_q"),
    row("norm.key_norm", (128,), "attn.norm_k"),
)
EMBEDDERS = (("time_in", "timestep_embedder", 256), ("vector_in", "text_embedder", 768))
QKV = ("single_blocks.{i}.linear1_qkv", ("single_blocks.{i}.linear1", (0, 3 * D)))
"""ComfyUI's name for a part of the fused weight. Source: ``comfy/lora.py`` (``model_lora_keys_unet``, 2026-05)."""
SLICES = r"\.linear1_qkv$"
WHOLE_NORMS = ("query_norm", "key_norm")
"""Source: Diffusers 0.42 ``FluxLoraLoaderMixin._control_lora_supported_norm_keys``."""
GUIDED = (*EMBEDDERS, ("guidance_in", "guidance_embedder", 256))
T5 = Encoder("t5_xxl", "lora_te3", "text_encoder_2", "text_encoders.t5xxl.transformer", onetrainer="lora_te2")

TABLES = tuple(
    Architecture(
        id="flux1",
        variant=variant,
        name=f"FLUX.1 {variant}",
        source="ComfyUI comfy/ldm/flux/model.py (2026-05), Diffusers FluxTransformer2DModel 0.42",
        no_bias=r"_norm$",
        comfyui_split="transformer.",
        diffusers_encoders=("text_encoder",),
        encoders=(Encoder("clip_l", "lora_te1", "text_encoder", "text_encoders.clip_l.transformer"), T5),
        aliases=(  # XLabs and ComfyUI
            *(
                (f"double_blocks.{{i}}.processor.{p}_lora{n}", f"double_blocks.{{i}}.{s}_attn.{p}")
                for n, s in ((1, "img"), (2, "txt"))
                for p in ("qkv", "proj")
            ),
            ("single_blocks.{i}.processor.qkv", ("single_blocks.{i}.linear1", (0, 3 * D))),
            ("single_blocks.{i}.processor.proj", "single_blocks.{i}.linear2"),
            QKV,
        ),
        comfyui_slices=SLICES,
        replaced_norms=WHOLE_NORMS,
        widened=("img_in",) if variant == "control" else (),
        usage=usage,
        metadata_names=("flux1", "flux-1", "flux.1", *known_as),
        rows=(
            row("img_in", (D, image), "x_embedder"),
            row("txt_in", (D, 4096), "context_embedder"),
            *(
                row(f"{at}.{layer}", (D, width), f"time_text_embed.{diffusers}.{linear}")
                for at, diffusers, first in embedders
                for layer, linear, width in (("in_layer", "linear_1", first), ("out_layer", "linear_2", D))
            ),
            block("double_blocks.{i}", (*DOUBLE, *DOUBLE_MODULATION), 19, diffusers="transformer_blocks.{i}"),
            block(
                "single_blocks.{i}",
                (*SINGLE, row("modulation.lin", (3 * D, D), "norm.linear")),
                38,
                diffusers="single_transformer_blocks.{i}",
            ),
            row("final_layer.linear", (64, D), "proj_out"),
            row("final_layer.adaLN_modulation.1", (2 * D, D), "norm_out.linear", swap_halves=True),
        ),
    )
    for variant, image, embedders, usage, known_as in (
        ("dev", 64, GUIDED, 20_000, ("flux-1-dev", "Flux.1-dev", "flux_kontext", "flux.1_kontext")),
        ("schnell", 64, EMBEDDERS, 1_500, ("flux-1-schnell",)),
        ("fill", 384, GUIDED, 400, ()),
        ("control", 128, GUIDED, 50, ()),
    )
)
