"""An exported program's file (torch.export.save), read without running Python that it holds.

torch.export.load unpickles whatever a file has (example inputs, weights of tensor subclasses, constants that
are Python objects), and it opens compiled code. What torch.export.save wrote of plain tensors needs none of
this. The program itself remains: it calls torch's operators.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import torch

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
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise InvalidConfig(f"torch.export.save writes a ZIP file ({error})") from None
    names = [part.filename for part in parts]
    below = [name.partition("/")[2] for name in names]
    if _OLD_PROGRAM not in names and not any(name.startswith(_PROGRAMS) for name in below):
        # torch would print what it tried instead.
        raise InvalidConfig("there is no program in it, such as torch.export.save writes")
    for part in parts:
        # The reader of torch does not heed the case of names.
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
