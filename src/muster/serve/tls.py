"""TLS for the server: a certificate and its key, refused in one sentence when they cannot be used."""

from __future__ import annotations

import ssl
from pathlib import Path

from muster.errors import UsageError


def tls_context(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """A server's context (TLS 1.2 or newer); None where neither file is given. Raises UsageError."""
    if certificate is None and key is None:
        return None
    if certificate is None:
        raise UsageError("--tls-key needs the certificate, too: --tls-cert FILE (PEM, the whole chain)")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    for file in filter(None, (certificate, key)):
        try:
            file.read_bytes()
        except OSError as error:
            raise UsageError(f"the TLS file {file} cannot be read: {error.strerror}") from None
    try:
        # A password would be asked for on the terminal, which may be nobody's.
        context.load_cert_chain(certificate, key, password=_no_password)
    except _Encrypted:
        raise UsageError(
            f"the TLS key {key or certificate} is encrypted: use one without a password"
        ) from None
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            why = "the key is not the certificate's"
        else:
            why = "they should be a certificate chain and its private key in PEM format"
        raise UsageError(f"TLS with {certificate} and {key or 'the key in it'} cannot start: {why}") from None
    return context


class _Encrypted(Exception):
    pass


def _no_password() -> str:
    raise _Encrypted
