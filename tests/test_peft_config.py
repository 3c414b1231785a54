"""PEFT's configurations and its own keys, against the installed PEFT: every type and field is exact, or refused by name.

The truth is PEFT's own: what ``merge_and_unload`` makes of a small float64 model, minus the model.
"""

from __future__ import annotations

import json
import typing
import warnings
from dataclasses import fields
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.lora.config import MontecloraConfig, VeloraConfig
from safetensors.torch import load_file, save_file

import lorasurgery
from lorasurgery.deltas.base import CannotError
from lorasurgery.errors import BrokenModuleError, FileFormatError, NotAnAdapterError, NotRepresentableError, RequestError
from lorasurgery.io.header import read_safetensors
from lorasurgery.layouts.group import group
from lorasurgery.layouts.peft_fields import FIELDS, INITIALISATIONS, PLAIN_STARTS, check_fields
from lorasurgery.layouts.peft_keys import BASE, BIAS, FACTOR, HARMLESS, ROWS, SAVED, doubles, peft_key, transposed
from lorasurgery.layouts.peft_types import OTHERS, READ, refuse_other_keys, refuse_other_types
from tests.edges import run
from tests.oracle import raw, write

if TYPE_CHECKING:
    from pathlib import Path

    from lorasurgery.adapter import Adapter

PREFIX = "base_model.model."
KINDS = {kind.value: made for kind, made in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


class Small(torch.nn.Module):
    """A layer of every kind that PEFT adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = torch.nn.Embedding(10, 8)
        self.lin = torch.nn.Linear(8, 12)
        self.conv = torch.nn.Conv2d(4, 8, 3)
        self.norm = torch.nn.LayerNorm(12)
        self.head = torch.nn.Linear(12, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.norm(self.lin(self.emb(tokens))))
        return found


def base(dtype: torch.dtype = torch.float64) -> Small:
    torch.manual_seed(0)
    return Small().to(dtype)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    """What PEFT warns of is not under test."""
    warnings.simplefilter("ignore")


def trained(config: Any, folder: Path, dtype: torch.dtype = torch.float64) -> Path:
    """A folder as PEFT saves it, every trainable number moved away from where it began."""
    model = peft.get_peft_model(base(dtype), config)
    generator = torch.Generator().manual_seed(1)
    for _, own in sorted(model.named_parameters()):
        if own.requires_grad:
            own.data += torch.randn(own.shape, generator=generator, dtype=torch.float64).to(own.dtype) * 0.3
    model.save_pretrained(folder)
    return folder


def merged(folder: Path, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """The model's tensors once PEFT has merged the folder into it."""
    found = peft.PeftModel.from_pretrained(base(dtype), str(folder)).merge_and_unload().state_dict()
    return {key: tensor.double().numpy() for key, tensor in found.items()}


def read(folder: Path, tmp_path: Path) -> Adapter:
    model = tmp_path / "base.safetensors"
    save_file(base().state_dict(), model)
    return lorasurgery.load(folder, base=model)


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**({"r": 2, "lora_alpha": 5, "target_modules": ["lin", "conv"]} | options))


