"""`slosched functions` and `slosched call`, against modules and a controller that runs calls inline."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from fake_controller import model_info
from slosched.cli.app import app
from slosched.codes import Code
from slosched.messages import InferRequest, ListModelsReply, ListModelsRequest
from slosched.transport.codec import decode_from_client
from test_functions_clients import FunctionController


class ListingController(FunctionController):
    """Tells its functions and one model."""

    def __enter__(self) -> ListingController:
        return self

    def _handle(self, peer: bytes, frames: list[Any]) -> None:
        message = decode_from_client(frames[0])
        if not isinstance(message, ListModelsRequest):
            super()._handle(peer, frames)
            return
        served = [
            msgspec.structs.replace(model_info(n), name=each.name, function=each.info)
            for n, each in enumerate(self.engine.functions.values())
        ]
        self._send(peer, ListModelsReply(message.request_id, (*served, model_info(99)), ()))


@pytest.fixture
def controller() -> Iterator[FunctionController]:
    with FunctionController() as served:
        yield served


def invoke(*words: str) -> Result:
    return CliRunner().invoke(app, [*words], prog_name="slosched")


def called(controller: FunctionController, *words: str) -> Result:
    return invoke("call", *words, "--controller", controller.address)


def test_the_check_says_which_calls_have_a_size_class() -> None:
    checked = invoke("functions", "check", "sized_functions")
    assert checked.exit_code == 0
    assert "sized: only calls that are given the function itself, or sized_functions:NAME" in (
        " ".join(checked.stdout.split())
    )
    assert "size class" not in invoke("functions", "check", "live_functions").stdout


def test_a_module_is_listed_and_checked() -> None:
    listed = invoke("functions", "list", "sample_functions")
    assert listed.exit_code == 0
    assert "fibonacci" in listed.stdout and "async def" in listed.stdout
    checked = invoke("functions", "check", "sample_functions", "--init")
    assert checked.exit_code == 0 and "remembers: init takes" in checked.stdout
    assert "a worker runs them with --functions sample_functions" in checked.stdout
    documents = json.loads(invoke("functions", "list", "sample_functions", "--json").stdout)
    [fibonacci] = [each for each in documents["functions"] if each["name"] == "fibonacci"]
    assert fibonacci["slo_ns"] == 2 * 10**9 and fibonacci["size_classes"] == 16
    assert fibonacci["target"] == "sample_functions:fibonacci" and fibonacci["async"] is True
    documents = json.loads(
        invoke("functions", "check", "sample_functions", "--init", "--json").stdout
    )
    times = {each["name"]: each["init_ns"] for each in documents["functions"]}
    assert times["noop"] is None and times["remembers"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("list", "bisect"), "module 'bisect' has no functions"),
        (("check", "no_such_module_here"), "ModuleNotFoundError"),
        (("check", "a/b.py"), "is not a module with functions"),
        (("list", "127.0.0.1:1", "127.0.0.1:2"), "one controller at a time"),
        (
            ("check", "cli_init_fails", "--init"),
            "function 'one': its init raised ZeroDivisionError",
        ),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    (tmp_path / "cli_init_fails.py").write_text(
        "import slosched\n@slosched.function(init=lambda: 1 / 0)\ndef one(ctx): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    result = invoke("functions", *words)
    assert result.exit_code == 2 and message in result.stderr.splitlines()[-1]


def test_a_controllers_functions_are_listed_apart_from_its_models() -> None:
    with ListingController() as controller:
        listed = invoke("functions", "list", controller.address)
        assert listed.exit_code == 0 and "fibonacci" in listed.stdout and "toy" not in listed.stdout
        documents = json.loads(invoke("functions", "list", controller.address, "--json").stdout)
        assert {each["name"] for each in documents["functions"]} == set(controller.names)
        models = invoke("models", controller.address)
        assert "toy" in models.stdout and "fibonacci" not in models.stdout
        assert f"{len(controller.names)} function(s) as well" in models.stdout
        documents = json.loads(invoke("models", controller.address, "--json").stdout)["models"]
        functions = {each["name"]: each["function"] for each in documents}
        assert functions["toy"] is None and functions["fibonacci"]["slo_ns"] == 2 * 10**9


def test_a_controller_without_functions_says_how_to_have_some(
    controller: FunctionController,
) -> None:
    listed = invoke("functions", "list", controller.address)
    assert listed.exit_code == 0 and "run no functions; start one with --functions" in listed.stdout


def test_a_call_prints_its_result_and_its_answer(controller: FunctionController) -> None:
    result = called(controller, "fibonacci", "12", "--slo", "25ms", "--near", "x")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0] == "144"
    assert "fibonacci: ok after 2ms of 25ms" in result.stdout
    assert controller.request().near == "x" and controller.request().length == 0
    result = called(controller, "sample_functions:fibonacci", "n=12", "--json")
    document = json.loads(result.stdout)
    assert document["value"] == 144 and document["code"] == 0 and document["slo_ns"] == 2 * 10**9
    assert controller.request().length == 1  # the size class is known with the function


def test_values_are_json_texts_or_arrays(controller: FunctionController, tmp_path: Path) -> None:
    file = tmp_path / "array.npy"
    np.save(file, np.zeros((2, 3), "f4"))
    words = ["7", "[1, 2]", "true", "plain text", '"quoted=1"', f"@{file}", "k=null", "t=a=b"]
    result = called(controller, "echo", *words)
    assert json.loads(result.stdout.splitlines()[0]) == {
        "args": [7, [1, 2], True, "plain text", "quoted=1", "array of float32 (2, 3)"],
        "kwargs": {"k": None, "t": "a=b"},
    }
    assert "characters)" in called(controller, "echo", "x" * 3000).stdout


def test_a_call_that_fails_prints_its_traceback_and_exits_with_1(
    controller: FunctionController,
) -> None:
    result = called(controller, "parent_of_boom", "so it goes")
    assert result.exit_code == 1
    assert "ValueError: so it goes" in result.stderr and "in boom" in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last == "slosched: error: call of 'parent_of_boom': call raised (code 104)"
    document = json.loads(called(controller, "boom", "no", "--json").stdout)
    assert document["code"] == Code.CALL_RAISED and "ValueError: no" in document["reason"]
    controller.code, controller.reason = Code.COULD_NOT_START_IN_TIME, "it needs 3ms"
    result = called(controller, "noop")
    assert result.exit_code == 1 and "it needs 3ms" in result.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("unknown",), "no worker offers"),
        (("a b",), "a function cannot be called 'a b'"),
        (("toy",), "is a model and not a function"),
        (("noop", "--slo", "soon"), "--slo: 'soon' is not a duration"),
        (("sample_functions:fibonacci",), "missing a required argument"),
        (("sample_functions:nothing",), "AttributeError"),
        (("echo", "k=1", "2"), "values come first"),
        (("echo", "k=1", "k=2"), "k= is given twice"),
        (("echo", "slo=1"), "slo= is an option of calls"),
        (("echo", "123456789012345678901234567890"), "an int of 97 bits"),
        (("echo", "@/no/such/file.npy"), "is not an array"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(
    controller: FunctionController, words: tuple[str, ...], message: str
) -> None:
    result = called(controller, *words)
    assert result.exit_code == 2 and message in result.stderr, result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not controller.of(InferRequest)
