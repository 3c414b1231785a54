"""Small files of every kind that a loader meets: a plain one in each spelling, and the ways in which real ones differ from it.

Each is made twice: with one column for Diffusers (:mod:`tests.real_diffusers`) and with the real shapes for the check.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from lorasurgery.architectures.table import DIFFUSERS, ORIGINAL, SD_SCRIPTS, flat
from lorasurgery.io.tensors import Tensor, scalar
from tests.real_diffusers import first_blocks, rows_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorasurgery.architectures.table import Architecture, Spans

RANK, ALPHA = 2, 0.5
AB, KOHYA = (".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")
OLD, DEFAULT = (".lora.down.weight", ".lora.up.weight"), (".lora_A.default.weight", ".lora_B.default.weight")
LOKR, LOHA = (".lokr_w1", ".lokr_w2"), (".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b")
SPELLINGS = {
    "lora_unet_ trained": ("lora_unet_", SD_SCRIPTS, True), "lora_unet_ original": ("lora_unet_", ORIGINAL, True),
    "lora_unet_ diffusers": ("lora_unet_", DIFFUSERS, True), "lora_transformer_": ("lora_transformer_", DIFFUSERS, True),
    "lycoris_": ("lycoris_", DIFFUSERS, True), "diffusion_model. original": ("diffusion_model.", ORIGINAL, False),
    "diffusion_model. diffusers": ("diffusion_model.", DIFFUSERS, False), "component.": ("{denoiser}.", DIFFUSERS, False),
    "component. trained": ("{denoiser}.", SD_SCRIPTS, False), "bare original": ("", ORIGINAL, False),
    "bare diffusers": ("", DIFFUSERS, False), "base_model.model. original": ("base_model.model.", ORIGINAL, False),
    "base_model.model. diffusers": ("base_model.model.", DIFFUSERS, False),
}  # fmt: skip
WORDS = {
    "A/B": AB, "A/B alpha": (*AB, ".alpha"), "down/up": KOHYA, "down/up alpha": (*KOHYA, ".alpha"), "old": OLD,
    "default": DEFAULT, "LoHa": LOHA, "LoKr": LOKR, "LoKr alpha": (*LOKR, ".alpha"),
}  # fmt: skip


class Parts(NamedTuple):
    """One module of a plain file."""

    spans: Spans
    words: tuple[str, ...]


@dataclass
class File:
    """A file in memory: torch's tensors for Diffusers, headers for the check."""

    arch: Architecture
    modules: dict[str, Parts] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    raw: dict[str, Tensor] = field(default_factory=dict)

    def add(self, stem: str, spans: Spans, words: tuple[str, ...]) -> None:
        """Tensors of one module, beside those that it has."""
        old = self.modules.get(stem, Parts(spans, ()))
        self.modules[stem] = Parts(spans, (*old.words, *(w for w in words if w not in old.words)))
        for word in words:
            narrow, shape = tensor(word, spans, *self.arch.module_shape(spans)[:2])
            self.put(stem + word, narrow, shape)

    def put(self, key: str, narrow: torch.Tensor, shape: tuple[int, ...]) -> None:
        """One key."""
        self.tensors[key] = narrow
        self.raw[key] = Tensor("F32", shape) if shape else scalar(narrow.item())

    def drop(self, stem: str, *words: str) -> None:
        """Leave tensors of a module out."""
        spans, own = self.modules[stem]
        self.modules[stem] = Parts(spans, tuple(w for w in own if w not in words))
        for word in words:
            del self.tensors[stem + word], self.raw[stem + word]


def tensor(word: str, spans: Spans, out: int, width: int = 1) -> tuple[torch.Tensor, tuple[int, ...]]:
    """A tensor for Diffusers, narrow where the width does not matter, and the shape of a real one.

    A LoRA's product and a LoKr's is eight times the number of each row; so is a ``.diff``.
    """
    rows = rows_of(spans)
    down, up, whole = torch.tensor([[1.0], [2.0]]), rows[:, None] * torch.tensor([2.0, 3.0]), rows[:, None] * 8
    downs, ups = {AB[0], KOHYA[0], OLD[0], DEFAULT[0]}, {AB[1], KOHYA[1], OLD[1], DEFAULT[1]}
    if word in downs:
        return down, (RANK, width)
    if word in ups:
        return up, (out, RANK)
    flat_ones = {".diff_b", ".lora_B.bias", ".lora_magnitude_vector"}
    if word in flat_ones:
        return rows, (out,)
    table = {
        ".alpha": (torch.tensor(ALPHA), ()), ".dora_scale": (rows[:, None], (out, 1)), ".diff": (whole, (out, width)),
        ".lokr_w1": (torch.ones(1, 1), (1, 1)), ".lokr_w2": (whole, (out, width)), ".w_norm": (rows, (out,)),
        ".lora_C.weight": (down, (RANK, width)), ".lora_E.weight": (down, (RANK, width)),
    }  # fmt: skip
    if word in LOHA:
        return (whole, (out, RANK)) if word.endswith("a") else (down, (RANK, width))
    return table[word]


