"""Signatures of a model's bytes, made with a key of one's own, as `cosign sign-blob --key` and `openssl` make them.

ECDSA on P-256 over SHA-256, DER-encoded (FIPS 186-5), or Ed25519 (RFC 8032); the signature in base64. A public key is
the base64 of its SubjectPublicKeyInfo (RFC 5280): what stands between the lines of a PEM file.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass


class NotSigned(Exception):
    """The bytes are not signed with any of the keys, or key or signature cannot be read; says which."""


@dataclass(frozen=True)
class Proof:
    """A signature, and the public keys of which one must have made it."""

    signature: str
    keys: Sequence[str]

    def check(self, content: bytes) -> None:
        """Raises NotSigned."""
        from cryptography.exceptions import InvalidSignature  # lazily: most servers are told of no signature
        from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP256R1, EllipticCurvePublicKey
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.serialization import load_der_public_key

        signature = _decoded(self.signature, "the signature")
        for text in self.keys:
            try:
                key = load_der_public_key(_decoded(text, "a public key"))
            except ValueError as exc:
                raise NotSigned(f"a public key cannot be read: {exc}") from exc
            try:
                if isinstance(key, Ed25519PublicKey):
                    key.verify(signature, content)
                elif isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1):
                    key.verify(signature, content, ECDSA(SHA256()))
                else:
                    raise NotSigned("a public key is neither of Ed25519 nor of ECDSA on P-256")
            except InvalidSignature:
                continue
            return
        raise NotSigned(f"the signature is by none of the {len(self.keys)} keys, or of other bytes")


def _decoded(text: str, what: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error as exc:
        raise NotSigned(f"{what} is not base64: {exc}") from exc
