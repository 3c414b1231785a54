"""AuraFlow. In a double layer ``w2`` is the image and ``w1`` the text stream; a single layer has ``w1`` alone."""

from lorasurgery.architectures.table import Architecture, block, row

D, F = 3072, 8192
OUT = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
ADDED = {"q": "add_q_proj", "k": "add_k_proj", "v": "add_v_proj", "o": "to_add_out"}

DOUBLE = (
    *(row(f"attn.w1{p}", (D, D), f"attn.{name}") for p, name in ADDED.items()),
    *(row(f"attn.w2{p}", (D, D), f"attn.{name}") for p, name in OUT.items()),
    *(
        r
        for mlp, ff in (("mlpX", "ff"), ("mlpC", "ff_context"))
        for r in (
            row(f"{mlp}.c_fc1", (F, D), f"{ff}.linear_1"),
            row(f"{mlp}.c_fc2", (F, D), f"{ff}.linear_2"),
            row(f"{mlp}.c_proj", (D, F), f"{ff}.out_projection"),
        )
    ),
    row("modX.1", (6 * D, D), "norm1.linear"),
    row("modC.1", (6 * D, D), "norm1_context.linear"),
)
SINGLE = (
    *(row(f"attn.w1{p}", (D, D), f"attn.{name}") for p, name in OUT.items()),
    row("mlp.c_fc1", (F, D), "ff.linear_1"),
    row("mlp.c_fc2", (F, D), "ff.linear_2"),
    row("mlp.c_proj", (D, F), "ff.out_projection"),
    row("modCX.1", (6 * D, D), "norm1.linear"),
)

TABLES = (
    Architecture(
        id="auraflow",
        variant="",
        name="AuraFlow",
        source="ComfyUI comfy/ldm/aura/mmdit.py (2026-05), Diffusers AuraFlowTransformer2DModel 0.42",
        no_bias=r"^(?!init_x_linear$|t_embedder\.)",
        comfyui_split="transformer.",
        usage=50,
        metadata_names=("auraflow",),
        rows=(
            row("t_embedder.mlp.0", (D, 256), "time_step_proj.linear_1"),
            row("t_embedder.mlp.2", (D, D), "time_step_proj.linear_2"),
            row("cond_seq_linear", (D, 2048), "context_embedder"),
            row("init_x_linear", (D, 16), "pos_embed.proj"),
            block("double_layers.{i}", DOUBLE, 4, diffusers="joint_transformer_blocks.{i}"),
            block("single_layers.{i}", SINGLE, 32, diffusers="single_transformer_blocks.{i}"),
            row("final_linear", (16, D), "proj_out"),
            row("modF.1", (2 * D, D), "norm_out.linear", swap_halves=True),
        ),
    ),
)
