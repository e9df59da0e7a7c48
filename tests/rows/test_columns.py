"""Ids as numbers."""

from __future__ import annotations

from rows.columns import id_hash


def test_id_hash_is_stable():
    assert id_hash("icon") == int.from_bytes(
        __import__("hashlib").blake2b(b"icon", digest_size=8).digest(), "little", signed=True
    )
    assert len({id_hash(str(i)) for i in range(10_000)}) == 10_000
