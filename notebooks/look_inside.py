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
# # Look inside a network, and quantize what flows through it
#
# Weights are known before a network runs; activations are not. This notebook lists the products
# of an unmodified Flax model, shows how each would be computed in low precision, looks at the
# ranges of the activations that enter them, compares scales found in each call (dynamic) with
# scales found once (static), and trains a network whose weights and activations both have 4 bits.
#
# Every section ends with an assertion of what its text claims.

# %%
import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import quantjax as qj
from quantjax import qat

SEED = 0
plt.rcParams.update({"figure.dpi": 80, "axes.grid": True, "grid.alpha": 0.3})

# %% [markdown]
# ## A small CNN on the digits
#
# 1,797 images of 8x8 pixels, 500 of them held out. The held-out images are looked at many times
# below, so read their accuracies as validation.

# %%
digits = load_digits()
order = np.random.default_rng(SEED).permutation(len(digits.target))
images = jnp.asarray(digits.images[order, ..., None] / 16, jnp.float32)
labels = jnp.asarray(digits.target[order], jnp.int32)
train_x, train_y, held_x, held_y = images[:-500], labels[:-500], images[-500:], labels[-500:]


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(16, (3, 3), name="conv1")(x))
        x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Conv(64, (3, 3), name="conv2")(x))
        x = nn.avg_pool(x, (2, 2), strides=(2, 2)).reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(64, name="fc")(x))
        return nn.Dense(10, name="head")(x)


model = CNN()


def accuracy(logits):
    return float((logits.argmax(-1) == held_y).mean())


def fit(params, forward, *, epochs, learning_rate, batch=64):
    """Adam on `forward(params, x)`, whatever that does to the parameters."""
    steps = len(train_y) // batch
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, epochs * steps))

    @jax.jit
    def step(params, state, index):
        def loss(params):
            logits = forward(params, train_x[index])
            return optax.softmax_cross_entropy_with_integer_labels(logits, train_y[index]).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state, rng = optimizer.init(params), np.random.default_rng(SEED)
    for _ in range(epochs):
        for index in rng.permutation(len(train_y))[: steps * batch].reshape(steps, batch):
            params, state = step(params, state, index)
    return params


params = fit(
    model.init(jax.random.key(SEED), held_x[:1]), model.apply, epochs=15, learning_rate=5e-3
)
float_logits = jax.jit(model.apply)(params, held_x)
print(f"float32: accuracy {accuracy(float_logits):.1%}")

assert accuracy(float_logits) > 0.93

# %% [markdown]
# ## Sites: the products, and what each sums over
#
# `sites` traces the function. A site is one product that uses a parameter: its key path, the axes
# of the parameter that are summed over, how often it runs, and its operations. The name in
# `module` is the framework's; the path is what policies match.

# %%
found = qj.sites(model.apply, params, held_x[:1])
for site in found:
    print(
        f"{site.path:14} {site.primitive:22} {'x'.join(map(str, site.param_shape)):12} "
        f"sums over {str(site.contracting):10} {site.flops / 1e3:6.0f} kFLOP  in {site.module}"
    )

assert [site.path for site in found] == ["conv1/kernel", "conv2/kernel", "fc/kernel", "head/kernel"]
assert found[1].contracting == (2, 0, 1)  # the input channels and the window, not the outputs

# %% [markdown]
# ## The report: how would it be computed?
#
# `intercept` gives a function that takes the quantized tree. Its `report` traces a call and says,
# product by product, how both sides are stored, which arithmetic is used, and why something stays
# float. On a CPU the convolutions of so small a network are computed in float, on rounded values:
# integers pay for wide layers. The dense layers are products of integers.

# %%
run = qj.intercept(model.apply)
q = qj.quantize(params, "w8a8", sites=found)
report = run.report(q, held_x)
print(report)

lowered = {site.path: site.lowering for site in report.sites}
assert lowered["fc/kernel"] == "int8 product"
assert "float" in lowered["conv1/kernel"]

# %% [markdown]
# ## Ranges of activations
#
# A histogram of what enters each layer: not negative, after the rectifier, with a long tail. One
# grid for the whole tensor has to choose between the tail and the bulk.

