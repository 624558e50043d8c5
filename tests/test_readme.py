"""Does the README say what the results say, and does its code run?"""

import json
import re

import pytest

from experiments.readme import PAGES, ROOT, rendered
from experiments.tables import article_markdown

TEXT = (ROOT / "README.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_are_those_of_the_committed_results(page):
    text = page.read_text()
    assert text.count("<!-- table: ") == text.count("<!-- end -->") > 0
    assert rendered(text) == text


def test_a_changed_number_is_seen():
    number = re.search(r"\| float32 \|[^|]*\| (\d\d\.\d\d)", TEXT)
    assert number is not None
    changed = TEXT.replace(number[1], "99.99")
    assert rendered(changed) == TEXT != changed


def test_figures_and_files_it_names_are_there():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert links
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not missing


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_its_code_runs(empty_folder):
    assert CODE
    names: dict = {}
    for block in CODE:
        exec(block, names)
    assert (empty_folder / "model.qj.safetensors").exists()


def test_rows_on_activations_stand_apart_from_the_bits_of_weights():
    payload = json.loads((ROOT / "experiments/results/article_mnist.json").read_text())
    before = article_markdown(payload)[1]
    like = next(row for row in payload["summary"]["rows"] if row["format"] == "w8")
    payload["summary"]["rows"].append({**like, "format": "w8a8", "method": "static"})
    added = [row for row in article_markdown(payload)[1] if row not in before]
    size = f"{like['bytes']['mean'] / 1000:.0f}"
    assert [row[:2] for row in added] == [("w8a8, static", size)] and added[0][2]
