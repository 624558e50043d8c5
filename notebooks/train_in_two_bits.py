# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Training in two bits
#
# A rounded weight has no useful derivative: it is zero almost everywhere. An estimator says what
# gradient passes instead, and what else is learned beside the weights. This notebook draws both
# sides of several estimators, trains a network whose weights and activations have two bits, and
# watches the learned step sizes on the way.
#
# Every section ends with an assertion of what its text claims.

# %%
import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import quantjax as qj
from quantjax import formats, qat
from quantjax.policy import preset_spec
from quantjax.spec import Granularity

SEED = 0
plt.rcParams.update({"figure.dpi": 80, "axes.grid": True, "grid.alpha": 0.3})

# %% [markdown]
# ## Weights: what a product sees, and what gradient comes back
#
# The product `1 @ w` shows every weight as it is rounded, and its gradient is what the estimator
# passes: 1 where the rounding is looked through, 0 where a weight is held to have left the grid.
# LSQ cuts the gradient at the outermost levels; DoReFa squashes by tanh first, so that large weights
# still hear a little; APoT's levels are sums of powers of two; IR-Net's gradient begins wide and
# sharpens as the training goes on, here at three moments.

# %%
w = jnp.linspace(-2.0, 2.0, 401)[None]
one = jnp.ones((1, 1))


def product(p, x):
    return x @ p["w"]


run = qj.intercept(product)


@jax.jit
def both_sides(tree):
    """The weights as the product sees them, and the derivative of each by itself."""

    def seen(value):
        return run({"w": dataclasses.replace(tree["w"], value=value)}, one)[0]

    return seen(w), jnp.diagonal(jax.jacrev(seen)(w)[:, 0])


def prepared(estimator, spec):
    spec = dataclasses.replace(spec, block=(None, None))  # one scale for all
    return qat.prepare({"w": w}, qj.Policy([("w", spec)]), estimator=estimator)


two, ternary, one_bit = (preset_spec(name) for name in ("w2", "ternary", "w1"))
trees = {
    "straight-through, 2 bits": prepared(None, two),
    "LSQ, ternary": prepared(qat.lsq(), ternary),
    "DoReFa, 2 bits": prepared(qat.dorefa(), two),
    "APoT, 4 bits": prepared(qat.apot(), qj.QuantSpec(format=formats.apot(4))),
    "TWN, ternary": prepared(qat.twn(), ternary),
    "BinaryConnect": prepared(qat.binary_connect(), one_bit),
}
for done in (0.0, 0.5, 1.0):
    trees[f"IR-Net, {done:.0%} trained"] = qat.at(prepared(qat.ir_net(), one_bit), done)
drawn = {name: both_sides(tree) for name, tree in trees.items()}

figure, panels = plt.subplots(3, 3, figsize=(9, 6.5), sharex=True)
for axes, (name, (seen, passed)) in zip(panels.flat, drawn.items(), strict=True):
    axes.plot(w[0], seen, color="C0", label="rounded")
    axes.plot(w[0], passed, color="C1", label="gradient")
    axes.set_title(name, fontsize=9)
panels[0, 0].legend(fontsize=8)
figure.supxlabel("weight", fontsize=9)
figure.tight_layout()

# %%
levels = {name: len(np.unique(seen)) for name, (seen, _) in drawn.items()}
print(levels)
assert levels["straight-through, 2 bits"] == 4 and levels["LSQ, ternary"] == 3
assert levels["BinaryConnect"] == 2
passed = [drawn[f"IR-Net, {done:.0%} trained"][1] for done in (0.0, 0.5, 1.0)]
wide = [float((g > g.max() / 2).mean()) for g in passed]
assert wide[0] > wide[1] > wide[2]  # sharper and sharper

# %% [markdown]
# ## Activations: what is learned hears from every value
#
# Here the weight is 1 and the input varies, in two bits without a sign. Beside the gradient of the
# input there is one of what is learned. LSQ's step hears of the rounding error in every cell and of
# what was clipped; PACT's bound of what was clipped alone; N2UQ learns where cells end, so that it
# has a number for each of them.

# %%
x = jnp.linspace(-0.5, 2.5, 301)[:, None]
grid = qj.QuantSpec(
    format=qj.IntFormat(2, signed=False), block=Granularity.TENSOR, static=True,
    observer=qj.percentile(70.0),
)  # fmt: skip
spec = dataclasses.replace(preset_spec("w8"), act=grid)
found = qj.calibrate(product, {"w": one}, [x], qj.Policy([("w", spec)]))


@jax.jit
def of_inputs(tree):
    """The inputs as the product sees them, the gradient of each, and of each what is learned."""

    def alone(x):
        value, (by_tree, by_x) = jax.value_and_grad(
            lambda tree, x: run(tree, x[None]).sum(), argnums=(0, 1)
        )(tree, x)
        return value, by_x[0], by_tree["w"].act_learned

    return jax.vmap(alone)(x)


figure, panels = plt.subplots(1, 3, figsize=(9, 2.8), sharex=True)
heard = {}
for axes, (name, estimator) in zip(
    panels, {"LSQ": qat.lsq(), "PACT": qat.pact(), "N2UQ": qat.n2uq()}.items(), strict=True
):
    of_inputs_alone = qat.Estimator(activations=estimator.activations)
    tree = qat.prepare({"w": one}, like=found, estimator=of_inputs_alone)
    seen, passed, heard[name] = of_inputs(tree)
    axes.plot(x[:, 0], seen, color="C0", label="rounded")
    axes.plot(x[:, 0], passed, color="C1", label="gradient of the input")
    for values in heard[name].values():
        values = values.reshape(len(x), -1)
        values = values / jnp.abs(values).max()  # papers scale it; its shape is of interest
        axes.plot(x[:, 0], values, linewidth=0.8, linestyle="--")
    axes.set_title(name, fontsize=9)
