"""A certificate for loopback and its key, made by the openssl command for one test run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

_WITHIN_S = 30


def made(folder: Path, name: str = "server") -> tuple[Path, Path]:
    """PEM files of a certificate that signs itself, valid for 127.0.0.1 and localhost, and of its key.

    The test is skipped without the openssl command.
    """
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on the PATH; install the package openssl")
    certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    words += ["-nodes", "-days", "2", "-subj", "/CN=localhost"]
    words += ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    words += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(words, check=True, capture_output=True, timeout=_WITHIN_S)
    return certificate, key
