"""Errors cross process boundaries: a pool's worker raises them, the caller catches them."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

import slosched
from fake_controller import model_info
from slosched.clients.inference import Inference, Model
from slosched.errors import DeadlineExceeded, SloschedError, UnknownName
from slosched.messages import InferReply

_PACKAGE = Path(slosched.__file__).parent
#: Imports torch, which takes seconds; its only error has no constructor of its own.
_WITHOUT = "slosched.daemon.backends.contract"


def _classes() -> list[type[SloschedError]]:
    """Every class below SloschedError that the source defines, found by its text and imported."""
    for path in sorted(_PACKAGE.rglob("*.py")):
        module = ".".join(("slosched", *path.relative_to(_PACKAGE).with_suffix("").parts))
        if module != _WITHOUT and re.search(
            r"^class \w+\(.*\bSloschedError\)", path.read_text(), re.M
        ):
            import_module(module)

    def below(kind: type[SloschedError]) -> Iterator[type[SloschedError]]:
        for each in kind.__subclasses__():
            yield each
            yield from below(each)

    found = {kind for kind in below(SloschedError) if kind.__module__.startswith("slosched.")}
    return [
        SloschedError,
        *sorted(found, key=lambda kind: f"{kind.__module__}.{kind.__qualname__}"),
    ]


def _example(kind: type[SloschedError]) -> SloschedError:
    """An instance, with something for each argument of its constructor."""
    if kind.__init__ is Exception.__init__:
        return kind("what was wrong; what to do")
    values: dict[str, object] = {"code": 8, "known": ["b", "a"], "exit_code": 5}
    positional, keywords = [], {}
    for name, parameter in list(inspect.signature(kind.__init__).parameters.items())[1:]:
        if parameter.kind is parameter.KEYWORD_ONLY:
            keywords[name] = values.get(name, "text")
        elif parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            positional.append(values.get(name, "text"))
    return kind(*positional, **keywords)


def test_the_classes_are_found() -> None:
    names = {kind.__name__ for kind in _classes()}
    assert {"DeadlineExceeded", "UnknownName", "JobFailed", "MalformedLog", "ChildFailed"} <= names
    assert len(names) > 20


@pytest.mark.parametrize("kind", _classes(), ids=lambda kind: kind.__name__)
def test_errors_survive_pickling_and_copying(kind: type[SloschedError]) -> None:
    error = _example(kind)
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is kind
        assert str(again) == str(error) and again.args == error.args
        assert again.__dict__ == error.__dict__ and again.exit_code == error.exit_code


def _refused() -> None:
    reply = InferReply(3, 8, "no opening", 1, 10_000_000, 3_000_000, False)
    answer = Inference(
        Model(model_info(1), 7), {"output": np.ones(2, np.float32)}, reply, 4_000_000
    )
    answer.raise_for_code()


def _unknown() -> None:
    raise UnknownName("model", "resnet", ["resnet50_v2"])


def test_a_process_pool_hands_errors_to_its_caller() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with pytest.raises(DeadlineExceeded) as caught:
            pool.submit(_refused).result(60)
        assert caught.value.code == 8
        assert isinstance(caught.value.reply, Inference)
        assert caught.value.reply.remaining_ns == 7_000_000
        with pytest.raises(UnknownName, match="resnet50_v2"):
            pool.submit(_unknown).result(60)
