"""Diffusion models by name: their networks are diffusers' and transformers', built from configs alone.

Weights are random, from a seed made of the name; nothing is downloaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from slosched.daemon.backends.diffusion.designs import DESIGNS, JUDGED, Design, TextDesign
from slosched.daemon.backends.diffusion.judge import large_judge, tiny_judge
from slosched.daemon.backends.diffusion.model import DiffusionModel, TextEncoder
from slosched.daemon.backends.diffusion.schedule import Schedule
from slosched.daemon.backends.diffusion.weights import filled
from slosched.daemon.backends.zoo import ModelSpec, import_transformers, taking
from slosched.errors import MissingPackage
from slosched.signature import Tensor
from slosched.workloads.prompt_tokens import TOKENS, VOCABULARY

_PREFIX, _JUDGE = "diffusion/", "+judge"
_INPUTS = (Tensor("tokens", "int32", (TOKENS,)), Tensor("seed", "int64", (1,)))
#: Classes of diffusers that are used; naming one imports the file behind it.
_CLASSES = (
    "UNet2DConditionModel",
    "AutoencoderKL",
    "AutoencoderTiny",
    "DDIMScheduler",
    "EulerDiscreteScheduler",
)


def diffusion_specs() -> dict[str, ModelSpec]:
    """The diffusion models by the name that a worker offers, "diffusion/sd15". Builds none of them.

    Imports diffusers and transformers. Raises MissingPackage.
    """
    import_diffusers()
    names = [*DESIGNS, *[name + _JUDGE for name in JUDGED]]
    return {_PREFIX + name: _spec(_PREFIX + name) for name in names}


def import_diffusers() -> Any:
    """The diffusers package, with the classes that are used. Raises MissingPackage."""
    import_transformers()
    try:
        import diffusers

        for name in _CLASSES:
            getattr(diffusers, name)
    except (ImportError, RuntimeError, AttributeError) as error:
        raise MissingPackage(
            f"the models of diffusion need diffusers, and it is not installed or does not fit this torch and "
            f"transformers ({error}): pip install 'slosched[torch,models,diffusion]', or leave them out"
        ) from None
    return diffusers


def _spec(name: str) -> ModelSpec:
    judged = name.endswith(_JUDGE)
    spec = ModelSpec(
        name=name,
        build=lambda: build(name),
        input_shape=(),
        input_high=VOCABULARY,
        labels=("text",),
        output="image",
        score="score" if judged else "",
    )
    return taking(spec, _INPUTS)


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model `name`, "diffusion/sd15" or with "+judge", on the CPU, in eval mode, its weights in `dtype`.

    Raises MissingPackage.
    """
    judged = name.endswith(_JUDGE)
    design = DESIGNS[name.removeprefix(_PREFIX).removesuffix(_JUDGE)]
    judge = (large_judge if design.large_judge else tiny_judge)(name) if judged else None
    # A judge changes nothing of the answer: the networks' weights are those of the name without it.
    seed = name.removesuffix(_JUDGE)
    unet, texts, decoder = networks(design)
    # A step of SD-Turbo takes 7.1 ms in this format, and 9.2 otherwise (H200); the decoder would be slower.
    steps: Any = filled(unet, f"{seed} unet", dtype)
    model = DiffusionModel(
        design,
        unet=steps.to(memory_format=torch.channels_last),
        texts=[
            TextEncoder(
                filled(each, f"{seed} text {place}", dtype),
                penultimate=text.penultimate,
                pooled=text.pooled,
            )
            for place, (text, each) in enumerate(zip(design.texts, texts, strict=True))
        ],
        decoder=_centred(filled(decoder, f"{seed} decoder", dtype)),
        schedule=Schedule(scheduler(design), design.steps),
        judge=None if judge is None else judge.to(dtype),
    )
    return model.eval()


def _centred(decoder: Any) -> nn.Module:
    """`decoder`, whose images lie about the middle of their range and seldom leave it, as trained ones do."""
    tiny = hasattr(decoder, "layers")  # DecoderTiny's images lie in 0..1 before it doubles them
    last = decoder.layers[-1] if tiny else decoder[1].conv_out
    with torch.no_grad():
        last.weight.mul_(0.5)
        last.bias.fill_(0.5 if tiny else 0.0)
    module: nn.Module = decoder
    return module


def scheduler(design: Design) -> Any:
    """A new scheduler of diffusers, as `design` says."""
    return getattr(import_diffusers(), design.scheduler)(**design.schedule)


def networks(design: Design) -> tuple[Any, list[Any], nn.Module]:
    """The UNet, the text encoders and the decoder, without weights, on the device "meta"."""
    diffusers = import_diffusers()
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**design.unet)
        texts = [_text_model(text) for text in design.texts]
        if design.tiny_decoder:
            return unet, texts, diffusers.AutoencoderTiny(**design.decoder).decoder
        whole = diffusers.AutoencoderKL(**design.decoder)
    return unet, texts, nn.Sequential(whole.post_quant_conv, whole.decoder)


def _text_model(text: TextDesign) -> Any:
    transformers = import_transformers()
    config = transformers.CLIPTextConfig(**text.config, attn_implementation="sdpa")
    kind = "CLIPTextModelWithProjection" if text.pooled else "CLIPTextModel"
    return getattr(transformers, kind)(config)
