"""FramePack: HunyuanVideo's network in Diffusers' form, which musubi-tuner trains and ComfyUI does not have."""

from lorasurgery.architectures.table import Architecture, block, row

D, F = 3072, 12288
IMAGE = 1152

NORMS = tuple(row(f"attn.{n}", (128,)) for n in ("norm_q", "norm_k"))
QKV = tuple(row(f"attn.{p}", (D, D)) for p in ("to_q", "to_k", "to_v"))
REFINER = (
    *QKV,
    row("attn.to_out.0", (D, D)),
    row("norm1", (D,)),
    row("norm2", (D,)),
    row("ff.net.0.proj", (F, D)),
    row("ff.net.2", (D, F)),
    row("norm_out.linear", (2 * D, D)),
)
DOUBLE = (
    *QKV,
    *NORMS,
    *(row(f"attn.{p}", (D, D)) for p in ("add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out")),
    *(row(f"attn.{n}", (128,)) for n in ("norm_added_q", "norm_added_k")),
    *(row(f"{n}.linear", (6 * D, D)) for n in ("norm1", "norm1_context")),
    *(row(f"{ff}.net.0.proj", (F, D)) for ff in ("ff", "ff_context")),
    *(row(f"{ff}.net.2", (D, F)) for ff in ("ff", "ff_context")),
)
SINGLE = (
    *QKV,
    *NORMS,
    row("proj_mlp", (F, D)),
    row("proj_out", (D, D + F)),
    row("norm.linear", (3 * D, D)),
)

TABLES = (
    Architecture(
        id="framepack",
        usage=300,
        variant="",
        name="FramePack",
        source="Diffusers HunyuanVideoFramepackTransformer3DModel 0.42",
        no_bias=r"\.attn\.norm_",
        sd_scripts="diffusers",
        has_comfyui=False,
        metadata_names=("framepack",),
        rows=(
            row("x_embedder.proj", (D, 16, 1, 2, 2)),
            row("clean_x_embedder.proj", (D, 16, 1, 2, 2)),
            row("clean_x_embedder.proj_2x", (D, 16, 2, 4, 4)),
            row("clean_x_embedder.proj_4x", (D, 16, 4, 8, 8)),
            row("image_projection.up", (3 * D, IMAGE)),
            row("image_projection.down", (D, 3 * D)),
            *(
                row(f"{embedder}.linear_{n}", (D, width))
                for embedder, first in (
                    ("time_text_embed.timestep_embedder", 256),
                    ("time_text_embed.text_embedder", 768),
                    ("time_text_embed.guidance_embedder", 256),
                    ("context_embedder.time_text_embed.timestep_embedder", 256),
                    ("context_embedder.time_text_embed.text_embedder", 4096),
                )
                for n, width in ((1, first), (2, D))
            ),
            row("context_embedder.proj_in", (D, 4096)),
            block("context_embedder.token_refiner.refiner_blocks.{i}", REFINER, 2),
            block("transformer_blocks.{i}", DOUBLE, 20),
            block("single_transformer_blocks.{i}", SINGLE, 40),
            row("norm_out.linear", (2 * D, D)),
            row("proj_out", (64, D)),
        ),
    ),
)
