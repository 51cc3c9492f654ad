"""What the text of an exported program may say: torch evaluates its expressions and looks its operators up.

Expressions of sizes go through sympy, which is Python's eval, and an operator's name is followed attribute by
attribute from the module torch, which has `os` as one. torch.export.save writes neither in any other form than
the ones that are let through here.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from slosched.errors import InvalidConfig

#: Without those of Python's operators that call what they are given, or reach into it.
_OPERATOR = re.compile(
    r"torch\.ops\.\w+(\.\w+)*|math\.[a-z]\w*|torch\._?sym_\w+"
    r"|_operator\.(?!call\b|methodcaller\b|attrgetter\b|itemgetter\b|setitem\b)[a-z]\w*"
)
_FILES = ("torch.ops.aten.from_file",)
_NODES = (
    ast.Expression,
    ast.Constant,
    ast.Name,
    ast.Load,
    ast.Call,
    ast.keyword,
    ast.BinOp,
    ast.UnaryOp,
    ast.Compare,
    ast.BoolOp,
    ast.operator,
    ast.unaryop,
    ast.cmpop,
    ast.boolop,
)
#: Functions of sympy and torch, which are classes; S and Lambda are not, and evaluate texts.
_FUNCTION = re.compile(r"[A-Z][A-Za-z]+|floor|ceiling")
_NOT_CALLED = ("Lambda",)
#: What texts within an expression may be: a symbol's name, or the digits of a number, by the function.
_TEXTS = {"Symbol": re.compile(r"\w+"), "Float": re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?")}


def check_program(text: bytes) -> None:
    """Raise InvalidConfig if the JSON text of a program has an expression or an operator of another kind."""
    try:
        left: list[Any] = [json.loads(text)]
    except (ValueError, RecursionError) as error:
        raise InvalidConfig(f"its program is not a JSON file: {error}") from None
    while left:
        value = left.pop()
        if isinstance(value, list):
            left += value
        elif isinstance(value, dict):
            left += value.values()
            if "expr_str" in value and not _is_expression(value["expr_str"]):
                raise InvalidConfig(f"it has {_short(value['expr_str'])} as the size of a tensor")
            target = value.get("target")
            if "inputs" in value and "target" in value and not _is_operator(target):
                raise InvalidConfig(f"it calls {_short(target)}, which is not an operator of torch")


def _is_operator(target: object) -> bool:
    if not isinstance(target, str) or target.startswith(_FILES):
        return False
    return _OPERATOR.fullmatch(target) is not None


def _is_expression(text: object) -> bool:
    """Whether `text` is arithmetic on symbols and numbers."""
    if not isinstance(text, str):
        return False
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    named: set[int] = set()  # texts that are such
    for node in ast.walk(tree):
        if not isinstance(node, _NODES):
            return False
        if isinstance(node, ast.Call):
            called = node.func
            if not isinstance(called, ast.Name) or not _FUNCTION.fullmatch(called.id):
                return False
            if called.id in _NOT_CALLED:
                return False
            named.update(id(each) for each in node.args if _is_text(each, called.id))
        number = isinstance(node, ast.Constant) and isinstance(node.value, int | float)
        if isinstance(node, ast.Constant) and not number and id(node) not in named:
            return False
    return True


def _is_text(node: ast.expr, function: str) -> bool:
    form = _TEXTS.get(function)
    text = node.value if isinstance(node, ast.Constant) else None
    return isinstance(text, str) and form is not None and form.fullmatch(text) is not None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."