ONE = {"target_modules": ["lin"]}
BOTH = {"target_modules": ["lin", "conv"]}
EXACT = {
    "plain": lora(),
    "rslora": lora(use_rslora=True, rank_pattern={"conv": 3}, alpha_pattern={"conv": 7}),
    "dora": lora(use_dora=True),
    "lora_bias": lora(lora_bias=True),
    "saved": lora(modules_to_save=["head", "norm"]),
    "every bias": lora(bias="all", modules_to_save=["head"]),
    "own biases": lora(bias="lora_only"),
    "embedding": lora(target_modules=["emb", "lin"]),
    "embedding dora": lora(target_modules=["emb", "lin"], use_dora=True),
    "tokens": lora(trainable_token_indices={"emb": [1, 4]}),
    "monteclora": lora(**ONE, monteclora_config=MontecloraConfig(num_samples=3, buffer_size=2)),
    "velora": lora(**ONE, velora_config=VeloraConfig()),
    "gaussian": lora(init_lora_weights="gaussian"),
    "orthogonal": lora(**ONE, init_lora_weights="orthogonal"),
    "excluded": lora(target_modules=["lin", "conv", "head"], exclude_modules=["head"]),
    "pattern": lora(target_modules="(lin|conv)"),
    "loha": peft.LoHaConfig(r=2, alpha=3, **BOTH, modules_to_save=["head"]),
    "loha tucker": peft.LoHaConfig(r=2, alpha=3, **BOTH, use_effective_conv2d=True),
    "lokr": peft.LoKrConfig(r=2, alpha=3, **BOTH),
    "lokr tucker": peft.LoKrConfig(r=1, alpha=3, **BOTH, use_effective_conv2d=True, decompose_both=True),
    "miss": peft.MissConfig(r=2, **ONE, bias="miss_only"),
    "miss mini": peft.MissConfig(r=2, **ONE, init_weights="mini", mini_r=3),
    "miss bat": peft.MissConfig(r=4, **ONE, init_weights="bat"),
    "oft": peft.OFTConfig(oft_block_size=4, **BOTH, bias="oft_only"),
    "oft shared": peft.OFTConfig(oft_block_size=4, **ONE, block_share=True, coft=True, eps=0.1, use_cayley_neumann=False),
    "oft by number": peft.OFTConfig(r=2, oft_block_size=0, **ONE, num_cayley_neumann_terms=7),
    "boft": peft.BOFTConfig(boft_block_size=4, **BOTH, bias="boft_only"),
    "boft butterfly": peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, **ONE),
    "ia3": peft.IA3Config(target_modules=["lin", "conv", "head"], feedforward_modules=["head"]),
    "ia3 by pattern": peft.IA3Config(target_modules="lin|head", feedforward_modules=".*head", modules_to_save=["norm"]),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_the_change_is_pefts_and_peft_reads_what_is_written(name: str, tmp_path: Path) -> None:
    folder = trained(EXACT[name], tmp_path / "in")
    expected = merged(folder)
    plain = {key: tensor.numpy() for key, tensor in base().state_dict().items()}
    adapter = read(folder, tmp_path)
    assert not adapter.warnings
    for site, module in adapter:
        weight = site.spans[0].weight
        if weight.endswith(".trainable_tokens"):  # which rows they are PEFT itself has the word of, below
            continue
        weight = weight if weight.endswith(".bias") else weight + ".weight"
        if module.family in ("oft", "boft", "ia3", "bat", "dora"):  # they multiply the base: PEFT itself has the word below
            continue
        if module.family == "set":
            found = next(iter(module.delta.tensors.values())).f64() if module.delta is not None else None
            np.testing.assert_array_equal(found, expected[weight])
            continue
        change = expected[weight] - plain[weight]
        np.testing.assert_allclose(module.dense().reshape(change.shape), change, rtol=0, atol=1e-13)
    result, report = lorasurgery.convert(adapter, "peft")
    lorasurgery.save(result, tmp_path / "out", report=report)
    assert report.exact
    again = merged(tmp_path / "out")
    for key, tensor in expected.items():
        np.testing.assert_allclose(again[key], tensor, rtol=1e-12, atol=1e-13, err_msg=key)


@pytest.mark.parametrize("name", EXACT)
def test_apply_makes_the_weights_that_peft_makes(name: str, tmp_path: Path) -> None:
    """The families that multiply the base too; whole rows are named as not used."""
    folder = trained(EXACT[name], tmp_path / "in")
    save_file(base().state_dict(), tmp_path / "m.safetensors")
    out = tmp_path / "o.safetensors"
    code, text, err = run("apply", str(tmp_path / "m.safetensors"), str(folder), "-o", str(out), "--json")
    assert code == 0, err
    left = [found for own in json.loads(text)["unmatched"] if (found := peft_key(own["key"])) is not None]
    unused = {found.stem for found in left if found.role not in (BASE, HARMLESS, BIAS)}  # a bias: what is said twice
    assert unused == ({f"{PREFIX}emb"} if name == "tokens" else set())
    got = {key: tensor.double().numpy() for key, tensor in load_file(out).items()}
    for key, tensor in merged(folder).items():
        if f"{PREFIX}{key}" in {f"{stem}.weight" for stem in unused}:
            continue
        np.testing.assert_allclose(got[key], tensor, rtol=1e-5, atol=1e-6, err_msg=key)


