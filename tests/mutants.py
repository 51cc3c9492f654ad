"""Plant each bug of mutants.toml in a copy of src, and say what notices it: a test, or a seed of the fuzzer.

    python tests/mutants.py [--seeds 150] [--jobs 2] [--fuzz] [WORD ...]

Only bugs with one of the WORDs in their names are planted, or all. The tests of a bug (`tests`), which pass
without it, must fail with it; a bug without tests is one for the fuzzer, and with --fuzz all are. A bug that is
not noticed shows that the tests, or what the fuzzer holds its cases to, are too weak. A bug is STALE if its
`old` does not stand in the source exactly once: the code has changed, and the bug must be planted elsewhere.
The exit code is 1 if any is STALE or not noticed.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import tomllib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pytest

_HERE = Path(__file__).resolve().parent
SOURCE = _HERE.parent / "src"
_LIST = _HERE / "mutants.toml"
#: A bug that makes a case or a test hang is noticed by this.
_SECONDS = 1800.0
_TEST_SECONDS = 300.0

_PROGRAM = """
import sys
from slosched.sim.fuzz import run_seed
for seed in range({first}, {first} + {seeds}):
    print(seed, end=" ", flush=True)
    try:
        failure = run_seed(seed).failure
    except Exception as error:
        failure = repr(error)
    if failure:
        print("FOUND", seed, failure.splitlines()[0][:110])
        sys.exit(1)
"""


class Bug(NamedTuple):
    """One edit below src/slosched/`within`: `old`, which stands there once, in whatever file, becomes `new`.

    White space counts as equal whatever its length, so that code may be moved and indented anew. `tests` are
    what pytest is given, from tests/ on; without any the fuzzer must notice the bug.
    """

    name: str
    old: str
    new: str
    within: str = "core"
    tests: tuple[str, ...] = ()

    def places(self, source: Path) -> list[tuple[Path, re.Match[str]]]:
        """Every place of `old` in the copy of src at `source`."""
        pattern = re.compile(r"\s+".join(map(re.escape, self.old.split())))
        root = source / "slosched" / self.within
        files = sorted(root.rglob("*.py")) if root.is_dir() else [root]
        return [(file, match) for file in files for match in pattern.finditer(file.read_text())]

    def plant(self, source: Path) -> Path:
        """Edit the copy of src at `source`; returns the file. Raises ValueError if the code has changed."""
        places = self.places(source)
        if len(places) != 1:
            raise ValueError(self.stale(len(places)))
        ((file, match),) = places
        text = file.read_text()
        line = text[text.rfind("\n", 0, match.start()) + 1 : match.start()]
        indent = line[: len(line) - len(line.lstrip())]
        new = textwrap.indent(self.new, indent)[len(indent) :]
        file.write_text(text[: match.start()] + new + text[match.end() :])
        return file

    def stale(self, count: int) -> str:
        """What is to be said if `old` stands there `count` times."""
        where = f"stands {count} times" if count else "is not to be found"
        return f"{self.name}: {self.old!r} {where} in src/slosched/{self.within}"


def bugs(words: Iterable[str] = ()) -> list[Bug]:
    """Those of the list whose names have one of `words`, or all."""
    listed = [
        Bug(**{**entry, "tests": tuple(entry.get("tests", ()))})
        for entry in tomllib.loads(_LIST.read_text())["bug"]
    ]
    wanted = tuple(words)
    return [bug for bug in listed if not wanted or any(word in bug.name for word in wanted)]


def stale(chosen: Iterable[Bug]) -> list[str]:
    """A line for each bug that can be planted nowhere, or in more than one place."""
    counts = [(bug, len(bug.places(SOURCE))) for bug in chosen]
    return [bug.stale(count) for bug, count in counts if count != 1]


def noticed_by(bug: Bug, *, first: int, seeds: int, fuzz: bool = False) -> str:
    """The test or the seed that fails with `bug` planted, and how; "" if none does."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(SOURCE, source, ignore=shutil.ignore_patterns("__pycache__"))
        bug.plant(source)
        environment = {**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{_HERE}"}
        if bug.tests and not fuzz:
            return _failing_test(bug.tests, environment)
        return _failing_seed(first, seeds, environment)


def failing_without_a_bug(chosen: Iterable[Bug]) -> str:
    """The test of a bug that fails although nothing is planted; "" if there is none."""
    tests = tuple(dict.fromkeys(test for bug in chosen for test in bug.tests))
    environment = {**os.environ, "PYTHONPATH": f"{SOURCE}{os.pathsep}{_HERE}"}
    return _failing_test(tests, environment) if tests else ""


def _failing_test(tests: tuple[str, ...], environment: dict[str, str]) -> str:
    options = ["-x", "-q", "-p", "no:cacheprovider", "--no-header", "-rfE"]
    given = [str(_HERE / test) for test in tests]
    program = [sys.executable, "-m", "pytest", *options, *given]
    try:
        done = _run(program, environment, _TEST_SECONDS)
    except subprocess.TimeoutExpired:
        return f"{' '.join(tests)} was not done after {_TEST_SECONDS:.0f} s"
    if not done.returncode:
        return ""
    found = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(.*)", done.stdout, re.MULTILINE)
    if done.returncode != 1 or found is None:
        raise RuntimeError(f"{' '.join(program)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return found[1][:150]


def _failing_seed(first: int, seeds: int, environment: dict[str, str]) -> str:
    program = [sys.executable, "-c", _PROGRAM.format(first=first, seeds=seeds)]
    try:
        done = _run(program, environment, _SECONDS)
    except subprocess.TimeoutExpired as error:
        last = (error.stdout or b"").decode().split()[-1:]
        return f"seed {' '.join(last)} was not done after {_SECONDS:.0f} s"
    if not done.returncode:
        return ""
    return "seed " + (done.stdout.partition("FOUND ")[2] or done.stderr[-200:]).strip()


def _run(
    program: list[str], environment: dict[str, str], seconds: float
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        program,
        env=environment,
        cwd=_HERE.parent,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def rewritten(patch: pytest.MonkeyPatch, owner: type, name: str, old: str, new: str) -> None:
    """Plant a bug in the source of a method, in this process."""
    method = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(method))
    if source.count(old) != 1:
        raise ValueError(f"{name} has changed: plant {new!r} elsewhere")
    made: dict[str, Any] = {}
    code = "from __future__ import annotations\n" + source.replace(old, new)
    exec(compile(code, name, "exec"), method.__globals__, made)
    patch.setattr(owner, name, made[name])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--seeds", type=int, default=150)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--fuzz", action="store_true", help="leave each bug to the fuzzer")
    given = parser.parse_args()
    chosen = bugs(given.words)
    lost = stale(chosen)
    for line in lost:
        say(f"STALE {line}")
    chosen = [bug for bug in chosen if len(bug.places(SOURCE)) == 1]
    failing = "" if given.fuzz else failing_without_a_bug(chosen)
    if failing:
        say(f"no bug is planted, and there fails {failing}")
        return 1
    missed = 0
    with ThreadPoolExecutor(given.jobs) as pool:
        running = {
            pool.submit(noticed_by, bug, first=given.first, seeds=given.seeds, fuzz=given.fuzz): bug
            for bug in chosen
        }
        for done in as_completed(running):
            failure = done.result()
            missed += not failure
            say(f"{running[done].name}: {failure or 'NOT NOTICED'}")
    noticed = len(chosen) - missed
    say(f"{noticed} of {len(chosen)} bugs were noticed; {len(lost)} STALE, not planted")
    return 1 if missed or lost else 0


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
