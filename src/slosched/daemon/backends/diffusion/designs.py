"""What each diffusion model consists of: the configs of its networks, its scheduler and its steps, as data.

The configs are those of the published models, from general knowledge and without their files; tests count the
parameters that they give. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from slosched.workloads.prompt_tokens import TOKENS, VOCABULARY

Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class TextDesign:
    """A CLIP text encoder. `config` is transformers' CLIPTextConfig.

    `penultimate`: its states are those before the last layer, without the last norm, as SDXL takes them.
    `pooled`: it also gives one projected vector for each prompt.
    """

    config: Config
    penultimate: bool = False
    pooled: bool = False


@dataclass(frozen=True, kw_only=True)
class Design:
    """A text-to-image model.

    `unet` is the config of diffusers' UNet2DConditionModel. `decoder` is that of its AutoencoderKL, or of
    its AutoencoderTiny where `tiny_decoder`. `scheduler` names a class of diffusers, and `schedule` is its
    config. With a `guidance` above 0 each step runs the UNet twice, with the prompt and with what stands for no
    prompt (zeros where `zero_negative`, otherwise the states of the empty prompt), and multiplies the
    difference of both by `guidance`. Latents are (4, latent, latent), images (3, image, image). Where
    `sized`, the UNet is told the size of the image.
    """

    unet: Config
    texts: tuple[TextDesign, ...]
    decoder: Config
    tiny_decoder: bool = False
    latent_scale: float
    scheduler: str
    schedule: Config
    steps: int
    guidance: float = 0.0
    zero_negative: bool = False
    sized: bool = False
    latent: int
    image: int
    #: Images are judged by EfficientNetV2-S; False: by three layers of our own, for small images.
    large_judge: bool = True

    @property
    def passes(self) -> int:
        """Rows of the UNet's batch for each request."""
        return 2 if self.guidance else 1


# ---------------------------------------------------------------------------------- text encoders

_TEXT: Config = {"vocab_size": VOCABULARY, "max_position_embeddings": TOKENS}
_CLIP_L: Config = {
    **_TEXT,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
#: Without its last layer, as Stable Diffusion 2 takes it.
_OPEN_CLIP_H: Config = {
    **_TEXT,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 1024,
}
_OPEN_CLIP_BIG_G: Config = {
    **_TEXT,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
_TINY_TEXT: Config = {
    **_TEXT,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 16,
}

# ------------------------------------------------------------------------------------- networks

_SD15_UNET: Config = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
_SD21_UNET: Config = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
_THREE_LEVELS: Config = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
}
#: An approximation: its paper gives the number of parameters, 319 million, and how it got there (one layer
#: for each block, no block in the middle, no attention at the full resolution). This has 318.7 million.
_SDXS_UNET: Config = {
    **_THREE_LEVELS,
    "sample_size": 64,
    "layers_per_block": 1,
    "mid_block_type": None,
    "cross_attention_dim": 1024,
}
_SDXL_UNET: Config = {
    **_THREE_LEVELS,
    "sample_size": 128,
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_TINY_UNET: Config = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}
_TINY_XL_UNET: Config = {
    **_TINY_UNET,
    "cross_attention_dim": 32,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 16,
}

_KL: Config = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
_TINY_KL: Config = {
    "block_out_channels": (16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
}

# ------------------------------------------------------------------------------------- schedules

_NOISE: Config = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "prediction_type": "epsilon",
}
_EULER = "EulerDiscreteScheduler"
_LEADING: Config = {**_NOISE, "timestep_spacing": "leading"}
_TRAILING: Config = {**_NOISE, "timestep_spacing": "trailing"}
#: The default pipeline of SD v1.5 uses PNDM, with 51 runs of the UNet for 50 steps. DiffServe's artifact names
#: DDIM, whose steps are equal and need no earlier outputs.
_DDIM: Config = {**_LEADING, "clip_sample": False, "set_alpha_to_one": False}

# --------------------------------------------------------------------------------------- the models

_SD15 = Design(
    unet=_SD15_UNET,
    texts=(TextDesign(config=_CLIP_L),),
    decoder=_KL,
    latent_scale=0.18215,
    scheduler="DDIMScheduler",
    schedule=_DDIM,
    steps=50,
    guidance=7.5,
    latent=64,
    image=512,
)
_SD_TURBO = replace(
    _SD15,
    unet=_SD21_UNET,
    texts=(TextDesign(config=_OPEN_CLIP_H),),
    scheduler=_EULER,
    schedule=_TRAILING,
    steps=1,
    guidance=0.0,
)
_SDXS = replace(_SD_TURBO, unet=_SDXS_UNET, decoder={}, tiny_decoder=True, latent_scale=1.0)
_SDXL = Design(
    unet=_SDXL_UNET,
    texts=(
        TextDesign(config=_CLIP_L, penultimate=True),
        TextDesign(config=_OPEN_CLIP_BIG_G, penultimate=True, pooled=True),
    ),
    decoder=_KL,
    latent_scale=0.13025,
    scheduler=_EULER,
    schedule=_LEADING,
    steps=50,
    guidance=5.0,
    zero_negative=True,
    sized=True,
    latent=128,
    image=1024,
)
_SDXL_LIGHTNING = replace(_SDXL, schedule=_TRAILING, steps=2, guidance=0.0)
_TINY_GUIDED = replace(
    _SD15,
    unet=_TINY_UNET,
    texts=(TextDesign(config=_TINY_TEXT),),
    decoder=_TINY_KL,
    steps=10,
    latent=8,
    image=16,
    large_judge=False,
)
_TINY = replace(_TINY_GUIDED, scheduler=_EULER, schedule=_TRAILING, steps=1, guidance=0.0)
_TINY_XL = replace(
    _TINY_GUIDED,
    unet=_TINY_XL_UNET,
    texts=(
        TextDesign(config=_TINY_TEXT, penultimate=True),
        TextDesign(config=_TINY_TEXT, penultimate=True, pooled=True),
    ),
    scheduler=_EULER,
    schedule=_LEADING,
    guidance=5.0,
    zero_negative=True,
    sized=True,
)

#: By the name behind "diffusion/". The small ones are for tests and for trying cascades without a GPU.
DESIGNS: dict[str, Design] = {
    "sd-turbo": _SD_TURBO,
    "sdxs": _SDXS,
    "sd15": _SD15,
    "sdxl-lightning": _SDXL_LIGHTNING,
    "sdxl": _SDXL,
    "tiny": _TINY,
    "tiny-guided": _TINY_GUIDED,
    "tiny-xl": _TINY_XL,
}
#: Those that are also offered with a judge fused to them, as NAME+judge: the light ones.
JUDGED = ("sd-turbo", "sdxs", "sdxl-lightning", "tiny")
