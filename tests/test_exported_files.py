"""Files of exported programs: what torch.export.save wrote is read, and no Python in one is ever run."""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch")

from slosched.config import ModelSource  # noqa: E402
from slosched.daemon.backends.exported_text import check_program  # noqa: E402
from slosched.daemon.backends.sources import source_spec  # noqa: E402
from slosched.errors import InvalidConfig  # noqa: E402

pytestmark = pytest.mark.torch


class Bomb:
    """Unpickling it makes the folder `place`."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.place,)


@pytest.fixture(scope="module")
def good() -> bytes:
    linear = torch.nn.Linear(4, 2).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(linear, (torch.zeros(2, 4),), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def rewritten(
    data: bytes,
    change: Callable[[str, bytes], bytes | None],
    more: dict[str, bytes] | None = None,
    *,
    compression: int = zipfile.ZIP_STORED,
) -> bytes:
    """The archive, each part as `change` makes it of name and content (None: left out), and `more`."""
    made = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as before,
        zipfile.ZipFile(made, "w", compression) as after,
    ):
        for info in before.infolist():
            content = change(info.filename.partition("/")[2], before.read(info))
            if content is not None:
                after.writestr(info.filename, content)
        for name, content in (more or {}).items():
            after.writestr(f"{before.infolist()[0].filename.partition('/')[0]}/{name}", content)
    return made.getvalue()


def same(name: str, content: bytes) -> bytes:
    return content


def build(data: bytes, path: Path) -> Any:
    file = path / "model.pt2"
    file.write_bytes(data)
    return source_spec(ModelSource("mine", pt2=str(file))).build()


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def test_what_torch_wrote_is_read_also_when_it_was_packed_again(
    good: bytes, tmp_path: Path
) -> None:
    one, other = build(good, tmp_path), build(rewritten(good, same), tmp_path)
    row = torch.ones(1, 4)
    assert torch.equal(one(row), other(row))


def test_pickles_are_not_run(good: bytes, tmp_path: Path) -> None:
    place = tmp_path / "made"
    bomb = pickle.dumps(Bomb(place), protocol=2)
    inputs, legacy = "data/sample_inputs/model.pt", "data/weights/model.pt"

    def with_inputs(name: str, content: bytes) -> bytes:
        return saved(Bomb(place)) if name == inputs else content

    for data in (
        rewritten(good, with_inputs),
        rewritten(good, lambda name, content: bomb if name == inputs else content),
        rewritten(good, same, {legacy: saved({"weight": Bomb(place)})}),
        rewritten(good, same, {"data/constants/model.pt": saved({"x": Bomb(place)})}),
        rewritten(good, same, {"data/constants/opaque_obj_0": bomb}),
        rewritten(good, same, {"DATA/Constants/Opaque_obj_0": bomb}),
        rewritten(good, same, {"data/constants/custom_obj_0": bomb}),
        bomb,
        saved(Bomb(place)),
    ):
        with pytest.raises(InvalidConfig) as caught:
            build(data, tmp_path)
        assert "model.pt2 is not an exported program: " in str(caught.value)
        assert not place.exists()
    # The test can fail: this is what the pickle does.
    pickle.loads(bomb)
    assert place.exists()


def test_a_weight_that_is_pickled_runs_nothing(good: bytes, tmp_path: Path) -> None:
    place = tmp_path / "made"

    def change(name: str, content: bytes) -> bytes:
        if name == "data/weights/model_weights_config.json":
            assert b'"use_pickle": false' in content
            return content.replace(b'"use_pickle": false', b'"use_pickle": true')
        return saved(Bomb(place)) if name.startswith("data/weights/weight_") else content

    with pytest.raises(
        InvalidConfig, match="holds Python objects, which are never unpickled; a fac"
    ):
        build(rewritten(good, change), tmp_path)
    assert not place.exists()


MADE = "__import__('os').mkdir('made')"


@pytest.mark.parametrize(
    "expression",
    [
        MADE,
        "print.__self__",
        "exec('1')",
        "S('1')",
        "Float('__import__')",
        "Symbol('x()')",
        "Max('1', 2)",
        "Lambda(x, 1)",
        "[1]",
        "(lambda: 1)()",
        "x.y",
        "x[0]",
        "f'{1}'",
        "1 if 2 else 3",
        "(" * 5_000,
        "",
        7,
    ],
)
def test_an_expression_that_is_more_than_arithmetic_is_not_evaluated(
    good: bytes, tmp_path: Path, expression: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def change(name: str, content: bytes) -> bytes:
        if not name.startswith("models/"):
            return content
        made, count = re.subn(
            rb'"expr_str": "[^"]*"', f'"expr_str": {json.dumps(expression)}'.encode(), content
        )
        assert count
        return made

    with pytest.raises(InvalidConfig, match="as the size of a tensor"):
        build(rewritten(good, change), tmp_path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "target",
    [
        "torch.os.system",
        "torch.load",
        "_operator.methodcaller",
        "_operator.call",
        "math.__loader__",
        "torch.ops.aten.from_file.default",
        "#hook:x",
        7,
    ],
)
def test_what_is_not_an_operator_is_not_called(good: bytes, tmp_path: Path, target: object) -> None:
    def change(name: str, content: bytes) -> bytes:
        if not name.startswith("models/"):
            return content
        made, count = re.subn(
            rb'"target": "torch\.ops[^"]*"', f'"target": {json.dumps(target)}'.encode(), content
        )
        assert count
        return made

    with pytest.raises(InvalidConfig, match="which is not an operator of torch"):
        build(rewritten(good, change), tmp_path)


@pytest.mark.parametrize(
    "expression",
    [
        "Symbol('s31', positive=True, integer=True)",
        "2*s0 + 1",
        "Max(1, FloorDiv(s0, 2))",
        "-s1",
        "4",
        "Mul(Integer(7), ToFloat(Symbol('s0', integer=True)), Float('0.5', precision=53))",
    ],
)
def test_what_torch_writes_of_sizes_is_let_through(expression: str) -> None:
    check_program(json.dumps({"a": [{"expr_str": expression}]}).encode())


def test_compiled_code_is_not_opened(good: bytes, tmp_path: Path) -> None:
    more = {"data/aotinductor/model/lib.so": b"\x7fELF"}
    with pytest.raises(InvalidConfig, match=r"it holds compiled code \('.*/lib\.so'\)"):
        build(rewritten(good, same, more), tmp_path)


def test_a_small_file_does_not_become_a_large_one(good: bytes, tmp_path: Path) -> None:
    zeros = bytes(8 << 20)
    data = rewritten(good, same, {"data/extra/zeros": zeros}, compression=zipfile.ZIP_DEFLATED)
    assert len(data) < len(zeros) // 50
    with pytest.raises(
        InvalidConfig, match=r"compressed, and torch\.export\.save compresses nothing"
    ):
        build(data, tmp_path)


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    "spoilt",
    [
        lambda data: b"",
        lambda data: b"nonsense",
        lambda data: zlib.compress(data),
        cut,
        lambda data: rewritten(data, lambda name, content: None, {"x": b""}),
        lambda data: saved({"weight": torch.zeros(2)}),
    ],
)
def test_what_is_not_a_program_is_refused_before_torch_opens_it(
    good: bytes, tmp_path: Path, spoilt: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: Any) -> None:
        raise AssertionError("torch prints a traceback")

    monkeypatch.setattr(torch.export, "load", load)
    with pytest.raises(InvalidConfig, match=r"is not an exported program: .*torch\.export\.save"):
        build(spoilt(good), tmp_path)
