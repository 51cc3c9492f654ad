"""Tones whose pitch is known, and what the 360 numbers that CREPE answers with mean."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Sound = npt.NDArray[np.float32]

SAMPLES = 1024
_PER_S = 16_000
_PITCHES = 360
#: Cents of the first pitch, and from each to the next: 1,200 are an octave, and 0 is at 10 Hz (Kim et al.,
#: section 2).
_FIRST_CENTS, _STEP_CENTS, _CENTS_BASE_HZ = 1997.3794084376191, 20.0, 10.0
#: How many neighbours of the likeliest pitch count, on each side.
_NEIGHBOURS = 4
_NAMES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
_A4_HZ, _A4_NUMBER = 440.0, 69
#: The strength of the noise in a noisy tone, a sine's being 0.71.
_NOISE = 0.2


@dataclass(frozen=True)
class Tone:
    """A tone of `hz`: a "sine", a "sawtooth", or a "noisy sine"."""

    wave: str
    hz: float

    def __str__(self) -> str:
        return f"{self.wave} of {self.hz:g} Hz"

    def sound(self) -> Sound:
        """1,024 samples at 16 kHz, within about -1..1. The noise is the same each time."""
        turns = np.arange(SAMPLES) * (self.hz / _PER_S)
        if self.wave == "sawtooth":
            # A sum of the harmonics that 16 kHz can hold; what lies above would come back as other tones.
            most = int(_PER_S / 2 / self.hz)
            waves = [np.sin(2 * np.pi * n * turns) / n for n in range(1, most + 1)]
            return np.asarray(np.sum(waves, axis=0), np.float32)
        sound = np.sin(2 * np.pi * turns)
        if self.wave == "noisy sine":
            sound = sound + _NOISE * np.random.default_rng(round(self.hz)).standard_normal(SAMPLES)
        return np.asarray(sound, np.float32)


#: Notes from A2 to A5, each as three waves.
TONES = tuple(
    Tone(wave, hz)
    for hz in (110.0, 146.83, 220.0, 329.63, 440.0, 523.25, 880.0)
    for wave in ("sine", "sawtooth", "noisy sine")
)


def noise() -> Sound:
    """1,024 samples of noise, which has no pitch."""
    return np.random.default_rng(0).standard_normal(SAMPLES).astype(np.float32)


class Heard(NamedTuple):
    """The pitch that an answer says, and how sure the model is, 0..1."""

    hz: float
    sure: float

    def cents_from(self, hz: float) -> float:
        """How far the pitch is from `hz`; 100 cents are a semitone."""
        return 1200 * math.log2(self.hz / hz)


def heard(answer: npt.NDArray[np.float32]) -> Heard:
    """The pitch that an answer (360,) says: the weighted mean about the likeliest (Kim et al., section 2)."""
    best = int(answer.argmax())
    near = slice(max(0, best - _NEIGHBOURS), best + _NEIGHBOURS + 1)
    weights = answer[near].astype(np.float64)
    places = np.arange(_PITCHES)[near]
    cents = _FIRST_CENTS + _STEP_CENTS * float((weights * places).sum() / weights.sum())
    return Heard(_CENTS_BASE_HZ * 2 ** (cents / 1200), float(answer[best]))


def note_of(hz: float) -> str:
    """The name of the nearest note, in equal temperament: 440 Hz is A4."""
    number = round(_A4_NUMBER + 12 * math.log2(hz / _A4_HZ))
    return f"{_NAMES[number % 12]}{number // 12 - 1}"
