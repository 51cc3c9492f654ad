"""The original's tasks as commands: `slosched exp experiments.sgd --native 10 60000`, and the table of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slosched.cli.help import SloschedCommand
from slosched.errors import InvalidConfig, UnknownName
from slosched.faasm.names import TASKS, VARIABLES, Task

#: The command that takes tasks by their names.
TASK = "task"
#: Our options that may stand behind a task's own words, and whether they take a value.
OURS = {
    "--scale": True,
    "--out": True,
    "--layout": True,
    "--resume": False,
    "--json": False,
    "--size": True,
    "--into": True,
    "--folder": True,
    "--python": True,
}


@dataclass(frozen=True)
class Understood:
    """A task with its words read: what it runs (() for nothing), and what to say of it."""

    task: Task
    runs: tuple[str, ...]
    notes: tuple[str, ...]


def is_task(word: str) -> bool:
    """Whether the word has the form of a task's name: no experiment's name has a dot."""
    return not word.startswith("-") and (_normal(word) in TASKS or "." in word)


def understood(words: Sequence[str]) -> list[Understood]:
    """What the words of one or several tasks mean, as `inv tf.upload tf.state` has two.

    Raises UnknownName for a task or switch that the original does not have, InvalidConfig for arguments that
    are missing or too many.
    """
    found = []
    rest = [*words]
    while rest:
        name = _normal(rest.pop(0))
        if name not in TASKS:
            raise UnknownName("task", name, [*TASKS])
        end = next((i for i, word in enumerate(rest) if _begins_task(word)), len(rest))
        found.append(_understood(TASKS[name], rest[:end]))
        rest = rest[end:]
    return found


def names_text() -> str:
    """Each task with what it is here, its switches that have no effect, and each variable."""
    lines = ["Tasks of the original (inv TASK), and what each is here:", ""]
    for task in TASKS.values():
        lines += [task.usage, f"    {task.ours}"]
        lines += [
            f"    {switch.rstrip('=')}: no effect: {what}"
            for switch, what in task.switches.items()
            if isinstance(what, str)
        ]
    lines += ["", "Variables of the original, and what each is here:", ""]
    lines += [f"{name}\n    {variable_text(name)}" for name in VARIABLES]
    return "\n".join(lines)


def names_markdown() -> str:
    """The three tables as docs/faasm.md has them: what is the same here stands in one row.

    Switches that do something stand with their tasks, and those of a task that has no effect for the same
    reason are left out.
    """
    tasks = [(f"`{task.usage}`", task.ours) for task in TASKS.values()]
    without = [row for row in switch_rows() if row[2][:1] == "n" and row[2] != TASKS[row[0]].ours]
    meanings: dict[str, set[str]] = {}
    for _, switch, meaning in without:
        meanings.setdefault(switch, set()).add(meaning)
    switches = [
        (f"`{switch}`" if len(meanings[switch]) == 1 else f"`{task} {switch}`", meaning)
        for task, switch, meaning in without
    ]
    variables = [(f"`{name}`", variable_text(name)) for name in VARIABLES]
    return "\n\n".join(
        _table(heading, rows)
        for heading, rows in (("tasks", tasks), ("switches", switches), ("variables", variables))
    )


def _table(heading: str, rows: Sequence[tuple[str, str]]) -> str:
    names: dict[str, dict[str, None]] = {}  # by what they are here, in order and each once
    for name, meaning in rows:
        names.setdefault(meaning, {})[name] = None
    lines = [f"| {heading} | here |", "|---|---|"]
    for meaning, those in names.items():
        cells = (", ".join(those), meaning)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def names_document() -> dict[str, object]:
    """The same, fit for JSON."""
    return {
        "tasks": [
            {
                "task": task.name,
                "usage": task.usage,
                "runs": " ".join(("slosched", *task.runs)) if task.runs else None,
                "no_effect": task.why or None,
                "documented": task.documented,
            }
            for task in TASKS.values()
        ],
        "switches": [
            {"task": task, "switch": switch, "here": meaning}
            for task, switch, meaning in switch_rows()
        ],
        "variables": {name: variable_text(name) for name in VARIABLES},
    }


class TaskCommand(SloschedCommand):
    """A command whose words all reach it, switches of the original too; its help ends with all tasks."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        formatter.write(f"\n{names_text()}\n")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--help" in args or "-h" in args or not args:
            return list(super().parse_args(ctx, args))
        return list(super().parse_args(ctx, ["--", *args]))


def switch_rows() -> list[tuple[str, str, str]]:
    """Each switch of each task: (task, switch, what it is here)."""
    return [
        (
            task.name,
            switch.rstrip("="),
            f"no effect: {what}" if isinstance(what, str) else f"`{' '.join(what)}`",
        )
        for task in TASKS.values()
        for switch, what in task.switches.items()
    ]


def variable_text(name: str) -> str:
    """What a variable is here."""
    variable = VARIABLES[name]
    if variable.why:
        return f"no effect: {variable.why}"
    options = " or ".join(
        f"--{each.removesuffix('_ns').replace('_', '-')}" for each in variable.fields
    )
    return f"{options}, where the experiment has it"


def _normal(word: str) -> str:
    return word.replace("_", "-")


def _begins_task(word: str) -> bool:
    return _normal(word) in TASKS and "." in word


def _understood(task: Task, words: Sequence[str]) -> Understood:
    values: dict[str, str] = {}
    added: list[str] = []
    notes = [] if task.runs else [f"{task.name}: no effect: {task.why}"]
    rest = [*words]
    while rest:
        word = rest.pop(0)
        if word.startswith("--"):
            _take_switch(task, word, rest, added, notes)
        elif len(values) == len(task.arguments):
            raise InvalidConfig(
                f"{task.name}: {word!r} is one argument too many; it is written {task.usage}"
            )
        else:
            values[task.arguments[len(values)]] = word
    missing = task.arguments[len(values) :]
    if missing:
        raise InvalidConfig(f"{task.name}: {missing[0]} is missing; it is written {task.usage}")
    runs = [values[word[1:-1]] if word.startswith("{") else word for word in task.runs]
    return Understood(task, (*runs, *added) if runs else (), tuple(notes))


def _take_switch(
    task: Task, word: str, rest: list[str], added: list[str], notes: list[str]
) -> None:
    """Read one switch, and its value from `rest`, into the words that are run and what is said."""
    switch, equals, value = word.partition("=")
    if f"{switch}=" in task.switches:
        if not equals:
            if not rest:
                raise InvalidConfig(f"{task.name}: {switch} takes a value")
            value = rest.pop(0)
        what = task.switches[f"{switch}="]
    elif switch in task.switches:
        what = task.switches[switch]
    elif task.runs and switch in OURS:
        added.append(switch)
        if OURS[switch]:
            if not equals and not rest:
                raise InvalidConfig(f"{task.name}: {switch} takes a value")
            added.append(value if equals else rest.pop(0))
        return
    else:
        raise UnknownName(
            f"switch of {task.name}", switch, [each.rstrip("=") for each in task.switches]
        )
    if isinstance(what, str):
        notes.append(f"{switch}: no effect: {what}")
    else:
        added += [each.replace("{}", value) for each in what]
