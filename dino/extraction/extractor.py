"""Base class of the extraction of both levels: distributes slides over processes and summarises the results."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from dino import distributed, progress
from dino.config.schema import ExtractConfig
from dino.errors import DataError
from dino.extraction.embed import CLS, Normalise, embed_batches
from dino.models.weights import LoadedBackbone


@dataclass(frozen=True)
class ExtractSummary:
    """Result of an extraction, or of its dry run.

    Attributes:
        folders: Folders of the features.
        written: Files written (dry run: to write).
        skipped: Files that the same model wrote before.
        failures: Slides that failed, with the reason.
        embedded: Cells (level 2: regions) that were embedded (dry run: to embed).
        pixels: Number of slides by the source of their pixels: ``slides``, ``tiles`` or ``regions``; empty for level 2.
        gigabytes: Size of the files to write.
        hours: Dry run: computing time, estimated from one batch; reading may take longer.
        dry_run: Whether it was a dry run, which writes nothing.
    """

    folders: tuple[Path, ...]
    written: int
    skipped: int
    failures: dict[str, str] = field(default_factory=dict)
    embedded: int = 0
    pixels: dict[str, int] = field(default_factory=dict)
    gigabytes: float = 0.0
    hours: float = 0.0
    dry_run: bool = False

    @property
    def exit_code(self) -> int:
        """0, or 2 if a slide failed."""
        return 2 if self.failures else 0

    def lines(self) -> list[str]:
        """The summary as lines of text."""
        sources = ", ".join(f"{count} slides from {name}" for name, count in self.pixels.items())
        lines = [f"pixels: {sources}"] if sources else []
        verb = "to write" if self.dry_run else "written"
        lines.append(f"{self.written:,} files {verb} ({self.embedded:,} embedded), {self.skipped:,} written before")
        if self.dry_run:
            lines.append(f"{self.gigabytes:.3g} GB, about {self.hours:.2g} hours of computing")
        lines += [f"failed: {slide}: {reason}" for slide, reason in self.failures.items()]
        return [*lines, f"features: {', '.join(str(folder) for folder in self.folders)}"]


class Extractor(ABC):
    """Extraction with a model of one level; :meth:`run` is the same for all levels.

    Args:
        loaded: The model.
        root: ROOT.
        config: Settings.
        device: Device to compute on.

    Attributes:
        title: Title of the progress bar.
        plan: Result of :meth:`prepare`, on every process.
    """

    title: ClassVar[str]
    plan: Any

    def __init__(self, loaded: LoadedBackbone, root: Path, config: ExtractConfig, device: torch.device) -> None:
        self.loaded, self.root, self.config, self.device = loaded, root, config, device

    @property
    def embed_dim(self) -> int:
        """Dimension of the features."""
        return self.loaded.backbone.embed_dim

    @property
    def features(self) -> str:
        """Which tokens the features are, see :func:`~dino.extraction.embed.embed_batches`."""
        return CLS

    @abstractmethod
    def prepare(self) -> Any:
        """Find the work, check that features do not mix, and write ``extract.json``; called on the main process.

        Raises:
            DataError: If ROOT does not contain what the model needs, or contains features made with different settings.
        """

    @abstractmethod
    def slides(self) -> Sequence[Any]:
        """The slides to process, each with a ``slide_id``."""

    @abstractmethod
    def size(self, slide: Any) -> int:
        """Number of items of a slide that are to be embedded."""

    def pending(self, slide: Any) -> bool:
        """Whether files of a slide are to be written."""
        return self.size(slide) > 0

    @abstractmethod
    def example(self) -> Tensor | None:
        """One batch, to estimate the time of a dry run; None if there is nothing to do."""

    @abstractmethod
    def process(self, slide: Any, advance: Callable[[int], None]) -> None:
        """Embed one slide and write its features.

        Args:
            slide: One of :meth:`slides`.
            advance: Called with the number of items embedded since the last call.

        Raises:
            DataError: If the slide cannot be processed.
        """

    @abstractmethod
    def normalise(self) -> Normalise:
        """The function that converts a batch to the input of the network."""

    @abstractmethod
    def summary(self, slides: Sequence[Any], **fields: Any) -> ExtractSummary:
        """The summary, given the slides that did not fail."""

    def embedder(self, batches: Iterable[Tensor]) -> Generator[Tensor, None, None]:
        """Features ``(B, D)`` of each batch."""
        backbone, config = self.loaded.backbone, self.config
        return embed_batches(backbone, batches, self.normalise(), self.device, config.precision, self.features)

    def run(self) -> ExtractSummary:
        """Process all slides, distributed over the processes of the job."""
        self.plan = distributed.run_on_main(self.prepare)
        slides = self.slides()
        if self.config.dry_run:
            return self.summary(slides, hours=self._hours(), dry_run=True)
        sizes = [self.size(slide) for slide in slides]
        chosen = distributed.assign(sizes, distributed.world_size())[distributed.rank()]
        assigned = [slides[i] for i in chosen if self.pending(slides[i])]
        failures: dict[str, str] = {}
        with progress.bar(self.title, sum(self.size(slide) for slide in assigned)) as bar:
            for slide in assigned:
                bar.advance(0, slide.slide_id)
                try:
                    self.process(slide, bar.advance)
                except DataError as error:
                    failures[slide.slide_id] = str(error)
        failures = {name: reason for part in distributed.gather(failures) for name, reason in part.items()}
        return self.summary([s for s in slides if s.slide_id not in failures], failures=failures)

    def _hours(self) -> float:
        """Computing time of all slides in hours, estimated from the second of two batches."""
        batch = self.example()
        if batch is None:
            return 0.0
        started = seconds = 0.0
        for _ in self.embedder([batch, batch]):
            started, seconds = time.monotonic(), time.monotonic() - started
        items = sum(self.size(slide) for slide in self.slides())
        return seconds * items / len(batch) / distributed.world_size() / 3600
