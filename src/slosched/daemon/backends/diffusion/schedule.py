"""The numbers of each denoising step, as a table on the device that is indexed by the number of the step.

Deterministic schedulers without a history take the latents x and the predicted noise e to a x + b e. The
coefficients are read off diffusers' own scheduler, which is asked for the step of x = 1, e = 0, and of x = 0,
e = 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

#: Columns of the table.
_IN, _TIME, _KEEP, _MOVE = range(4)


class Schedule(nn.Module):
    """The steps of `scheduler`, one of diffusers', in `steps` steps.

    Raises ValueError for a scheduler whose step is not a x + b e.
    """

    table: torch.Tensor

    def __init__(self, scheduler: Any, steps: int) -> None:
        super().__init__()
        scheduler.set_timesteps(steps)
        self.steps = steps
        #: The standard deviation of the first latents.
        self.first_scale = float(scheduler.init_noise_sigma)
        rows = []
        for time in scheduler.timesteps:
            scaled = scheduler.scale_model_input(torch.ones(1), time)
            probe = [torch.tensor([0.0, 1.0, 1.0]), time, torch.tensor([1.0, 0.0, 1.0])]
            keep, move, both = scheduler.step(*probe, return_dict=False)[0].tolist()
            if abs(keep + move - both) > 1e-3 * max(abs(keep), abs(move), 1.0):
                raise ValueError(f"a step of {type(scheduler).__name__} is not linear")
            rows.append([float(scaled), float(time), keep, move])
        if len(rows) != steps:
            raise ValueError(f"{type(scheduler).__name__} runs {len(rows)} times for {steps} steps")
        # As the bits of float32 numbers, which stay as they are when a worker converts the weights to float16:
        # the time 981 and sigmas have more digits than that holds.
        bits = torch.tensor(rows, dtype=torch.float32).view(torch.int32)
        self.register_buffer("table", bits)

    def at(self, number: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The factor of the UNet's input, the time, a and b of the steps `number`, int64 (batch,).

        Each is float32 (batch,). A number past the last step is taken as the last.
        """
        row = self.table.view(torch.float32).index_select(0, number.clamp(max=self.steps - 1))
        return row[:, _IN], row[:, _TIME], row[:, _KEEP], row[:, _MOVE]
