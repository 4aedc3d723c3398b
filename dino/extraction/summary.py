"""What an extraction did, or would do."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class ExtractSummary:
    """The outcome.

    Attributes:
        folder: Where the features are.
        written: Files written now (dry run: to write).
        skipped: Files that stood there before, made by the same model.
        failures: Why each slide that could not be done could not.
        embedded: Cells (level 2: regions) that went through the network (dry run: that would).
        pixels: Slides by where their pixels come from: ``slides``, ``tiles`` or ``regions``; empty for level 2.
        gigabytes: Size of the files to write.
        hours: Dry run: computing time by the speed of one batch; reading may take longer.
        dry_run: Whether nothing was written.
    """

    folder: Path
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
        """0, or 2 if a slide could not be done."""
        return 2 if self.failures else 0

    def lines(self) -> list[str]:
        """The summary in words, one line each."""
        sources = ", ".join(f"{count} slides from {name}" for name, count in self.pixels.items())
        lines = [f"pixels: {sources}"] if sources else []
        verb = "to write" if self.dry_run else "written"
        lines.append(f"{self.written:,} files {verb} ({self.embedded:,} embedded), {self.skipped:,} done before")
        if self.dry_run:
            lines.append(f"{self.gigabytes:.3g} GB, about {self.hours:.2g} hours of computing")
        lines += [f"failed: {slide}: {reason}" for slide, reason in self.failures.items()]
        return [*lines, f"features: {self.folder}"]
