"""Do pruned weights and their state stay zero, whatever the optimizer?"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import quantjax as qj
from quantjax import prune, qat
from tests.counted import Counted
from tests.daily import daily

W = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
PARAMS = {"w": W, "b": jnp.ones(4)}
X = jnp.asarray(np.random.default_rng(1).normal(size=(8, 6)), jnp.float32)

OPTIMIZERS = {
    "momentum and decay": optax.chain(
        optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9, nesterov=True)
    ),
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=2),
    "lion": optax.lion(0.1),
    "averaged": optax.chain(optax.adam(0.1), optax.ema(0.9)),
    "by label": optax.partition({"w": optax.adam(0.1), "b": optax.sgd(0.1)}, {"w": "w", "b": "b"}),
    "every second step": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
}


def loss(p):
    return jnp.mean((X @ p["w"] + p["b"] - 1) ** 2)


def zeros_of_state(state, mask):
    """All entries of leaves of the masked weight's shape where it is pruned."""
    return [np.asarray(x)[~mask] for x in jax.tree.leaves(state) if np.shape(x) == mask.shape]


@pytest.mark.parametrize("name", daily(OPTIMIZERS, ["momentum and decay", "adamw", "by label"]))
def test_pruned_weights_and_their_state_stay_zero(name):
    """From whole weights: zero after the first step that counts, to the bit, and ever after."""
    masks = prune.magnitude(PARAMS, "w", 0.5)
    mask = np.asarray(masks["w"])
    optimizer = prune.masked(OPTIMIZERS[name], masks)
    params, state = PARAMS, optimizer.init(PARAMS)

    @Counted
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    first = loss(prune.apply(params, masks))
    for _ in range(6):
        params, state = step(params, state)
        assert not np.asarray(params["w"])[~mask].any()
        assert all(not x.any() for x in zeros_of_state(state, mask))
    assert zeros_of_state(state, mask) or name == "adafactor"
    assert loss(params) < first and (np.asarray(params["w"])[mask] != 0).all()
    assert step.traces == 1


def test_a_bare_optimizer_moves_them():
    """The reason for `masked`: momentum and decay of what was there before."""
    masks = prune.magnitude(PARAMS, "w", 0.5)
    optimizer = optax.adam(0.1)
    _, state = optimizer.update(jax.grad(loss)(PARAMS), optimizer.init(PARAMS), PARAMS)
    params = prune.apply(PARAMS, masks)
    updates, _ = optimizer.update(prune.apply(jax.grad(loss)(params), masks), state, params)
    assert np.asarray(updates["w"])[~np.asarray(masks["w"])].any()


def test_masks_of_a_schedule_grow_in_one_compiled_step():
    """Masks traced in the step: the state is that of the optimizer, nothing compiles twice."""
    inner, schedule = optax.adam(0.05), prune.Cubic(0.75, end=6, every=2)

    @Counted
    def step(params, state, i):
        masks = prune.magnitude(params, "w", schedule(i))
        updates, state = prune.masked(inner, masks).update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, inner.init(PARAMS)
    for i in range(9):
        params, state = step(params, state, i)
        zero = np.asarray(params["w"]) == 0
        assert zero.sum() == round(schedule(i) * 24)
        assert not np.asarray(state[0].mu["w"])[zero].any()
        assert not np.asarray(state[0].nu["w"])[zero].any()
    assert step.traces == 1


def test_leaves_that_train_their_scales_stay_pruned_too():
    """A tree of FakeQuantized leaves as parameters: values are masked, scales train on."""
    tree = qat.prepare(PARAMS, qj.Policy([("w", "w4")]))
    masks = {"w": jnp.arange(24).reshape(6, 4) % 3 > 0}
    optimizer = prune.masked(optax.adamw(0.01, weight_decay=0.1), masks)
    state = optimizer.init(tree)
    gradient = jax.tree.map(jnp.ones_like, tree)
    for _ in range(2):
        updates, state = optimizer.update(gradient, state, tree)
        tree = optax.apply_updates(tree, updates)
    assert not np.asarray(tree["w"].value)[~np.asarray(masks["w"])].any()
    assert not np.asarray(state[0].mu["w"].value)[~np.asarray(masks["w"])].any()
    assert np.asarray(state[0].mu["w"].scale).all()
    values = qj.dequantize(qat.finalize(tree))["w"]
    assert not np.asarray(values)[~np.asarray(masks["w"])].any()


def test_it_takes_extra_arguments_and_is_understood_by_optax():
    masks = {"w": jnp.ones((6, 4), bool)}
    optimizer = optax.chain(prune.masked(optax.contrib.reduce_on_plateau(), masks))
    optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS, value=jnp.float32(1.0))
    inner = prune.masked(optax.adam(0.1), masks)
    shapes = optax.tree_map_params(inner, lambda x: x.shape, inner.init(PARAMS))
    assert shapes[0].mu == {"w": (6, 4), "b": (4,)}


def test_it_changes_nothing_of_whole_leaves():
    masks = {"w": jnp.ones((6, 4), bool)}
    results = []
    for optimizer in (optax.adamw(0.1), prune.masked(optax.adamw(0.1), masks)):
        results.append(optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS))
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_bad_input_raises():
    masks = {"w": jnp.ones((4, 6), bool)}
    with pytest.raises(ValueError, match=r"w: expected a mask of shape \(6, 4\), got \(4, 6\)"):
        prune.masked(optax.sgd(0.1), masks).init(PARAMS)
    with pytest.raises(TypeError, match="expected an optax GradientTransformation"):
        prune.masked(optax.adam, masks)
    optimizer = prune.masked(optax.sgd(0.1), {"w": jnp.ones((6, 4), bool)})
    with pytest.raises(ValueError, match="needs the parameters"):
        optimizer.update(PARAMS, optimizer.init(PARAMS))
    for where in (lambda o: o, lambda o: optax.chain(optax.clip(1.0), o)):
        outside = prune.masked(where(qat.quantize_state(optax.adam(0.1), min_size=1)), {})
        with pytest.raises(ValueError, match=r"masks inside, quantize_state\(masked\("):
            outside.init(PARAMS)
