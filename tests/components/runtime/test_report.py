"""Pages that stand by themselves, readable without the pictures."""

import re
from html.parser import HTMLParser

from components.runtime.curves import curve_figures
from components.runtime.report import (
    bar_figure,
    html_table,
    interval_figure,
    line_figure,
    text_block,
    thin,
    tiles,
    write_page,
)


class Checker(HTMLParser):
    """Collects tags, ids and references; complains about unbalanced tags."""

    VOID = frozenset({"meta", "br", "img", "hr", "input", "link"})

    def __init__(self):
        super().__init__()
        self.stack, self.ids, self.references, self.labels, self.tags = [], [], [], [], set()

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.add(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.labels += [values["aria-label"]] if "aria-label" in values else []
        for value in values.values():
            self.references += re.findall(r"^#(.+)$|url\(#([^)]+)\)", value or "")
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


def page(tmp_path):
    figures = [
        line_figure(
            "Loss", {"a": [(0, 2.0), (1, 1.0)], "b": [(0, 3.0), (1, 2.5)]}, x="step", y="nats", marks=[(0, "p")]
        ),
        line_figure("KL", {"a": [(0, 0.2), (1, 0.1)]}, x="step", y="nats"),
        interval_figure("pass@1", [("before", 0.25, 0.2, 0.3), ("after", 0.75, 0.7, 0.8)], x="share"),
        bar_figure("Recall", {"all": [("0-31", 0.5), ("32-63", 0.25)]}, x="words", y="recall"),
    ]
    parts = [tiles([("<b>1", "a & b")]), *figures, html_table(["x", "y"], [["<script>", "2"]], numbers=[1])]
    return write_page(tmp_path / "p.html", "T <i>", parts, lead="l").read_text()


def test_a_page_is_whole_and_its_references_hold(tmp_path):
    checker = Checker()
    checker.feed(page(tmp_path))
    assert checker.stack == []
    assert len(checker.ids) == len(set(checker.ids))
    named = {first or second for first, second in checker.references}
    assert named
    assert named <= set(checker.ids)
    assert "script" not in checker.tags  # text from a run is escaped


def test_every_picture_is_told_in_words(tmp_path):
    checker = Checker()
    checker.feed(page(tmp_path))
    assert len(checker.labels) == 4
    assert checker.labels[0] == (
        "Loss. a: from 2 at 0 to 1 at 1; lowest 1, highest 2; b: from 3 at 0 to 2.5 at 1; lowest 2.5, highest 3"
    )
    assert "before: 0.250 (interval 0.200 to 0.300)" in checker.labels[2]
    assert "all: 0-31: 0.5, 32-63: 0.25" in checker.labels[3]


def test_colours_follow_the_page_in_light_and_dark(tmp_path):
    text = page(tmp_path)
    assert "prefers-color-scheme: dark" in text
    assert "currentColor" in text
    assert "#123457" not in text
    assert "#000000" not in text


def test_drawing_twice_gives_the_same_page(tmp_path):
    assert page(tmp_path) == page(tmp_path)


def test_thinning_keeps_the_mean_and_short_curves():
    points = [(float(i), float(i % 7)) for i in range(2000)]
    thinned = thin(points, 100)
    assert len(thinned) == 100
    assert abs(sum(y for _, y in thinned) / 100 - sum(y for _, y in points) / 2000) < 1e-9
    assert thin(points[:100], 100) == points[:100]


def test_what_is_no_loss_makes_no_phase():
    curves = {"dense/loss": [(0, 2.0), (5, 1.0)], "cost/core_seconds": [(0, 3.0)], "states/bytes": [(0, 9.0)]}
    (figure,) = curve_figures("Training", curves)
    assert "cost" not in figure
    assert "states" not in figure
    both = {**curves, "sparse/loss": [(0, 1.0), (5, 0.5)]}
    (figure,) = curve_figures("Training", both)
    assert "sparse" in figure


def test_wide_tables_and_long_texts_scroll_by_keyboard(tmp_path):
    parts = [html_table(["a", "b"], [["1", "2"]]), text_block("a < b")]
    text = write_page(tmp_path / "page.html", "Page", parts).read_text()
    assert text.count('tabindex="0"') == 2
    assert "a &lt; b" in text
    assert text.index("<main>") < text.index("<h1>") < text.index("</main>")
