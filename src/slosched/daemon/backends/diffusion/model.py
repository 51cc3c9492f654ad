"""A diffusion model as it is served: prompt and seed to an image, in equal steps (stepped.py).

    begin   the text encoders, and the first latents from the seed
    step    one run of the UNet, on twice the batch with guidance, and the scheduler's step
    finish  the decoder, and the judge if there is one

Nothing here waits for the device, so each part can be a CUDA graph. Latents are float32 throughout; the
networks run in the precision of their weights, the decoder too, which diffusers runs in float32 for SDXL.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from slosched.daemon.backends.diffusion.designs import Design
from slosched.daemon.backends.diffusion.judge import Judge
from slosched.daemon.backends.diffusion.noise import normal
from slosched.daemon.backends.diffusion.schedule import Schedule
from slosched.daemon.backends.stepped import Stepped
from slosched.workloads.prompt_tokens import hashed_tokens

LATENT_CHANNELS = 4


class TextEncoder(nn.Module):
    """transformers' CLIP text `model`: token ids (batch, tokens) to states (batch, tokens, width), and where it
    is `pooled` to one vector for each prompt (batch, projection).
    """

    def __init__(self, model: Any, *, penultimate: bool, pooled: bool) -> None:
        super().__init__()
        self.model, self.penultimate, self.pooled = model, penultimate, pooled

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        # No mask: CLIP's text encoder sees what lies before a token, padding or not.
        found = self.model(tokens, output_hidden_states=self.penultimate)
        states = found.hidden_states[-2] if self.penultimate else found.last_hidden_state
        return states, found.text_embeds if self.pooled else None


class DiffusionModel(Stepped):
    """`design` with these networks. Inputs of a request are `tokens`, int32 (77,), and `seed`, int64 (1,).

    It answers with `image`, float32 (3, height, width) within 0..1, and with `score`, float32 (), of `judge`.
    Images are not rounded to bytes: rows of batches of different sizes are compared before a model is served,
    and rounding turns the last bit of a float into a step of an integer.
    """

    empty: torch.Tensor
    size: torch.Tensor

    def __init__(
        self,
        design: Design,
        *,
        unet: Any,
        texts: Sequence[TextEncoder],
        decoder: nn.Module,
        schedule: Schedule,
        judge: Judge | None,
    ) -> None:
        super().__init__()
        self.design, self.steps = design, design.steps
        self.unet, self.texts, self.decoder = unet, nn.ModuleList(texts), decoder
        self.schedule, self.judge = schedule, judge
        empty = torch.tensor([hashed_tokens("")], dtype=torch.int32)
        self.register_buffer("empty", empty)
        # The original size, the corner of the crop, and the target size: SDXL's pipeline's for a whole image.
        size = torch.tensor([[design.image, design.image, 0, 0, design.image, design.image]])
        self.register_buffer("size", size)

    def begin(  # type: ignore[override]  # the names of the inputs are the model's own
        self, tokens: torch.Tensor, seed: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """The state: latents (batch, 4, latent, latent) float32; the number of the next step (batch,) int64;
        the texts' states (batch, passes, tokens, width); and where the design is `sized` the texts' vectors
        (batch, passes, projection).
        """
        design = self.design
        latent = (LATENT_CHANNELS, design.latent, design.latent)
        latents = normal(seed[:, 0], latent) * self.schedule.first_scale
        number = torch.zeros_like(seed[:, 0])
        context = self._context(tokens)
        return (latents, number, *(context if design.sized else context[:1]))

    def _context(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """What the UNet gets of the prompts: the states, and the vectors if an encoder gives them."""
        rows, design = len(tokens), self.design
        empty_first = design.passes > 1 and not design.zero_negative
        if empty_first:
            tokens = torch.cat([self.empty, tokens])
        states, vectors = [], []
        for encoder in self.texts:
            found, vector = encoder(tokens)
            states.append(found)
            if vector is not None:
                vectors.append(vector)
        context = [torch.cat(each, dim=-1) for each in (states, vectors) if each]
        if empty_first:
            pairs = [(each[:1].expand(rows, *each.shape[1:]), each[1:]) for each in context]
        elif design.passes > 1:
            pairs = [(torch.zeros_like(each), each) for each in context]
        else:
            return [each[:, None] for each in context]
        return [torch.stack(pair, dim=1) for pair in pairs]

    def step(self, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        latents, number, *context = state
        passes = self.design.passes
        scale, time, keep, move = self.schedule.at(number)
        sample = (latents * _over(scale)).to(context[0].dtype).repeat(passes, 1, 1, 1)
        # The rows of a pass lie together, as in diffusers' pipelines: without the prompt first.
        by_pass = [each.transpose(0, 1).flatten(0, 1) for each in context]
        added = (
            {"text_embeds": by_pass[1], "time_ids": self._sizes(by_pass[1])}
            if len(by_pass) > 1
            else None
        )
        noise = self.unet(
            sample,
            time.repeat(passes),
            encoder_hidden_states=by_pass[0],
            added_cond_kwargs=added,
            return_dict=False,
        )[0].float()
        if passes > 1:
            without, noise = noise.chunk(2)
            noise = without + self.design.guidance * (noise - without)
        return (latents * _over(keep) + noise * _over(move), number + 1, *context)

    def _sizes(self, vectors: torch.Tensor) -> torch.Tensor:
        return self.size.to(vectors.dtype).expand(len(vectors), -1)

    def finish(self, *state: torch.Tensor) -> dict[str, torch.Tensor]:
        latents, context = state[0], state[2]
        decoded = self.decoder((latents / self.design.latent_scale).to(context.dtype))
        image = (decoded / 2 + 0.5).clamp(0, 1)
        answer = {"image": image.float()}
        if self.judge is not None:
            answer["score"] = self.judge(image)
        return answer


def _over(factor: torch.Tensor) -> torch.Tensor:
    """(batch,) as a factor of images."""
    return factor[:, None, None, None]
