"""Plant each bug of mutants.toml, run fuzz seeds against it, and say which seed notices it.

    python tests/mutants.py [--seeds 150] [--jobs 2] [WORD ...]

Only bugs with one of the WORDs in their names are planted, or all. A bug that no seed notices is one that the
fuzzer, or what it holds cases to, is too weak for. The exit code is the number of those.
"""

from __future__ import annotations

import argparse
import inspect
import os
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
#: A bug that makes a case hang is noticed by this.
_SECONDS = 1800.0

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
    """One edit of `file` (below src/slosched): `old`, which stands there once, becomes `new`."""

    name: str
    file: str
    old: str
    new: str

    def plant(self, source: Path) -> None:
        """Edit the copy of src at `source`. Raises ValueError if the code has changed."""
        path = source / "slosched" / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.file} has changed; plant it elsewhere")
        path.write_text(text.replace(self.old, self.new))


def bugs(words: Iterable[str] = ()) -> list[Bug]:
    """Those of the list whose names have one of `words`, or all."""
    listed = [Bug(**entry) for entry in tomllib.loads(_LIST.read_text())["bug"]]
    wanted = tuple(words)
    return [bug for bug in listed if not wanted or any(word in bug.name for word in wanted)]


def noticed_by(bug: Bug, *, first: int, seeds: int) -> str:
    """The first seed that fails with `bug` planted, and how; "" if none does."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(SOURCE, source, ignore=shutil.ignore_patterns("__pycache__"))
        bug.plant(source)
        program = [sys.executable, "-c", _PROGRAM.format(first=first, seeds=seeds)]
        environment = {**os.environ, "PYTHONPATH": str(source)}
        try:
            done = subprocess.run(
                program,
                env=environment,
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            last = (error.stdout or b"").decode().split()[-1:]
            return f"{' '.join(last)} was not done after {_SECONDS:.0f} s"
        if not done.returncode:
            return ""
        return (done.stdout.partition("FOUND")[2] or done.stderr[-200:]).strip()


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
    given = parser.parse_args()
    chosen = bugs(given.words)
    missed = 0
    with ThreadPoolExecutor(given.jobs) as pool:
        running = {
            pool.submit(noticed_by, bug, first=given.first, seeds=given.seeds): bug
            for bug in chosen
        }
        for done in as_completed(running):
            failure = done.result()
            missed += not failure
            what = f"seed {failure}" if failure else "NOT NOTICED"
            sys.stdout.write(f"{running[done].name}: {what}\n")
            sys.stdout.flush()
    return missed


if __name__ == "__main__":
    sys.exit(main())
