import hashlib
import pickle

import pytest

from dino.data.names import Names


@pytest.mark.parametrize(
    "names", [[], ["a"], ["slide_0_0.jpg", "b/c d.png", "line\nbreak", "Gewebe_µ_組織.png", "not-\udcff.png"]]
)
def test_names_are_kept_as_they_are(names: list[str]) -> None:
    kept = pickle.loads(pickle.dumps(Names(iter(names))))
    assert list(kept) == names and len(kept) == len(names)
    assert [kept[-i] for i in range(1, len(names) + 1)] == names[::-1] and kept[1:4] == names[1:4]
    with pytest.raises(IndexError):
        kept[len(names)]


def test_the_fingerprint_knows_names_and_order() -> None:
    digest = hashlib.sha256(b"a\0b\xff/c\0").hexdigest()
    assert Names(["a", "b\udcff/c"]).fingerprint == digest
    assert len({Names(n).fingerprint for n in (["ab"], ["a", "b"], ["b", "a"], [])}) == 4
