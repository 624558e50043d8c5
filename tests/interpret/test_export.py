"""Does an intercepted model export for CPU, CUDA and TPU at once, and run here as it did before?"""

import functools

import jax
import numpy as np
import pytest

import quantjax as qj
from quantjax.interpret import intercept, sites
from tests.daily import daily

from .models import CASES

NAMES = ["linen CNN", "linen GRU", "linen decoder", "linen ViT", "plain experts"]


@pytest.mark.parametrize("name", daily(NAMES, ["plain experts"]))
def test_one_program_for_three_platforms(name):
    case = CASES[name]()
    found = sites(case.apply, case.params, case.x)
    q = jax.jit(functools.partial(qj.quantize, policy="w8a8", sites=found))(case.params)
    run = jax.jit(lambda q, x: intercept(case.apply)(q, x))
    leaves, structure = jax.tree.flatten(q)  # a file holds arrays; the tree is the caller's
    flat = jax.jit(lambda leaves, x: run(jax.tree.unflatten(structure, leaves), x))
    exported = jax.export.export(flat, platforms=["cpu", "cuda", "tpu"])(leaves, case.x)
    again = jax.export.deserialize(exported.serialize())
    assert again.platforms == ("cpu", "cuda", "tpu")
    jax.tree.map(np.testing.assert_array_equal, again.call(leaves, case.x), run(q, case.x))
