"""Stable Diffusion 1, 2 and XL: one UNet in three sizes.

The original counts every module through one list of input and one of output blocks, Diffusers by level. sd-scripts
trains the Diffusers UNet for SD 1 and 2, the original one for SDXL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasurgery.architectures.table import Architecture, Encoder, block, row

if TYPE_CHECKING:
    from lorasurgery.architectures.table import Block, Row

SOURCE = "ComfyUI comfy/ldm/modules/diffusionmodules/openaimodel.py (2026-05), Diffusers UNet2DConditionModel 0.42"
TIME = 1280
CLIP_L = "text_encoders.clip_l.transformer"


def _resnet(name: str, diffusers: str, width: int, out: int) -> Block:
    shortcut = () if width == out else (row("skip_connection", (out, width, 1, 1), "conv_shortcut"),)
    rows = (
        row("in_layers.0", (width,), "norm1"),
        row("in_layers.2", (out, width, 3, 3), "conv1"),
        row("emb_layers.1", (out, TIME), "time_emb_proj"),
        row("out_layers.0", (out,), "norm2"),
        row("out_layers.3", (out, out, 3, 3), "conv2"),
        *shortcut,
    )
    return block(name, rows, diffusers=diffusers)


def _attention(name: str, diffusers: str, width: int, depth: int, context: int, kernel: tuple[int, ...]) -> Block:
    layer = (
        *(row(f"norm{n}", (width,)) for n in (1, 2, 3)),
        *(row(f"attn{a}.{p}", (width, width)) for a in (1, 2) for p in ("to_q", "to_out.0")),
        *(row(f"attn{a}.{p}", (width, c)) for a, c in ((1, width), (2, context)) for p in ("to_k", "to_v")),
        row("ff.net.0.proj", (8 * width, width)),
        row("ff.net.2", (width, 4 * width)),
    )
    rows = (
        row("norm", (width,)),
        row("proj_in", (width, width, *kernel)),
        block("transformer_blocks.{i}", layer, depth),
        row("proj_out", (width, width, *kernel)),
    )
    return block(name, rows, diffusers=diffusers)


def _unet(widths: tuple[int, ...], depths: tuple[int, ...], context: int, kernel: tuple[int, ...]) -> list[Row | Block]:
    """``depths``: transformer layers per level, the middle last; two resnets a level down, three up."""
    rows: list[Row | Block] = [
        row("time_embed.0", (TIME, widths[0]), "time_embedding.linear_1"),
        row("time_embed.2", (TIME, TIME), "time_embedding.linear_2"),
        row("input_blocks.0.0", (widths[0], 4, 3, 3), "conv_in"),
    ]
    last, width, skips = len(widths) - 1, widths[0], [widths[0]]
    for level, out in enumerate(widths):
        for j in range(2):
            n, d = 3 * level + j + 1, f"down_blocks.{level}"
            rows.append(_resnet(f"input_blocks.{n}.0", f"{d}.resnets.{j}", width, out))
            if depths[level]:
                rows.append(_attention(f"input_blocks.{n}.1", f"{d}.attentions.{j}", out, depths[level], context, kernel))
            width = out
            skips.append(out)
        if level < last:
            rows.append(row(f"input_blocks.{3 * level + 3}.0.op", (out, out, 3, 3), f"{d}.downsamplers.0.conv"))
            skips.append(out)
    rows += [_resnet(f"middle_block.{2 * j}", f"mid_block.resnets.{j}", width, width) for j in (0, 1)]
    rows.append(_attention("middle_block.1", "mid_block.attentions.0", width, depths[-1], context, kernel))
    for i, level in enumerate(range(last, -1, -1)):
        out, depth = widths[level], depths[level]
        for j in range(3):
            n, d = 3 * i + j, f"up_blocks.{i}"
            rows.append(_resnet(f"output_blocks.{n}.0", f"{d}.resnets.{j}", width + skips.pop(), out))
            if depth:
                rows.append(_attention(f"output_blocks.{n}.1", f"{d}.attentions.{j}", out, depth, context, kernel))
            width = out
        if level:
            at = f"output_blocks.{n}.{2 if depth else 1}.conv"
            rows.append(row(at, (out, out, 3, 3), f"{d}.upsamplers.0.conv"))
    return [*rows, row("out.0", (width,), "conv_norm_out"), row("out.2", (4, width, 3, 3), "conv_out")]


ATTENTIONS = {  # by Diffusers' names: its old LoRA files put a processor into the path
    "sd": [
        *(f"down_blocks.{i}.attentions.{j}" for i in (0, 1, 2) for j in (0, 1)),
        "mid_block.attentions.0",
        *(f"up_blocks.{i}.attentions.{j}" for i in (1, 2, 3) for j in (0, 1, 2)),
    ],
    "sdxl": [
        *(f"down_blocks.{i}.attentions.{j}" for i in (1, 2) for j in (0, 1)),
        "mid_block.attentions.0",
        *(f"up_blocks.{i}.attentions.{j}" for i in (0, 1) for j in (0, 1, 2)),
    ],
}
PROCESSORS = {
    size: tuple(
        (f"{a}.transformer_blocks.{{i}}.attn{n}.processor.{p}", f"{a}.transformer_blocks.{{i}}.attn{n}.{q}")
        for a in attentions
        for n in (1, 2)
        for p, q in (("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("to_out", "to_out.0"))
    )
    for size, attentions in ATTENTIONS.items()
}

TABLES = (
    Architecture(
        id="sd1",
        variant="",
        name="Stable Diffusion 1",
        source=SOURCE,
        no_bias=r"\.attn\d\.to_[qkv]$",
        sd_scripts="diffusers",
        denoiser="unet",
        diffusers_encoders=("text_encoder",),
        encoders=(Encoder("clip_l", "lora_te", "text_encoder", CLIP_L),),
        aliases=PROCESSORS["sd"],
        usage=12_000,
        metadata_names=("sd_v1", "sd_v1_v", "stable-diffusion-v1", "sd_1.5"),
        rows=tuple(_unet((320, 640, 1280, 1280), (1, 1, 1, 0, 1), 768, (1, 1))),
    ),
    Architecture(
        id="sd2",
        variant="",
        name="Stable Diffusion 2",
        source=SOURCE,
        no_bias=r"\.attn\d\.to_[qkv]$",
        sd_scripts="diffusers",
        denoiser="unet",
        diffusers_encoders=("text_encoder",),
        encoders=(Encoder("clip_h", "lora_te", "text_encoder", "text_encoders.clip_h.transformer"),),
        aliases=PROCESSORS["sd"],
        usage=300,
        metadata_names=(
            "sd_v2",
            "sd_v2_v",
            "stable-diffusion-v2-512",
            "stable-diffusion-v2-768-v",
            "stable-diffusion-v2",
            "sd_2.1",
        ),
        rows=tuple(_unet((320, 640, 1280, 1280), (1, 1, 1, 0, 1), 1024, ())),
    ),
    Architecture(
        id="sdxl",
        variant="",
        name="Stable Diffusion XL",
        source=SOURCE,
        no_bias=r"\.attn\d\.to_[qkv]$",
        denoiser="unet",
        diffusers_encoders=("text_encoder", "text_encoder_2"),
        encoders=(
            Encoder("clip_l", "lora_te1", "text_encoder", CLIP_L),
            Encoder("clip_g", "lora_te2", "text_encoder_2", "text_encoders.clip_g.transformer"),
        ),
        aliases=PROCESSORS["sdxl"],
        usage=25_000,
        metadata_names=("sdxl_base_v1-0", "stable-diffusion-xl-v1-base", "sdxl_1.0"),
        rows=(
            *_unet((320, 640, 1280), (0, 2, 10, 10), 2048, ()),
            row("label_emb.0.0", (TIME, 2816), "add_embedding.linear_1"),
            row("label_emb.0.2", (TIME, TIME), "add_embedding.linear_2"),
        ),
    ),
)
