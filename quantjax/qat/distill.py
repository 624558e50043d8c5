"""How does a small network learn more than its labels say? From what a larger one answers.
Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531;
Romero et al., "FitNets", 2014, arXiv:1412.6550; Zagoruyko and Komodakis, "Paying More Attention to
Attention", 2016, arXiv:1612.03928."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer


def distill_loss(
    student_logits: Float[Array, "*batch classes"],
    teacher_logits: Float[Array, "*batch teacher_classes"],
    labels: Integer[Array, "*rows"] | None = None,
    temperature: float | jax.Array = 4.0,
    alpha: float | jax.Array = 0.9,
) -> Float[Array, ""]:
    """alpha T^2 KL(softmax(z_t / T) || softmax(z_s / T)) + (1 - alpha) CE(softmax(z_s), labels).

    The mean over the batch, in float32; without labels the first term alone, not times alpha. T^2
    keeps the size of its gradient from falling with T. No gradient reaches the teacher. temperature
    and alpha may be traced. Raises ValueError for logits of different shapes, labels that are not
    one a row, and a temperature or alpha out of range. Source: Hinton et al. 2015, section 2.

    A network of few bits learns from its own float weights, which cost no other training:

    >>> from quantjax import intercept, qat
    >>> apply = lambda p, x: x @ p["kernel"]
    >>> teacher = {"kernel": jnp.array([[2.0, -1.0], [0.3, 0.9]])}
    >>> x = jnp.array([[1.0, 0.5], [-0.2, 1.0]])
    >>> def loss(params):
    ...     logits = intercept(apply)(qat.prepare(params, "w2"), x)
    ...     return distill_loss(logits, apply(teacher, x), temperature=2.0)
    >>> float(loss(teacher)) > 0 == float(distill_loss(apply(teacher, x), apply(teacher, x)))
    True
    >>> jax.grad(loss)(teacher)["kernel"].shape
    (2, 2)
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"distill_loss: student and teacher must have the same classes and rows: student "
            f"{student_logits.shape}, teacher {teacher_logits.shape}."
        )
    if labels is not None and labels.shape != student_logits.shape[:-1]:
        raise ValueError(
            f"distill_loss: expected a label for each row of {student_logits.shape}, got shape "
            f"{labels.shape}."
        )
    if isinstance(temperature, int | float) and not 0 < temperature < float("inf"):
        raise ValueError(f"distill_loss: temperature must be positive, got {temperature}.")
    if isinstance(alpha, int | float) and not 0 <= alpha <= 1:
        raise ValueError(f"distill_loss: alpha must lie in [0, 1], got {alpha}.")
    student = student_logits.astype(jnp.float32)
    teacher = jax.lax.stop_gradient(teacher_logits.astype(jnp.float32))
    log_s = jax.nn.log_softmax(student / temperature)
    log_t = jax.nn.log_softmax(teacher / temperature)
    # A class that the teacher rules out (-inf) counts nothing: 0 log 0 = 0.
    gap = jnp.where(jnp.isneginf(log_t), 0.0, log_t - log_s)
    soft = temperature**2 * jnp.mean(jnp.sum(jnp.exp(log_t) * gap, -1))
    if labels is None:
        return soft
    picked = jnp.take_along_axis(jax.nn.log_softmax(student), labels[..., None], -1)
    return alpha * soft - (1 - alpha) * jnp.mean(picked)


def hint_loss(
    student: Float[Array, "*features"], teacher: Float[Array, "*teacher_features"]
) -> Float[Array, ""]:
    """Half the mean squared difference of two layers' features: 1/2 mean (r(s) - t)^2.

    r, the regressor that takes a thinner student's features to the teacher's width, is the
    caller's: a matrix or a 1x1 convolution that trains with the student and is dropped afterwards.
    No gradient reaches the teacher. Raises ValueError, with both shapes, where they differ.
    Source: Romero et al. 2014, equation 3, as a mean.

    >>> r = jnp.ones((2, 3))  # of the student's 2 features the teacher's 3
    >>> float(hint_loss(jnp.ones((5, 2)) @ r, jnp.ones((5, 3))))
    0.5
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"hint_loss: student features {student.shape}, teacher's {teacher.shape}: put a "
            f"regressor between, as in hint_loss(student @ r, teacher)."
        )
    gap = student.astype(jnp.float32) - jax.lax.stop_gradient(teacher.astype(jnp.float32))
    return jnp.mean(gap**2) / 2


def attention_transfer(
    student: Float[Array, "batch *space"], teacher: Float[Array, "batch *teacher_space"]
) -> Float[Array, ""]:
    """How far apart are the places that two layers look at? |Q_s / |Q_s| - Q_t / |Q_t||^2.

    Q is the sum over channels, the last axis, of squared activations: one number for each place of
    an example. The mean over examples; the square of equation 2's norm, as that has no gradient
    where the maps agree. Channels may differ, places not. A map of zeros stays zeros. No gradient
    reaches the teacher. Raises ValueError, with both shapes, where examples or places differ.
    Source: Zagoruyko and Komodakis 2016, section 3.1.

    >>> a = jnp.ones((1, 2, 2, 8)).at[0, 0, 0].set(3.0)
    >>> float(attention_transfer(a[..., :3], a)) < 1e-12  # of fewer channels, but the same places
    True
    """
    if student.ndim < 2 or student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"attention_transfer: expected (examples, places, channels) of the same examples and "
            f"places, got student {student.shape}, teacher {teacher.shape}."
        )
    gap = _map(student) - jax.lax.stop_gradient(_map(teacher))
    return jnp.mean(jnp.sum(gap**2, -1))


def _map(x: Float[Array, "batch *space"]) -> Float[Array, "batch places"]:
    """Where an example's activations are large, of length one."""
    q = jnp.sum(jnp.square(x.astype(jnp.float32)), -1).reshape(x.shape[0], -1)
    square = jnp.sum(q**2, -1, keepdims=True)
    return q * jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1)), 0)
