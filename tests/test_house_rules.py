"""What CONTRIBUTING.md promises about the code's form, and what ARCHITECTURE.md promises about imports."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import plain_english

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "slosched"
#: Everything a person wrote; benchmarks, examples and recipes keep the rules too.
FOLDERS = ("src", "tests", "clients", "daemon", "workloads", "analysis", "benchmarks", "docs")

_FILE_LINES = 600
_FUNCTION_LINES = 70

#: Package -> the room under src/slosched that alone may import it.
HOMES = {
    "zmq": "transport",
    "torch": "daemon/backends",
    "transformers": "daemon/backends",
    "diffusers": "daemon/backends",
    "torchvision": "daemon/backends",
    "timm": "daemon/backends",
    "cupy": "daemon/backends",
    "pynvml": "daemon/backends",
    "matplotlib": "analysis",
    "scipy": "bound",
    "sklearn": "cascade/digits",
    "distributed": "engines",
    "dask": "engines",
    "redis": "functions/state",
    "httptools": "fronts",
    "grpc": "fronts",
    "google": "fronts",
}
#: Rooms with models of their own, beside those above.
MORE_HOMES = {
    "cascade/digits": ("torch",),
    "faasm": (
        "torch",
        "timm",
        "cupy",
        "sklearn",
        "scipy",
    ),  # what its functions run, and are held against
}


def sources() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def test_there_is_something_to_look_at() -> None:
    assert len(sources()) > 100 and PACKAGE / "messages.py" in sources()


def test_files_are_short() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources()
    }
    long = {name: lines for name, lines in lengths.items() if lines >= _FILE_LINES}
    assert not long, f"{_FILE_LINES} lines or more; split them by subject: {long}"


def length(function: ast.FunctionDef | ast.AsyncFunctionDef, *, is_command: bool = False) -> int:
    """Lines of a function from `def` to its end; of a command, from its first statement.

    The signature of a command of the command line is the list of its options and its docstring the
    page that --help prints: both are read as lists, and only what it does is counted.
    """
    first, last = function.lineno, function.end_lineno
    assert last is not None
    if is_command:
        documented = ast.get_docstring(function) is not None and len(function.body) > 1
        first = function.body[1 if documented else 0].lineno
    return last - first + 1


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_functions_are_short() -> None:
    lengths = {
        f"{path.relative_to(ROOT)}:{function.lineno} {function.name}": length(
            function, is_command=path.parent == PACKAGE / "cli"
        )
        for path in sources()
        for function in functions(path)
    }
    long = {name: lines for name, lines in lengths.items() if lines >= _FUNCTION_LINES}
    assert not long, f"{_FUNCTION_LINES} lines or more: {long}"


def test_how_a_functions_lines_are_counted() -> None:
    source = (
        'def f(\n  a,\n  b,\n):\n  """Says\n\n  much."""\n  if a:\n    return b\n\n  return a\n'
    )
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    assert length(function) == 11 and length(function, is_command=True) == 4


def test_no_file_is_called_after_nothing() -> None:
    banned = {"utils.py", "util.py", "helpers.py", "misc.py", "common.py"}
    assert not [str(path) for path in sources() if path.name in banned]


def test_everything_is_in_plain_english() -> None:
    files = plain_english.done_files()
    for each in (
        "src/slosched/errors.py",
        "tests/conftest.py",
        "benchmarks/scaling.py",
        "docs/faults.md",
    ):
        assert ROOT / each in files
    for each in ("README.md", "docs/adr", "clients/README.md", "daemon/worker.toml", "Makefile"):
        assert any(path.is_relative_to(ROOT / each) for path in files), each
    assert not plain_english.NOT_DONE
    found = [each for path in files for each in plain_english.findings(path)]
    assert not found, found


@pytest.mark.parametrize(
    ("source", "phrase"),
    [
        ('"""Keeps rows. Of each GPU the first."""', "Of"),
        ("#: Looks at this after so many rows.", "so many"),
        ("# Ends with whoever called;\n# see below.", "whoever"),
        ("x = 1  # nobody waits", "nobody"),
        ("# The callbacks are told of\n# each worker.", "told of"),
        ('text = f"{1} s for the way back"', "way back"),
        ("# It has two\n# ways to the worker.", "ways to the worker"),
        ('"""A line for people."""', "for people"),
        ("# A clock of ours.", "of ours"),
        ('raise ValueError("10 is no bandwidth")', "is no b"),
        ("# Kept whole: who reads it copies it.", ": who "),
        ("said = words", "said"),
    ],
)
def test_a_planted_phrase_is_found(source: str, phrase: str, tmp_path: Path) -> None:
    path = tmp_path / "planted.py"
    path.write_text(source + "\n")
    assert any(phrase in found.text for found in plain_english.findings(path))
    assert plain_english.main([str(path)]) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("page.md", "A sentence.\n\n| a | b |\n| - | - |\n| 1 | so many\n"),
        ("page.md", "It ends\nwith whoever called `it`.\n"),
        ("worker.toml", "x = 1\n# One line,\n# and what nobody\n# reads.\n"),
        ("Makefile", "all:\n# Of all targets the first.\n"),
    ],
)
def test_documents_and_settings_are_read_too(name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert len(plain_english.findings(path)) == 1


def test_code_in_a_document_and_what_a_test_feeds_are_not_sentences() -> None:
    blocks = "Text.\n\n```sh\necho so many\n```\n\n    so many\n\nA `so many` b.\n"
    assert "so many" not in " ".join(text for _, text in plain_english._paragraphs(blocks))
    path = ROOT / "tests" / "test_bound.py"  # names a model 'nobody'
    assert "nobody" in path.read_text() and not plain_english.findings(path)


def test_good_sentences_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "fine.py"
    path.write_text(
        "# Of course there is no longer a file. Both ways work; in flight: 3.\nx = 'so'\n"
    )
    assert plain_english.main([str(path)]) == 0


def imported_packages(path: Path) -> set[str]:
    """Top-level names of what `path` imports, wherever in the file the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def test_heavy_packages_stay_in_their_rooms() -> None:
    strays = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for name in sorted(imported_packages(path) & HOMES.keys())
        if not path.is_relative_to(PACKAGE / HOMES[name])
        and not any(
            name in names and path.is_relative_to(PACKAGE / room)
            for room, names in MORE_HOMES.items()
        )
    ]
    assert not strays, strays


