"""LTX-Video and LTX-2 (video and audio). Their blocks have the same names everywhere, but for the q and k norms."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasurgery.architectures.table import Architecture, block, row

if TYPE_CHECKING:
    from lorasurgery.architectures.table import Row

VIDEO, AUDIO, TEXT = 4096, 2048, 3840


def _attention(name: str, queries: int, keys: int, inner: int) -> tuple[Row, ...]:
    return (
        row(f"{name}.to_q", (inner, queries)),
        row(f"{name}.to_k", (inner, keys)),
        row(f"{name}.to_v", (inner, keys)),
        row(f"{name}.to_out.0", (queries, inner)),
        row(f"{name}.q_norm", (inner,), f"{name}.norm_q"),
        row(f"{name}.k_norm", (inner,), f"{name}.norm_k"),
    )


def _feed_forward(name: str, d: int) -> tuple[Row, Row]:
    return row(f"{name}.net.0.proj", (4 * d, d)), row(f"{name}.net.2", (d, 4 * d))


def _modulation(name: str, diffusers: str, d: int, count: int) -> tuple[Row, ...]:
    return (
        row(f"{name}.emb.timestep_embedder.linear_1", (d, 256), f"{diffusers}.emb.timestep_embedder.linear_1"),
        row(f"{name}.emb.timestep_embedder.linear_2", (d, d), f"{diffusers}.emb.timestep_embedder.linear_2"),
        row(f"{name}.linear", (count * d, d), f"{diffusers}.linear"),
    )


def _captions(name: str, d: int, text: int) -> tuple[Row, Row]:
    return row(f"{name}.linear_1", (d, text)), row(f"{name}.linear_2", (d, d))


LTX2_BLOCK = (
    *_attention("attn1", VIDEO, VIDEO, VIDEO),
    *_attention("attn2", VIDEO, VIDEO, VIDEO),
    *_attention("audio_attn1", AUDIO, AUDIO, AUDIO),
    *_attention("audio_attn2", AUDIO, AUDIO, AUDIO),
    *_attention("audio_to_video_attn", VIDEO, AUDIO, AUDIO),
    *_attention("video_to_audio_attn", AUDIO, VIDEO, AUDIO),
    *_feed_forward("ff", VIDEO),
    *_feed_forward("audio_ff", AUDIO),
)
CONNECTOR = (*_attention("attn1", TEXT, TEXT, TEXT), *_feed_forward("ff", TEXT))

TABLES = (
    *(
        Architecture(
            id="ltx-video",
            variant=variant,
            name=f"LTX-Video {variant.upper()}",
            source="ComfyUI comfy/ldm/lightricks/model.py (2026-05), Diffusers LTXVideoTransformer3DModel 0.42",
            no_bias=r"_norm$",
            usage=500,
            rows=(
                row("patchify_proj", (d, 128), "proj_in"),
                *_modulation("adaln_single", "time_embed", d, 6),
                *_captions("caption_projection", d, 4096),
                block(
                    "transformer_blocks.{i}",
                    (*_attention("attn1", d, d, d), *_attention("attn2", d, d, d), *_feed_forward("ff", d)),
                    layers,
                ),
                row("proj_out", (128, d)),
            ),
        )
        for variant, d, layers in (("2b", 2048, 28), ("13b", 4096, 48))
    ),
    Architecture(
        id="ltx2",
        variant="",
        name="LTX-2",
        source="ComfyUI comfy/ldm/lightricks/av_model.py, comfy/text_encoders/lt.py (2026), Diffusers "
        "LTX2VideoTransformer3DModel 0.42",
        no_bias=r"_norm$|^text_embedding_projection\.",
        diffusers_roots=(("connectors.", "connectors"),),
        beside=(("text_embedding_projection.aggregate_embed", "text_encoders.text_embedding_projection"),),
        aliases=(("text_encoders.text_embedding_projection", "text_embedding_projection.aggregate_embed"),),
        usage=20_000,
        metadata_names=("ltx2", "ltx-2", "ltx2.3"),
        rows=(
            row("text_embedding_projection.aggregate_embed", (TEXT, 49 * TEXT), "connectors.text_proj_in"),
            row("patchify_proj", (VIDEO, 128), "proj_in"),
            row("audio_patchify_proj", (AUDIO, 128), "audio_proj_in"),
            *_modulation("adaln_single", "time_embed", VIDEO, 6),
            *_modulation("audio_adaln_single", "audio_time_embed", AUDIO, 6),
            *_modulation("av_ca_video_scale_shift_adaln_single", "av_cross_attn_video_scale_shift", VIDEO, 4),
            *_modulation("av_ca_a2v_gate_adaln_single", "av_cross_attn_video_a2v_gate", VIDEO, 1),
            *_modulation("av_ca_audio_scale_shift_adaln_single", "av_cross_attn_audio_scale_shift", AUDIO, 4),
            *_modulation("av_ca_v2a_gate_adaln_single", "av_cross_attn_audio_v2a_gate", AUDIO, 1),
            *_captions("caption_projection", VIDEO, TEXT),
            *_captions("audio_caption_projection", AUDIO, TEXT),
            *(
                block(
                    f"{media}_embeddings_connector.transformer_1d_blocks.{{i}}",
                    CONNECTOR,
                    2,
                    diffusers=f"connectors.{media}_connector.transformer_blocks.{{i}}",
                )
                for media in ("video", "audio")
            ),
            block("transformer_blocks.{i}", LTX2_BLOCK, 48),
            row("proj_out", (128, VIDEO)),
            row("audio_proj_out", (128, AUDIO)),
        ),
    ),
)
