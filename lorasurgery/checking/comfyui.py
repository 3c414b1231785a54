"""ComfyUI: ``comfy/lora.py``, ``comfy/lora_convert.py`` and ``comfy/weight_adapter`` of September 2026.

Every weight is known by its own name under two prefixes, for every model; the rest is aliases of single models. Nothing of
the header is read. What has no name is passed over with a line in the log.
"""

from __future__ import annotations

from lorasurgery.checking.rules import (
    AB,
    ALPHA,
    BARE_AB,
    DEFAULT_AB,
    DIFF,
    DIFFUSERS,
    DORA_SCALE,
    GLORA,
    KOHYA,
    LINEAR,
    LOHA,
    LOKR,
    MID,
    OFT,
    OLD,
    ORIGINAL,
    PROCESSOR,
    TUCKER,
    XLABS,
    Consumer,
    EncoderSpelling,
    Has,
    Note,
    Route,
    Spelling,
    table,
)

READS = frozenset(
    {
        *KOHYA, *MID, *PROCESSOR, *AB, *OLD, *BARE_AB, *LINEAR, *DEFAULT_AB, *ALPHA, *DORA_SCALE, *LOHA, *LOKR, *TUCKER,
        *GLORA, *OFT, *DIFF, ".reshape_weight",
    }
)  # fmt: skip

NATIVE = (Spelling("lora_unet_", flat=True), Spelling("diffusion_model."))
CLIP = r"\.(self_attn\.[qkv]_proj|self_attn\.out_proj|mlp\.fc[12])$|^text_projection$"
"""``LORA_CLIP_MAP``: of CLIP only these have names other than ComfyUI's own."""
LAYERS = r"\.(self_attn\.[qkv]_proj|self_attn\.out_proj|mlp\.fc[12])$"
FIRST_CLIP = ("clip_l", "clip_h")
SINGLE = ("qwen3_06b", "gemma2_2b")
"""Language models that are a model's only text encoder."""
ENCODERS = (
    EncoderSpelling("{comfyui}."),
    EncoderSpelling("lora_te_", FIRST_CLIP, flat=True, only=LAYERS),
    EncoderSpelling("lora_te1_", FIRST_CLIP, flat=True, only=LAYERS),
    EncoderSpelling("text_encoder.", FIRST_CLIP, only=LAYERS),
    EncoderSpelling("lora_te2_", ("clip_g",), flat=True, only=CLIP),
    EncoderSpelling("lora_te1_", ("clip_l",), flat=True, only="^text_projection$"),
    EncoderSpelling("text_encoder_2.", ("clip_g",), only=LAYERS),
    EncoderSpelling("lora_te_", SINGLE, flat=True),
    EncoderSpelling("text_encoders.transformer.model.", SINGLE),
    EncoderSpelling("text_encoders.transformer.", ("t5_xxl",)),
)
T5 = ("t5_xxl",)

UNET_DOTTED = ((".to_", ".processor.to_"), (".to_out.0.", ".to_out."))
HUNYUAN = (
    ("_mod.lin.", "_mod.linear."), ("_attn.qkv.", "_attn_qkv."), ("_attn.proj.", "_attn_proj."), ("mlp.0.", "mlp.fc1."),
    ("mlp.2.", "mlp.fc2."), (".modulation.lin.", ".modulation.linear."),
)  # fmt: skip
FLUX2_NAMES = ((".net.0.proj.", ".linear_in."), (".net.2.", ".linear_out."))
LUMINA = r"^t_embedder\.mlp|^cap_embedder|feed_forward\.w|attention_norm|ffn_norm"


def _aliases(prefixes: str, naming: str = DIFFUSERS, *, only: str = "", without: str = r"(?!)") -> tuple[Spelling, ...]:
    """Spellings under several prefixes (separated by spaces, ``-`` is none); those that end in an underscore are flat."""
    texts = ["" if p == "-" else p for p in prefixes.split()]
    return tuple(Spelling(p, naming, p.endswith("_"), only=only, without=without) for p in texts)


def _route(*names: Spelling, t5: tuple[str, ...] = (), when: tuple[Has, ...] = (), also: str = r"(?!)") -> Route:
    more = tuple(EncoderSpelling(prefix, T5, flat=True) for prefix in t5)
    return Route((*NATIVE, *names), READS, when, (*ENCODERS, *more), also=also, because=BECAUSE, wrong=WRONG, error="KeyError")


BECAUSE = (
    Note(
        r"^unet\..*\.attn[12]\.to_", "ComfyUI knows SD's and SDXL's attention in Diffusers' names only as attn1.processor.to_q"
    ),
    Note(r"^base_model\.model\.", "ComfyUI knows the prefix base_model.model. for SD3 and PixArt only"),
    Note(r"^transformer_2\.", "the second expert of Wan 2.2 is a file of its own"),
    Note(r"\.processor\.", "XLabs files are converted only when they hold the last double and the last single block"),
)
WRONG = ()

