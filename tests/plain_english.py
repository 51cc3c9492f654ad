"""Finds phrases that ARCHITECTURE.md's words rule out, in comments, docstrings and messages of the package.

    python tests/plain_english.py [FILE ...]

Prints each with its place; exits with 1 if there is any. Without files it reads the whole package, less the
files that are not rewritten yet (`NOT_DONE`). That list only ever gets shorter.
"""

from __future__ import annotations

import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parent.parent / "src" / "slosched"

#: What is looked for, and what to write instead.
PHRASES = {
    r"\bso many\b|\bso few\b": "say the number: 'number of', 'at most N'",
    r"\bwhoever\b|\bnobody's\b|\banybody's\b|\bwho or what\b": "name the subject",
    r"(?:^|[.!?:;] )Of (?!course)": "begin the sentence with its subject",
    r"\btold of\b|\basked of\b|\bhears of it\b|\bheard of every\b": "say who tells what to whom",
    r"\bways? (?:there|here|back)\b|\bways? to (?:and from|the worker|spare)|\bof its ways\b": "latency",
    r"\bfor people\b": "human-readable",
    r"(?<![tT]here )\bis no (?!longer|more|less|larger|later|earlier|other|reason|use|need)[a-z]": "is not a",
    r"\bof ours\b": "our",
    r"\bgoes on as\b|\bgoes on with its\b": "resumes, continues",
    r"\bas it stands\b|\bas they stand\b": "unchanged",
    r"\bonce more to\b|\bis yet to\b": "again",
    r"\bout of turn\b|\bby itself alone\b": "alone",
}

#: Files that are not rewritten yet, or folders of them; relative to the package.
NOT_DONE: tuple[str, ...] = ()


class Finding(NamedTuple):
    path: Path
    line: int
    text: str
    advice: str


def _texts(path: Path) -> Iterator[tuple[int, str]]:
    """Each run of comment lines, and each string, with the line on which it begins."""
    run: list[str] = []
    began = last = 0
    with path.open("rb") as source:
        for token in tokenize.tokenize(source.readline):
            if token.type == tokenize.COMMENT:
                if run and token.start[0] != last + 1:
                    yield began, " ".join(run)
                    run = []
                if not run:
                    began = token.start[0]
                run.append(token.string.lstrip("#: "))
                last = token.start[0]
            elif token.type == tokenize.STRING or token.type == getattr(
                tokenize, "FSTRING_MIDDLE", -1
            ):
                yield token.start[0], token.string.strip("\"'rbf")
    if run:
        yield began, " ".join(run)


def findings(path: Path) -> list[Finding]:
    """Every listed phrase in the comments, docstrings and strings of one Python file."""
    found = []
    for began, text in _texts(path):
        flat = re.sub(r"\s+", " ", text)
        for pattern, advice in PHRASES.items():
            for match in re.finditer(pattern, flat):
                around = flat[max(0, match.start() - 30) : match.end() + 30]
                found.append(Finding(path, began, around, advice))
    return found


def done_files(package: Path = PACKAGE) -> list[Path]:
    """The package's files that must be free of the phrases."""
    return [
        path
        for path in sorted(package.rglob("*.py"))
        if not any(path.is_relative_to(package / each) for each in NOT_DONE)
    ]


def main(arguments: list[str]) -> int:
    paths = [Path(each) for each in arguments] or done_files()
    count = 0
    for path in paths:
        for found in findings(path):
            count += 1
            place = f"{found.path}:{found.line}"
            sys.stdout.write(f"{place}: ...{found.text}... ({found.advice})\n")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