WHOLE = {
    "own biases": (lora(bias="lora_only"), {"lin.bias", "conv.bias"}),
    "every bias": (lora(bias="all"), {"lin.bias", "conv.bias", "norm.bias", "head.bias"}),
    "of the layer and its factors": (lora(**ONE, bias="lora_only", lora_bias=True), {"lin.bias"}),
    "saved": (lora(modules_to_save=["head", "norm"]), {"head", "head.bias", "norm", "norm.bias"}),
    "saved and every bias": (
        lora(**ONE, bias="all", modules_to_save=["conv"]), {"lin.bias", "conv.bias", "norm.bias", "head.bias", "conv"}
    ),
    "saved embedding": (lora(modules_to_save=["emb"]), {"emb"}),
    "tokens": (lora(trainable_token_indices={"emb": [1, 4]}), {"emb.trainable_tokens"}),
    "loha": (peft.LoHaConfig(r=2, alpha=3, **BOTH, modules_to_save=["head"]), {"head", "head.bias"}),
    "miss": (peft.MissConfig(r=2, **ONE, bias="all"), {"lin.bias", "conv.bias", "norm.bias", "head.bias"}),
    "beside an embedding's": (lora(target_modules=["emb", "lin"], bias="lora_only"), {"lin.bias"}),
    "rslora": (lora(use_rslora=True, bias="lora_only"), {"lin.bias", "conv.bias"}),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_what_peft_saved_whole_is_a_module_and_not_scaled_in_silence(name: str, tmp_path: Path) -> None:
    config, sites = WHOLE[name]
    folder = trained(config, tmp_path / "in")
    adapter = read(folder, tmp_path)
    assert {site.spans[0].weight for site, module in adapter if module.family == "set"} == sites
    assert not adapter.ledger.lost
    args = ["--base", str(tmp_path / "base.safetensors")]
    for verb, words in (("merge", [f"{folder}:0.5", "-o"]), ("prune", [str(folder), "--scale", "0.5", "-o"])):
        code, _, err = run(verb, *words, str(tmp_path / verb), *args)
        assert (code, any(f"{PREFIX}{site}:" in err for site in sites)) == (1, True), err
        assert not (tmp_path / verb).exists()
    code, _, err = run("convert", str(folder), str(tmp_path / "o.safetensors"), "--target", "diffusers", *args)
    assert code == 1, err
    code, _, err = run("merge", f"{folder}:1", "-o", str(tmp_path / "one"), *args, "--strict")
    assert code == 0, err
    expected, again = merged(folder), merged(tmp_path / "one")
    for key, tensor in expected.items():
        np.testing.assert_allclose(again[key], tensor, rtol=1e-12, atol=1e-13, err_msg=key)
    out = tmp_path / "half.safetensors"
    code, text, err = run("apply", args[1], f"{folder}:0.5", "-o", str(out), "--json")
    assert code == 0, err
    plain = {key: tensor.numpy() for key, tensor in base().state_dict().items()}
    for key, tensor in load_file(out).items():
        if name == "tokens" and key == "emb.weight":  # named as not used: the configuration alone says which rows they are
            assert "token_adapter" in str(json.loads(text)["unmatched"])
            continue
        np.testing.assert_allclose(tensor.numpy(), (plain[key] + expected[key]) / 2, rtol=0, atol=1e-12, err_msg=key)


TO_LORA = {
    "miss": (peft.MissConfig(r=2, **ONE), "resize", ["{in}", "{out}", "--rank", "8"]),
    "miss mini": (peft.MissConfig(r=2, **ONE, init_weights="mini", mini_r=3), "resize", ["{in}", "{out}", "--rank", "8"]),
    "loha": (peft.LoHaConfig(r=2, alpha=3, **ONE), "resize", ["{in}", "{out}", "--rank", "8", "--as", "lora"]),
    "lokr": (peft.LoKrConfig(r=2, alpha=3, **ONE), "resize", ["{in}", "{out}", "--rank", "8", "--as", "lora"]),
    "merged loha": (peft.LoHaConfig(r=2, alpha=3, **ONE), "merge", ["{in}:1", "--as", "lora", "-o", "{out}"]),
    "merged miss": (peft.MissConfig(r=2, **ONE), "merge", ["{in}:1", "--as", "lora", "-o", "{out}"]),
}


@pytest.mark.parametrize("name", TO_LORA)
def test_what_becomes_a_lora_in_a_folder_has_pefts_words(name: str, tmp_path: Path) -> None:
    config, verb, words = TO_LORA[name]
    folder = trained(config, tmp_path / "in")
    save_file(base().state_dict(), tmp_path / "m.safetensors")
    args = [word.format(**{"in": folder, "out": tmp_path / "out"}) for word in words]
    code, _, err = run(verb, *args, "--base", str(tmp_path / "m.safetensors"))
    assert code == 0, err
    np.testing.assert_allclose(merged(tmp_path / "out")["lin.weight"], merged(folder)["lin.weight"], rtol=0, atol=1e-6)


TOLD = {"base_model_name_or_path": "some/model", "revision": "main", "task_type": "CAUSAL_LM", "lora_dropout": 0.25}


def test_what_peft_put_there_stays(tmp_path: Path) -> None:
    folder = trained(lora(modules_to_save=["head"], bias="lora_only", target_modules="(lin|conv)"), tmp_path / "in")
    config = json.loads((folder / "adapter_config.json").read_text()) | TOLD | {"fan_in_fan_out": True, "use_rslora": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    result, report = lorasurgery.convert(read(folder, tmp_path), "peft")
    lorasurgery.save(result, tmp_path / "out", report=report)
    found = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {name: found[name] for name in TOLD} == TOLD
    assert (found["fan_in_fan_out"], found["bias"], found["modules_to_save"]) == (True, "lora_only", ["head"])
    assert (found["use_rslora"], found["init_lora_weights"], found["target_modules"]) == (False, True, ["conv", "lin"])
    assert (
        load_file(tmp_path / "out" / "adapter_model.safetensors").keys()
        == load_file(folder / "adapter_model.safetensors").keys()
    )


def test_a_lokr_of_a_one_dimensional_kernel_is_not_what_it_is_elsewhere(tmp_path: Path) -> None:
    """PEFT multiplies the factors along other axes there: what it wrote is refused, and it gets none."""
    stem = f"{PREFIX}conv_in"
    whole = {f"{stem}.lokr_w1": raw(np.ones((2, 2)), "F32"), f"{stem}.lokr_w2": raw(np.ones((4, 2, 3)), "F32")}
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "adapter_model.safetensors", whole)
    config = {"peft_type": "LOKR", "r": 8, "alpha": 8, "target_modules": ["conv_in"]}
    (tmp_path / "in" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(BrokenModuleError, match="lokr_w2"):
        lorasurgery.load(tmp_path / "in")
    write(tmp_path / "a.safetensors", {key.removeprefix(PREFIX): value for key, value in whole.items()})
    save_file({"conv_in.weight": torch.zeros(8, 4, 3)}, tmp_path / "m.safetensors")
    adapter = lorasurgery.load(tmp_path / "a.safetensors", base=tmp_path / "m.safetensors")
    result, report = lorasurgery.convert(adapter, "peft")
    with pytest.raises(NotRepresentableError, match="conv_in"):
        lorasurgery.save(result, tmp_path / "out", report=report)


# types --------------------------------------------------------------------------------------------------------------------


def test_every_type_of_the_installed_peft_is_read_or_named() -> None:
    assert KINDS.keys() == set(READ) | set(OTHERS)


@pytest.mark.parametrize("kind", sorted(OTHERS))
def test_other_types_are_refused_by_their_names(kind: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "r": 4}))
    tensors = {
        f"{PREFIX}lin.lora_A.weight": raw(np.ones((4, 8)), "F32"),
        f"{PREFIX}lin.lora_B.weight": raw(np.ones((12, 4)), "F32"),
    }
    write(tmp_path / "in" / "adapter_model.safetensors", tensors)
    for verb in (lorasurgery.load, lambda path: read(path, tmp_path)):
        with pytest.raises(NotAnAdapterError, match=OTHERS[kind].name.replace("(", r"\(").replace(")", r"\)")):
            verb(tmp_path / "in")
    code, _, err = run("inspect", str(tmp_path / "in"))
    assert code != 0
    assert OTHERS[kind].name in err


