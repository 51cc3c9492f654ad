"""Finds phrases and names that read badly, in the code, comments, docstrings and messages of the package.

    python tests/plain_english.py [FILE ...]

Prints each with its place; exits with 1 if there is any, which `make lint` reports. Without files it reads the
whole package, less the files that are not rewritten yet (`NOT_DONE`). That list only ever gets shorter.
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
    r"\b[Ss]o (?:many|few)\b": "say the number: 'number of', 'at most N'",
    r"\bfor so long\b|\bafter so (?:long|much)\b|\bso much (?:longer|later|more|time)\b": "'for this time'",
    r"\b[Ww]hoever\b|\b(?:nobody|anybody|everybody)'s\b|\bwho or what\b": "name the subject",
    r"\b(?:[Nn]o|[Ss]ome|[Aa]ny|[Ee]very)body\b": "name the client, the process or the operator",
    r"[:;] who (?!owns|may)|(?:^|\. )Who (?:waits and|says|sends,|wires|keeps|reads)\b": "name the subject",
    r"(?:^|[.!?:;] )Of (?!course)": "begin the sentence with its subject",
    r"\btold of\b|\basked of\b|\bhears? of\b|\bheard of every\b": "say who tells what to whom",
    r"\bis told (?:as(?! soon)|in words)\b|\bwhat it is told if\b|\bnone is told\b": "is reported as",
    r"\bways? (?:there|here|back)\b|\bways? to (?:and from|the worker|spare)|\bof its ways?\b": "latency",
    r"(?<![Bb]oth )(?<!several )\bways\b|\ba way(?:'s| is\b| takes\b)": "latencies",
    r"\bfor people\b": "human-readable",
    r"(?<![tT]here )\b(?:is|are|was|were) no "
    r"(?!longer|more|less|larger|later|earlier|other|reason|use|need)[a-zA-Z]": "is not a",
    r"\bof (?:ours|theirs)\b": "our, their",
    r"\bbefell\b|\blet alone\b|\bwhereof\b|\bthereof\b": "an everyday word",
    r"\bgoes on as\b|\bgoes on with its\b": "resumes, continues",
    r"\bas it stands\b|\bas they stand\b": "unchanged",
    r"\bonce more to\b|\bis yet to\b": "again",
    r"\bout of turn\b|\bby itself alone\b": "alone",
}

#: Names that do not say what they hold.
NAMES = re.compile(r"_?(?:said|told|here|hindered|unasked|news)$")

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


def _names(path: Path) -> Iterator[Finding]:
    with path.open("rb") as source:
        for token in tokenize.tokenize(source.readline):
            if token.type == tokenize.NAME and NAMES.match(token.string):
                yield Finding(path, token.start[0], token.string, "name what it holds")


def findings(path: Path) -> list[Finding]:
    """Every listed phrase in the comments, docstrings and strings of one Python file, and every listed name."""
    found = list(_names(path))
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
