"""PEFT's own keys beside an adapter's factors: saved modules, trained biases, an embedding's LoRA, rows of an embedding.

What each means, source PEFT 0.21: ``modules_to_save`` and ``bias`` are whole tensors that replace the base's
(``utils/other.py`` ``ModulesToSaveWrapper``, ``tuners_utils.py`` ``_get_learnable_bias_state_dict``). An embedding's LoRA has
``lora_embedding_A`` (rank, rows) and ``lora_embedding_B`` (dim, rank), and the weight (rows, dim) changes by ``(B A)^T``:
turned over, they are the up and the down of a LoRA (``lora/layer.py`` ``Embedding.get_delta_weight``); its DoRA magnitude has
a number for each of the dim columns. ``trainable_tokens_delta`` are no differences but the rows themselves, and only the
configuration says which (``trainable_tokens/layer.py``). The rest is left from training.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from lorasurgery.io.tensors import Tensor
from lorasurgery.layouts.words import LORA, SET, Word, split_key

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

PREFIX = "base_model.model."
FACTOR, SAVED, BIAS, ROWS, BASE, HARMLESS, REFUSED = "factor", "saved", "bias", "rows", "base", "harmless", "refused"
"""Roles: of a LoRA; a whole weight, a whole bias or whole rows that replace the base's; the base's own weight; left from
training, without an effect; not to be used here."""
SAVED_IN = ".modules_to_save"
_ORIGINAL = "the base's own, as PEFT found it"

TAILS = MappingProxyType(
    {
        ".lora_embedding_A": (FACTOR, "the up factor of an embedding, turned over"),
        ".lora_embedding_B": (FACTOR, "the down factor of an embedding, turned over"),
        ".token_adapter.trainable_tokens_delta": (ROWS, "trained rows of an embedding, which replace the base's"),
        ".trainable_tokens_delta": (ROWS, "trained rows of an embedding, which replace the base's"),
        ".token_adapter.trainable_tokens_original": (HARMLESS, _ORIGINAL),
        ".trainable_tokens_original": (HARMLESS, _ORIGINAL),
        ".token_adapter.base_layer.weight": (BASE, _ORIGINAL),
        ".base_layer.weight": (BASE, f"{_ORIGINAL}: it saves an embedding beside its LoRA, which alone is trained"),
        ".base_layer.bias": (BIAS, "a trained bias, which replaces the base's"),
        ".lora_velora_embed": (HARMLESS, "VeLoRA's compression of activations, for training"),
        ".lora_diag": (REFUSED, "KaSA, which drops the smallest singular values of the base when PEFT loads it"),
        "ranknum": (HARMLESS, "AdaLoRA's count of ranks"),
    }
)
"""Ends of keys, an adapter's name left out."""
_INSIDE = MappingProxyType(
    {
        "original_module": (HARMLESS, f"{_ORIGINAL}: the saved module takes its place"),
        "lora_monteclora_sampler": (HARMLESS, "MonteCLoRA's samples, for training"),
    }
)
"""What stands somewhere in a key that has no effect."""
_WORDS = MappingProxyType({".lora_embedding_A": Word(LORA, "up", "peft"), ".lora_embedding_B": Word(LORA, "down", "peft")})
EMBEDDING_WORDS = MappingProxyType({word.slot: suffix for suffix, word in _WORDS.items()})
"""Slot -> suffix of an embedding's factors, which are to be turned over."""
_PLAIN = MappingProxyType({"weight": SAVED, "bias": BIAS})
_PARAMETERS = MappingProxyType({BIAS: ".bias", ROWS: ".trainable_tokens"})
"""Role -> what the name of a module of one parameter has beside the layer's."""
_REASONS = MappingProxyType({SAVED: "a saved module, which replaces the base's", BIAS: TAILS[".base_layer.bias"][1]})
EMBEDDINGS = ("token_embedding", "position_embedding", "embed_tokens", "shared", "relative_attention_bias", "wte", "wpe")
"""What the last part of an embedding's name is, in the text encoders that are known here and in the usual language models."""


class PeftKey(NamedTuple):
    """One of PEFT's own keys, understood."""

    stem: str
    """The module's name as spelled, prefix included."""
    role: str
    slot: str
    """What follows the stem in the key, an adapter's name included."""
    reason: str
    """In a few words, for messages."""

    @property
    def module(self) -> str:
        """The name of the module that it makes: a whole bias and whole rows are parameters of their own beside the factors."""
        return self.stem + _PARAMETERS.get(self.role, "")

    @property
    def word(self) -> Word | None:
        """The word of a factor or of what replaces the base's; None for what is no tensor of a module."""
        if self.role in (SAVED, BIAS, ROWS):
            return Word(SET, "set_weight", "peft")
        return _WORDS.get(_nameless(self.slot)) if self.role == FACTOR else None