panels[0].legend(fontsize=7)
figure.supxlabel("input; dashed: the gradients of what is learned, scaled to 1", fontsize=9)
figure.tight_layout()

# %%
inside = (x[:, 0] > 0.05) & (x[:, 0] < 0.5 * float(found["w"].act_scale) * 3)
by_step, by_bound = (next(iter(heard[name].values())).reshape(len(x)) for name in ("LSQ", "PACT"))
assert (by_step[inside] != 0).mean() > 0.9 and not by_bound[inside].any()

# %% [markdown]
# ## A network of two bits
#
# The digits of scikit-learn, 500 of them held out; these are looked at many times, so read their
# accuracies as validation. The float network is trained first.

# %%
digits = load_digits()
order = np.random.default_rng(SEED).permutation(len(digits.target))
images = jnp.asarray(digits.images[order, ..., None] / 16, jnp.float32)
labels = jnp.asarray(digits.target[order], jnp.int32)
train_x, train_y, held_x, held_y = images[:-500], labels[:-500], images[-500:], labels[-500:]


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3), strides=2, name="conv1")(x))
        x = nn.relu(nn.Conv(32, (3, 3), name="conv2")(x))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(64, name="fc")(x))
        return nn.Dense(10, name="head")(x)


model = CNN()


def trained(apply, tree, rate, epochs, watch=lambda tree: None):
    """The tree after Adam on a cosine, and what `watch` saw of it after each epoch."""
    batches = (len(train_x) // 64) * epochs
    weights = optax.adam(optax.cosine_decay_schedule(rate, batches))
    learned = optax.adam(optax.cosine_decay_schedule(rate / 10, batches))
    optimizer = optax.partition(
        {"weights": weights, "learned": learned, "fixed": optax.set_to_zero()}, qat.labels
    )

    @jax.jit
    def step(tree, state, rows):
        def loss(tree):
            logits = apply(tree, train_x[rows])
            return optax.softmax_cross_entropy_with_integer_labels(logits, train_y[rows]).mean()

        updates, state = optimizer.update(jax.grad(loss)(tree), state, tree)
        return optax.apply_updates(tree, updates), state

    state, seen = optimizer.init(tree), [watch(tree)]
    for key in jax.random.split(jax.random.key(SEED), epochs):
        for rows in jax.random.permutation(key, len(train_x))[: len(train_x) // 64 * 64].reshape(
            -1, 64
        ):
            tree, state = step(tree, state, rows)
        seen.append(watch(tree))
    return tree, seen


intercepted = jax.jit(qj.intercept(model.apply))


def accuracy(tree):
    return float((intercepted(tree, held_x).argmax(-1) == held_y).mean())


start = jax.jit(model.init)(jax.random.key(SEED), train_x[:1])
params, _ = trained(model.apply, start, 3e-3, 15)
float_accuracy = accuracy(params)
print(f"float: {float_accuracy:.3f}")
assert float_accuracy > 0.95

# %% [markdown]
# Two bits for every weight and every activation, the image included: four shades. What is rounded
# after training loses a good part of its digits; with LSQ the network is trained on, its weights and
# steps together, and what it sees while it trains is what is stored in the end.

# %%
low = dataclasses.replace(two, act=dataclasses.replace(grid, observer=qj.mse()))
policy = qj.Policy([("**/kernel", low)])
rounded = qj.calibrate(model.apply, params, [train_x[:256]], policy)
print(f"rounded after training: {accuracy(rounded):.3f}")


def steps(tree):
    """The learned steps of weights, and those of least squared error for the weights as they are."""
    layers = tree["params"]
    floats = {name: layer["kernel"].value for name, layer in layers.items()}
    nearest = qj.quantize(floats, qj.Policy([("*", two)]))
    return {
        name: (
            float(layers[name]["kernel"].learned["scale"].mean()),
            float(nearest[name].scale.mean()),
        )
        for name in floats
    }


tree = qat.prepare(params, like=rounded, estimator=qat.lsq())
tree, seen = trained(qj.intercept(model.apply), tree, 2e-3, 15, steps)
stored = qat.finalize(tree)
print(f"trained through rounding: {accuracy(stored):.3f}")
print(qj.summary(stored, reference=params))
assert accuracy(stored) > max(accuracy(rounded) + 0.05, float_accuracy - 0.05)

# %% [markdown]
# ## The steps over the training
#
# They begin where the squared error of the weights is least, and go where the loss is least. The
# dashed line is the step of least squared error for the weights as they are at that moment.

# %%
figure, panels = plt.subplots(1, 4, figsize=(10, 2.6), sharex=True)
for axes, name in zip(panels, seen[0], strict=True):
    learned, nearest = zip(*(record[name] for record in seen), strict=True)
    axes.plot(learned, label="learned")
    axes.plot(nearest, "--", label="least squared error")
    axes.set_title(name, fontsize=9)
panels[1].legend(fontsize=7, loc="lower right")
panels[0].set_ylabel("mean step of a channel")
figure.supxlabel("epoch", fontsize=9)
figure.tight_layout()
moved = {name: seen[-1][name][0] / seen[0][name][0] for name in seen[0]}
print({name: round(ratio, 3) for name, ratio in moved.items()})
assert any(abs(ratio - 1) > 0.03 for ratio in moved.values())
