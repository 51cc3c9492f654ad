"""Trains all networks from one seed, on a CPU and in one thread: the teacher, its student, the judge, the
classifier.

The same seed, recipe and versions give the same weights on the same machine. On another processor, or with
another version of torch, they may differ in the last bits, and after some thousands of steps in more than
those.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from slosched.cascade.digits.data import LEVELS, Digits, Part, as_stored, load_digits
from slosched.cascade.digits.models import (
    CLASSIFIER,
    JUDGE,
    STUDENT,
    TEACHER,
    Heavy,
    as_ink,
    first_noise,
    in_one_step,
    new_network,
)
from slosched.cascade.digits.networks import CLASSES, parameters_of
from slosched.cascade.digits.served import one_thread
from slosched.clock import now_ns
from slosched.output_files import write_file
from slosched.units import NS_PER_S

#: Changes whenever this file, or a network, makes other weights of the same recipe.
SCRIPT_VERSION = 1
MANIFEST = "weights.json"
NAMES = (TEACHER, STUDENT, JUDGE, CLASSIFIER)

Show = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """How long each network learns: numbers of steps, of `batch` images each, and of images that the
    teacher makes.
    """

    seed: int = 0
    batch: int = 128
    teacher_steps: int = 2400
    pairs: int = 3072
    student_steps: int = 1500
    judge_steps: int = 1500
    classifier_steps: int = 500


def quick_recipe(seed: int = 0) -> Recipe:
    """A few steps of each: seconds, and images of no use."""
    return Recipe(
        seed,
        batch=16,
        teacher_steps=6,
        pairs=32,
        student_steps=6,
        judge_steps=4,
        classifier_steps=4,
    )


#: Seeds of requests whose images the networks learn from. Measurements take seeds from 0 up, far below these.
_PAIR_SEEDS, _JUDGE_SEEDS = 1 << 40, 1 << 41
#: How many images are made at a time.
_ROWS = 256


def train(out: Path, recipe: Recipe, *, show: Show = lambda line: None) -> dict[str, Any]:
    """Train everything, write the weights and weights.json into `out`, and return what that says.

    `show` gets lines of progress. Raises MissingPackage, and what `write_file` raises.
    """
    digits = load_digits()
    started_ns = now_ns()
    with _repeatable(recipe.seed):
        trainer = _Trainer(digits, recipe, show)
        networks = trainer.all()
    took_s = (now_ns() - started_ns) / NS_PER_S
    show(f"trained in {took_s:.0f} s")
    return _write(out, networks, recipe, took_s)


def train_classifier(recipe: Recipe, *, show: Show = lambda line: None) -> nn.Module:
    """The classifier alone, in eval mode: seconds. Nothing is written.

    From ink (batch, 1, 8, 8) to logits (batch, 10). It has the recipe's seed, but draws other numbers than the
    one that `train` makes last. Raises MissingPackage.
    """
    digits = load_digits()
    with _repeatable(recipe.seed):
        return _rounded(_Trainer(digits, recipe, show).classifier())


@contextmanager
def _repeatable(seed: int) -> Iterator[None]:
    """One thread, as the order of sums depends on their number; and the seed. The caller's are restored."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        with one_thread():
            yield
    finally:
        torch.set_rng_state(state)