FLUX = _aliases("transformer. lycoris_ lora_transformer_ -")
QKV = Spelling("diffusion_model.", "alias", only=r"\.linear1_qkv$")
"""The attention rows of a single block, for every model of the FLUX class."""
CONTROL = (Has(r"^img_in\.lora_A\.weight$"), Has(r"^single_blocks\.0\.norm\.key_norm\.scale$"))
USO = (
    Has(r"^single_blocks\.37\.processor\.qkv_lora\.up\.weight$"),
    Has(r"^double_blocks\.18\.processor\.qkv_lora2\.up\.weight$"),
)
BFL = Route((Spelling(""), *NATIVE), READS | {".lora_B.bias", ".scale"}, CONTROL, ENCODERS, because=BECAUSE, error="KeyError")
XLABS_FILE = Route((Spelling("", "alias"), *NATIVE), READS | XLABS, USO, ENCODERS, because=BECAUSE, error="KeyError")
WAN_FUN = _route(Spelling("lora_unet__", flat=True), when=(Has(r"^lora_unet__blocks_0_cross_attn_k\.lora_down\.weight$"),))
Z = _aliases("diffusion_model. transformer. lycoris_ -")
UNET = (
    Spelling("lora_unet_", DIFFUSERS, flat=True),
    Spelling("lycoris_", DIFFUSERS, flat=True),
    *(Spelling(p, DIFFUSERS, replace=UNET_DOTTED) for p in ("", "unet.")),
)
FLUX1 = _route(
    QKV, *FLUX, *(Spelling(p, DIFFUSERS, p.endswith("_"), FLUX2_NAMES) for p, *_ in FLUX), t5=("lora_te2_", "lora_te3_")
)
TENCENT = tuple(Spelling(p, replace=HUNYUAN) for p in ("transformer.", "diffusion_model."))
TABLES = r"scale_shift_table(_a2v_ca_(video|audio))?$|_embeddings_connector\.learnable_registers$"

LTX = Route(
    (
        *(own._replace(without=r"^text_embedding_projection") for own in (*NATIVE, Spelling(""))),
        Spelling("", "alias", only=r"^text_encoders\."),
    ),
    READS,
    encoders=ENCODERS,
    also=rf"^diffusion_model\..*({TABLES})",
    because=BECAUSE,
    error="KeyError",
)

COMFYUI = Consumer(
    "comfyui",
    "ComfyUI",
    "2026-09",
    "comfy/lora.py, comfy/lora_convert.py, comfy/weight_adapter (September 2026)",
    table(
        ("sd1 sd2 sdxl", (_route(*UNET),)),
        ("sd3", (_route(*_aliases("transformer. base_model.model. lora_transformer_ lycoris_"), t5=("lora_te3_",)),)),
        ("auraflow", (_route(*_aliases("transformer.")),)),
        ("pixart", (_route(*_aliases("transformer. base_model.model. unet.base_model.model."), t5=("lora_te1_",)),)),
        ("flux1", (BFL, XLABS_FILE, FLUX1)),
        ("chroma", (_route(QKV, *(own._replace(without="^distilled") for own in FLUX), t5=("lora_te1_",)),)),
        ("flux2", (_route(QKV, *_aliases("transformer. lycoris_ lora_transformer_ -", without="^time_guidance|_modulation")),)),
        ("hunyuan-video hunyuan-video-1.5", (_route(*TENCENT),)),
        ("qwen-image", (_route(*_aliases("- transformer. lycoris_", ORIGINAL)),)),
        ("hidream", (_route(*_aliases("transformer. lycoris_", ORIGINAL), t5=("lora_te3_",)),)),
        ("mochi", (_route(*_aliases("-", ORIGINAL)),)),
        ("kandinsky5", (_route(*_aliases("- transformer.", ORIGINAL)),)),
        ("z-image", (_route(*Z, also=r"^(diffusion_model|transformer)\.(x|cap)_pad_token$"),)),
        ("lumina2", (_route(*_aliases("transformer. lycoris_ -", ORIGINAL, only=LUMINA)),)),
        ("wan", (WAN_FUN, _route(also=r"^diffusion_model\.(blocks\.\d+|head)\.modulation$"))),
        ("ltx-video ltx2", (LTX,)),
        ("framepack", ()),
    ),
    default=(_route(),),
    layout="comfyui",
    swaps=False,
    slices_bias=False,
    patches=True,
)  # fmt: skip
