"""A model as a flat list of steps, and cut in pieces: it computes what it did."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import quantjax as qj
from quantjax.interpret.evaluate import Machine
from quantjax.interpret.method import Journal
from quantjax.interpret.pieces import Pieces
from quantjax.interpret.program import Leaf, Value, flatten, layer_of
from quantjax.interpret.record import Record
from quantjax.interpret.segments import cut
from quantjax.paths import named_leaves
from tests.daily import daily

from . import models

CASES = (
    "linen CNN",
    "linen LSTM",
    "linen decoder",
    "nnx transformer",
    "plain experts",
    "plain control flow",
)


def lookup(tree):
    leaves = dict(named_leaves(tree)[0])
    return lambda x: layer_of(leaves[x.path], x.layer)


def own_kernel(x):
    """Each matrix begins a segment."""
    return x if x.path.endswith(("kernel", "w", "weight", "k")) else None


def piece_by_piece(apply, tree, batch, label=own_kernel):
    program = flatten(apply, tree, *batch)
    pieces = Pieces(apply, tree, [batch], label)
    stream = pieces.start()
    for k in range(len(pieces)):
        stream = pieces.advance(k, stream, lookup(tree))
    out = [stream[0][x.id] for x in program.outputs if isinstance(x, Value)]
    return jax.tree.unflatten(program.structure, out), pieces


@pytest.mark.parametrize("name", daily(CASES, ["linen CNN", "linen decoder", "plain control flow"]))
def test_pieces_one_after_another_are_the_model(name):
    case = models.CASES[name]()
    got, pieces = piece_by_piece(case.apply, case.params, (case.x,))
    want = jax.jit(case.apply)(case.params, case.x)
    assert len(pieces) > 1 or name == "linen LSTM"  # all its products are in one scan
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # Compiled in other pieces, sums may be taken in another order.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def stacked(params, x):
    def layer(carry, p):
        return jnp.tanh(carry @ p["k"] + p["b"]), carry.sum()

    return lax.scan(layer, x, params)


STACKED = {"k": models.normal(5, 4, 4), "b": models.normal(5, 4)}


def test_a_scan_over_parameters_is_unrolled():
    program = flatten(stacked, STACKED, jnp.ones((2, 4)))
    used = [x for s in program.instructions for x in s.inputs if isinstance(x, Leaf)]
    assert {x for x in used if x.path == "k"} == {Leaf("k", (i,)) for i in range(5)}
    got = program.run(Machine(Record()), lookup(STACKED), [jnp.ones((2, 4))])
    want = stacked(STACKED, jnp.ones((2, 4)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, want)


def test_a_scan_backwards_stacks_its_steps_in_order():
    def apply(params, x):
        return lax.scan(lambda c, k: (c @ k, c.sum()), x, params["k"], reverse=True)

    program = flatten(apply, STACKED, jnp.ones((2, 4)))
    got = program.run(Machine(Record()), lookup(STACKED), [jnp.ones((2, 4))])
    want = apply(STACKED, jnp.ones((2, 4)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


def test_layers_alike_are_one_program():
    segments = cut(flatten(stacked, STACKED, jnp.ones((2, 4))), own_kernel)
    assert len(segments) == 5
    # The first has no values to pass on yet, the last stacks them.
    assert len({s.key for s in segments[1:-1]}) <= 3
    relu = flatten(lambda p, x: jax.nn.relu(x @ p["k"]), {"k": jnp.ones((4, 4))}, jnp.ones((2, 4)))
    tanh = flatten(lambda p, x: jnp.tanh(x @ p["k"]), {"k": jnp.ones((4, 4))}, jnp.ones((2, 4)))
    assert cut(relu, own_kernel)[0].key != cut(tanh, own_kernel)[0].key


def test_arrays_that_the_model_holds_are_not_taken_for_each_other():
    held = [jnp.full(4, 2.0), jnp.full(4, 3.0)]
    tree = {"a": {"k": jnp.eye(4)}, "b": {"k": jnp.eye(4)}}

    def apply(p, x):
        return (((x @ p["a"]["k"]) * held[0]) @ p["b"]["k"]) * held[1]

    got, _ = piece_by_piece(apply, tree, (jnp.ones((1, 4)),))
    np.testing.assert_array_equal(got, jnp.full((1, 4), 6.0))


def test_a_closed_over_table_in_an_inner_call_is_told_apart():
    held = [jnp.full(4, 2.0), jnp.full(4, 3.0)]
    tree = {"a": {"k": jnp.eye(4)}, "b": {"k": jnp.eye(4)}}

    def apply(p, x):
        for name, table in zip("ab", held, strict=True):
            x = lax.cond(x.sum() > 0, lambda v, t=table: v * t, lambda v: v, x @ p[name]["k"])
        return x

    got, _ = piece_by_piece(apply, tree, (jnp.ones((1, 4)),))
    np.testing.assert_array_equal(got, jnp.full((1, 4), 6.0))


def test_what_depends_on_no_input_is_computed_where_it_is_needed():
    def apply(p, x):
        table = jnp.cos(jnp.arange(4.0))
        return (x * table) @ p["a"]["k"] * table @ p["b"]["k"]

    tree = {"a": {"k": jnp.eye(4)}, "b": {"k": jnp.eye(4)}}
    got, pieces = piece_by_piece(apply, tree, (jnp.ones((1, 4)),))
    np.testing.assert_allclose(got, apply(tree, jnp.ones((1, 4))), rtol=1e-6)
    assert all(len(pieces.segment(k).inputs) == 1 for k in range(len(pieces)))


def test_batches_of_two_shapes_go_through_programs_of_their_own():
    tree = {"a": {"k": models.normal(4, 4)}, "b": {"k": models.normal(4, 4)}}

    def apply(p, x):
        return jnp.tanh(x @ p["a"]["k"]) @ p["b"]["k"]

    pieces = Pieces(apply, tree, [jnp.ones((2, 4)), jnp.ones((3, 4))], own_kernel)
    stream = pieces.start()
    for k in range(len(pieces)):
        stream = pieces.advance(k, stream, lookup(tree))
    assert [next(iter(values.values())).shape for values in stream] == [(2, 4), (3, 4)]


def test_batches_that_go_different_ways_are_refused():
    tree = {"a": {"k": jnp.eye(4)}, "b": {"k": jnp.eye(4)}}

    def apply(p, x):
        return x @ p["a"]["k"] if len(x) > 2 else x @ p["b"]["k"]

    with pytest.raises(ValueError, match="different ways"):
        Pieces(apply, tree, [jnp.ones((2, 4)), jnp.ones((3, 4))], own_kernel)


def test_quantized_leaves_run_in_their_pieces():
    tree = {"a": {"k": models.normal(4, 4)}, "b": {"k": models.normal(4, 4)}}

    def apply(p, x):
        return jnp.tanh(x @ p["a"]["k"]) @ p["b"]["k"]

    policy = qj.Policy([("**/k", "w8")])
    q = qj.quantize(tree, policy)
    pieces = Pieces(apply, tree, [jnp.ones((2, 4))], own_kernel)
    stream = pieces.start()
    for k in range(len(pieces)):
        stream = pieces.advance(k, stream, lookup(q))
    want = apply(qj.dequantize(q), jnp.ones((2, 4)))
    np.testing.assert_allclose(next(iter(stream[0].values())), want, rtol=1e-5, atol=1e-6)


def test_a_journal_calls_with_what_is_finished():
    seen = []
    journal = Journal(on_block=lambda i, state: seen.append((i, sorted(state["done"]))))
    journal.add("a", 1)
    journal.add("b", 2)
    assert seen == [(0, ["a"]), (1, ["a", "b"])]
    assert Journal(journal.state).find("b") == 2