def _tuner(kind: str) -> Any:
    """A configuration of a type that adapts the small model's linear layer; None where it needs another model."""
    extra = {"ADALORA": {"total_step": 10}, "XLORA": None, "TRAINABLE_TOKENS": None, "LN_TUNING": {"target_modules": ["norm"]}}
    options = extra.get(kind, {})
    if options is None or PEFT_TYPE_TO_PREFIX_MAPPING.get(peft.PeftType(kind)) is None:
        return None
    try:
        return KINDS[kind](**({"target_modules": ["lin"]} | options))
    except (TypeError, ValueError, ImportError):
        return None


@cache
def _made(kind: str) -> tuple[str, ...] | None:
    config = _tuner(kind)
    try:
        model = None if config is None else peft.get_peft_model(base(torch.float32), config)
        return None if model is None else tuple(peft.get_peft_model_state_dict(model))
    except (TypeError, ValueError, AttributeError, ImportError, KeyError, RuntimeError):
        return None


def test_many_types_are_made_here() -> None:
    assert sum(_made(kind) is not None for kind in OTHERS) > 15


@pytest.mark.parametrize("kind", sorted(OTHERS))
def test_the_weights_alone_of_other_types_are_never_an_adapter(kind: str, tmp_path: Path) -> None:
    keys = _made(kind)
    if keys is None:
        pytest.skip("it needs another model")
    write(tmp_path / "a.safetensors", {key: raw(np.ones((4, 4)), "F32") for key in keys})
    with pytest.raises((NotAnAdapterError, BrokenModuleError)) as refusal:
        read(tmp_path / "a.safetensors", tmp_path)
    if any(f".{kind.lower()}_" in key for key in keys):
        assert OTHERS[kind].name in str(refusal.value)


