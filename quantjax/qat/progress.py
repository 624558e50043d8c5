"""What changes as training goes on? Values that a step passes, so that nothing compiles again."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from quantjax.fake_quantized import FakeQuantized, is_quantized


def at(tree: Any, progress: Float[Array, ""] | float) -> Any:
    """The tree at this point of the training, 0 at the start and 1 at the end, for estimators whose
    gradient or rounding changes with it (`ir_net`). To be called in the loss or the step, with a
    traced number: `at(tree, step / steps)`. Others do not look at it. For what changes at a step,
    and not little by little, see `stages`.

    >>> from quantjax import qat
    >>> tree = qat.prepare({"kernel": jnp.ones((2, 2))}, "binary", estimator=qat.ir_net())
    >>> float(at(tree, 0.5)["kernel"].progress)
    0.5
    """

    def one(x: Any) -> Any:
        if not isinstance(x, FakeQuantized):
            return x
        now = jnp.broadcast_to(jnp.clip(jnp.asarray(progress, jnp.float32), 0, 1), x.layers)
        return dataclasses.replace(x, progress=jax.lax.stop_gradient(now))

    return jax.tree.map(one, tree, is_leaf=is_quantized)
