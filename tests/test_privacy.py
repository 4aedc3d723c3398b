import hashlib

import pytest

from dino.privacy import count, hash_id, hash_record, known

RECORD = {"slide_ids": ["b 2", "a1", 7], "patient_ids": ["p1", "a1"]}


def test_a_hash_is_that_of_pbkdf2_with_the_salt_and_the_kind():
    expected = hashlib.pbkdf2_hmac("sha256", "München 1".encode(), b"patient s", 10_000, dklen=16).hex()
    assert hash_id("München 1", "s", "patient") == expected
    assert len({hash_id("1", salt, kind) for salt in "st" for kind in ("slide", "patient")}) == 4


def test_a_record_of_hashes_knows_what_the_record_of_ids_knows_and_names_none():
    hashed = hash_record(RECORD, "salt")
    assert hashed["slide_hashes"] == sorted(hashed["slide_hashes"]) and hashed["salt"] == "salt"
    assert not {"a1", "b 2", "p1"} & set(str(hashed).replace("'", " ").split())
    assert not set(hashed["slide_hashes"]) & set(hashed["patient_hashes"])  # although one id is in both
    for record in (RECORD, hashed):
        assert known(["a1", "7", "", "p1", "b"], record, "slide") == {"a1", "7"}
        assert known(["a1", "7", "p1"], record, "patient") == {"a1", "p1"}
        assert (count(record, "slide"), count(record, "patient")) == (3, 2)


def test_hashes_are_not_hashed_again():
    hashed = hash_record(RECORD, "salt")
    assert hash_record(hashed, "other") == hashed


@pytest.mark.parametrize("record", [{}, {"slide_ids": [], "patient_ids": []}, hash_record({}, "salt")])
def test_nothing_is_known_of_an_empty_record(record):
    assert known(["a", ""], record, "slide") == set()
    assert count(record, "slide") == count(record, "patient") == 0
