"""What a worker serves: `heavy`, a diffusion model of 50 steps, and `light`, one step and a judge.

Both take `label` (1,), int64, of which the last decimal digit counts, and `seed` (1,), int64, of the noise
that an image begins with; the same request gives both programs the same noise. Both answer with ink (1, 8,
8) within 0..1. The light program adds `score`, the judge's probability that its answer is a real image.
"""

from __future__ import annotations

import math
from importlib import resources
from pathlib import Path

import torch
from torch import nn

from slosched.cascade.digits.networks import CLASSES, PIXELS, SIDE, Recogniser, UNet
from slosched.cascade.digits.noise import normal
from slosched.daemon.backends.stepped import Stepped
from slosched.errors import InvalidConfig, MissingPackage

#: Steps of the diffusion model.
STEPS = 50
#: The last angle before pure noise; there the image has no part in it.
_NOISE_ANGLE = math.pi / 2
#: Names of the files of weights, without .safetensors.
TEACHER, STUDENT, JUDGE, CLASSIFIER = "teacher", "student", "judge", "classifier"


def new_network(name: str) -> nn.Module:
    """The network of that name, its weights not yet trained."""
    if name == TEACHER:
        return UNet(24, 48)
    if name == STUDENT:
        return UNet(8, 16, condition=32)
    if name == JUDGE:
        return Recogniser(12, 24, 24, 1)
    return Recogniser(16, 32, 24, CLASSES)


class Heavy(Stepped):
    """The teacher: x = cos(a) image + sin(a) noise, from a = pi/2 to 0 in equal steps of DDIM.

    The network predicts v = cos(a) noise - sin(a) image, so that a step turns x by a fixed angle:
    x' = cos(d) x - sin(d) v (Salimans and Ho, 2022, appendix D). Nothing is drawn between the steps.
    """

    steps = STEPS

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        angles = [_NOISE_ANGLE * (STEPS - step) / STEPS for step in range(STEPS)]
        self.register_buffer("angles", torch.tensor(angles), persistent=False)
        turn = _NOISE_ANGLE / STEPS
        self._keep, self._change = math.cos(turn), math.sin(turn)

    def begin(self, *args: torch.Tensor, **inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """From `label` and `seed`, (batch, 1) each, in this order or by name: the image, the label, the number
        of the step."""
        given = dict(zip(("label", "seed"), args, strict=False)) | inputs
        label, seed = given["label"], given["seed"]
        return first_noise(seed), _class_of(label), torch.zeros_like(label[:, 0])

    def step(self, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, label, done = state
        angles: torch.Tensor = self.get_buffer("angles")
        v = self.network(x, angles.index_select(0, done).to(x.dtype), label)
        return self._keep * x - self._change * v, label, done + 1

    def finish(self, *state: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"answer": as_ink(state[0])}


class Light(nn.Module):
    """The student, and the judge of its answers."""

    def __init__(self, network: nn.Module, judge: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.judge = judge

    def forward(self, label: torch.Tensor, seed: torch.Tensor) -> dict[str, torch.Tensor]:
        answer = as_ink(in_one_step(self.network, first_noise(seed), _class_of(label)))
        return {"answer": answer, "score": self.judge(answer)[:, 0].sigmoid()}


def in_one_step(network: nn.Module, noise: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """The student's image within -1..1: at a = pi/2 the network's v is the image's negative."""
    image: torch.Tensor = -network(noise, torch.full_like(noise[:, 0, 0, 0], _NOISE_ANGLE), label)
    return image


def first_noise(seed: torch.Tensor) -> torch.Tensor:
    """The noise (batch, 1, 8, 8) that an image begins with, of seeds (batch, 1)."""
    return normal(seed[:, 0], PIXELS).reshape(-1, 1, SIDE, SIDE)


def as_ink(image: torch.Tensor) -> torch.Tensor:
    """An image of -1..1 as ink within 0..1."""
    return (image * 0.5 + 0.5).clamp(0, 1)


def _class_of(label: torch.Tensor) -> torch.Tensor:
    return torch.remainder(label[:, 0], CLASSES)


# ----------------------------------------------------------------------------------- with weights


def trained(name: str, folder: Path | None = None) -> nn.Module:
    """The network of that name with its trained weights, in eval mode: those of the package, or of `folder`.

    Weights lie in float16 and are float32 here. Raises MissingPackage, and InvalidConfig where the file is
    missing or is of another network.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load
    except ImportError:
        raise MissingPackage(
            "trained digits need safetensors, which is not installed: pip install 'slosched[digits]'"
        ) from None
    place = resources.files(__package__) / "weights" if folder is None else folder
    file = place.joinpath(f"{name}.safetensors")
    network = new_network(name)
    try:
        weights = {key: each.float() for key, each in load(file.read_bytes()).items()}
        network.load_state_dict(weights)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InvalidConfig(
            f"no weights of the {name} in {file} ({error}); `slosched cascade digits train` makes them"
        ) from None
    return network.eval()


def light(folder: Path | None = None) -> Light:
    """The light program, for a worker's file: factory = "slosched.cascade.digits.models:light"."""
    return Light(trained(STUDENT, folder), trained(JUDGE, folder)).eval()


def heavy(folder: Path | None = None) -> Heavy:
    """The heavy program, for a worker's file: factory = "slosched.cascade.digits.models:heavy"."""
    return Heavy(trained(TEACHER, folder)).eval()
