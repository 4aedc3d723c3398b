"""The page is one file, fetches nothing, and treats every name as text."""

import re
from html.parser import HTMLParser

import pytest

from dino.report import style
from dino.report.page import Page, Picture, Section, Table, Verdict, render

NASTY = '<script>alert("x")</script>'


@pytest.fixture
def html():
    with style.figure(1, 1) as figure:
        content = style.svg(figure)
    table = Table(["features", "found"], [["teacher", NASTY]], f"caption {NASTY}")
    section = Section("Slide & tiles", f"lead {NASTY}", [Picture(content, f"alt {NASTY}", NASTY), table])
    return render(
        Page(
            title=f"slide {NASTY}",
            subtitle=NASTY,
            notice=NASTY,
            verdicts=[Verdict(NASTY, "learning", NASTY)],
            facts=[(NASTY, NASTY)],
            sections=[section],
            methods=NASTY,
            settings={NASTY: {NASTY: NASTY}},
            footer=NASTY,
        )
    )


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))


def test_names_are_escaped_everywhere(html):
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 14


def test_nothing_comes_from_the_network(html):
    tags = Tags()
    tags.feed(html)
    links = [attrs[name] for _, attrs in tags.seen for name in ("src", "href", "srcset", "action") if name in attrs]
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)
    assert not re.search(r"@import|url\(", html)


def test_every_picture_has_an_alt_text_and_sections_can_be_reached(html):
    tags = Tags()
    tags.feed(html)
    assert all(attrs.get("alt") for tag, attrs in tags.seen if tag == "img")
    ids = {attrs["id"] for _, attrs in tags.seen if "id" in attrs}
    assert {attrs["href"][1:] for tag, attrs in tags.seen if tag == "a"} <= ids
    assert "slide-tiles" in ids


def test_an_empty_page_still_stands():
    html = render(Page("nothing", "at all"))
    assert "<h1>nothing</h1>" in html
    assert "Methods" not in html
