"""A whole file, for the tests that spoil it."""

from pathlib import Path

import pytest

from quantjax.storage import load, save

# Before its import, so that a failing assert_same shows both sides.
pytest.register_assert_rewrite(f"{__package__}.trees")

from .trees import TREE, assert_same  # noqa: E402


@pytest.fixture
def whole(tmp_path) -> Path:
    save(tmp_path / "whole", TREE, metadata={"step": "7"})
    assert_same(load(tmp_path / "whole"), TREE)
    return tmp_path / "whole"
