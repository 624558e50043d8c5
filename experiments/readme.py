"""Which numbers do the pages show? Those of the committed JSON, put in by this command.
Run: python -m experiments.readme [--check]

Everything between `<!-- table: NAME VIEW -->` and `<!-- end -->` is made anew from
experiments/results/NAME.json, in README.md and in experiments/results/README.md."""

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import tyro

from experiments import method_tables
from experiments.report import markdown_table
from experiments.tables import (
    activations_markdown,
    article_markdown,
    bench_markdown,
    inference_markdown,
    normal_markdown,
    ratios_markdown,
)

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "experiments" / "results" / "README.md")
SGD = "article_fashion_mnist_sgd"  # one row of the other table too
TABLES = {
    "activations": activations_markdown,
    "bench_quantize": bench_markdown,
    "bench_inference": inference_markdown,
    "bench_training": ratios_markdown,
    "bench_sensitivity": ratios_markdown,
    "normal_error": normal_markdown,
}
_resnet = partial(partial, method_tables.lost)
# The front page has the plainest rounding, the best of every package, and the best of ours.
FRONT_RESNET = (
    "qwix absmax", "torchao absmax", "torchao, exported", "onnxruntime", "hqq package", "absmax",
    "rtn, outputs", "gptq, paper", "brecq", "gptq", "adaround",
)  # fmt: skip
FRONT_LANGUAGE = (
    "torchao absmax", "torchao hqq", "hqq package", "qwix awq", "qwix gptq", "absmax", "hqq",
    "brecq", "gptq", "gptq, rotated", "adaround",
)  # fmt: skip
METHODS: dict[str, Callable[[Any], method_tables.Table]] = {
    "ptq_resnet front": partial(_resnet(ends="low", folded=False), methods=FRONT_RESNET),
    "ptq_resnet": _resnet(ends="low", folded=False),
    "ptq_resnet ends": _resnet(ends="8 bits", folded=False),
    "ptq_resnet folded": _resnet(ends="low", folded=True),
    "ptq_resnet costs": partial(method_tables.costs, ends="low", folded=False),
    "ptq_article fashion_mnist": partial(method_tables.lost, network="fashion_mnist", ends="low"),
    "ptq_article mnist": partial(method_tables.lost, network="mnist", ends="low"),
    "ptq_article costs": partial(method_tables.costs, network="fashion_mnist", ends="low"),
    "ptq_language_model front": partial(
        method_tables.divergence, field="kl", digits=5, embedding=False, methods=FRONT_LANGUAGE
    ),
    "ptq_language_model": partial(method_tables.divergence, field="kl", digits=5, embedding=False),
    "ptq_language_model perplexity": partial(
        method_tables.divergence, field="perplexity", digits=2, embedding=False
    ),
    "ptq_language_model embedding": partial(
        method_tables.divergence, field="kl", digits=5, embedding=True
    ),
    "ptq_language_model costs": method_tables.costs,
    **{
        f"qat_article {network}_{bits}": partial(
            method_tables.trained, network=network, activations=bits
        )
        for network in ("fashion_mnist", "mnist")
        for bits in (32, 8, 4, 2)
    },
    "qat_resnet resnet8": partial(method_tables.trained, network="resnet8"),
    "qat_resnet resnet20": partial(method_tables.trained, network="resnet20"),
    **{
        f"qat_recurrent {network}_{cell}": partial(
            method_tables.trained, network=network, cell=cell
        )
        for network in ("spoken_digits", "japanese_vowels")
        for cell in ("lstm", "gru")
    },
    "qat_transformer formats": method_tables.decoder_formats,
    "qat_transformer state": method_tables.optimizer_states,
    "joint_compression fashion_mnist": partial(method_tables.compressions, network="fashion_mnist"),
    "allocate fashion_mnist": partial(method_tables.allocations, network="fashion_mnist"),
    "allocate mnist": partial(method_tables.allocations, network="mnist"),
    "allocate resnet32": partial(method_tables.allocations, network="resnet32"),
    "allocate predictions": method_tables.predictions,
}
BLOCK = re.compile(r"(<!-- table: (\w+)( \w+)? -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Config:
    """check: change nothing, and exit with 1 if a page is not what the JSON makes it."""

    check: bool = False


def _result(name: str) -> Any:
    return json.loads((ROOT / "experiments" / "results" / f"{name}.json").read_text())


def _table(name: str, view: str) -> str:
    payload = _result(name)
    if make := METHODS.get(name + view):
        return make(payload).markdown()
    if name in TABLES:
        return markdown_table(*TABLES[name](payload))
    return markdown_table(
        *article_markdown(payload, _result(SGD) if f"{name}_sgd" == SGD else None)
    )


def rendered(text: str) -> str:
    """A page's text with every table made anew."""
    return BLOCK.sub(lambda m: f"{m[1]}{_table(m[2], m[3] or '')}\n{m[4]}", text)


def main(config: Config) -> None:
    """Rewrites the pages, or checks them."""
    for path in PAGES:
        text = path.read_text()
        new = rendered(text)
        if config.check and new != text:
            sys.exit(
                f"{path.name} is not what the results make it: run python -m experiments.readme."
            )
        if not config.check:
            path.write_text(new)


if __name__ == "__main__":
    main(tyro.cli(Config))
