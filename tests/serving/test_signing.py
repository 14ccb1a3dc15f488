"""Signatures: bytes that one of the keys has signed, and no others."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import CannotServe
from serving.model import Model
from serving.signing import NotSigned, Proof
from tests.serving import models
from tests.serving.keys import body, pem, sign

P256, ED25519 = ec.generate_private_key(ec.SECP256R1()), Ed25519PrivateKey.generate()


@pytest.mark.parametrize("key", [P256, ED25519], ids=["P-256", "Ed25519"])
@given(content=st.binary(max_size=200), at=st.integers(min_value=0), flip=st.integers(1, 255))
def test_what_a_key_has_signed_passes_and_a_changed_byte_does_not(
    key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey, content: bytes, at: int, flip: int
) -> None:
    other = ED25519 if key is P256 else P256
    proof = Proof(sign(key, content), [body(other), body(key)])
    proof.check(content)
    changed = bytearray(content or b"\0")
    changed[at % len(changed)] ^= flip
    with pytest.raises(NotSigned, match="by none of the 2 keys, or of other bytes"):
        proof.check(bytes(changed))
    with pytest.raises(NotSigned, match="by none of the 1 keys"):
        Proof(proof.signature, [body(other)]).check(content)


@pytest.mark.parametrize(
    ("signature", "keys", "says"),
    [
        ("no!", [body(P256)], "the signature is not base64"),
        ("aGk=", ["aGk="], "a public key cannot be read"),
        ("aGk=", ["no!"], "a public key is not base64"),
        ("aGk=", [body(rsa.generate_private_key(65537, 2048))], "neither of Ed25519 nor of ECDSA on P-256"),
        ("aGk=", [body(ec.generate_private_key(ec.SECP384R1()))], "neither of Ed25519 nor of ECDSA on P-256"),
        ("", [body(P256), body(ED25519)], "by none of the 2 keys"),
        ("aGk=", [], "by none of the 0 keys"),
    ],
)
def test_what_cannot_be_a_proof_is_none_and_says_why(signature: str, keys: list[str], says: str) -> None:
    with pytest.raises(NotSigned, match=says):
        Proof(signature, keys).check(b"content")


def test_a_server_loads_nothing_that_is_not_signed(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    digest = models.score(path)
    proof = Proof(sign(P256, path.read_bytes()), [body(P256)])
    assert Model.load(path, digest, None, proof).digest == digest
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(CannotServe, match=r"m\.onnx' will not be served: the signature is by none of the 1 keys"):
        Model.load(path, None, None, proof)


def test_openssl_s_signatures_are_taken(tmp_path: Path) -> None:
    """With the commands of the README."""
    content, key, public = tmp_path / "model.onnx", tmp_path / "key.pem", tmp_path / "public.pem"
    content.write_bytes(b"bytes")
    for command in (
        f"openssl ecparam -name prime256v1 -genkey -noout -out {key}",
        f"openssl ec -in {key} -pubout -out {public}",
    ):
        subprocess.run(command.split(), check=True, capture_output=True)
    made = f"openssl dgst -sha256 -sign {key} {content} | base64 -w0"
    signature = subprocess.run(made, shell=True, check=True, capture_output=True, text=True).stdout
    Proof(signature, ["".join(public.read_text().splitlines()[1:-1])]).check(b"bytes")
    assert pem(P256).splitlines()[0] == public.read_text().splitlines()[0]
