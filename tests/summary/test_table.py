"""Do text, HTML and JSON show the whole report, within the width of a screen?"""

import json
import re
from html.parser import HTMLParser

import jax.numpy as jnp
import pytest

import quantjax as qj
from quantjax.summary import summary
from quantjax.summary.table import shorten

TITLES = ["path", "shape", "format", "block", "bytes", "bits"]


def test_text_table(variables):
    text = str(summary(qj.quantize(variables, "w4"), reference=variables, policy="w4"))
    lines = text.splitlines()
    assert re.split("  +", lines[0]) == [*TITLES, "SQNR dB", "matched by"]
    cells = next(line for line in lines if line.startswith("head/kernel")).split()
    assert cells[:6] == ["head/kernel", "512x10", "int4", "per", "channel", "2,600"]
    assert cells[-1] == "w4"
    assert 18 < float(cells[-2]) < 25
    assert "2 of 8 leaves quantized" in text
    assert "a bias; name it in a rule to quantize it: conv/bias, head/bias, norm/bias" in text
    assert "collection batch_stats, not params" in text
    assert all(len(line) <= 100 for line in lines)
    # Columns are aligned: every row ends its bytes where the title does.
    end = lines[0].index("bytes") + len("bytes")
    assert all(line[end - 1].isdigit() and line[end] == " " for line in lines[2:10])
    assert repr(summary(variables)) == str(summary(variables))


def test_text_leaves_out_columns_that_say_nothing(variables):
    q = qj.quantize(variables, "w4")
    assert str(summary(q)).splitlines()[0].split() == TITLES


def test_text_of_nothing():
    assert "0 of 0 leaves quantized" in str(summary({}))
    assert "(root)" in str(summary(jnp.ones(3)))


def test_long_paths_are_shortened_and_stay_apart():
    tree = {
        "a_long_transformer_name": {
            f"decoder_layers_{i}": {
                "multi_head_self_attention": {
                    n: {"kernel": jnp.ones((2, 2))} for n in ("query_projection", "key_projection")
                }
            }
            for i in range(12)
        }
    }
    report = summary(qj.quantize(tree, "w8"), reference=tree, policy="w8")
    lines = str(report).splitlines()
    assert all(len(line) <= 100 for line in lines)
    paths = [line.split()[0] for line in lines[2:26]]
    assert len(set(paths)) == 24
    assert all(path.endswith("/kernel") for path in paths)


def test_paths_that_would_become_one_stay_whole():
    alike = ["abcdefgh/abcdefgh/x", "abcdefgh/abcdefgz/x"]
    assert shorten(alike, 5) == alike


def test_notes_on_numbered_paths_are_counted():
    tree = {f"layer_{i}": {"bias": jnp.ones(2)} for i in range(12)} | {"kernel": jnp.ones((2, 2))}
    report = summary(qj.quantize(tree, "w8"), policy="w8")
    assert "layer_*/bias (12)" in str(report)
    assert sum("a bias" in row.note for row in report.rows) == 12


class Page(HTMLParser):
    """Collects cells and checks that tags close in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.add(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def test_html_parses_and_is_escaped(variables):
    tree = variables | {"<b>": {"\"&'": jnp.ones(3)}}
    report = summary(qj.quantize(tree, "w4"), reference=tree, policy="w4")
    page = Page(report.to_html())
    assert not page.open
    assert page.tags == {"div", "table", "thead", "tbody", "tfoot", "tr", "td", "th", "p"}
    assert "<b>/\"&'" in page.cells and "head/kernel" in page.cells
    assert f"{report.totals.bytes:,}" in page.cells
    assert report._repr_html_() == report.to_html()


def test_json_round_trip(variables):
    q = qj.quantize(variables, "w4")
    report = summary(q, reference=variables, policy="w4")
    read = json.loads(report.to_json(), parse_constant=pytest.fail)
    assert read["totals"]["bytes"] == report.totals.bytes
    assert read["totals"]["ratio"] == report.totals.ratio
    assert len(read["rows"]) == len(report.rows)
    for got, want in zip(read["rows"], report.to_dict()["rows"], strict=True):
        sqnr = got.pop("sqnr_db")
        assert float(sqnr) == want.pop("sqnr_db")
        assert got == want
    assert read["rows"][3]["shape"] == [3, 3, 3, 8]
    assert read["rows"][3]["block"] == [None, None, None, 1]
