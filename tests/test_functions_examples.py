"""What docs/functions.md and the programs in clients/ say about functions is what happens."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slosched.cli.app import app
from slosched.functions.function import MAX_PAYLOAD_BYTES, _made

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "functions.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the page's module."""
    (tmp_path / "my_functions.py").write_text(blocks("python")[0])
    return tmp_path


def run(folder: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_pages_functions_run_on_the_local_engine(folder: Path) -> None:
    program = next(each for each in blocks("python") if "engines.open" in each)
    assert run(folder, "-c", program) == "3\n"


def test_the_pages_host_part_is_one(tmp_path: Path) -> None:
    """With an image that is a number, and a network that adds one, on the local engine."""
    program = next(each for each in blocks("python") if "prepare=build" in each)
    (tmp_path / "made.py").write_text(
        "import slosched, slosched.engines\n"
        "load_torch = lambda: None\n"
        "to_tensor = float\n"
        "class Network:\n"
        "    to = lambda self, device: self\n"
        "    __call__ = lambda self, tensor: self\n"
        "    tolist = lambda self: [1.0]\n"
        "def build(ctx, image, name):\n"
        "    return Network()\n"
        f"{program}"
        "with slosched.engines.open('local', functions=[classify]) as engine:\n"
        "    print(engine.call('classify', 0, 'net').result())\n"
    )
    assert run(tmp_path, "made.py") == "[1.0]\n"


def test_the_pages_module_is_one_that_can_be_checked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "`slosched functions check my_functions`" in PAGE
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    checked = CliRunner().invoke(app, ["functions", "check", "my_functions"])
    sys.modules.pop("my_functions", None)
    assert checked.exit_code == 0 and "word_count" in checked.stdout


def test_the_table_of_options_has_each_option_with_its_default() -> None:
    section = PAGE.partition("## What a function may say")[2].partition("\n## ")[0]
    documented = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", section, re.MULTILINE))
    taken = inspect.signature(_made).parameters.values()
    assert set(documented) == {each.name for each in taken if each.kind is each.KEYWORD_ONLY}
    for each in taken:
        if isinstance(each.default, bool | str):
            shown = f'`"{each.default}"`' if isinstance(each.default, str) else f"`{each.default}`"
            assert documented[each.name] == shown
    assert documented["max_payload"] == f"{MAX_PAYLOAD_BYTES / 1e6:.0f} MB"


@pytest.mark.processes
@pytest.mark.parametrize("where", ["local", "slosched"])
def test_the_program_that_counts_primes(where: str) -> None:
    assert (
        run(ROOT / "clients", "call_primes.py", where, "100000") == "9,592 primes below 100,000\n"
    )


@pytest.mark.processes
def test_the_page_can_be_followed(folder: Path) -> None:
    """Its commands, unchanged but for the ports, and its client."""
    from slosched.engines.live import LiveEngine
    from slosched.functions.registry import find

    worker, controller, call = blocks("sh")[0].splitlines()
    assert worker.startswith("slosched worker --functions my_functions --slots 2")
    assert controller.startswith("slosched controller INFER5 --workers")
    functions = find(["my_functions"], folder=str(folder))
    sys.path.append(str(folder))
    try:
        with LiveEngine([*functions.values()], slots=2) as engine:
            words = [call.partition("slosched ")[2], f"--controller {engine.address}"]
            result = CliRunner().invoke(app, " ".join(words), prog_name="slosched")
            assert result.exit_code == 0 and result.stdout.splitlines()[0] == "3"
            program = "import slosched\n" + blocks("python")[1].replace(
                "127.0.0.1:12346", engine.address
            )
            printed = program.replace("    client.call(", "    print(client.call(", 1)
            printed = printed.replace('slo="1s")  #', 'slo="1s"))  #')
            printed = printed.rstrip() + "\n    print(future.result(60))\n"
            assert run(folder, "-c", printed) == "3\n2\n"
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("my_functions", None)
