"""Requests over HTTP for fuzz.py: right ones, and what becomes of them when parts are changed at random."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Callable
from typing import Any

from fuzz_values import DATATYPES, ODD, REGION, REGION_KEY, Filled
from http_cases import HttpCase, Json, packed
from raw_http import message

_LENGTH = "Inference-Header-Content-Length"


def case(number: int, draw: random.Random) -> HttpCase:
    """One request. Its name says what was done to it."""
    if draw.random() < 0.75:
        made = _Inference(draw)
        return HttpCase(f"{number}: {' + '.join(made.done) or 'right'}", made.data())
    name, data = _other(draw)
    return HttpCase(f"{number}: {name}", data)


class _Inference:
    """An inference, changed in none to three places."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.filled = Filled(draw)
        self.model, self.version = self.filled.model, draw.choice(("", "", "/versions/1"))
        self.headers: list[tuple[str, str]] = []
        self.tails: list[bytes] = []
        self.document: Json = {"inputs": [self._input(name) for name in self.filled.inputs]}
        self.length: str | None = None
        self.path = ""
        self.done: list[str] = []
        self.on_bytes: list[Callable[[bytes], bytes]] = []
        if draw.random() < 0.4:
            self.document["outputs"] = [self._output(name) for name in self.filled.outputs]
        if draw.random() < 0.2:
            self.document["id"] = draw.choice(("1", "an id", "ü", ""))
        if draw.random() < 0.2:
            self.document["parameters"] = {"binary_data_output": draw.random() < 0.7}
        for _ in range(draw.choice((0, 1, 1, 1, 1, 2, 2, 3))):
            change = draw.choice(_CHANGES)
            self.done.append(change.__name__.strip("_"))
            change(self)

    def _input(self, name: str) -> Json:
        datatype, shape, values = self.filled.inputs[name]
        made: Json = {"name": name, "datatype": datatype, "shape": shape}
        if datatype == "FP16" or self.draw.random() < 0.4:
            data = packed(datatype, values)
            self.tails.append(data)
            return made | {"parameters": {"binary_data_size": len(data)}}
        if self.draw.random() < 0.3:
            size = len(values) // shape[0]
            values = [values[at : at + size] for at in range(0, len(values), size)]
        return made | {"data": values}

    def _output(self, name: str) -> Json:
        form = self.draw.choice((None, True, False))
        return {"name": name} | ({} if form is None else {"parameters": {"binary_data": form}})

    def any_input(self) -> Json:
        found = self.document.get("inputs")
        each = self.draw.choice(found) if isinstance(found, list) and found else {}
        return each if isinstance(each, dict) else {}

    def any_output(self) -> Json:
        if not isinstance(self.document.get("outputs"), list) or not self.document["outputs"]:
            self.document["outputs"] = [{"name": name} for name in self.filled.outputs]
        each = self.draw.choice(self.document["outputs"])
        return each if isinstance(each, dict) else {}

    def parameters(self, owner: Json) -> Json:
        found = owner.setdefault("parameters", {})
        return found if isinstance(found, dict) else {}

    def any_list(self, name: str) -> list[Any]:
        found = self.document.get(name)
        return found if isinstance(found, list) else []

    def data(self) -> bytes:
        text = json.dumps(self.document).encode()
        whole = text + b"".join(self.tails)
        length = str(len(text)) if self.tails and self.length is None else self.length
        for each in self.on_bytes:
            whole = each(whole)
        headers = [("Content-Type", "application/json"), *self.headers]
        if length is not None and length != "none":
            headers.append((_LENGTH, length))
        path = self.path or f"/v2/models/{self.model}{self.version}/infer"
        return message("POST", path, whole, headers)


# ------------------------------------------------------------------------------------- changes


def _input_field(it: _Inference) -> None:
    it.any_input()[it.draw.choice(("name", "datatype", "shape", "parameters"))] = it.draw.choice(
        ODD
    )


def _input_lacks(it: _Inference) -> None:
    it.any_input().pop(it.draw.choice(("name", "datatype", "shape", "data", "parameters")), None)


def _datatype(it: _Inference) -> None:
    it.any_input()["datatype"] = it.draw.choice(DATATYPES)


def _shape(it: _Inference) -> None:
    each = it.any_input()
    shape = [*each["shape"]] if isinstance(each.get("shape"), list) else [1]
    place = it.draw.randrange(len(shape) + 1)
    extent = it.draw.choice(
        (0, 1, 2, 3, 17, -1, -2, 2**31, 2**62, 2**63, "1", 1.0, None, [1], True)
    )
    how = it.draw.choice(("insert", "set", "remove"))
    if how == "insert":
        shape.insert(place, extent)
    elif shape and how == "set":
        shape[min(place, len(shape) - 1)] = extent
    elif shape:
        shape.pop(min(place, len(shape) - 1))
    each["shape"] = shape