def stem_of(arch: Architecture, spelling: str, name: str) -> str:
    prefix, _, is_flat = SPELLINGS[spelling]
    return prefix.format(denoiser=arch.denoiser) + (flat(name) if is_flat else name)


def plain(arch: Architecture, spelling: str, words: str, *, around: bool = True, blocks: int = 1) -> File:
    """The matrices of the first blocks, and of what is around them."""
    file = File(arch)
    for name, spans in first_blocks(arch, SPELLINGS[spelling][1], blocks).items():
        inside = any(w in spans[0].weight.split(".")[0] for w in ("block", "layers", "refiner", "stream"))
        if len(arch.shapes[spans[0].weight]) == 2 and (around or inside):
            file.add(stem_of(arch, spelling, name), spans, WORDS[words])
    return file


# the ways in which files differ from a plain one --------------------------------------------------------------------------


def lone(*words: str) -> Callable[[File, str], None]:
    """A module that has only these tensors."""

    def change(file: File, stem: str) -> None:
        spans, own = file.modules[stem]
        file.drop(stem, *own)
        file.add(stem, spans, words)

    return change


def beside(*words: str) -> Callable[[File, str], None]:
    """A module that has these tensors too."""
    return lambda file, stem: file.add(stem, file.modules[stem].spans, words)


def everywhere(*words: str) -> Callable[[File, str], None]:
    """All modules have these tensors too."""

    def change(file: File, _: str) -> None:
        for other, own in list(file.modules.items()):
            file.add(other, own.spans, words)

    return change


def without(place: int) -> Callable[[File, str], None]:
    """A module that lacks its first or last tensor."""
    return lambda file, stem: file.drop(stem, file.modules[stem].words[place])


def absent(file: File, stem: str) -> None:
    """A module that is not there."""
    file.drop(stem, *file.modules[stem].words)
    del file.modules[stem]


def misspelled(file: File, stem: str) -> None:
    """A name that no model has."""
    spans, words = file.modules[stem]
    absent(file, stem)
    file.add(stem + "zz", spans, words)


def parameter(word: str) -> Callable[[File, str], None]:
    """A bare parameter's or a norm's difference beside a module, in its block."""

    def change(file: File, stem: str) -> None:
        cut = stem.rfind(".") if "." in stem else stem.rfind("_")
        file.put(stem[:cut] + (word if "." in stem else word.replace(".", "_", 1)), torch.ones(4), (4,))

    return change


MUTATIONS: dict[str, Callable[[File, str], None]] = {
    "no first factor": without(0), "no second factor": without(1), "one absent": absent, "one misspelled": misspelled,
    "bias alone": lone(".diff_b"), "PEFT's bias alone": lone(".lora_B.bias"), "diff alone": lone(".diff"),
    "diff and bias": lone(".diff", ".diff_b"), "alpha alone": lone(".alpha"),
    "magnitude alone": lone(".lora_magnitude_vector"),
    "w_norm alone": lone(".w_norm"),
    "strange word beside": beside(".lora_C.weight"), "strange word alone": lone(".lora_C.weight"),
    "bias on one": beside(".diff_b"), "PEFT's bias on one": beside(".lora_B.bias"), "bias on all": everywhere(".diff_b"),
    "PEFT's bias on all": everywhere(".lora_B.bias"), "magnitude on one": beside(".lora_magnitude_vector"),
    "magnitude on all": everywhere(".lora_magnitude_vector"), "dora_scale on one": beside(".dora_scale"),
    "dora_scale on all": everywhere(".dora_scale"), "alpha on one": beside(".alpha"), "diff beside": beside(".diff"),
    "LoHa among them": lone(*LOHA), "LoKr among them": lone(*LOKR), "A/B among them": lone(*AB),
    "down/up among them": lone(*KOHYA),
    "diff_m": parameter(".diff_m"), "norm's diff": parameter(".norm1.diff"), "norm's bias": parameter(".norm1.diff_b"),
    "norm's w_norm": parameter(".norm1.w_norm"), "parameter's diff": parameter(".modulation.diff"),
    "replaced norm": parameter(".norm1.linear.weight"), "q norm": parameter(".norm_q.weight"),
    "stray lora": parameter(".x.lora"), "nothing": lambda *_: None,
}  # fmt: skip


class Case(NamedTuple):
    """One variant."""

    spelling: str
    words: str
    mutation: str
    at: int
    """Which module is changed."""
    around: bool


def spellings(arch: Architecture) -> list[str]:
    """Those that differ for a model."""
    own = arch.sd_scripts == SD_SCRIPTS
    return [name for name, (_, naming, _) in SPELLINGS.items() if own or naming != SD_SCRIPTS]


def made(arch: Architecture, case: Case) -> File:
    """The file of a case."""
    file = plain(arch, case.spelling, case.words, around=case.around)
    if not file.modules:
        return file
    MUTATIONS[case.mutation](file, list(file.modules)[case.at % len(file.modules)])
    return file
