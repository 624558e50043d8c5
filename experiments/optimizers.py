"""How does what an estimator learns move? By shares of its own size.

Steps and bounds differ by orders of magnitude between layers and formats, so that one rate in
absolute terms is too large for some and too small for others. Adafactor does the same to weights:
Shazeer and Stern, 2018, arXiv:1804.04235, section 8."""

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
