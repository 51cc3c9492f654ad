"""The file of a join key."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slosched.cli.app import app
from slosched.errors import InvalidConfig
from slosched.join_key import read_join_key, write_join_key


def test_a_key_is_32_random_bytes_that_only_its_owner_can_read(tmp_path: Path) -> None:
    path, other = tmp_path / "a.key", tmp_path / "b.key"
    before = os.umask(0)
    try:
        write_join_key(path)
        write_join_key(other)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(read_join_key(str(path))) == 32
    assert read_join_key(str(path)) != read_join_key(str(other))


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.key"
    write_join_key(path)
    key = path.read_bytes()
    with pytest.raises(InvalidConfig, match="exists already"):
        write_join_key(path)
    assert path.read_bytes() == key
    with pytest.raises(InvalidConfig, match="cannot write"):
        write_join_key(tmp_path / "missing" / "a.key")


@pytest.mark.parametrize("content", [b"", b"x" * 31, b"x" * 33])
def test_a_file_of_another_length_is_no_key(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(InvalidConfig, match="32 bytes"):
        read_join_key(str(path))


def test_a_key_that_others_can_read_is_refused_and_so_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.key"
    write_join_key(path)
    path.chmod(0o640)
    with pytest.raises(InvalidConfig, match="chmod 600"):
        read_join_key(str(path))
    with pytest.raises(InvalidConfig, match="No such file"):
        read_join_key(str(tmp_path / "none"))


def test_the_command_makes_one_and_refuses_to_overwrite_it(tmp_path: Path) -> None:
    path = tmp_path / "a.key"
    made = CliRunner().invoke(app, ["keys", "join", str(path)])
    assert made.exit_code == 0 and str(path) in made.output
    assert len(read_join_key(str(path))) == 32
    again = CliRunner().invoke(app, ["keys", "join", str(path)])
    assert again.exit_code == 2
