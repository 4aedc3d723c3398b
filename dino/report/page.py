"""The page itself: sections of text, pictures and tables, rendered into one self-contained HTML file."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from dino.report import style


@dataclass(frozen=True)
class Picture:
    """A figure with what it shows (``alt``, for those who cannot see it) and how to read it (``caption``)."""

    content: bytes
    alt: str
    caption: str

    @property
    def source(self) -> str:
        """The picture as a data URI."""
        return f"data:{style.media_type(self.content)};base64,{base64.b64encode(self.content).decode()}"

    @property
    def width(self) -> int | None:
        """Width on the page in CSS px; None leaves it to the picture."""
        return style.shown_width(self.content)


@dataclass(frozen=True)
class Table:
    """A small table; the first column names the rows, cells of the others are aligned right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph that leads in, and what follows it in order."""

    title: str
    lead: str
    items: Sequence[Picture | Table]

    @property
    def anchor(self) -> str:
        """The heading as an HTML id."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.title.lower()).split())


@dataclass(frozen=True)
class Verdict:
    """What one run came to: a word (learning, flat, collapsed, ...), a sentence, and the numbers behind it."""

    subject: str
    word: str
    text: str
    numbers: str = ""


@dataclass(frozen=True)
class Page:
    """Everything that a report shows.

    Attributes:
        title: Heading of the page.
        subtitle: One line below it: which slide, which runs.
        notice: A paragraph that puts the numbers into proportion, or "".
        verdicts: One per run.
        facts: Value and label of the few numbers at the top.
        sections: The body.
        methods: The methods paragraph.
        settings: Title and ``key: value`` of each folded table.
        footer: Last line of the page.
    """

    title: str
    subtitle: str
    notice: str = ""
    verdicts: Sequence[Verdict] = ()
    facts: Sequence[tuple[str, str]] = ()
    sections: Sequence[Section] = ()
    methods: str = ""
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    footer: str = ""


def render(page: Page) -> str:
    """The page as one HTML document: styles inline, pictures as data URIs, nothing fetched from anywhere.

    Every name and number goes through the template's autoescape, so a slide called ``<script>`` stays text.
    """
    from jinja2 import Environment

    template = (resources.files("dino.report") / "page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    kinds = {"is_picture": lambda item: isinstance(item, Picture)}
    return environment.from_string(template).render(page=page, **kinds)
