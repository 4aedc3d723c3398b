"""Ids of slides and patients in files that are given to others: as salted hashes, which still show leakage.

A hash hides an id from a reader who does not know it. It does not hide it from one who guesses: whoever holds an id can
check whether it is among the hashes, and numbers in sequence can be tried one after the other. Each try costs
:data:`ITERATIONS` rounds of PBKDF2 (RFC 8018), about 2 ms.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

ITERATIONS = 10_000
DIGEST_BYTES = 16
KINDS = ("slide", "patient")  # a record has `<kind>_ids`, or `<kind>_hashes` and `salt`


def hash_id(name: str, salt: str, kind: str) -> str:
    """PBKDF2-HMAC-SHA256 of an id as 32 hexadecimal digits; other salts and kinds give unrelated hashes."""
    digest = hashlib.pbkdf2_hmac(
        "sha256", name.encode("utf-8", "surrogateescape"), f"{kind} {salt}".encode(), ITERATIONS, DIGEST_BYTES
    )
    return digest.hex()


def hash_record(record: Mapping[str, Any], salt: str) -> dict[str, Any]:
    """A record of slides and patients with hashes in place of ids; one that has hashes already is returned as it is.

    Args:
        record: ``slide_ids`` and ``patient_ids``, or the result of an earlier call.
        salt: Not secret, but another one for every model, so that hashes of two models cannot be compared.

    Returns:
        ``salt``, ``slide_hashes`` and ``patient_hashes``, sorted, so that their order does not tell that of the ids.
    """
    if "salt" in record:
        return dict(record)
    hashed = {f"{k}_hashes": sorted(hash_id(str(i), salt, k) for i in record.get(f"{k}_ids") or []) for k in KINDS}
    return {"salt": salt, **hashed}


def count(record: Mapping[str, Any], kind: str) -> int:
    """Number of slides or patients in a record, with ids or hashes."""
    return len(record.get(f"{kind}_hashes") or record.get(f"{kind}_ids") or [])


def known(candidates: Iterable[str], record: Mapping[str, Any], kind: str) -> set[str]:
    """Those of the candidates that a record of slides and patients contains.

    Args:
        candidates: Ids; empty ones are unknown.
        record: As :func:`hash_record` takes or returns it; may be empty.
        kind: ``slide`` or ``patient``.
    """
    wanted = {name for name in candidates if name}
    hashes = set(record.get(f"{kind}_hashes") or [])
    if hashes:
        return {name for name in wanted if hash_id(name, str(record.get("salt")), kind) in hashes}
    return wanted & {str(name) for name in record.get(f"{kind}_ids") or []}
