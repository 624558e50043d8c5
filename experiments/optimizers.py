"""How do weights move, and what an estimator learns? The latter by shares of its own size.

Steps and bounds differ by orders of magnitude between layers and formats, so that one rate in
absolute terms is too large for some and too small for others. Adafactor does the same to weights:
Shazeer and Stern, 2018, arXiv:1804.04235, section 8."""

import functools

import jax
import optax


def relative_adam(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Adam whose step is `rate` times the root mean square of the array it moves, at least 1e-3."""
    return optax.chain(
        optax.scale_by_adam(),
        optax.scale_by_param_block_rms(1e-3),
        optax.scale_by_learning_rate(rate),
    )


def fine_tuning(
    rate: float, steps: int
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Of weights, Adam on a cosine down to zero; and of what is learned, the same by shares of its
    size."""
    schedule = optax.cosine_decay_schedule(rate, steps)
    return optax.adam(schedule), relative_adam(schedule)


def momentum(
    rate: float, steps: int, *, learned: float = 1e-3, decay: float = 1e-4
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Of weights, Nesterov's momentum of 0.9 on a cosine down to zero, kernels alone decaying; and
    of what is learned, Adam by shares of its size, on the same cosine from `learned`."""
    kernels = functools.partial(jax.tree.map, lambda x: x.ndim > 1)
    descent = optax.sgd(optax.cosine_decay_schedule(rate, steps), momentum=0.9, nesterov=True)
    weights = optax.chain(optax.add_decayed_weights(decay, mask=kernels), descent)
    return weights, relative_adam(optax.cosine_decay_schedule(learned, steps))