# %%
_, seen = model.apply(params, train_x[:512], capture_intermediates=True)
seen = seen["intermediates"]
hidden = {name: nn.relu(seen[name]["__call__"][0]) for name in ("conv1", "conv2", "fc")}
inputs = {
    "conv1": train_x[:512],
    "conv2": nn.avg_pool(hidden["conv1"], (2, 2), strides=(2, 2)),
    "fc": nn.avg_pool(hidden["conv2"], (2, 2), strides=(2, 2)),
    "head": hidden["fc"],
}

figure, axes = plt.subplots(1, 4, figsize=(12, 2.6), layout="constrained")
for axis, (name, values) in zip(axes, inputs.items(), strict=True):
    values = np.asarray(values).ravel()
    axis.hist(values, 60, log=True)
    axis.axvline(np.percentile(values, 99.99), color="C1", label="99.99 %")
    axis.axvline(values.max(), color="C3", linestyle=":", label="largest")
    axis.set(title=f"what enters {name}", xlabel="value")
axes[0].legend()
plt.show()

assert all(float(values.min()) >= 0 for values in inputs.values())

# %% [markdown]
# ## Static scales
#
# `calibrate` runs a few batches of the float model and puts one activation scale on each leaf. The
# observer chooses the range. One damaged image, fifty times too bright, is put among the 512.
#
# Claim: the largest value follows the damaged image; the 99.9th percentile hardly moves.

# %%
damaged = train_x[:512].at[100].multiply(50.0)
observers = {"largest": qj.absmax(), "99.9 %": qj.percentile(99.9)}
scales = {}
for source, batch in (("clean", train_x[:512]), ("damaged", damaged)):
    for name, observer in observers.items():
        tree = qj.calibrate(model.apply, params, [batch], "w8a8", observer=observer)
        scales[name, source] = float(tree["params"]["conv2"]["kernel"].act_scale)
for name in observers:
    ratio = scales[name, "damaged"] / scales[name, "clean"]
    print(f"{name:8} scale of conv2's input grows {ratio:5.2f} times")

assert scales["largest", "damaged"] > 10 * scales["largest", "clean"]
assert scales["99.9 %", "damaged"] < 2 * scales["99.9 %", "clean"]

# %% [markdown]
# ## Static against dynamic
#
# Dynamic scales are found in each call, one for a row of a dense layer and one for an example of a
# convolution; nothing has to be calibrated and nothing clips. Static scales cost no pass over the
# activation, and can be asymmetric for free: with zero as the lowest code, what leaves a rectifier
# has twice as many levels.
#
# Claim: at 8 bits all are the same to within one image in a hundred; at 3 bits the asymmetric grid
# loses least of the logits.


# %%
def policy(bits, *, static, symmetric):
    signed = symmetric
    act = qj.QuantSpec(
        format=qj.IntFormat(bits, signed=signed),
        symmetric=symmetric,
        observer=qj.percentile(99.99) if static else qj.minmax(),
        block=qj.Granularity.TENSOR if static else qj.Granularity.ROW,
        static=static,
    )
    return qj.Policy(otherwise=dataclasses.replace(qj.preset("w8").otherwise, act=act))


@jax.jit
def logits_of(tree):
    return run(tree, held_x)


def error(logits):
    return float(jnp.linalg.norm(logits - float_logits) / jnp.linalg.norm(float_logits))


kinds = {
    "dynamic": dict(static=False, symmetric=True),
    "static": dict(static=True, symmetric=True),
    "static, asymmetric": dict(static=True, symmetric=False),
}
bits = (8, 6, 5, 4, 3)
errors, accuracies = {}, {}
for kind, how in kinds.items():
    for b in bits:
        rules = policy(b, **how)
        if how["static"]:
            tree = qj.calibrate(model.apply, params, [train_x[:512]], rules)
        else:
            tree = qj.quantize(params, rules, sites=found)
        logits = logits_of(tree)
        errors[kind, b], accuracies[kind, b] = error(logits), accuracy(logits)

print(f"{'activations':20}" + "".join(f"{b} bits".rjust(16) for b in bits))
for kind in kinds:
    cells = [f"{accuracies[kind, b]:.1%} ({errors[kind, b]:.3f})".rjust(16) for b in bits]
    print(f"{kind:20}" + "".join(cells))

figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
for kind in kinds:
    axis.plot(bits, [errors[kind, b] for b in bits], marker="o", label=kind)
