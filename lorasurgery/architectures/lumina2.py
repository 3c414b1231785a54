"""Lumina Image 2. Keys and values have fewer heads than queries, so ComfyUI's equal thirds of ``qkv`` do not fit it."""

from lorasurgery.architectures.table import Architecture, Encoder, block, row

D, F, KV, HEAD, TIME = 2304, 9216, 768, 96, 1024

ATTENTION = (
    row("attention.qkv", (D + 2 * KV, D), (("attn.to_q", D), ("attn.to_k", KV), ("attn.to_v", KV))),
    row("attention.out", (D, D), "attn.to_out.0"),
    row("attention.q_norm", (HEAD,), "attn.norm_q"),
    row("attention.k_norm", (HEAD,), "attn.norm_k"),
    row("attention_norm2", (D,), "norm2"),
    row("ffn_norm1", (D,)),
    row("ffn_norm2", (D,)),
    row("feed_forward.w1", (F, D), "feed_forward.linear_1"),
    row("feed_forward.w2", (D, F), "feed_forward.linear_2"),
    row("feed_forward.w3", (F, D), "feed_forward.linear_3"),
)
CONTEXT = (*ATTENTION, row("attention_norm1", (D,), "norm1"))
MODULATED = (
    *ATTENTION,
    row("attention_norm1", (D,), "norm1.norm"),
    row("adaLN_modulation.1", (4 * D, TIME), "norm1.linear"),
)

TABLES = (
    Architecture(
        id="lumina2",
        variant="",
        name="Lumina Image 2",
        source="ComfyUI comfy/ldm/lumina/model.py (2026-05), Diffusers Lumina2Transformer2DModel 0.42",
        no_bias=r"norm\d?$|\.(attention|feed_forward)\.|^cap_embedder\.0$",
        encoders=(Encoder("gemma2_2b", "lora_te", "text_encoder", "text_encoders.gemma2_2b.transformer.model"),),
        usage=30,
        metadata_names=("lumina2", "lumina-2", "lumina"),
        rows=(
            row("x_embedder", (D, 64)),
            row("t_embedder.mlp.0", (TIME, 256), "time_caption_embed.timestep_embedder.linear_1"),
            row("t_embedder.mlp.2", (TIME, TIME), "time_caption_embed.timestep_embedder.linear_2"),
            row("cap_embedder.0", (D,), "time_caption_embed.caption_embedder.0"),
            row("cap_embedder.1", (D, D), "time_caption_embed.caption_embedder.1"),
            block("noise_refiner.{i}", MODULATED, 2),
            block("context_refiner.{i}", CONTEXT, 2),
            block("layers.{i}", MODULATED, 26),
            row("final_layer.linear", (64, D), "norm_out.linear_2"),
            row("final_layer.adaLN_modulation.1", (D, TIME), "norm_out.linear_1"),
        ),
    ),
)
