"""The report as one self-contained HTML file: sections of text, figures and tables."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from dino.evaluate.verdict import Verdict
from dino.report import style


@dataclass(frozen=True)
class Figure:
    """A figure.

    Attributes:
        content: The encoded figure.
        alt: Alternative text, for screen readers.
        caption: Text below it.
        narrow: The same for a narrow screen; None to scroll ``content`` there.
    """

    content: bytes
    alt: str
    caption: str
    narrow: bytes | None = None

    @property
    def source(self) -> str:
        """The figure as a data URI."""
        return _data_uri(self.content)

    @property
    def narrow_source(self) -> str:
        """The figure for a narrow screen as a data URI, "" if there is none."""
        return _data_uri(self.narrow) if self.narrow else ""

    @property
    def is_chart(self) -> bool:
        """Whether it consists of lines and text, whose colours may be inverted on a dark page."""
        return style.media_type(self.content) == style.SVG

    @property
    def width(self) -> int | None:
        """Width on the page in CSS px; None for the intrinsic width."""
        return style.display_width(self.content)


@dataclass(frozen=True)
class Table:
    """A table, whose first column contains the names of the rows.

    Attributes:
        head: Title of each column.
        rows: The cells.
        caption: Text below it.
        text: Whether the other columns are text, aligned to the left, not numbers.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str
    text: bool = False


@dataclass(frozen=True)
class Section:
    """A heading, an introduction, and figures and tables in order."""

    title: str
    introduction: str
    items: Sequence[Figure | Table]

    @property
    def anchor(self) -> str:
        """The heading as an HTML id."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.title.lower()).split())


@dataclass(frozen=True)
class Page:
    """Contents of a report.

    Attributes:
        title: Heading of the page.
        subtitle: One line below it: the slide and the runs.
        notice: A paragraph at the top, or "".
        verdicts: Name and verdict of each run.
        facts: Value and label of the main numbers, shown at the top.
        sections: The body.
        left_out: What the page lacks, and why, in sentences.
        methods: The methods paragraph.
        settings: Title and ``key: value`` of each collapsed table.
        footer: Last line of the page.
    """

    title: str
    subtitle: str
    notice: str = ""
    verdicts: Sequence[tuple[str, Verdict]] = ()
    facts: Sequence[tuple[str, str]] = ()
    sections: Sequence[Section] = ()
    left_out: Sequence[str] = ()
    methods: str = ""
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    footer: str = ""


def _data_uri(content: bytes) -> str:
    return f"data:{style.media_type(content)};base64,{base64.b64encode(content).decode()}"


def render(page: Page) -> str:
    """The page as one HTML document with inline styles and figures as data URIs, without external resources.

    The template escapes all text, also the names of slides.
    """
    from jinja2 import Environment

    template = (resources.files("dino.report") / "page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(page=page, is_figure=lambda item: isinstance(item, Figure))