def test_old_names_of_types() -> None:
    for kind in ("", "LORA", "PeftType.LORA", "BONE", "lokr"):
        refuse_other_types({"peft_type": kind})
    refuse_other_types({})
    refuse_other_keys([f"{PREFIX}x.lora_A.weight", "model.poly.weight", "road_map.weight"])


# fields -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", READ)
def test_every_field_of_the_installed_peft_is_in_the_table(kind: str) -> None:
    assert {field.name for field in fields(KINDS[kind])} - set(FIELDS[kind]) == set()
    assert all(own.reason for own in FIELDS[kind].values())


def test_every_way_to_begin_of_the_installed_peft_is_known() -> None:
    kinds = typing.get_type_hints(peft.LoraConfig)["init_lora_weights"]
    said = {text for part in typing.get_args(kinds) for text in typing.get_args(part)}
    assert {"pissa", "olora", "gaussian"} <= said
    for text in said:
        assert (text in PLAIN_STARTS) != any(text.startswith(start) for start in INITIALISATIONS), text


CHANGING = ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "new")
CHANGES: dict[str, Any] = {
    **{f"init_lora_weights: {way}": {"init_lora_weights": way} for way in CHANGING},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1, 2]},
    "layer_replication": {"layer_replication": [[0, 1], [0, 1]]},
    "target_parameters": {"target_parameters": ["lin.weight"]},
    "use_qalora": {"use_qalora": True},
    "arrow_config": {"arrow_config": {"top_k": 2}},
    "kasa_config": {"kasa_config": {"beta": 1e-4}},
    "use_bdlora": {"use_bdlora": {"nblocks": 2}},
    "field_of_tomorrow": {"field_of_tomorrow": 3},
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("where", ["folder", "header"])
def test_a_field_that_changes_what_the_tensors_mean_is_refused_by_its_name(name: str, where: str, tmp_path: Path) -> None:
    stem = "transformer_blocks.0.attn.to_q"
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | CHANGES[name]
    factors = {"lora_A": np.ones((2, 3072)), "lora_B": np.ones((3072, 2))}
    if where == "folder":
        path = tmp_path / "in"
        path.mkdir()
        (path / "adapter_config.json").write_text(json.dumps(config))
        write(path / "adapter_model.safetensors", {f"{PREFIX}{stem}.{n}.weight": raw(v, "F32") for n, v in factors.items()})
    else:
        path = tmp_path / "a.safetensors"
        header = json.dumps({f"transformer.{field}": value for field, value in config.items()})
        tensors = {f"transformer.{stem}.{n}.weight": raw(v, "F32") for n, v in factors.items()}
        write(path, tensors, {"lora_adapter_metadata": header})
    with pytest.raises(FileFormatError, match=name) as refusal:
        lorasurgery.load(path)
    assert refusal.value.hint
    code, out, err = run("inspect", str(path), "--json")
    assert (code, json.loads(out)["kind"]) == (0, "adapter"), err
    assert next(iter(CHANGES[name])) in " ".join(own["message"] for own in json.loads(out)["warnings"])
    code, _, err = run("convert", str(path), str(tmp_path / "out"), "--target", "sd-scripts")
    assert code != 0
    assert next(iter(CHANGES[name])) in err


def test_fields_that_say_nothing_are_taken() -> None:
    values: tuple[Any, ...] = (None, False, "", [], {})
    for nothing in values:
        check_fields({"field_of_tomorrow": nothing, "use_qalora": nothing, "arrow_config": nothing}, "adapter_config.json")
    check_fields({name: None for name in FIELDS["LORA"] if name != "peft_type"}, "adapter_config.json")


