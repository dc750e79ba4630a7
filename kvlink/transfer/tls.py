"""TLS 1.3 in which both ends show the same certificate, made from the secret that they share.

Whoever holds another secret has another key, so the handshake is the proof: mutual, with forward
secrecy, and everything behind it is encrypted. `cryptography` is imported when the first endpoint
is made.
"""

from __future__ import annotations

import datetime
import os
import ssl

from kvlink.errors import Unsupported
from kvlink.transfer.errors import ProtocolError, SecretMismatch, TransferError

_LABEL = b"kvlink control plane, TLS key"
# What a peer says when our certificate is not its own.
_NOT_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "HTTPS_PROXY_REQUEST")
_REFUSALS = ("UNKNOWN_CA", "BAD_CERTIFICATE", "CERTIFICATE_UNKNOWN", "DECRYPT_ERROR")


class Credentials:
    """An endpoint's half of every handshake, derived from its secret."""

    def __init__(self, secret: bytes) -> None:
        self.certificate, key_pem, certificate_pem = _certificate(secret)
        self._contexts = [
            _context(protocol, self.certificate, certificate_pem + key_pem)
            for protocol in (ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER)
        ]

    def begin(self, server_side: bool) -> Tls:
        """The state of one connection."""
        return Tls(self._contexts[server_side], self.certificate, server_side)


class Tls:
    """TLS without a socket: `take` what came, send what `pending` gives. Not thread-safe."""

    def __init__(self, context: ssl.SSLContext, certificate: bytes, server_side: bool) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        self._certificate = certificate

    def take(self, data: bytes) -> None:
        """Bytes from the wire."""
        self._incoming.write(data)

    def pending(self) -> bytes:
        """Bytes for the wire."""
        return self._outgoing.read()

    def shake(self) -> bool:
        """As much of the handshake as can be done; True once it is complete. Raises SecretMismatch,
        ProtocolError."""
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as error:
            raise _explained(error) from error
        self._check()
        return True

    def read(self) -> bytes:
        """Decrypted bytes; empty when there are no more yet. Raises SecretMismatch (the peer's
        verdict on our handshake), ProtocolError."""
        try:
            data = self._object.read(1 << 16)
            if not data:  # ends are told by sockets
                raise ProtocolError("TLS: the peer ended it and went on")
            return data
        except ssl.SSLWantReadError:
            return b""
        except ssl.SSLError as error:
            raise _explained(error) from error

    def write(self, data: bytes) -> None:
        """Encrypts all of it. Raises ProtocolError once the connection has failed."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._object.write(rest) :]
            except ssl.SSLError as error:
                raise _explained(error) from error

    def _check(self) -> None:
        if self._object.getpeercert(binary_form=True) != self._certificate:
            raise SecretMismatch("the peer's certificate is not that of this secret")


def _explained(error: ssl.SSLError) -> TransferError:
    reason = error.reason or str(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        return SecretMismatch("the peer does not hold the secret of this endpoint")
    if "ALERT" in reason and reason.endswith(_REFUSALS):
        return SecretMismatch("the peer says that this endpoint does not hold its secret")
    if reason in _NOT_TLS:  # OpenSSL calls the first bytes of anything else a version
        return ProtocolError("TLS: what answers there does not speak it, so it is no endpoint")
    return ProtocolError(f"TLS: {reason.lower().replace('_', ' ')}")


def _context(protocol: int, certificate: bytes, chain_pem: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the key is the identity; addresses prove nothing
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=certificate)
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # every connection proves itself anew
    # Python takes keys from files only. This one has no name and is gone at once.
    fd = os.memfd_create("kvlink-tls", os.MFD_CLOEXEC)
    try:
        os.write(fd, chain_pem)
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
    return context


def _certificate(secret: bytes) -> tuple[bytes, bytes, bytes]:
    """(DER, key as PEM, PEM): nothing in it is random, so equal secrets give equal bytes."""
    try:
        from cryptography import x509
    except ImportError as error:
        raise Unsupported(f"Endpoint: the package 'cryptography' is missing ({error})") from error
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
    from cryptography.x509.oid import NameOID

    seed = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=_LABEL).derive(secret)
    key = Ed25519PrivateKey.from_private_bytes(seed)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kvlink")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(datetime.datetime(1970, 1, 1))
        .not_valid_after(datetime.datetime(9999, 12, 31))
        .sign(key, None)
    )
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return (
        certificate.public_bytes(serialization.Encoding.DER),
        key.private_bytes(pem, pkcs8, serialization.NoEncryption()),
        certificate.public_bytes(pem),
    )
