"""Write small adapters of the families that multiply a weight with the real PEFT, LyCORIS and OneTrainer, for the tests.

    python scripts/make_multiplied_fixtures.py                                every fixture but OneTrainer's
    python scripts/make_multiplied_fixtures.py --onetrainer CHECKOUT          OneTrainer's, too
    python scripts/make_multiplied_fixtures.py --early-peft WHEEL             only those of an earlier PEFT (0.12, 0.15)
    python scripts/make_multiplied_fixtures.py NAME ...                       some of them

Base weights are numbers that only depend on the layer's name (tests/probes.py), so that the tests can make the model again.
Beside each adapter stands its truth, ``NAME.truth.safetensors``: what the producer itself makes of every weight less that
weight, as ``left.T @ change @ right``; ``NAME|bias`` where it changes the bias. A second run writes the same values.

Needs the test extra. Versions that wrote what is in the repository: tests/fixtures/multiplied/README.md.
"""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch
from zlib import crc32

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.make_fixtures import CONV_1X1, CONV_3X3, CONVS, LINEAR, SD15, Truth, exactly, on_meta, real  # noqa: E402
from tests.probes import base_weight, bilinear  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

OUT = ROOT / "tests" / "fixtures" / "multiplied"
WIDER = "down_blocks.1.resnets.0.conv1"
"""A convolution with more output than input channels."""


def unet(targets: Sequence[str]) -> torch.nn.Module:
    """Stable Diffusion 1.5's UNet on the meta device, but for these layers."""
    model = on_meta("UNet2DConditionModel", **SD15)
    real(model, targets)
    for name in targets:
        for kind, parameter in model.get_submodule(name).named_parameters():
            parameter.data = torch.from_numpy(base_weight(f"{name}.{kind}", tuple(parameter.shape)))
    return model


def around(parameter: torch.nn.Parameter, centre: float, size: float, dtype: torch.dtype) -> None:
    """Random values that ``dtype`` holds."""
    parameter.data = (centre + size * torch.randn(parameter.shape)).to(dtype).to(parameter.dtype)


# PEFT ------------------------------------------------------------------------------------------------------------------


class NoKernel:
    """What PEFT's CUDA extension does for BOFT, which would take it for a butterfly of one set without it."""

    @staticmethod
    def forward(blocks: torch.Tensor) -> list[torch.Tensor]:
        """(m, n, b, b) to (m, n b, n b)."""
        return [torch.stack([torch.block_diag(*one) for one in blocks])]  # type: ignore[no-untyped-call]


def peft(config: Any, targets: Sequence[str] = CONVS, *, size: float = 0.1, sets: int = 1) -> Callable[[Path], Truth]:  # noqa: ANN401
    """A builder of a folder as ``save_pretrained`` writes it."""

    def build(path: Path) -> Truth:
        from peft import get_peft_model

        config.target_modules = list(targets)
        with patch("peft.tuners.boft.layer.get_fbd_cuda", lambda: NoKernel() if sets > 1 else None, create=True):
            wrapped = get_peft_model(unet(targets), config)
            for name, parameter in wrapped.named_parameters():
                if any(f".{word}." in name for word in ("ia3_l", "boft_s", "oft_s")):
                    around(parameter, 1.0, 0.2, torch.float16)
                elif any(f".{word}." in name for word in ("oft_R", "oft_r", "boft_R", "miss_block")):
                    around(parameter, 0.0, size, torch.float16)
            wrapped.save_pretrained(path)
            (path / "README.md").unlink()
            return merged(wrapped)

    return build