def _data_value(it: _Inference) -> None:
    each = it.any_input()
    if isinstance(each.get("data"), list) and each["data"]:
        values = [*each["data"]]
        values[it.draw.randrange(len(values))] = it.draw.choice(ODD)
        each["data"] = values


def _data_count(it: _Inference) -> None:
    each = it.any_input()
    if isinstance(each.get("data"), list) and each["data"]:
        each["data"] = it.draw.choice((each["data"][:-1], each["data"] * 2, []))


def _data_whole(it: _Inference) -> None:
    it.any_input()["data"] = it.draw.choice(ODD)


def _data_nested(it: _Inference) -> None:
    each = it.any_input()
    if isinstance(each.get("data"), list):
        for _ in range(it.draw.randint(1, 4)):
            each["data"] = [each["data"]]


def _binary_size(it: _Inference) -> None:
    parameters = it.parameters(it.any_input())
    size = parameters.get("binary_data_size", 0)
    size = size if isinstance(size, int) else 0
    others: tuple[Any, ...] = (
        size - 1,
        size + 1,
        0,
        -1,
        2**62,
        2**63,
        2**64,
        str(size),
        size + 0.0,
    )
    parameters["binary_data_size"] = it.draw.choice((*others, None, True, [size]))


def _tail(it: _Inference) -> None:
    if it.tails:
        place = it.draw.randrange(len(it.tails))
        each = it.tails[place]
        it.tails[place] = it.draw.choice((each[:-1], each + b"\0", b"", each * 2))


def _text_bytes(it: _Inference) -> None:
    """Lengths of texts that lie."""
    if it.tails:
        place = it.draw.randrange(len(it.tails))
        changed = bytearray(it.tails[place] or b"\0")
        changed[it.draw.randrange(min(8, len(changed)))] = it.draw.randrange(256)
        it.tails[place] = bytes(changed)


def _header_length(it: _Inference) -> None:
    size = len(json.dumps(it.document).encode())
    others = (size - 1, size + 1, 0, -1, 2**31, 2**63, 2**64, f"+{size}", f" {size} ", f"0{size}")
    more = (f"{size}.0", f"0x{size:x}", "", "ten", f"{size}, {size}", "none", size)
    it.length = str(it.draw.choice((*others, *more)))


def _inputs(it: _Inference) -> None:
    inputs = it.document.get("inputs")
    if not isinstance(inputs, list) or not inputs:
        return
    how = it.draw.choice(("drop", "twice", "other", "shuffle", "odd", "none", "unknown"))
    if how == "drop":
        inputs.pop(it.draw.randrange(len(inputs)))
    elif how == "twice":
        inputs.append(it.draw.choice(inputs))
    elif how == "other":
        inputs[it.draw.randrange(len(inputs))] = it.draw.choice(ODD)
    elif how == "shuffle":
        it.draw.shuffle(inputs)
        it.length = it.length or ("none" if not it.tails else None)
    elif how == "odd":
        it.document["inputs"] = it.draw.choice(ODD)
    elif how == "none":
        del it.document["inputs"]
    else:
        it.any_input()["name"] = it.draw.choice(("nope", "", "left ", "LEFT", "ü", "x" * 300))


def _outputs(it: _Inference) -> None:
    it.any_output()
    outputs = it.document["outputs"]
    how = it.draw.choice(("drop", "twice", "other", "shuffle", "odd", "empty", "unknown"))
    if how == "drop":
        outputs.pop(it.draw.randrange(len(outputs)))
    elif how == "twice":
        outputs.append(dict(outputs[0]) if isinstance(outputs[0], dict) else outputs[0])
    elif how == "other":
        outputs[it.draw.randrange(len(outputs))] = it.draw.choice(ODD)
    elif how == "shuffle":
        it.draw.shuffle(outputs)
    elif how == "odd":
        it.document["outputs"] = it.draw.choice(ODD)
    elif how == "empty":
        it.document["outputs"] = []
    else:
        it.any_output()["name"] = it.draw.choice(("nope", "", "ü", "x" * 300, None, 1))


def _output_parameter(it: _Inference) -> None:
    # Classification by more than none is not asked for: a Triton without labels of the model crashes.
    name = it.draw.choice(("binary_data", "classification", "colour", "binary_data_size"))
    value = it.draw.choice((0, "0", None, False, -1) if name == "classification" else ODD)
    output = it.any_output()
    if it.draw.random() < 0.1:
        output["parameters"] = it.draw.choice(ODD)
    else:
        it.parameters(output)[name] = value


