"""Finds phrases and names that read badly, in every kind of text: code, comments, messages, help and documents.

    python tests/plain_english.py [FILE ...]

Prints each with its place; exits with 1 if there is any, which `make lint` reports. Without files it reads all
that `texts_of_the_tree` names, less the files that are not rewritten yet (`NOT_DONE`). That list only ever gets
shorter.
"""

from __future__ import annotations

import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "slosched"
TESTS = ROOT / "tests"
#: Folders with Python files; all others have documents and settings only.
_PROGRAMS = (PACKAGE, TESTS, ROOT / "benchmarks", ROOT / "analysis", ROOT / "clients")
#: Folders with settings whose comments a person reads.
_SETTINGS = (ROOT / "workloads", ROOT / "daemon", ROOT / "clients", PACKAGE / "profiles")
#: They quote the phrases that they look for.
_QUOTE = (TESTS / "plain_english.py", TESTS / "test_house_rules.py")

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

#: Files that are not rewritten yet, or folders of them; relative to the repository.
NOT_DONE: tuple[str, ...] = ()


class Finding(NamedTuple):
    path: Path
    line: int
    text: str
    advice: str


def _texts(path: Path, *, all_strings: bool) -> Iterator[tuple[int, str]]:
    """Each run of comment lines, and each string or docstring, with the line on which it begins."""
    run: list[str] = []
    began = last = 0
    begins_a_line = True
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
            elif token.type in _STRINGS and (all_strings or begins_a_line):
                yield token.start[0], token.string.strip("\"'rbf")
            begins_a_line = token.type in _BEFORE_A_LINE
    if run:
        yield began, " ".join(run)


#: The second is that of an f-string's text, from Python 3.12 on.
_STRINGS = (tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1))
#: A string behind one of these begins a line, so it is a docstring or a part of a longer text.
_BEFORE_A_LINE = (
    tokenize.ENCODING,
    tokenize.NEWLINE,
    tokenize.NL,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.COMMENT,
)
_CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
_QUOTED = re.compile(r"`[^`\n]+`")
_PARAGRAPH = re.compile(r"(?:[^\n]*\S[^\n]*\n?)+")


def _paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """Each paragraph of a document without its code, with the line on which it begins."""
    text = _CODE.sub(lambda block: "\n" * block[0].count("\n"), text)
    text = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
    for each in _PARAGRAPH.finditer(text):
        yield text.count("\n", 0, each.start()) + 1, _QUOTED.sub("CODE", each[0])


def _remarks(text: str) -> Iterator[tuple[int, str]]:
    """Each run of comment lines of a file of settings, with the line on which it begins."""
    for each in re.finditer(r"(?:^ *#.*\n?)+", text, re.MULTILINE):
        comment = re.sub(r"^ *#:? ?", "", each[0], flags=re.MULTILINE)
        yield text.count("\n", 0, each.start()) + 1, _QUOTED.sub("CODE", comment)


def _names(path: Path) -> Iterator[Finding]:
    with path.open("rb") as source:
        for token in tokenize.tokenize(source.readline):
            if token.type == tokenize.NAME and NAMES.match(token.string):
                yield Finding(path, token.start[0], token.string, "name what it holds")


def findings(path: Path) -> list[Finding]:
    """Every listed phrase in one file, and in code other than tests every listed name.

    In a test the comments and docstrings count; its other strings are what it feeds and expects.
    """
    in_tests = TESTS in path.parents
    found: list[Finding] = []
    if path.suffix == ".py":
        found += [] if in_tests else _names(path)
        texts = _texts(path, all_strings=not in_tests)
    elif path.suffix == ".md":
        texts = _paragraphs(path.read_text(encoding="utf-8"))
    else:
        texts = _remarks(path.read_text(encoding="utf-8"))
    for began, text in texts:
        flat = re.sub(r"\s+", " ", text)
        for pattern, advice in PHRASES.items():
            for match in re.finditer(pattern, flat):
                around = flat[max(0, match.start() - 30) : match.end() + 30]
                found.append(Finding(path, began, around, advice))
    return found


def texts_of_the_tree(root: Path = ROOT) -> list[Path]:
    """Every file with words that a person reads: programs, documents and comments of settings."""
    files = [path for folder in _PROGRAMS for path in folder.rglob("*.py")]
    files += [path for folder in _SETTINGS for path in folder.rglob("*.toml")]
    files += [
        path for folder in root.iterdir() if _holds_texts(folder) for path in folder.rglob("*.md")
    ]
    files += [*root.glob("*.md"), root / "Makefile", root / "pyproject.toml"]
    return sorted(set(files) - set(_QUOTE))


def _holds_texts(folder: Path) -> bool:
    """False for files, and for what tools leave behind."""
    left_behind = ("shared", "build", "dist", "slosched-runs")
    return folder.is_dir() and folder.name not in left_behind and not folder.name.startswith(".")


def done_files(root: Path = ROOT) -> list[Path]:
    """The files that must be free of the phrases."""
    return [
        path
        for path in texts_of_the_tree(root)
        if not any(path.is_relative_to(root / each) for each in NOT_DONE)
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