def imported_modules(path: Path, known: set[str]) -> set[str]:
    """Modules of `known` that `path` imports, also where only a type checker or a call needs them."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(names & known or {node.module})
    return found & known


def test_no_module_imports_itself_by_way_of_others() -> None:
    paths = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
    }
    graph = {name: imported_modules(path, set(paths)) for name, path in paths.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_only_the_clock_room_reads_a_clock() -> None:
    readers = [
        str(path.relative_to(PACKAGE))
        for path in sorted(PACKAGE.rglob("*.py"))
        if "time" in imported_packages(path)
    ]
    assert readers == ["clock.py"]


def test_no_pickle() -> None:
    assert not [p for p in PACKAGE.rglob("*.py") if {"pickle", "dill"} & imported_packages(p)]


def loaded_after(program: str) -> set[str]:
    """Top-level names of the modules that are loaded when `program` has run in a fresh process."""
    report = "import sys; print(*{m.partition('.')[0] for m in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\n{report}"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


HEAVY = {"torch", "transformers", "diffusers", "cupy", "matplotlib", "scipy", "sklearn"}


@pytest.mark.parametrize(
    ("program", "unwanted"),
    [
        ("import slosched", HEAVY | {"zmq", "uvloop", "numpy", "typer"}),
        ("import slosched.cli.app", HEAVY | {"zmq", "uvloop", "numpy"}),
        ("import slosched.daemon.controller", HEAVY),
        ("import slosched.sim.harness", HEAVY | {"zmq", "uvloop"}),
        ("import slosched; slosched.connect; slosched.Client", HEAVY),
        ("import slosched; slosched.Controller; slosched.Worker", HEAVY),
    ],
)
def test_nothing_heavy_is_imported_unasked(program: str, unwanted: set[str]) -> None:
    assert not loaded_after(program) & unwanted


def test_a_controller_and_an_emulated_worker_run_without_torch() -> None:
    program = """
import asyncio, tempfile, slosched

async def main():
    with tempfile.TemporaryDirectory() as logs:
        emulated = slosched.WorkerConfig(device="emulated", bind="127.0.0.1", port=0)
        with slosched.Worker(emulated) as worker:
            controller = slosched.Controller(
                slosched.ControllerConfig(
                    scheduler=slosched.SchedulerConfig(), workers=(f"127.0.0.1:{worker.port}",),
                    bind="127.0.0.1", port=0, http_port=-1, log_dir=logs,
                ),
                announce=lambda line: None,
            )
            await controller.start()
            serving = asyncio.create_task(controller.run())
            async with slosched.connect(f"127.0.0.1:{controller.port}") as client:
                [model] = await client.load("resnet50_v2")
                assert (await client.infer(model, slo="5s")).ok
            controller.stop()
            await serving

asyncio.run(asyncio.wait_for(main(), 30))
"""
    assert not loaded_after(program) & HEAVY


def test_mypy_sees_every_folder_with_programs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    checked = set(project["tool"]["mypy"]["files"])
    present = {folder for folder in FOLDERS if any((ROOT / folder).rglob("*.py"))}
    assert checked == present


_EXTRAS = (
    "torch",
    "models",
    "diffusion",
    "digits",
    "plot",
    "state",
    "bound",
    "dask",
    "faasm",
    "gateway",
)


def test_constraints_pin_every_requirement() -> None:
    """Also those of an extra that `make install` asks for, and of the checks' tools."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    wanted = [
        *project["project"]["dependencies"],
        *(text for extra in _EXTRAS for text in extras[extra]),
        *project["dependency-groups"]["dev"],
    ]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(line.count("==") == 1 for line in pins)
    # pip freezes a name as its package spells it: "_" and "-" are the same to it.
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in pins}
    names = {text.partition(">")[0].partition("[")[0].strip().lower() for text in wanted}
    assert names <= pinned, f"not in constraints.txt: {names - pinned}; run make constraints"
    assert "torch==2.13.0" in pins and "slosched" not in pinned


def test_the_slow_tests_that_are_listed_are_there() -> None:
    """conftest.py holds cases to it as well, in a run of all tests that one process collects."""
    lines = (ROOT / "tests" / "slow_tests.txt").read_text().splitlines()
    for line in lines:
        if line and not line.startswith("#"):
            file, _, test = line.removeprefix("but ").partition("::")
            text = (ROOT / "tests" / file).read_text()
            assert f"def {test.partition('[')[0]}(" in text or not test, line
