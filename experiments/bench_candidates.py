"""What does the benchmark of inference compare? One function on trees of several formats."""

import dataclasses
import importlib.util
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import quantjax as qj
from experiments.bench_models import Case
from experiments.timing import Call
from quantjax.interpret import Site

POLICIES = ("w8", "w4", "w4g64", "w8a8")
FROM_MEMORY = 2**29  # bytes of each format's weights that the calls of one measurement read


@dataclasses.dataclass(frozen=True, eq=False)
class Candidate:
    """A compiled function and the trees its calls take turns over. sites: how its products are
    computed, where that is known."""

    run: Callable[..., Any]
    trees: Sequence[Any]
    sites: tuple[Site, ...] = ()

    def call(self, args: tuple[Any, ...]) -> Call:
        """What is timed."""
        turns = itertools.cycle(self.trees)
        return lambda: self.run(next(turns), *args)


def quantized_trees(case: Case) -> dict[str, Any]:
    """The parameters in every format, float32 first."""
    trees = {"float32": case.params}
    trees |= {name: qj.quantize(case.params, name) for name in POLICIES}
    trees["w8a8 static"] = qj.calibrate(case.apply, case.params, [case.args], "w8a8")
    return trees


def candidates(case: Case) -> dict[str, Candidate]:
    """What is timed, by name."""
    found = {}
    for name, tree in quantized_trees(case).items():
        apply = case.apply if name == "float32" else qj.intercept(case.apply)
        count = math.ceil(FROM_MEMORY / tree_bytes(tree)) if case.from_memory else 1
        trees = [tree, *(jax.tree.map(jnp.copy, tree) for _ in range(count - 1))]
        sites = qj.sites(case.apply, tree, *case.args)
        found[name] = Candidate(jax.jit(apply), trees, sites)
    if case.module is not None and importlib.util.find_spec("qwix"):
        found |= _qwix(case)
    return found


def _qwix(case: Case) -> dict[str, Candidate]:
    import qwix

    found = {}
    for name, act in (("Qwix w8", None), ("Qwix w8a8", jnp.int8)):
        rule = qwix.QuantizationRule(module_path=".*", weight_qtype=jnp.int8, act_qtype=act)
        model = qwix.quantize_model(case.module, qwix.PtqProvider([rule]))
        shapes = jax.eval_shape(model.init, jax.random.key(0), *case.args)
        params = qwix.quantize_params(case.params["params"], shapes["params"])
        found[name] = Candidate(jax.jit(model.apply), [{"params": params}])
    return found


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays, codes and scales as they are stored; of shapes too."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
