"""The demo's question by plain HTTP, as curl asks it: through a gateway in front of the controller."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from slosched.cli.demo_answers import OutputsDiffer, compare
from slosched.cli.demo_models import DemoModel
from slosched.cli.output import say
from slosched.errors import SloschedError
from slosched.experiment.children import Children
from slosched.output_files import write_file

if TYPE_CHECKING:
    from slosched.clients.tensors import Array

#: The file with the question, for curl.
QUESTION = "question.json"
_READY_S = 30.0
_ANSWER_S = 60.0
_SLO = "10s"
_MOST_BYTES = 1 << 20


def chosen(models: Sequence[DemoModel]) -> DemoModel:
    """The model that is asked: the one whose question is shortest to read, if it is served."""
    return next((model for model in models if model.name == "digits"), models[0])


def ask_by_http(
    children: Children,
    controller: str,
    directory: Path,
    repository: Path,
    models: Sequence[DemoModel],
    device: str,
) -> str:
    """Start a gateway, ask one model its first question by HTTP, and compare with a direct forward pass.

    Says what was asked, and returns a line for the verdict; empty without the gateway's packages. The question
    stays in `directory`. Raises OutputsDiffer, ChildFailed, or SloschedError for an answer that is none.
    """
    if find_spec("httptools") is None:
        say("by HTTP: left out; httptools is not installed (pip install slosched[gateway])")
        return ""
    model = chosen(models)
    body = question_of(model)
    write_file(directory / QUESTION, body)
    # Both ports are free ones; gRPC would need one more package.
    arguments = ["gateway", "--controller", controller, "--http-port", "0", "--grpc-port", "-1"]
    child = children.start("gateway", arguments, directory / "gateway.log")
    port = children.wait_ready(child, within_s=_READY_S)
    url = f"http://127.0.0.1:{port}/v1/infer/{model.name}"
    answer = _array(model.name, _post(url, body))
    children.end(child)
    how = compare(model.name, [answer], [model.direct(repository)[0]], device)
    say("by plain HTTP, through slosched gateway:")
    say(f"  curl {url} -d @{quote(str(directory / QUESTION))}")
    say(f"  -> {model.meaning(answer)}; it equals a direct forward pass {how}")
    return f"gateway   one answer by plain HTTP: {model.meaning(answer)}"


def question_of(model: DemoModel) -> bytes:
    """The first question of a model as the plain JSON of `POST /v1/infer/MODEL`."""
    inputs = {name: value.tolist() for name, value in model.questions()[0].items()}
    return json.dumps({"inputs": inputs, "slo": _SLO}).encode() + b"\n"


def _post(url: str, body: bytes) -> bytes:
    """The answer's body, of at most 1 MiB. Raises SloschedError, with what the gateway said."""
    from urllib.error import HTTPError
    from urllib.request import ProxyHandler, Request, build_opener

    direct = build_opener(
        ProxyHandler({})
    )  # whatever proxy the environment names, this is loopback
    request = Request(url, body, {"Content-Type": "application/json"})
    try:
        with direct.open(request, timeout=_ANSWER_S) as reply:
            found: bytes = reply.read(_MOST_BYTES)
            return found
    except HTTPError as error:
        words = error.read(_MOST_BYTES).decode(errors="replace")
        raise SloschedError(f"the gateway answered {error.code} to {url}: {words}") from None
    except OSError as error:
        raise SloschedError(f"the gateway at {url} did not answer: {error}") from None


def _array(name: str, reply: bytes) -> Array:
    """The only output of an answer. Raises OutputsDiffer."""
    import numpy as np

    try:
        document: Any = json.loads(reply)
        [value] = document["outputs"].values()
        return np.asarray(value, np.float32)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputsDiffer(
            f"model {name} answered by HTTP with {reply[:200]!r} ({error})"
        ) from None
