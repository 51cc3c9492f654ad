"""Texts of the command line become values, and wrong ones are named."""

from __future__ import annotations

import pytest

from slosched.cli.values import (
    duration_ns,
    flag,
    inputs_enabled,
    looks_like_address,
    one_address,
    worker_addresses,
)
from slosched.errors import InvalidConfig, InvalidDuration


def test_worker_lists_and_ranges_expand_in_order() -> None:
    given = ["a:12345,b:12345", "c:12345-12347", "[::1]:5"]
    assert worker_addresses(given) == (
        "a:12345",
        "b:12345",
        "c:12345",
        "c:12346",
        "c:12347",
        "[::1]:5",
    )


def test_empty_parts_are_no_workers() -> None:
    assert worker_addresses(["a:1, b:2,"]) == ("a:1", "b:2")
    assert worker_addresses([]) == ()


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("gpu01", "is not a host:port"),
        ("gpu01:", "is not a host:port"),
        (":12345", "is not a host:port"),
        ("a:0", "1..65535"),
        ("a:70000", "1..65535"),
        ("a:9-3", "ascending"),
        ("a:1-65535", "more than 1024"),
        ("a:1,a:1", "named twice"),
        ("a:1-3,a:2", "named twice"),
        ("tcp://a:1", "is not a host:port"),
    ],
)
def test_wrong_workers_are_named(text: str, wrong: str) -> None:
    with pytest.raises(InvalidConfig, match=wrong):
        worker_addresses([text])


def test_an_address_is_told_from_a_name() -> None:
    assert looks_like_address("volta04:12346")
    assert looks_like_address("127.0.0.1:12346")
    for name in ("slo-exp-1", "infer", "volta04", "a:b", "http://a:1", ""):
        assert not looks_like_address(name)
    with pytest.raises(InvalidConfig, match="names 2 addresses"):
        one_address("a:1-2")


def test_bare_durations_have_the_unit_of_their_option() -> None:
    assert duration_ns("--x", "5000000", bare_unit="ns") == 5_000_000
    assert duration_ns("--x", "5ms") == 5_000_000
    assert duration_ns("--x", "2") == 2_000_000_000
    for text in ("0", "-5ms", "soon", "nan"):
        with pytest.raises(InvalidDuration, match="--x"):
            duration_ns("--x", text)


def test_flags_take_the_seeds_form_and_words() -> None:
    assert [flag("g", text) for text in ("1", "true", "Yes")] == [True] * 3
    assert [flag("g", text) for text in ("0", "false", "off")] == [False] * 3
    with pytest.raises(InvalidConfig, match="generate_inputs must be 0 or 1"):
        flag("generate_inputs", "2")


def test_the_option_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLOCKWORK_DISABLE_INPUTS", raising=False)
    assert inputs_enabled(None)
    monkeypatch.setenv("CLOCKWORK_DISABLE_INPUTS", "1")
    assert not inputs_enabled(None)
    assert inputs_enabled(True)
    monkeypatch.setenv("CLOCKWORK_DISABLE_INPUTS", "yes")  # Clockwork reads exactly "1"
    assert inputs_enabled(None)
