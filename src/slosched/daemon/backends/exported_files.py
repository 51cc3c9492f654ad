"""An exported program's file (torch.export.save), read without running Python that it holds.

torch.export.load unpickles whatever a file has (example inputs, weights of tensor subclasses, constants that
are Python objects), and it opens compiled code. What torch.export.save wrote of plain tensors needs none of
this. What the program itself may say is in exported_text.py.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import torch

from slosched.daemon.backends.exported_text import check_program
from slosched.errors import InvalidConfig

#: Parts of an archive, below its top folder (torch/export/pt2_archive/constants.py).
_COMPILED = "data/aotinductor/"
_OBJECTS = ("data/constants/custom_obj_", "data/constants/opaque_obj_")
_PROGRAMS = "models/"
#: The form before torch 2.8 has no top folder.
_OLD_PROGRAM = "serialized_exported_program.json"
_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_FACTORY = "a factory can load it by code of its own"


def read_program(file: BinaryIO) -> torch.export.ExportedProgram:
    """The program in `file`.

    Raises InvalidConfig for one with Python objects, compiled code or compressed parts, and what torch raises
    for what is not a program.
    """
    _check(file)
    file.seek(0)
    with _weights_alone():
        try:
            return torch.export.load(file)
        except Exception as error:
            if type(error).__name__ == "UnpicklingError":
                raise InvalidConfig(
                    f"it holds Python objects, which are never unpickled; {_FACTORY}"
                ) from None
            raise


def _check(file: BinaryIO) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
            _check_parts(parts)
            for part in parts:
                if _is_program(part.filename):
                    check_program(archive.read(part))
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise InvalidConfig(f"torch.export.save writes a ZIP file ({error})") from None


def _is_program(name: str) -> bool:
    return name == _OLD_PROGRAM or name.lower().partition("/")[2].startswith(_PROGRAMS)


def _check_parts(parts: list[zipfile.ZipInfo]) -> None:
    names = [part.filename for part in parts]
    if not any(map(_is_program, names)):
        # torch would print what it tried instead.
        raise InvalidConfig("there is no program in it, such as torch.export.save writes")
    # The reader of torch does not heed the case of names.
    if len({name.lower() for name in names}) < len(names):
        raise InvalidConfig("it has two parts of one name")
    for part in parts:
        name = part.filename.lower().partition("/")[2]
        if name.startswith(_COMPILED):
            raise InvalidConfig(f"it holds compiled code ({part.filename!r}); {_FACTORY}")
        if name.startswith(_OBJECTS):
            raise InvalidConfig(
                f"it holds Python objects ({part.filename!r}), which are never unpickled; {_FACTORY}"
            )
        if part.compress_type != zipfile.ZIP_STORED:
            raise InvalidConfig(
                f"{part.filename!r} in it is compressed, and torch.export.save compresses nothing"
            )


@contextmanager
def _weights_alone() -> Iterator[None]:
    """torch.load takes tensors and plain values alone, whatever its caller asks for."""
    before = os.environ.get(_WEIGHTS_ONLY)
    os.environ[_WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_WEIGHTS_ONLY]
        else:
            os.environ[_WEIGHTS_ONLY] = before