axis.set(xlabel="bits of activations", ylabel="relative error of the logits", yscale="log")
axis.invert_xaxis()
axis.legend()
plt.show()

assert all(accuracies[kind, 8] > accuracy(float_logits) - 0.01 for kind in kinds)
assert errors["static, asymmetric", 3] < errors["static", 3]

# %% [markdown]
# ## Training through rounded weights and activations
#
# `prepare` makes leaves that say how their products round, and `intercept` runs the unmodified
# model on them: both operands of every product are rounded, and the gradient passes straight
# through to the float parameters. The scales follow the weights, so they are found anew in every
# step. Weights and activations have 3 bits here.
#
# Claims: rounding after training hurts; training through the rounding wins back more than half of
# the loss; what was trained is what is stored, bit for bit; and the stored network, whose products
# are those of integers, gives the classes of the network that was trained.


# %%
def loss_of(tree):
    return float(optax.softmax_cross_entropy_with_integer_labels(logits_of(tree), held_y).mean())


weights = qj.QuantSpec(format=qj.IntFormat(3))
rules = qj.Policy(
    [("**/kernel", dataclasses.replace(weights, act=qj.QuantSpec(format=qj.IntFormat(3))))]
)
tuned = fit(
    params,
    lambda p, x: run(qat.prepare(p, rules, sites=found), x),
    epochs=4,
    learning_rate=2e-3,
)
trained = qat.prepare(tuned, rules, sites=found)
stored = qat.finalize(trained)
trees = {"float32": params, "rounded after": qj.quantize(params, rules, sites=found)}
trees["trained through"] = stored
losses = {name: loss_of(tree) for name, tree in trees.items()}
for name, tree in trees.items():
    print(f"{name:16} accuracy {accuracy(logits_of(tree)):.1%}, loss {losses[name]:.3f}")
agree = (logits_of(trained).argmax(-1) == logits_of(stored).argmax(-1)).mean()
print(f"{float(agree):.1%} of the images get the same class from floats and from integers")

won_back = losses["rounded after"] - losses["trained through"]
assert won_back > 0.5 * (losses["rounded after"] - losses["float32"])
fake = qj.fake_quantize(tuned, qj.Policy([("**/kernel", weights)]), sites=found)
jax.tree.map(np.testing.assert_array_equal, qj.dequantize(stored), fake)
assert agree > 0.98

# %% [markdown]
# ## A backward pass in 4 bits
#
# A layer has two gradient products: dX = g Wᵀ, which goes on to the layer before, and dW = xᵀ g,
# which moves the weights. `Backward` rounds the operands of each by a spec of its own. Rounded to
# nearest, entries far below the largest of their row all vanish, and the gradient is biased;
# rounded stochastically, each keeps its mean.
#
# Claim: the mean of 32 stochastic gradients comes nearer to the exact one than half the way of
# nearest rounding, which stays where it is.


# %%
@partial(jax.jit, static_argnames="backward")
def gradient(key, backward):
    """Of the loss on one batch, with respect to the kernel of the dense layer."""

    def loss(p):
        logits = run(qat.prepare(p, rules, sites=found, backward=backward, key=key), train_x[:64])
        return optax.softmax_cross_entropy_with_integer_labels(logits, train_y[:64]).mean()

    return jax.grad(loss)(params)["params"]["fc"]["kernel"]


nearest = qj.QuantSpec(format=qj.IntFormat(4))
noisy = dataclasses.replace(nearest, rounding=qj.Rounding.STOCHASTIC)
keys = jax.random.split(jax.random.key(SEED), 32)
exact = gradient(keys[0], None)
once = gradient(keys[0], qat.Backward(input_gradient=nearest, weight_gradient=nearest))
sampled = qat.Backward(input_gradient=noisy, weight_gradient=noisy)
samples = jnp.stack([gradient(key, sampled) for key in keys])
off = {
    "nearest": once,
    "one stochastic": samples[0],
    "mean of 32 stochastic": samples.mean(0),
}
off = {name: float(jnp.linalg.norm(g - exact) / jnp.linalg.norm(exact)) for name, g in off.items()}
for name, value in off.items():
    print(f"{name:22} relative error of dW {value:.3f}")

assert off["mean of 32 stochastic"] < off["nearest"] / 2
