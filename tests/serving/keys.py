"""Keys of one's own, and what they sign, for tests."""

from __future__ import annotations

import base64

from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat


def sign(key: EllipticCurvePrivateKey | Ed25519PrivateKey, content: bytes) -> str:
    """The signature, in base64."""
    made = key.sign(content) if isinstance(key, Ed25519PrivateKey) else key.sign(content, ECDSA(SHA256()))
    return base64.b64encode(made).decode()


def pem(key: object) -> str:
    """Its public key, as it stands in a policy."""
    public = key.public_key()  # type: ignore[attr-defined]
    return str(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode())


def body(key: object) -> str:
    """Its public key, as a server is given it."""
    return "".join(pem(key).splitlines()[1:-1])
