"""Repositories for the tests: versions are written elsewhere and moved in, as the documents say."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

FACTORY_TOML = '[model]\nfactory = "model:make"\ninput_shape = [4]\n'
FACTORY = """
import torch
from torch import nn
from . import scale

class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.full((4,), scale.FACTOR))

    def forward(self, x):
        return x * self.factor

def make():
    return Scaled()
"""


class Repository:
    """The folder DIR/models, and DIR/elsewhere where versions are written."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "models"
        self._elsewhere = directory / "elsewhere"
        self.path.mkdir()
        self._elsewhere.mkdir()
        self._count = 0

    def add(self, folder: str, files: dict[str, str | bytes]) -> Path:
        """A version, or anything else, at `folder` with `files`, all at once."""
        self._count += 1
        made = self._elsewhere / str(self._count)
        made.mkdir()
        for name, content in files.items():
            file = made / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content.encode() if isinstance(content, str) else content)
        place = self.path / folder
        place.parent.mkdir(parents=True, exist_ok=True)
        made.rename(place)
        return place

    def scaled(self, folder: str, factor: float) -> Path:
        """A model that multiplies four numbers by `factor`."""
        files = {
            "model.toml": FACTORY_TOML,
            "model.py": FACTORY,
            "scale.py": f"FACTOR = {factor}\n",
        }
        return self.add(folder, dict(files))

    def remove(self, folder: str) -> None:
        """Move a version out, and delete it there."""
        self._count += 1
        gone = self._elsewhere / str(self._count)
        (self.path / folder).rename(gone)
        shutil.rmtree(gone)

    def age(self, seconds: float = 60) -> None:
        """Set the times of all files into the past (their ctime is now all the same)."""
        for path in self.path.rglob("*"):
            status = path.stat()
            os.utime(path, (status.st_atime - seconds, status.st_mtime - seconds))
