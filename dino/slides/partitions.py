"""The column ``partition`` of slide lists: which slides are pretrained on, and which are held out."""

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

PRETRAIN = ("", "pretrain")  # slides with these values are pretrained on, all others are held out
HELD_OUT = ("val", "test", "held_out")  # the values that hold a slide out and mean to
KNOWN = "blank or pretrain (pretrained on), val, test or held_out (held out)"

F = TypeVar("F")


def unknown_value(value: str, count: int) -> str:
    """A warning about a value that holds slides out although it may not be meant to.

    Args:
        value: The value.
        count: Number of slides that have it.
    """
    close = difflib.get_close_matches(value.lower(), (*PRETRAIN[1:], *HELD_OUT), 1, 0.75)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"partition '{value}' holds {_count(count, 'slide')} out of pretraining: expected {KNOWN}{hint}"


def unknown_values(partitions: Iterable[str]) -> list[str]:
    """A warning for each unknown value among the partitions of slides."""
    counts = Counter(partition for partition in partitions if partition not in (*PRETRAIN, *HELD_OUT))
    return [unknown_value(value, count) for value, count in counts.items()]


@dataclass(frozen=True)
class Split:
    """How many samples a run is trained on, and how many are held out.

    Attributes:
        items: What a sample is: ``tiles`` or ``regions``.
        samples: Number of samples that the run is trained on.
        slides: Number of their slides, 0 where they are not known.
        held_out: Number of held-out slides and of their samples by partition, or by status of slides that failed or
            were excluded after they had been tiled.
    """

    items: str
    samples: int
    slides: int
    held_out: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def held_out_slides(self) -> int:
        """Number of held-out slides."""
        return sum(slides for slides, _ in self.held_out.values())

    @property
    def held_out_samples(self) -> int:
        """Number of samples of held-out slides."""
        return sum(samples for _, samples in self.held_out.values())

    def __str__(self) -> str:
        """``8,078 tiles of 3 slides; held out: 2,718 tiles of 1 slide (test)``."""
        held = [f"{self._amount(samples, slides)} ({word})" for word, (slides, samples) in self.held_out.items()]
        return f"{self._amount(self.samples, self.slides)}; held out: {', '.join(held) or 'none'}"

    def _amount(self, samples: int, slides: int) -> str:
        return _count(samples, self.items.removesuffix("s")) + (f" of {_count(slides, 'slide')}" if slides else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``status.json``."""
        held = {word: {"slides": slides, "samples": samples} for word, (slides, samples) in self.held_out.items()}
        return {"items": self.items, "samples": self.samples, "slides": self.slides, "held_out": held}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Split":
        """The inverse of :meth:`to_dict`."""
        held = {word: (one["slides"], one["samples"]) for word, one in values["held_out"].items()}
        return cls(values["items"], values["samples"], values["slides"], held)


def split_files(
    files: Sequence[F], slide_of: Callable[[F], str | None], partitions: Mapping[str, str]
) -> tuple[list[F], dict[str, tuple[int, int]]]:
    """Separate the files that may be pretrained on from those of held-out slides.

    Args:
        files: Names or paths.
        slide_of: Returns the slide of a file.
        partitions: Partition of each slide; slides that are not listed are pretrained on.

    Returns:
        The files to pretrain on, and the number of held-out slides and files by partition.
    """
    held = {slide: partition for slide, partition in partitions.items() if partition not in PRETRAIN}
    if not held:
        return list(files), {}
    kept: list[F] = []
    counts: Counter[str] = Counter()
    for file in files:
        slide = slide_of(file)
        if slide in held:
            counts[slide] += 1
        else:
            kept.append(file)
    words = sorted({held[slide] for slide in counts})
    by_word = {word: [count for slide, count in counts.items() if held[slide] == word] for word in words}
    return kept, {word: (len(found), sum(found)) for word, found in by_word.items()}


def _count(number: int, noun: str) -> str:
    return f"1 {noun}" if number == 1 else f"{number:,} {noun}s"