def _parameter(it: _Inference) -> None:
    names = ("timeout", "priority", "sequence_id", "sequence_start", "sequence_end", "colour")
    name = it.draw.choice((*names, "binary_data_output", "triton_x", ""))
    values = (*ODD, 10**7, 10**9)
    if name == "timeout":  # neither server may be late by it
        values = (
            0,
            10**8,
            "0",
            "100000000",
            -1,
            1e8,
            1.5,
            True,
            None,
            "soon",
            "",
            [],
            {},
            2**62,
            2**64,
        )
    it.parameters(it.document)[name] = it.draw.choice(values)


def _top(it: _Inference) -> None:
    it.document[it.draw.choice(("id", "parameters", "outputs", "inputs", "colour", ""))] = (
        it.draw.choice(ODD)
    )


def _input_region(it: _Inference) -> None:
    """An input in shared memory, in place of its data or beside it."""
    each = it.any_input()
    if it.draw.random() < 0.8:
        each.pop("data", None)
    parameters = it.parameters(each)
    size = parameters.pop("binary_data_size", 16) if it.draw.random() < 0.8 else 16
    wanted = {"shared_memory_region": REGION, "shared_memory_byte_size": size}
    if it.draw.random() < 0.3:
        wanted["shared_memory_offset"] = it.draw.choice((0, 16, 4080, 4096, 4097, -1, "0", 2**62))
    parameters |= wanted
    if it.draw.random() < 0.5:
        parameters[it.draw.choice([*wanted])] = it.draw.choice((*ODD, "nope", 8, 16, 32, 64))


def _output_region(it: _Inference) -> None:
    parameters = it.parameters(it.any_output())
    wanted: Json = {"shared_memory_region": REGION, "shared_memory_byte_size": 512}
    if it.draw.random() < 0.4:
        wanted["shared_memory_offset"] = it.draw.choice((0, 16, 3584, 4000, 4097, -1, "0", 2**62))
    parameters |= wanted
    if it.draw.random() < 0.4:
        parameters[it.draw.choice([*wanted])] = it.draw.choice((*ODD, "nope", 8, 16, 64))


def _cut(it: _Inference) -> None:
    at = it.draw.random()
    it.on_bytes.append(lambda whole: whole[: int(at * len(whole))])


def _byte(it: _Inference) -> None:
    at, value = it.draw.random(), it.draw.choice(b'\x00\xff"{}[],:0-ae \n')
    it.on_bytes.append(
        lambda whole: whole[: int(at * len(whole))] + bytes([value]) + whole[int(at * len(whole)) :]
    )


def _around(it: _Inference) -> None:
    before, behind = it.draw.choice(
        (
            (b"\xef\xbb\xbf", b""),
            (b" \n", b""),
            (b"", b" \n"),
            (b"", b"x"),
            (b"", b"{}"),
            (b"//a\n", b""),
        )
    )
    it.on_bytes.append(lambda whole: before + whole + behind)


def _spelling(it: _Inference) -> None:
    """The same JSON written otherwise, or what is nearly JSON."""
    old, new = it.draw.choice(
        (
            (b'"inputs"', b'"\\u0069nputs"'),
            (b'"name"', b"'name'"),
            (b'"name"', b'"name":"a","name"'),
            (b"[", b"[,"),
            (b"]", b",]"),
            (b": ", b":\t\n "),
            (b'"data": [', b'"data": [NaN, '),
            (b'"data": [', b'"data": [-Infinity, '),
            (b'"data": [', b'"data": [01, '),
            (b'"data": [', b'"data": [1e400, '),
            (b'"data": [', b'"data": ["\\ud800", '),
        )
    )
    it.on_bytes.append(lambda whole: whole.replace(old, new, 1))


def _path(it: _Inference) -> None:
    infer, model = "/infer", it.filled.model
    it.path = it.draw.choice(
        (
            *(
                f"/v2/models/{model}/versions/{v}{infer}"
                for v in ("01", "0", "2", "-1", "+1", "1.0", "")
            ),
            *(
                f"/v2/models/{model}/versions/{v}{infer}"
                for v in ("9" * 18, "9" * 30, "1%20", "1:1")
            ),
            *(
                f"/v2/models/{m}{infer}"
                for m in ("nope", "spare", model.upper(), f"{model}%00", "")
            ),
            *(
                f"/v2/models/{m}{infer}"
                for m in (f"{model}/", f"/{model}", f"./{model}", "a" * 300)
            ),
            *(
                f"/v2/models/{model}{infer}{end}"
                for end in ("/", "?a=b", "?", "#x", ";x", "/x", "%20")
            ),
            *(
                f"/v2//models/{model}{infer}",
                f"//v2/models/{model}{infer}",
                f"/V2/models/{model}{infer}",
            ),
            *(
                f"/v2/models/{model}/versions{infer}",
                f"/v2/models/{model}",
                f"/v2/models/{model}/generate",
            ),
        )
    )


