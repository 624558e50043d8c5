"""Which numbers does the README show? Those of the committed JSON, put in by this command.
Run: python -m experiments.readme [--check]

Everything between `<!-- table: NAME -->` and `<!-- end -->` is made anew from
experiments/results/NAME.json."""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import tyro

from experiments.report import markdown_table
from experiments.tables import (
    activations_markdown,
    article_markdown,
    bench_markdown,
    inference_markdown,
    normal_markdown,
)

ROOT = Path(__file__).parent.parent
SGD = "article_fashion_mnist_sgd"  # one row of the other table too
MAKERS = {
    "activations": activations_markdown,
    "bench_quantize": bench_markdown,
    "bench_inference": inference_markdown,
    "normal_error": normal_markdown,
}
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Config:
    """check: change nothing, and exit with 1 if the README is not what the JSON makes it."""

    check: bool = False


def _result(name: str) -> Any:
    return json.loads((ROOT / "experiments" / "results" / f"{name}.json").read_text())


def rendered(text: str) -> str:
    """The README's text with every table made anew."""

    def table(match: re.Match[str]) -> str:
        payload = _result(match[2])
        if match[2] in MAKERS:
            table = MAKERS[match[2]](payload)
        else:
            sgd = _result(SGD) if f"{match[2]}_sgd" == SGD else None
            table = article_markdown(payload, sgd)
        return f"{match[1]}{markdown_table(*table)}\n{match[3]}"

    return BLOCK.sub(table, text)


def main(config: Config) -> None:
    """Rewrites the README, or checks it."""
    path = ROOT / "README.md"
    text = path.read_text()
    new = rendered(text)
    if config.check and new != text:
        sys.exit("README.md is not what the results make it: run python -m experiments.readme.")
    if not config.check:
        path.write_text(new)


if __name__ == "__main__":
    main(tyro.cli(Config))
