"""The page is one file, loads nothing, and escapes every text."""

import re
from html.parser import HTMLParser

import pytest

from dino.evaluate.verdict import Verdict
from dino.report import style
from dino.report.page import Figure, Page, Section, Table, render
from dino.report.sections import run_verdict

MARKUP = '<script>alert("x")</script>'


@pytest.fixture
def html():
    with style.figure(1, 1) as figure:
        content = style.figure_to_svg(figure)
    table = Table(["features", "found"], [["teacher", MARKUP]], f"caption {MARKUP}")
    section = Section("Slide & tiles", f"lead {MARKUP}", [Figure(content, f"alt {MARKUP}", MARKUP), table])
    return render(
        Page(
            title=f"slide {MARKUP}",
            subtitle=MARKUP,
            notice=MARKUP,
            verdicts=[(MARKUP, Verdict("learning", MARKUP, (MARKUP,)))],
            facts=[(MARKUP, MARKUP)],
            sections=[section],
            methods=MARKUP,
            settings={MARKUP: {MARKUP: MARKUP}},
            footer=MARKUP,
        )
    )


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))


def test_all_text_is_escaped(html):
    assert "<script" not in html
    assert html.count("&lt;script&gt;") >= 14


def test_nothing_is_loaded_from_the_network(html):
    tags = Tags()
    tags.feed(html)
    links = [attrs[name] for _, attrs in tags.seen for name in ("src", "href", "srcset", "action") if name in attrs]
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)
    assert not re.search(r"@import|url\(", html)


def test_every_figure_has_an_alt_text_and_every_link_a_target(html):
    tags = Tags()
    tags.feed(html)
    assert all(attrs.get("alt") for tag, attrs in tags.seen if tag == "img")
    ids = {attrs["id"] for _, attrs in tags.seen if "id" in attrs}
    assert {attrs["href"][1:] for tag, attrs in tags.seen if tag == "a"} <= ids
    assert "slide-tiles" in ids


def test_page_without_content():
    html = render(Page("title", "subtitle"))
    assert "<h1>title</h1>" in html
    assert "Methods" not in html


def test_verdict_of_a_run():
    verdict = Verdict("flat", "The loss has hardly decreased.", ("loss 0.999 of ln K",))
    assert run_verdict({"verdict": verdict.to_dict()}) == verdict


def test_state_of_a_run_without_a_verdict():
    verdict = run_verdict({"state": "early_stopped", "step": 1200, "total_steps": 5000})
    assert (verdict.word, verdict.reason) == ("early stopped", "Step 1,200 of 5,000; not evaluated yet.")
