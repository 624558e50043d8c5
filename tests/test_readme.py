"""Does the README say what the results say, and does its code run?"""

import re

import pytest

from experiments.readme import ROOT, rendered

TEXT = (ROOT / "README.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_tables_are_those_of_the_committed_results():
    assert "<!-- table: " in TEXT
    assert rendered(TEXT) == TEXT


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
