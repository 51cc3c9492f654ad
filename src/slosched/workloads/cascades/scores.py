"""Scores of prompts that were recorded, in the two formats of DiffServe's artifact (MLSys'25).

Both files hold P(fake), the judge's belief that an image is a generated one; a score is 1 - P(fake).
`dist_CASCADE.txt` has one number a line and four lines to a prompt, whose mean counts.
`confidence_scores.csv` has a header (content_id, the light model, the heavy model) and a row a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from slosched.errors import InvalidConfig
from slosched.text_files import no_integer, no_number, open_lines

#: Lines of a dist file to one prompt: the artifact judges four images of each.
_IMAGES = 4
_ID_COLUMN = "content_id"


def read_scores(path: str | Path) -> tuple[float, ...]:
    """Read the score of each prompt, 0..1: `scores[id]` is that of the prompt `id`.

    A CSV says its ids, which begin with 0 or 1. A dist file is looked up as the artifact does: its first four
    lines are those of id 0, although by the artifact's own CSV they are those of id 1.
    Raises InvalidConfig with the file and the line of what is wrong.
    """
    file = Path(path)
    with open_lines(file, "the scores") as lines:
        numbered = ((n, line.strip()) for n, line in enumerate(lines, start=1) if line.strip())
        first = next(numbered, None)
        if first is None:
            raise InvalidConfig(f"{file}: the file holds no scores")
        if "," in first[1] or first[1] == _ID_COLUMN:
            scores = _of_table(file, first, numbered)
        else:
            scores = _of_numbers(file, first, numbered)
    return tuple(scores)


def _of_table(file: Path, header: tuple[int, str], lines: Iterator[tuple[int, str]]) -> list[float]:
    """The scores of a CSV by its first column after the id; ids count up from 1 or another number."""
    number, text = header
    names = [name.strip() for name in text.split(",")]
    if names[0] != _ID_COLUMN or len(names) < 2:
        raise InvalidConfig(
            f"{file}, line {number}: the header must be {_ID_COLUMN} and then the models, "
            f"not {text[:60]!r}"
        )
    scores: list[float] = []
    expected: int | None = None
    for number, line in lines:
        place = f"{file}, line {number}"
        cells = line.split(",")
        if len(cells) != len(names):
            raise InvalidConfig(f"{place}: {len(cells)} columns, but the header has {len(names)}")
        prompt = _prompt(place, cells[0])
        if expected is not None and prompt != expected:
            raise InvalidConfig(f"{place}: {_ID_COLUMN} is {prompt} where {expected} should follow")
        if expected is None and prompt not in (0, 1):
            raise InvalidConfig(f"{place}: {_ID_COLUMN} must begin with 0 or 1, not {prompt}")
        score = 1 - _probability(place, cells[1])
        if prompt == 1 and not scores:
            scores.append(
                score
            )  # there is no prompt 0: the place of a score is its prompt's number
        expected = prompt + 1
        scores.append(score)
    if not scores:
        raise InvalidConfig(f"{file}: the file has a header and no scores")
    return scores


def _of_numbers(
    file: Path, first: tuple[int, str], lines: Iterator[tuple[int, str]]
) -> list[float]:
    """The scores of a file of P(fake), each the mean of four lines."""
    fakes = [_probability(f"{file}, line {first[0]}", first[1])]
    fakes += [_probability(f"{file}, line {number}", text) for number, text in lines]
    if len(fakes) % _IMAGES:
        raise InvalidConfig(
            f"{file}: {len(fakes)} numbers, which are not {_IMAGES} for each prompt; is the end cut off?"
        )
    return [
        1 - sum(fakes[start : start + _IMAGES]) / _IMAGES for start in range(0, len(fakes), _IMAGES)
    ]


def _prompt(place: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InvalidConfig(
            f"{place}: {_ID_COLUMN} {text.strip()[:40]!r} is {no_integer(text)}"
        ) from None


def _probability(place: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise InvalidConfig(f"{place}: {text.strip()[:40]!r} is {no_number(text)}") from None
    if not 0 <= value <= 1:  # and NaN is not
        raise InvalidConfig(f"{place}: P(fake) must be within 0..1, not {text.strip()[:40]}")
    return value
