"""Copies a result directory from another host over SSH, as the original's pull tasks do with scp.

Nothing here is replaced: what comes goes into a folder that is new or empty.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from slosched.errors import InvalidConfig, OutputExists
from slosched.experiment.fetch import fetch
from slosched.experiment.hosts import Host
from slosched.experiment.ssh import check_ssh
from slosched.faasm.frame_table import EXPERIMENTS
from slosched.output_files import check_folder, give_folder, make_folder

#: Where the original keeps results on each host, and where they go here.
THERE, HERE = "~/faasm", "faasm-results"


@dataclass(frozen=True)
class Pulled:
    """How many files of which folder there are now in `into`."""

    files: int
    folder: str
    into: Path


def pull_results(
    experiment: str,
    *,
    user: str,
    host: str,
    folder: str = "",
    into: Path | None = None,
    python: str = "python3",
    ssh_config: str = "",
) -> Pulled:
    """Copy `folder` of `host` (default ~/faasm/<user>_<func>) into `into`; see `slosched exp pull --help`.

    Raises OutputExists if `into` has anything in it, InvalidConfig for a wrong user, host or folder, or one
    without files, MissingPackage without ssh, and PeerUnreachable.
    """
    published = EXPERIMENTS[experiment].published
    folder = folder or f"{THERE}/{published}"
    place = into or Path(HERE) / _file_name(host) / published
    there = Host(
        name=_file_name(host), address=host, user=user, python=python, ssh_config=ssh_config
    )
    check_folder(place)
    if place.is_dir() and any(place.iterdir()):
        raise OutputExists(
            f"{place} has files, and none is overwritten; choose another folder by --into"
        )
    check_ssh()
    make_folder(place.parent)
    # What is cut off leaves nothing in its place, which a second try finds empty.
    with tempfile.TemporaryDirectory(prefix=f".{place.name}-", dir=place.parent) as drafts:
        draft = Path(drafts) / place.name
        count = fetch(there, folder, draft)
        if not count:
            raise InvalidConfig(
                f"host {host} has no files in {folder}; name the folder by --folder"
            )
        give_folder(draft, place)
    return Pulled(count, folder, place)


def _file_name(host: str) -> str:
    """The host as a name of a folder."""
    name = "".join(c if c.isalnum() or c in "._-" else "_" for c in host).strip("._-")
    if not name:
        raise InvalidConfig(f"{host!r} is not a host's name or address")
    return name[:63]