@pytest.mark.parametrize("way", ["pissa", "pissa_niter_2", "olora", "mica", "eva", "gaussian"])
def test_a_way_to_begin_is_refused_exactly_when_it_changes_the_base(way: str, tmp_path: Path) -> None:
    """What PEFT makes of the weights, and of the same ones that are said to have begun as every LoRA does."""
    folder = trained(lora(**ONE, init_lora_weights="gaussian" if way == "eva" else way), tmp_path / "in", torch.float32)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"init_lora_weights": way}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    own = merged(folder, torch.float32)["lin.weight"]
    (folder / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": True}))
    plain = merged(folder, torch.float32)["lin.weight"]
    if np.abs(own - plain).max() > 1e-3:
        with pytest.raises(FileFormatError, match=way):
            check_fields(config, "adapter_config.json")
    else:
        check_fields(config, "adapter_config.json")


def test_what_a_refusal_of_pissa_advises_is_exact(tmp_path: Path) -> None:
    model = peft.get_peft_model(base(torch.float32), lora(**ONE, init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    for _, own in model.named_parameters():
        if own.requires_grad:
            own.data += torch.randn(own.shape, generator=torch.Generator().manual_seed(2)) * 0.3
    model.save_pretrained(tmp_path / "in", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    expected = model.merge_and_unload().state_dict()["lin.weight"].double().numpy()
    ((_, module),) = read(tmp_path / "in", tmp_path)
    before = base(torch.float32).state_dict()["lin.weight"].double().numpy()
    np.testing.assert_allclose(module.dense(), expected - before, atol=1e-5)


# a scale that nothing says --------------------------------------------------------------------------------------------------

STEM = "transformer_blocks.0.attn.to_out.0"


def loose(tmp_path: Path, prefix: str = PREFIX, extra: dict[str, Any] | None = None) -> Path:
    tensors = {f"{prefix}{STEM}.lora_A.weight": np.ones((2, 3072)), f"{prefix}{STEM}.lora_B.weight": np.ones((3072, 2))}
    made = {key: raw(value, "F32") for key, value in (tensors | (extra or {})).items()}
    write(tmp_path / "adapter_model.safetensors", made)
    return tmp_path / "adapter_model.safetensors"


def test_a_loose_file_of_peft_says_that_its_scale_is_not_known(tmp_path: Path) -> None:
    path = loose(tmp_path)
    adapter = lorasurgery.load(path, arch="flux1")
    ((_, module),) = adapter
    assert module.scale.source == "unknown (no adapter_config.json)"
    assert any("--trained-alpha" in text for text in adapter.warnings)
    code, out, err = run("convert", str(path), str(tmp_path / "o.safetensors"), "--target", "comfyui", "--arch", "flux1-dev")
    assert code == 0
    assert "is not known" in out + err
    code, out, _ = run("inspect", str(path), "--json")
    assert "unknown (no adapter_config.json)" in out


def test_the_alpha_it_was_trained_at(tmp_path: Path) -> None:
    path = loose(tmp_path)
    ((_, module),) = (adapter := lorasurgery.load(path, arch="flux1-dev", alpha=8.0))
    assert (module.scale.value, module.scale.source, adapter.warnings) == (4.0, "--trained-alpha", ())
    out = tmp_path / "o.safetensors"
    code, text, err = run(
        "convert", str(path), str(out), "--target", "comfyui", "--arch", "flux1-dev", "--trained-alpha", "8", "--json"
    )
    assert code == 0, err
    assert json.loads(text)["warnings"] == []
    np.testing.assert_array_equal(next(iter(lorasurgery.load(out, arch="flux1-dev")))[1].dense(), module.dense())
    for wrong in (0.0, float("nan"), float("inf")):
        with pytest.raises(RequestError, match="--trained-alpha"):
            lorasurgery.load(path, arch="flux1-dev", alpha=wrong)


VERBS = {
    "merge": ["{in}:1", "-o", "{out}"],
    "resize": ["{in}", "{out}", "--rank", "2"],
    "prune": ["{in}", "{out}", "--scale", "2"],
    "split": ["{in}", "--by", "component", "--out-dir", "{out}"],
    "ema": ["{in}", "{in}", "--on", "delta", "--sort", "given", "-o", "{out}"],
    "convert": ["{in}", "{out}", "--target", "comfyui"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_takes_the_alpha_it_was_trained_at(verb: str, tmp_path: Path) -> None:
    path, out = loose(tmp_path), tmp_path / "o.safetensors"
    words = [word.format(**{"in": path, "out": out}) for word in VERBS[verb]]
    code, _, err = run(verb, *words, "--arch", "flux1-dev", "--trained-alpha", "8")
    assert code == 0, err
    result = next(out.iterdir()) if out.is_dir() else out
    ((_, module),) = lorasurgery.load(result, arch="flux1-dev")
    np.testing.assert_allclose(module.dense(), np.full((3072, 3072), 16.0 if verb == "prune" else 8.0), rtol=1e-6)


def test_comparing_and_applying_with_the_alpha_it_was_trained_at(tmp_path: Path) -> None:
    folder = trained(lora(**ONE), tmp_path / "in")
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((folder / "adapter_model.safetensors").read_bytes())
    save_file(base().state_dict(), tmp_path / "m.safetensors")
    args = ["--base", str(tmp_path / "m.safetensors")]
    assert run("compare", str(alone), str(folder), *args)[0] == 1
    code, _, err = run("compare", str(alone), str(folder), "--trained-alpha", "5", *args)
    assert code == 0, err
    out = tmp_path / "o.safetensors"
    code, _, err = run("apply", args[1], str(alone), "-o", str(out), "--trained-alpha", "5")
    assert code == 0, err
    np.testing.assert_allclose(load_file(out)["lin.weight"].numpy(), merged(folder)["lin.weight"], rtol=0, atol=1e-12)
    code, _, err = run("apply", args[1], str(folder), "-o", str(out), "--trained-alpha", "5", "--force")
    assert (code, "says its scales itself" in err) == (2, True)


def test_an_alpha_for_a_file_that_says_its_own_is_refused(tmp_path: Path) -> None:
    path = loose(tmp_path, "transformer.", {f"transformer.{STEM}.alpha": np.array(1.0)})
    with pytest.raises(RequestError, match="says its scales itself"):
        lorasurgery.load(path, arch="flux1-dev", alpha=8.0)


# keys ---------------------------------------------------------------------------------------------------------------------

KEYS = {
    "x.head.weight": (f"{PREFIX}x.head", SAVED),
    "x.head.bias": (f"{PREFIX}x.head", BIAS),
    "x.head.modules_to_save.weight": (f"{PREFIX}x.head", SAVED),
    "x.head.modules_to_save.default.weight": (f"{PREFIX}x.head", SAVED),
    "x.head.modules_to_save.default.dense.bias": (f"{PREFIX}x.head.dense", BIAS),
    "x.head.original_module.weight": (f"{PREFIX}x.head", HARMLESS),
    "x.lin.base_layer.bias": (f"{PREFIX}x.lin", BIAS),
    "x.emb.base_layer.weight": (f"{PREFIX}x.emb", BASE),
    "x.emb.lora_embedding_A": (f"{PREFIX}x.emb", FACTOR),
    "x.emb.lora_embedding_B.default": (f"{PREFIX}x.emb", FACTOR),
    "x.emb.token_adapter.trainable_tokens_delta": (f"{PREFIX}x.emb", ROWS),
    "x.lin.lora_monteclora_sampler.std_prior": (f"{PREFIX}x.lin", HARMLESS),
    "x.lin.lora_velora_embed": (f"{PREFIX}x.lin", HARMLESS),
}  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_a_key_of_pefts_own(key: str) -> None:
    found = peft_key(PREFIX + key)
    assert found is not None
    assert (found.stem, found.role) == KEYS[key]
    assert found.reason


@pytest.mark.parametrize("key", [f"{PREFIX}x.lora_A.weight", "x.head.weight", f"{PREFIX}x.hada_w1_a", f"{PREFIX}x.alpha"])
def test_other_keys_are_not(key: str) -> None:
    assert peft_key(key) is None


def test_what_is_said_twice() -> None:
    assert doubles(["h.bias", "h.modules_to_save.bias", "h.modules_to_save.weight"]) == {"h.modules_to_save.bias"}


def test_kasa_without_its_configuration(tmp_path: Path) -> None:
    path = loose(tmp_path, extra={f"{PREFIX}{STEM}.lora_diag": np.ones(2)})
    with pytest.raises(BrokenModuleError, match="KaSA"):
        lorasurgery.load(path, arch="flux1-dev")


def test_a_turned_matrix_comes_back_as_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", {"x": raw(np.arange(6.0).reshape(2, 3), "BF16")})
    tensor = read_safetensors(tmp_path / "a.safetensors").tensors["x"]
    np.testing.assert_array_equal(transposed(tensor).f64(), tensor.f64().T)
    assert transposed(transposed(tensor)) is tensor


def test_a_whole_model_under_pefts_prefix_is_no_adapter(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", {f"{PREFIX}{name}.weight": raw(np.ones((4, 4)), "F32") for name in "abc"})
    with pytest.raises(NotAnAdapterError):
        lorasurgery.load(tmp_path / "a.safetensors")
    assert not group(read_safetensors(tmp_path / "a.safetensors"))[0]


def test_layers_that_hold_their_weights_turned_over(tmp_path: Path) -> None:
    """GPT-2's: a square one would take the wrong product without a word."""
    names = ["h.0.attn.c_proj", "h.0.mlp.c_proj"]
    save_file({f"{name}.weight": torch.ones(16, 16) for name in names}, tmp_path / "m.safetensors")
    (tmp_path / "in").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "fan_in_fan_out": True}
    (tmp_path / "in" / "adapter_config.json").write_text(json.dumps(config))
    tensors = {f"{PREFIX}{name}.lora_{side}.weight": raw(np.ones(shape), "F32") for name in names for side, shape in SQUARE}
    write(tmp_path / "in" / "adapter_model.safetensors", tensors)
    arguments = ("apply", str(tmp_path / "m.safetensors"), str(tmp_path / "in"), "-o", str(tmp_path / "o.safetensors"))
    code, _, err = run(*arguments)
    assert code != 0
    assert "fan_in_fan_out" in err
    (tmp_path / "in" / "adapter_config.json").write_text(json.dumps(config | {"fan_in_fan_out": False}))
    code, _, err = run(*arguments)
    assert code == 0, err


SQUARE = (("A", (2, 16)), ("B", (16, 2)))


# only PEFT's ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["oft", "boft", "ia3", "miss bat"])
@pytest.mark.parametrize("target", ["sd-scripts", "comfyui", "lycoris", "onetrainer", "other", "diffusers"])
def test_what_only_peft_reads_goes_nowhere_else(name: str, target: str, tmp_path: Path) -> None:
    adapter = read(trained(EXACT[name], tmp_path / "in"), tmp_path)
    with pytest.raises((NotRepresentableError, RequestError)):
        lorasurgery.convert(adapter, target)


@pytest.mark.parametrize("name", ["oft", "boft", "ia3", "miss bat", "saved", "every bias", "tokens", "embedding"])
@pytest.mark.parametrize("verb", ["split", "prune"])
def test_parts_of_a_folder_are_what_peft_makes_of_those_modules(name: str, verb: str, tmp_path: Path) -> None:
    folder, model = trained(EXACT[name], tmp_path / "in"), tmp_path / "base.safetensors"
    read(folder, tmp_path)
    if verb == "split":
        code, _, err = run("split", str(folder), "--base", str(model), "--by", "component", "-o", str(tmp_path / "part"))
        (out,) = tmp_path.glob("part-*") if code == 0 else (None,)
    else:
        out = tmp_path / "part"
        code, _, err = run(
            "prune", str(folder), "--base", str(model), "--drop", "re=no such module", "--scale", "1", "-o", str(out)
        )
    assert code == 0, err
    assert out is not None
    expected, found = merged(folder), merged(out)
    for key, tensor in expected.items():
        np.testing.assert_allclose(found[key], tensor, rtol=1e-12, atol=1e-13, err_msg=key)


def test_the_weights_of_oft_without_their_configuration_are_not_written_for_peft(tmp_path: Path) -> None:
    folder = trained(EXACT["oft"], tmp_path / "in")
    (folder / "adapter_model.safetensors").rename(tmp_path / "alone.safetensors")
    adapter = read(tmp_path / "alone.safetensors", tmp_path)
    with pytest.raises((NotRepresentableError, RequestError)):
        lorasurgery.save(lorasurgery.convert(adapter, "peft")[0], tmp_path / "out")


def test_rotations_are_not_dense_here(tmp_path: Path) -> None:
    for _, module in read(trained(EXACT["oft"], tmp_path / "in"), tmp_path):
        with pytest.raises(CannotError):
            module.dense()
