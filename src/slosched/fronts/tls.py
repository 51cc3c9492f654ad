"""The certificate and the key that both ports speak TLS with, and which of the two files is wrong.

TLS 1.2 is the least. `reload` reads the files again: connections that come later get the new certificate.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from slosched.errors import InvalidConfig

#: A chain of many certificates has some 10 kB.
_MOST_BYTES = 1024**2


class TlsFiles:
    """Both files, as bytes for gRPC and as a context for HTTP."""

    def __init__(self, certificate_file: str, key_file: str) -> None:
        self._certificate_file, self._key_file = certificate_file, key_file
        self._contexts: list[ssl.SSLContext] = []
        self.certificate = self.key = b""
        self.reload()

    def reload(self) -> None:
        """Read both files. Raises InvalidConfig, which names the file, and then what was read before stays."""
        certificate = _content(self._certificate_file, "--tls-cert")
        key = _content(self._key_file, "--tls-key")
        self._load(_context())
        for context in self._contexts:
            self._load(context)
        self.certificate, self.key = certificate, key

    def context(self) -> ssl.SSLContext:
        """A context for a server, which `reload` keeps up to date."""
        context = _context()
        context.set_alpn_protocols(["http/1.1"])
        self._load(context)
        self._contexts.append(context)
        return context

    def _load(self, context: ssl.SSLContext) -> None:
        certificate, key = self._certificate_file, self._key_file
        try:
            context.load_cert_chain(certificate, key, password=self._no_passphrase)
        except OSError as error:  # ssl.SSLError is one
            if isinstance(error, ssl.SSLError) and "KEY_VALUES_MISMATCH" in str(error):
                raise InvalidConfig(
                    f"--tls-key {key} is not the key of the certificate in --tls-cert {certificate}; the "
                    "server's own certificate comes first in that file"
                ) from None
            self._blame_the_certificate()
            raise InvalidConfig(f"--tls-key {key} has no usable private key in PEM form") from None

    def _blame_the_certificate(self) -> None:
        """Raise InvalidConfig if the certificate's file has no certificate that can be read."""
        try:
            text = Path(self._certificate_file).read_text(encoding="ascii")
            _context().load_verify_locations(cadata=text)
        except (OSError, ValueError):
            raise InvalidConfig(
                f"--tls-cert {self._certificate_file} has no usable certificate in PEM form"
            ) from None

    def _no_passphrase(self) -> str:
        raise InvalidConfig(
            f"--tls-key {self._key_file} is encrypted; give a key without a passphrase, in a file that only "
            "the gateway's user can read"
        )


def read_tls(certificate_file: str, key_file: str) -> TlsFiles:
    """The TLS of --tls-cert and --tls-key. Raises InvalidConfig, which names the file that is wrong."""
    return TlsFiles(certificate_file, key_file)


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _content(name: str, option: str) -> bytes:
    try:
        with Path(name).open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InvalidConfig(f"{option} {name} cannot be read: {reason}") from None
    if len(content) > _MOST_BYTES:
        raise InvalidConfig(f"{option} {name} is too large for a PEM file")
    return content