def merged(wrapped: Any) -> Truth:  # noqa: ANN401  a PeftModel
    """What PEFT's ``merge`` makes of the weights and biases, in float64."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    truth: Truth = {}
    for name, layer in wrapped.named_modules():
        if isinstance(layer, BaseTunerLayer):
            stem, base = "base_model.model." + name.removeprefix("base_model.model."), layer.get_base_layer()
            layer.double()
            before = {kind: parameter.detach().clone() for kind, parameter in base.named_parameters()}
            layer.merge()
            truth[stem] = base.weight.detach() - before["weight"]
            if "bias" in before and not torch.equal(base.bias, before["bias"]):
                truth[f"{stem}|bias"] = base.bias.detach() - before["bias"]
    return truth


def peft_fixtures() -> dict[str, Callable[[Path], Truth]]:
    """OFT in its variants, BOFT of one and of several sets, MiSS' bat, (IA)^3 where only the configuration tells the axis."""
    from peft import BOFTConfig, IA3Config, MissConfig, OFTConfig

    return {
        "peft_oft": peft(OFTConfig(oft_block_size=8)),
        "peft_oft_cayley": peft(OFTConfig(r=64, oft_block_size=0, use_cayley_neumann=False), (*LINEAR[:2], CONV_1X1)),
        "peft_oft_terms": peft(OFTConfig(oft_block_size=4, num_cayley_neumann_terms=7), LINEAR[:2]),
        "peft_oft_three_terms": peft(OFTConfig(oft_block_size=4, num_cayley_neumann_terms=3), LINEAR[:1]),
        "peft_oft_shared": peft(OFTConfig(oft_block_size=16, block_share=True), (*LINEAR[:2], CONV_3X3)),
        "peft_coft": peft(OFTConfig(oft_block_size=8, coft=True, eps=1.5), (*LINEAR[:2], CONV_1X1)),
        "peft_boft": peft(BOFTConfig(boft_block_size=4), size=0.3),
        "peft_boft_sets": peft(
            BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=3), (*LINEAR[:2], CONV_1X1), size=0.3, sets=3
        ),
        "peft_bat": peft(MissConfig(r=8, init_weights="bat"), LINEAR),
        "peft_ia3_conv": peft(IA3Config(feedforward_modules=[LINEAR[0], CONV_3X3]), (*LINEAR, CONV_1X1, CONV_3X3, WIDER)),
    }


def early_fixtures() -> dict[str, Callable[[Path], Truth]]:
    """OFT as PEFT wrote it before 0.16: for columns, with a factor for each row, or before 0.14 for rows."""
    from peft import OFTConfig, __version__

    minor = int(__version__.split(".")[1])
    name = "peft_early_oft" if minor >= COLUMNS_SINCE else "peft_earliest_oft"
    return {
        name: peft(OFTConfig(r=40), (*LINEAR[:2], CONV_1X1), size=0.3),
        f"{name}_shared": peft(OFTConfig(r=20, block_share=True, coft=True, eps=0.004), LINEAR[:2], size=0.3),
    }


COLUMNS_SINCE = 14
"""PEFT 0.14's OFT turns columns, as all later ones do."""

# LyCORIS ---------------------------------------------------------------------------------------------------------------


def lycoris(targets: Sequence[str] = CONVS, **args: Any) -> Callable[[Path], Truth]:  # noqa: ANN401  LyCORIS' options
    """A builder of what LyCORIS writes as sd-scripts' network module."""

    def build(path: Path) -> Truth:
        from lycoris.kohya import LycorisNetworkKohya

        model = unet(targets)
        LycorisNetworkKohya.apply_preset({"enable_conv": True, "unet_target_module": [], "unet_target_name": exactly(targets)})
        fields = {"lora_dim": 10, "conv_lora_dim": 10, "alpha": 3, "conv_alpha": 5} | args
        network = LycorisNetworkKohya(None, model, warn_on_unmatched=False, **fields)
        network.apply_to(None, model, apply_text_encoder=False, apply_unet=True)
        truth: Truth = {}
        with torch.no_grad():
            for module in network.loras:
                for name, parameter in module.named_parameters():
                    around(parameter, float(name == "rescale"), 0.2 if name == "rescale" else 0.1, torch.float16)
                before = module.org_module[0].weight
                truth[module.lora_name] = (module.get_merged_weight(1.0)[0].reshape(before.shape) - before).double()
        network.save_weights(str(path), None, {"ss_network_module": "lycoris.kohya"})
        return truth

    return build


LYCORIS: dict[str, Callable[[Path], Truth]] = {
    "lycoris_oft.safetensors": lycoris(network_module="diag-oft"),
    "lycoris_oft_rescaled.safetensors": lycoris(network_module="diag-oft", constraint=0.003, rescaled=True),
    "lycoris_boft.safetensors": lycoris((LINEAR[0], CONV_1X1, CONV_3X3), network_module="boft"),
    "lycoris_boft_rescaled.safetensors": lycoris(
        (LINEAR[0], CONV_1X1, CONV_3X3), network_module="boft", constraint=0.01, rescaled=True
    ),
    "lycoris_glora.safetensors": lycoris(network_module="glora", lora_dim=3, conv_lora_dim=2),
    "lycoris_ia3_conv.safetensors": lycoris((*CONVS, WIDER), network_module="ia3"),
    "lycoris_ia3_input.safetensors": lycoris((*CONVS, WIDER), network_module="ia3", train_on_input=True),
}