def peft_key(key: str, prefixes: Collection[str] = (PREFIX,)) -> PeftKey | None:
    """What one of PEFT's own keys means; None for a key that is none of them (factors of a LoRA are not, see ``words``).

    A plain ``weight`` or ``bias`` is a saved one only under ``prefixes``, which are PEFT's or a folder's component.
    """
    stem, inside, rest = key.partition(SAVED_IN + ".")
    if inside and rest:
        tail = rest.removeprefix("default.")
        return _saved(stem, f"{inside}{rest}", tail)
    parts = key.split(".")
    for i, part in enumerate(parts[1:], 1):
        if part in _INSIDE:
            role, reason = _INSIDE[part]
            return PeftKey(".".join(parts[:i]), role, "." + ".".join(parts[i:]), reason)
    plain = _nameless(key)
    for tail, (role, reason) in TAILS.items():
        if plain.endswith(tail):
            stem = plain[: -len(tail)]
            return PeftKey(stem, role, key[len(stem) :], reason)
    if key.startswith(tuple(prefixes)) and split_key(key) is None:
        stem, _, tail = key.rpartition(".")
        return _saved(stem, f".{tail}", tail) if tail in _PLAIN else None
    return None


def _saved(stem: str, slot: str, tail: str) -> PeftKey:
    """A tensor of a saved module; ``tail`` is its name in that module, which may have modules of its own."""
    inner, _, last = tail.rpartition(".")
    role = _PLAIN.get(last, SAVED)
    return PeftKey(f"{stem}.{inner}" if inner else stem, role, slot, _REASONS[role])


def _nameless(text: str) -> str:
    """Without the adapter's name that a raw state dict has at the end: ``lora_embedding_A.default``."""
    head, _, last = text.rpartition(".")
    named = head.endswith(tuple(tail for tail in TAILS if tail not in (".base_layer.weight", ".base_layer.bias")))
    return head if last and named else text


def role_of(slot: str) -> str | None:
    """What a module's tensor replaces, by its slot (what followed the layer's name in PEFT's key): a weight, bias or rows."""
    found = peft_key(f"{PREFIX}_{slot}")
    return None if found is None or found.role not in (SAVED, BIAS, ROWS) else found.role


def saved_key(stem: str, slot: str) -> str | None:
    """PEFT's key of a whole bias or whole rows, of the module's name and its slot; None for other slots."""
    parameter = _PARAMETERS.get(role_of(slot) or "")
    if parameter is None or not stem.endswith(parameter):
        return None
    return stem.removesuffix(parameter) + plain_slot(slot)


def plain_slot(text: str) -> str:
    """A key, or the end of one, as PEFT saves it, without ``modules_to_save``."""
    return text.replace(f"{SAVED_IN}.default.", ".").replace(f"{SAVED_IN}.", ".")


def is_carried(key: str, components: Collection[str]) -> bool:
    """Whether a key that is no module's goes from PEFT to PEFT as it is: whole tensors do, what is left from training not."""
    found = peft_key(key, [f"{name}." if name else PREFIX for name in components])
    return found is not None and found.role in (SAVED, BIAS, ROWS, BASE)


def is_harmless(key: str) -> bool:
    """Whether a key that is no module's is left from training and has no effect."""
    found = peft_key(key)
    return found is not None and found.role == HARMLESS


def reason_of(key: str) -> str:
    """Why a key is in no module, in a few words."""
    found = peft_key(key)
    return "not part of any module" if found is None else found.reason


def doubles(keys: Iterable[str]) -> set[str]:
    """Keys that say a second time what another key says: PEFT saves ``head.bias`` and ``head.modules_to_save.bias`` alike.

    It reads the first and finds no place for the second (``set_peft_model_state_dict``).
    """
    have = set(keys)
    return {key for key in have if SAVED_IN in key and key.replace(f"{SAVED_IN}.default", "").replace(SAVED_IN, "") in have}


@dataclass(frozen=True)
class Turned(Tensor):
    """A matrix turned over, when its values are asked for."""

    original: Tensor | None = None


def transposed(tensor: Tensor) -> Tensor:
    """A matrix turned over; turned over twice it is the same bytes."""
    if isinstance(tensor, Turned) and tensor.original is not None:
        return tensor.original
    rows, columns = tensor.shape
    return Turned(tensor.dtype, (columns, rows), compute=lambda: tensor.array().T, original=tensor)


def is_embedding(stem: str, factor: Tensor) -> bool:
    """Whether a LoRA is an embedding's, for which PEFT has other words: by its module's name, or as it came from PEFT."""
    return isinstance(factor, Turned) or stem.rpartition(".")[2] in EMBEDDINGS
