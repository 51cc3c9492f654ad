"""However a command ends, the user gets one line and an exit code, never a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from slosched import errors
from slosched.cli.guard import SloschedGroup, guarded
from slosched.cli.output import Announcer, print_json, progress_text, table_text
from slosched.errors import SloschedError
from slosched.loadgen.results import RunProgress


def ended(
    error: BaseException, capsys: pytest.CaptureFixture[str], *, nested: bool = False
) -> tuple[object, str, str]:
    """Run a command that raises `error`, through typer; return (exit code, stdout, stderr)."""
    inner = typer.Typer(cls=SloschedGroup, rich_markup_mode=None)
    app = typer.Typer(cls=SloschedGroup, rich_markup_mode=None, pretty_exceptions_enable=False)

    @(inner if nested else app).command()
    def fail() -> None:
        raise error

    @(inner if nested else app).command()
    def other() -> None: ...

    if nested:
        app.add_typer(inner, name="inner")
    with pytest.raises(SystemExit) as exit_:
        guarded(lambda: app(["inner", "fail"] if nested else ["fail"]))
    out, err = capsys.readouterr()
    return exit_.value.code, out, err


@pytest.mark.parametrize("nested", [False, True])
def test_a_deliberate_error_is_one_line_and_its_exit_code(
    capsys: pytest.CaptureFixture[str], nested: bool
) -> None:
    code, out, err = ended(
        errors.AddressInUse("port 1 is in use;\n take another"), capsys, nested=nested
    )
    assert (code, out) == (4, "")
    assert err == "slosched: error: port 1 is in use; take another\n"


def test_exit_codes_differ_from_success() -> None:
    classes = [each for each in vars(errors).values() if isinstance(each, type)]
    codes = [each.exit_code for each in classes if issubclass(each, SloschedError)]
    assert len(codes) > 10
    assert all(0 < code < 64 for code in codes)


@pytest.mark.parametrize("nested", [False, True])
def test_ctrl_c_is_130_and_one_line(capsys: pytest.CaptureFixture[str], nested: bool) -> None:
    code, out, err = ended(KeyboardInterrupt(), capsys, nested=nested)
    assert (code, out, err) == (130, "", "slosched: interrupted\n")


def test_ctrl_c_while_options_are_read_is_130_too(capsys: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer(cls=SloschedGroup, rich_markup_mode=None, pretty_exceptions_enable=False)

    def slow(text: str) -> str:
        raise KeyboardInterrupt  # as if what the option needs were still imported

    @app.callback()
    def options(value: str = typer.Option("", callback=slow)) -> None: ...

    @app.command()
    def command() -> None: ...

    with pytest.raises(SystemExit) as exit_:
        guarded(lambda: app(["--value", "x", "command"]))
    assert (exit_.value.code, capsys.readouterr().err) == (130, "slosched: interrupted\n")


@pytest.mark.parametrize("nested", [False, True])
def test_an_unforeseen_error_keeps_its_traceback_in_a_file(
    capsys: pytest.CaptureFixture[str],
    nested: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, out, err = ended(ZeroDivisionError("by zero"), capsys, nested=nested)
    assert (code, out) == (70, "")
    assert len(err.splitlines()) == 1
    assert "ZeroDivisionError: by zero" in err
    [file] = tmp_path.iterdir()
    assert str(file) in err
    assert "Traceback" in file.read_text()


def test_the_exit_code_of_a_command_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(typer.Exit(9), capsys) == (9, "", "")


def test_an_announcer_outlives_its_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Gone())
    announce = Announcer()
    announce("one")
    announce("two")  # silent, and no error


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": float("nan"), 1: [float("inf"), 2.5, "x"], "path": Path("p")})
    assert capsys.readouterr().out.split() == [
        "{",
        '"a":',
        "null,",
        '"1":',
        "[",
        "null,",
        "2.5,",
        '"x"',
        "],",
        '"path":',
        '"p"',
        "}",
    ]


def test_numbers_stand_to_the_right_and_names_to_the_left() -> None:
    text = table_text(("name", "time"), [("a", "10ms"), ("long-name", "-"), ("b", "2.5ms")])
    assert text.splitlines() == [
        "name        time",
        "a           10ms",
        "long-name      -",
        "b          2.5ms",
    ]


def test_progress_names_rate_satisfaction_and_slo() -> None:
    text = progress_text(RunProgress(3, 12, 5.0, 60.0, "SLO 2.25x", 598.7, 0.914))
    assert text == "step 3/12  SLO 2.25x  599 r/s  in time so far 91.4 %"
