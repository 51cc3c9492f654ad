"""A process of the tests of state: it adds ones to a key, and prints a line after each push that it made."""

from __future__ import annotations

import sys

from slosched.functions.state import State


def main(store: str, pushes: int, size: int) -> None:
    with State("shared", store) as state:
        array = state.array("total", size, "f8", merge="sum")
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        for _ in range(pushes):
            with (
                array._local.locked()
            ):  # the increment of a view, kept apart from pulls of this host
                array._fetch(0, size)
                array._local.keep_base()
                array._local.value += 1
            array.push()
            sys.stdout.write("pushed\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