class _Trainer:
    def __init__(self, digits: Digits, recipe: Recipe, show: Show) -> None:
        self._digits = digits
        self._recipe = recipe
        self._show = show

    def all(self) -> dict[str, nn.Module]:
        """The networks in the order in which they need one another, by name."""
        teacher = _rounded(self._teacher())
        pairs = _requests(teacher, self._recipe.pairs, self._show)
        student = _rounded(self._student(pairs))
        judge = _rounded(self._judge(pairs, student))
        classifier = _rounded(self.classifier())
        return dict(zip(NAMES, (teacher, student, judge, classifier), strict=True))

    def _teacher(self) -> nn.Module:
        """Learns v at angles from the whole quarter turn; the weights are means over its last steps."""
        network, steps = new_network(TEACHER), self._recipe.teacher_steps
        ink, labels = _tensors(self._digits.learn)
        recent: Any = torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)  # type: ignore[no-untyped-call]
        mean = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=recent)

        def loss() -> torch.Tensor:
            rows = torch.randint(len(ink), (self._recipe.batch,))
            image = 2 * _dithered(ink[rows]) - 1
            noise = torch.randn_like(image)
            angle = (math.pi / 2) * torch.rand(len(rows))
            cos, sin = torch.cos(angle)[:, None, None, None], torch.sin(angle)[:, None, None, None]
            predicted = network(cos * image + sin * noise, angle, labels[rows])
            return mse_loss(predicted, cos * noise - sin * image)

        self._learn(
            TEACHER, network, loss, steps, 2e-3, after=lambda: mean.update_parameters(network)
        )
        averaged: nn.Module = mean.module
        return averaged

    def _student(self, pairs: _Pairs) -> nn.Module:
        """Learns the teacher's image of the same noise and label, in one step."""
        noise, image = first_noise(pairs.seed), 2 * pairs.ink - 1
        network = new_network(STUDENT)

        def loss() -> torch.Tensor:
            rows = torch.randint(len(image), (self._recipe.batch,))
            made = in_one_step(network, noise[rows], pairs.label[rows, 0])
            return torch.sqrt((made - image[rows]).square() + 0.01).mean()

        self._learn(STUDENT, network, loss, self._recipe.student_steps, 3e-3)
        return network

    def _judge(self, pairs: _Pairs, student: nn.Module) -> nn.Module:
        """Learns to tell real images, which the teacher has not seen, from generated ones.

        Half of these are the teacher's, half the student's of seeds that the student has not seen.
        """
        label, seed = _inputs(self._recipe.pairs, _JUDGE_SEEDS)
        with torch.no_grad():
            by_student = as_ink(in_one_step(student, first_noise(seed), label[:, 0]))
        made = torch.from_numpy(as_stored(torch.cat([pairs.ink, by_student]).numpy()))
        real, _ = _tensors(self._digits.judge)
        network, half = new_network(JUDGE), self._recipe.batch // 2
        wanted = torch.cat([torch.ones(half), torch.zeros(half)])

        def loss() -> torch.Tensor:
            rows = torch.randint(len(real), (half,)), torch.randint(len(made), (half,))
            seen = _dithered(torch.cat([real[rows[0]], made[rows[1]]]), more=0.05)
            return binary_cross_entropy_with_logits(network(seen)[:, 0], wanted)

        self._learn(JUDGE, network, loss, self._recipe.judge_steps, 1e-3)
        return network

    def classifier(self) -> nn.Module:
        """Learns the ten classes from the real images of both parts that are not held out."""
        ink, labels = _tensors(self._digits.learn.with_more(self._digits.judge))
        network = new_network(CLASSIFIER)

        def loss() -> torch.Tensor:
            rows = torch.randint(len(ink), (self._recipe.batch,))
            return cross_entropy(network(_dithered(ink[rows], more=0.1)), labels[rows])

        self._learn(CLASSIFIER, network, loss, self._recipe.classifier_steps, 2e-3)
        return network

    def _learn(
        self,
        name: str,
        network: nn.Module,
        loss: Callable[[], torch.Tensor],
        steps: int,
        rate: float,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        """AdamW, its rate rising for 50 steps and falling to 0 along a cosine."""
        optimiser = torch.optim.AdamW(network.parameters(), rate, weight_decay=0.01)
        recent: list[float] = []
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = (
                    rate * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
                )
            value = loss()
            optimiser.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            after()
            recent.append(value.item())
            if (step + 1) % 200 == 0 or step + 1 == steps:
                mean = sum(recent[-100:]) / len(recent[-100:])
                self._show(f"{name}: step {step + 1} of {steps}, loss {mean:.4f}")


def _tensors(part: Part) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(part.ink), torch.from_numpy(part.labels)


def _dithered(ink: torch.Tensor, *, more: float = 0.0) -> torch.Tensor:
    """Ink of whole levels with what rounding took, drawn evenly, and `more` of normal noise.

    Without it the levels alone would tell a real image from a generated one.
    """
    drawn = ink + (torch.rand_like(ink) - 0.5) / LEVELS
    if more:
        drawn = drawn + more * torch.randn_like(ink)
    return drawn.clamp(0, 1)


@dataclass(frozen=True)
class _Pairs:
    """Requests, label (n, 1) and seed (n, 1), and the teacher's ink for them, (n, 1, 8, 8)."""

    label: torch.Tensor
    seed: torch.Tensor
    ink: torch.Tensor


def _requests(teacher: nn.Module, count: int, show: Show) -> _Pairs:
    show(f"{TEACHER}: makes {count} images")
    label, seed = _inputs(count, _PAIR_SEEDS)
    heavy, ends = Heavy(teacher).eval(), range(0, count, _ROWS)
    with torch.inference_mode():
        parts = [heavy(label[at : at + _ROWS], seed[at : at + _ROWS])["answer"] for at in ends]
    return _Pairs(label, seed, torch.cat(parts).clone())


def _inputs(count: int, first_seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels and seeds (count, 1): each class equally often."""
    place = torch.arange(count)[:, None]
    return place % CLASSES, place + first_seed


def _rounded(network: nn.Module) -> nn.Module:
    """With the weights as they are stored: those that learn from it see what is served."""
    with torch.no_grad():
        for each in network.parameters():
            each.copy_(each.half().float())
    return network.eval()


# ------------------------------------------------------------------------------------------ files


def _write(
    out: Path, networks: dict[str, nn.Module], recipe: Recipe, took_s: float
) -> dict[str, Any]:
    from safetensors.torch import save

    document: dict[str, Any] = {
        "what": "weights of slosched.cascade.digits, float16, made by `slosched cascade digits train`",
        "data": "scikit-learn's digits (UCI Optical Recognition of Handwritten Digits), 1,797 images of 8x8",
        "script_version": SCRIPT_VERSION,
        "recipe": asdict(recipe),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "seconds": round(took_s),
        "files": {},
    }
    for name, network in networks.items():
        data = save({key: each.half().contiguous() for key, each in network.state_dict().items()})
        write_file(out / f"{name}.safetensors", data)
        document["files"][f"{name}.safetensors"] = {
            "sha256": hashlib.sha256(data).hexdigest(),
            "bytes": len(data),
            "parameters": parameters_of(network),
        }
    write_file(out / MANIFEST, (json.dumps(document, indent=2) + "\n").encode())
    return document
