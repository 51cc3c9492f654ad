"""Text-to-image models, step by step and without graphs: SDXL as HotCarbon-24 runs it, and its relatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from slosched.daemon.backends.diffusion.building import build, import_diffusers
from slosched.daemon.backends.diffusion.designs import DESIGNS
from slosched.daemon.backends.eager.model import EagerModel, dtype_of
from slosched.errors import InvalidConfig, UnknownName
from slosched.share_spec import Job
from slosched.workloads.prompt_tokens import hashed_tokens

_PREFIX = "diffusion/"
_PROMPT = "a small red house beside a quiet lake, in the light of the evening"


class Diffusion(EagerModel):
    """`diffusion`: SDXL in float16, 50 steps with guidance (two rows of a batch), 1024 x 1024, and the decoder.

    `diffusion/NAME` is another design of daemon/backends/diffusion. The answer is images of bytes.
    """

    note = "diffusers' networks from configs, the decoder in the same dtype; one prompt by hashed token ids"

    def __init__(self, job: Job, device: torch.device, seed: int, *, small: bool = False) -> None:
        import_diffusers()
        name = job.model.removeprefix(_PREFIX)
        name = "tiny-xl" if small else "sdxl" if name == "diffusion" else name
        if name not in DESIGNS:
            raise UnknownName("diffusion model", job.model, [_PREFIX + each for each in DESIGNS])
        side = DESIGNS[name].image
        if job.size not in ((0, 0), (side, side)):
            raise InvalidConfig(
                f"job {job.name!r}: {job.model} makes images of {side}x{side} only; leave the size out"
            )
        dtype = dtype_of(job.dtype, torch.float16 if device.type == "cuda" else torch.float32)
        with torch.inference_mode(False):
            model: Any = build(_PREFIX + name, dtype)
        self.module = torch.nn.Module.to(model, device).requires_grad_(False)
        self._device, self._model = device, model
        self._tokens = torch.tensor([hashed_tokens(_PROMPT)] * job.batch, dtype=torch.int32)
        self._seeds = torch.arange(job.batch, dtype=torch.int64)[:, None] + seed % 2**62

    def run(self, between: Callable[[], None]) -> Sequence[torch.Tensor]:
        model = self._model
        state = model.begin(self._tokens.to(self._device), self._seeds.to(self._device))
        for _ in range(model.steps):
            between()
            state = model.step(*state)
        between()
        image = model.finish(*state)["image"]
        return [(image * 255).round().to(torch.uint8)]
