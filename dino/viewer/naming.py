"""Names of words that someone typed in the viewer, saved in the table of words (``annotate=true``)."""

from dino import files
from dino.errors import DataError
from dino.extraction.encoder_features import EncoderFeatures


def save_name(features: EncoderFeatures, body: bytes) -> None:
    """Save the name of a word in ``ROOT/words_<encoder>/words.csv``.

    Args:
        features: The features of the encoder.
        body: JSON with ``word`` (its index), ``name``, and ``version`` of the names that the page shows.

    Raises:
        TableChanged: If the table has been changed since the page read it.
        DataError: If the body is not as described, there are no words, or the table cannot be written.
    """
    word, name, version = _parsed(body)
    if features.words is None:
        raise DataError(
            f"expected words of {features.encoder}, whose names are kept, found clusters; run `dino words`, then start "
            "the viewer without clusters="
        )
    features.words.write_name(word, name, version)


def _parsed(body: bytes) -> tuple[int, str, str]:
    try:
        content = files.parse_json(body.decode())
        word, name, version = content["word"], content["name"], content["version"]
        good = type(word) is int and isinstance(name, str) and isinstance(version, str)
    except (ValueError, KeyError, TypeError):
        good = False
    if not good:
        raise DataError("expected the index of a word, a name, and the version of the names, found something else")
    return word, name, version