def _header(it: _Inference) -> None:
    it.headers.append(
        it.draw.choice(
            (
                *(("Content-Type", "text/plain"), ("Content-Type", "")),
                *(("Accept", "text/html"), ("Accept-Encoding", "gzip;q=0, identity")),
                *(
                    ("Expect", "100-continue"),
                    ("Content-Encoding", "identity"),
                    ("Content-Encoding", ""),
                ),
                *(
                    ("Triton-Request-Timeout", "5"),
                    ("Cookie", "a=b"),
                    ("Origin", "http://localhost"),
                ),
            )
        )
    )


def _compressed(it: _Inference) -> None:
    encoding = it.draw.choice(
        ("gzip", "deflate", "raw", "GZIP", "x-gzip", "gzip, gzip", "twice", "cut")
    )
    ways: dict[str, Callable[[bytes], bytes]] = {
        "deflate": zlib.compress,
        "raw": lambda whole: zlib.compress(whole)[2:-4],
        "twice": lambda whole: gzip.compress(whole[:30]) + gzip.compress(whole[30:]),
        "cut": lambda whole: gzip.compress(whole)[:-6],
    }
    name = {"raw": "deflate", "twice": "gzip", "cut": "gzip"}.get(encoding, encoding)
    it.headers.append(("Content-Encoding", name))
    it.on_bytes.append(ways.get(encoding, gzip.compress))


_CHANGES: tuple[Callable[[_Inference], None], ...] = (
    *(_input_field, _input_lacks, _datatype, _shape, _data_value, _data_count, _data_whole),
    *(_data_nested, _binary_size, _tail, _text_bytes, _header_length, _inputs, _outputs),
    *(_output_parameter, _parameter, _top, _input_region, _output_region, _cut, _byte, _around),
    *(_spelling, _path, _header, _compressed, _shape, _parameter, _data_value),
)

# -------------------------------------------------------------------------------- other requests


def _other(draw: random.Random) -> tuple[str, bytes]:
    """A request for anything but an inference."""
    model = draw.choice(("pair", "pair", "types", "seen", "nope", "spare", "", "a b", "n%6Fpe"))
    version = draw.choice(
        ("", "", "", "/versions/1", "/versions/2", "/versions/one", "/versions/01")
    )
    of_model = f"/v2/models/{model}{version}"
    of_region = draw.choice((REGION, "nope", "other", ""))
    memory = draw.choice(("/v2/systemsharedmemory", "/v2/cudasharedmemory"))
    path = draw.choice(
        (
            *(of_model, f"{of_model}/config", f"{of_model}/ready", f"{of_model}/stats"),
            *("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/stats", "/v2/models"),
            *(
                f"{of_model}/trace/setting",
                "/v2/trace/setting",
                "/v2/logging",
                "/v2/repository/index",
            ),
            *(f"/v2/repository/models/{model}/load", f"/v2/repository/models/{model}/unload"),
            *(f"{memory}/status", f"{memory}/region/{of_region}/status"),
            *(f"{memory}/region/{of_region}/register", "/v2/repository/index"),
            *(f"{memory}/region/nope/unregister", "/v2/cudasharedmemory/unregister"),
        )
    )
    posts = path.endswith(("index", "load", "register")) or "setting" in path or "logging" in path
    method = (
        draw.choice(("POST",) * 6 + ("GET", "PUT"))
        if posts
        else draw.choice(("GET",) * 8 + _METHODS)
    )
    if path.endswith(("/pair/unload", "/types/unload", "/seen/unload")):
        method = "GET"  # others need them
    path += draw.choice(("",) * 12 + ("/", "?a=b", "?", "//", "%20", "/x"))
    name = f"{method} {path.partition('?')[0]}"
    return name, message(method, path, _body(draw, path) if method != "GET" else b"")


_METHODS = ("POST", "PUT", "DELETE", "PATCH", "OPTIONS")


def _body(draw: random.Random, path: str) -> bytes:
    if draw.random() < 0.2:
        return draw.choice(
            (b"", b"{", b"[]", b"null", b"1", b'"x"', b"\xff", b"{}x", b" {} ", b"{}")
        )
    document: Json = {}
    if path.endswith("register"):
        document = {"key": draw.choice((REGION_KEY, "/nope", "nope", "", "/a/b"))}
        document |= {"offset": 0, "byte_size": draw.choice((64, 4096, 4097, 0, 2**62))}
    elif path.endswith("index"):
        document = {"ready": draw.choice((True, False))}
    elif path.endswith("load"):
        document = {"parameters": draw.choice(({}, {"unload_dependents": True}, {"colour": "red"}))}
    elif "trace" in path or "logging" in path:
        return b"{}"
    if draw.random() < 0.4:
        document[draw.choice((*document, "colour"))] = draw.choice(ODD)
    return json.dumps(document).encode()
