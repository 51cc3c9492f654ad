"""Which notes are these tones? Asks the model of pitch that `slosched demo` leaves in its folder of models.

Usage: python notes.py [host:port] [hz ...]
"""

import math
import sys

import numpy as np

import slosched

NAMES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
TUNE = ("261.63", "329.63", "392", "440")


def tone(hz: float) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """What the model takes: 1,024 samples at 16 kHz."""
    return np.sin(2 * np.pi * hz * np.arange(1024) / 16_000).astype(np.float32)


def pitch_of(answer: np.ndarray[tuple[int], np.dtype[np.float32]]) -> float:
    """What it answers, 360 pitches in steps of 20 cents, as Hz: the weighted mean about the likeliest."""
    best = int(answer.argmax())
    near = range(max(0, best - 4), min(360, best + 5))
    place = sum(answer[i] * i for i in near) / sum(answer[i] for i in near)
    return float(10 * 2 ** ((1997.38 + 20 * place) / 1200))


def note_of(hz: float) -> str:
    number = round(69 + 12 * math.log2(hz / 440))
    return f"{NAMES[number % 12]}{number // 12 - 1}"


def main() -> int:
    address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:12346"
    with slosched.Client(address, name="notes") as client:
        [model] = client.load("pitch")
        for hz in map(float, sys.argv[2:] or TUNE):
            answer = client.infer(model, tone(hz), slo="1s")
            assert answer.output is not None
            heard = pitch_of(answer.output)
            print(f"{hz:g} Hz: {heard:.1f} Hz, {note_of(heard)}; {answer.explain()}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except slosched.SloschedError as error:
        sys.exit(f"error: {error}")