# OneTrainer ------------------------------------------------------------------------------------------------------------


def onetrainer(checkout: Path, *, scaled: bool, shared: bool = False) -> Callable[[Path], Truth]:
    """A builder of OneTrainer's OFT, by the module class of a checkout."""

    def build(path: Path) -> Truth:
        sys.path.insert(0, str(checkout))
        with patch.dict(sys.modules, {"parse": object()}):  # it parses names of files, which nothing here has
            from modules.module.LoRAModule import OFTModule  # type: ignore[import-not-found]

        model = unet(CONVS)
        tensors: dict[str, torch.Tensor] = {}
        truth: Truth = {}
        for name in CONVS:
            layer: Any = model.get_submodule(name)
            stem = "lora_unet_" + name.replace(".", "_")
            module = OFTModule(stem, layer, 8, shared, scaled)
            around(module.oft_R.weight, 0.0, 0.2 if scaled else 0.1, torch.float16)
            tensors |= {f"{stem}.{key}": value.detach().clone() for key, value in module.state_dict().items()}
            layer.double()
            module.double()
            truth[stem] = turned(module, layer) - layer.weight.detach()
        save_file(tensors, path)
        return truth

    return build


def turned(module: Any, layer: Any) -> torch.Tensor:  # noqa: ANN401  OneTrainer's
    """The weight with which the layer now works: its outputs for unit vectors, or what reaches the convolution."""
    module.hook_to_module()
    if isinstance(layer, torch.nn.Linear):
        units = torch.eye(layer.in_features, dtype=torch.float64)
        return (module(units) - module(torch.zeros_like(units))).T.detach()  # type: ignore[no-any-return]
    module.op = lambda _x, weight, _bias, **_more: weight
    return module(torch.zeros(1)).detach()  # type: ignore[no-any-return]


def onetrainer_fixtures(checkout: Path) -> dict[str, Callable[[Path], Truth]]:
    """Plain, scaled, and scaled with one block for all."""
    return {
        "onetrainer_oft.safetensors": onetrainer(checkout, scaled=False),
        "onetrainer_oft_scaled.safetensors": onetrainer(checkout, scaled=True),
        "onetrainer_oft_shared.safetensors": onetrainer(checkout, scaled=True, shared=True),
    }


def make(name: str, build: Callable[[Path], Truth]) -> None:
    """Write one fixture and its truth."""
    torch.manual_seed(crc32(name.encode()))
    path = OUT / name
    if path.is_dir():
        shutil.rmtree(path)
    truth = build(path)
    stem = name.removesuffix(".safetensors")
    save_file({key: torch.from_numpy(bilinear(own.numpy())) for key, own in truth.items()}, OUT / f"{stem}.truth.safetensors")
    for written in (path, *OUT.glob(f"{stem}.truth.*")):
        written.chmod(0o755 if written.is_dir() else 0o644)
    print(f"{name}: {len(truth)} truths")


def main(arguments: Sequence[str]) -> None:
    """Write the named fixtures, or all that can be."""
    logging.getLogger("LyCORIS").setLevel(logging.WARNING)
    OUT.mkdir(parents=True, exist_ok=True)
    names = list(arguments)
    if "--early-peft" in names:
        at = names.index("--early-peft")
        unet(())  # by Diffusers with the PEFT that it wants
        for module in [own for own in sys.modules if own.partition(".")[0] == "peft"]:
            del sys.modules[module]
        sys.path.insert(0, names[at + 1])
        del names[at : at + 2]
        builders = early_fixtures()
    else:
        builders = peft_fixtures() | LYCORIS
    if "--onetrainer" in names:
        at = names.index("--onetrainer")
        builders |= onetrainer_fixtures(Path(names[at + 1]))
        del names[at : at + 2]
    for name in names or builders:
        make(name, builders[name])


if __name__ == "__main__":
    main(sys.argv[1:])
