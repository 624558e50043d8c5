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
# # From a float network to the best one of three bits
#
# A trained network and a few hundred samples, no further training. First a report says which layer
# hurts and why. Then methods are compared that choose codes by what the layer computes, not by the
# nearest level. Last, the bits are dealt out so that the same bytes lose less.
#
# Every section ends with an assertion of what its text claims.

# %%
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import quantjax as qj
from quantjax import ptq

SEED = 0
plt.rcParams.update({"figure.dpi": 80, "axes.grid": True, "grid.alpha": 0.3})

# %% [markdown]
# ## The network
#
# Convolutions with batch norm on the digits of scikit-learn. 400 images are held out; methods
# calibrate on 256 training images. The held-out images are looked at many times below, so read
# their accuracies as validation.

# %%
digits = load_digits()
order = np.random.default_rng(SEED).permutation(len(digits.target))
images = jnp.asarray(digits.images[order, ..., None] / 8 - 1, jnp.float32)
labels = jnp.asarray(digits.target[order], jnp.int32)
train_x, train_y, held_x, held_y = images[:-400], labels[:-400], images[-400:], labels[-400:]
batches = [train_x[i : i + 64] for i in range(0, 256, 64)]


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        for channels in (16, 32, 32):
            x = nn.Conv(channels, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(not train, momentum=0.9)(x))
        x = nn.relu(nn.Dense(64)(x.mean((1, 2))))
        return nn.Dense(10)(x)


model = CNN()
variables = model.init(jax.random.key(SEED), train_x[:1])
optimizer = optax.adam(3e-3)


@jax.jit
def step(variables, state, x, y):
    def loss(params):
        tree = {**variables, "params": params}
        logits, new = model.apply(tree, x, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new

    grads, new = jax.grad(loss, has_aux=True)(variables["params"])
    updates, state = optimizer.update(grads, state)
    return {"params": optax.apply_updates(variables["params"], updates), **new}, state


state = optimizer.init(variables["params"])
for key in jax.random.split(jax.random.key(SEED + 1), 12):
    for rows in jax.random.permutation(key, 1344).reshape(-1, 64):
        variables, state = step(variables, state, train_x[rows], train_y[rows])


@partial(jax.jit, static_argnums=0)
def logits_of(apply, tree, x):
    return apply(tree, x)


def accuracy(tree):
    logits = logits_of(qj.intercept(model.apply), tree, held_x)
    return float((logits.argmax(-1) == held_y).mean())


def divergence(tree):
    """KL(float || quantized) on the held-out images: what is left when accuracies are equal."""
    p = jax.nn.log_softmax(logits_of(model.apply, variables, held_x))
    q = jax.nn.log_softmax(logits_of(qj.intercept(model.apply), tree, held_x))
    return float((jnp.exp(p) * (p - q)).sum(-1).mean())


float_accuracy = accuracy(variables)
print(f"float: {float_accuracy:.3f}")
assert float_accuracy > 0.95

# %% [markdown]
# ## Which layer hurts, and why?
#
# One backward pass a batch (the Fisher matrix) predicts what each layer would cost in each format,
# beside what rounding does to its weights and to its products.

# %%
report = qj.sensitivity(model.apply, variables, batches, ["w2", "w3", "w4", "w8"])
print(report)

# %%
worst = report.ranking("w3")[0]
print(worst.name, "-", "; ".join(report.why(worst, "w3")))
assert worst.cell("w3").loss > 5 * report.ranking("w3")[-1].cell("w3").loss

# %% [markdown]
# ## Which method?
#
# Three bits everywhere. Rounding to nearest under the widest range; under the range of least squared
# error; GPTQ, which lets later weights undo the errors of earlier ones; AdaRound, which rounds up
# or down for the layer's output; and reconstruction, which does so through whole blocks.

# %%
policy = qj.Policy([("**/kernel", "w3")])
widest = qj.Policy([("**/kernel", qj.QuantSpec(format=qj.IntFormat(3)))])
trees = {
    "nearest, absmax": qj.quantize(variables, widest),
    "nearest, mse": qj.quantize(variables, policy),
}
methods = {
    "gptq": ptq.gptq(policy),
    "adaround": ptq.adaround(policy),
    "brecq": ptq.brecq(policy, blocks=("*",), steps=150),
}
trees |= {
    name: qj.calibrate(model.apply, variables, batches, method) for name, method in methods.items()
}
for name, tree in trees.items():
    print(f"{name:16} accuracy {accuracy(tree):.3f}  KL {divergence(tree):.4f}")

assert divergence(trees["gptq"]) < divergence(trees["nearest, mse"])
assert min(map(divergence, trees.values())) < 0.5 * divergence(trees["nearest, absmax"])

# %% [markdown]
# ## Dealing out the bits
#
# The same bytes, but layers that hurt get more bits. The allocation is exact for the predicted
# losses; it returns an ordinary policy, which any method takes.

# %%
uniform = trees["gptq"]
budget = sum(leaf.nbytes for leaf in jax.tree.leaves(uniform))  # of the whole tree
found = qj.allocate_bits(report, budget)
print(found.formats, f"predicted loss {found.loss:.4f}")
mixed = qj.calibrate(model.apply, variables, batches, ptq.gptq(found.policy))
print(qj.summary(mixed, reference=variables))
print(f"uniform {divergence(uniform):.4f}, allocated {divergence(mixed):.4f} at {budget:,} bytes")
assert divergence(mixed) < divergence(uniform)

# %% [markdown]
# ## All together

# %%
shown = {name: divergence(tree) for name, tree in trees.items()}
shown["gptq, allocated"] = divergence(mixed)
plt.figure(figsize=(6, 3))
plt.barh(list(shown), list(shown.values()))
plt.xscale("log")
plt.gca().invert_yaxis()
plt.xlabel("KL to the float network, nats")
plt.title("Three bits a weight")
plt.tight_layout()
