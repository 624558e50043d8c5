"""Is the loss that of the papers, and is a stored teacher the one that is asked for?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.special import log_softmax, softmax

import quantjax as qj
from quantjax.qat import distill
from quantjax.qat.teacher import load_logits, store_logits


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("temperature, alpha", [(1.0, 0.0), (4.0, 0.9), (0.5, 1.0)])
def test_the_loss_is_hintons(temperature, alpha):
    """By SciPy in float64. The sum of 5 terms of size 1: a few roundings of float32, times T^2."""
    s, t, y = 3 * normal(2, 3, 5), 3 * normal(2, 3, 5, seed=1), jnp.array([[0, 4, 2], [1, 1, 3]])
    s64, t64 = np.asarray(s, np.float64), np.asarray(t, np.float64)
    p = softmax(t64 / temperature, -1)
    soft = temperature**2 * np.mean(
        np.sum(p * (np.log(p) - log_softmax(s64 / temperature, -1)), -1)
    )
    hard = -np.mean(np.take_along_axis(log_softmax(s64, -1), np.asarray(y)[..., None], -1))
    got = distill.distill_loss(s, t, y, temperature, alpha)
    np.testing.assert_allclose(got, alpha * soft + (1 - alpha) * hard, rtol=1e-5)
    np.testing.assert_allclose(distill.distill_loss(s, t, None, temperature), soft, rtol=1e-5)
    jitted = jax.jit(distill.distill_loss)(s, t, y, temperature, alpha)
    np.testing.assert_allclose(jitted, got, rtol=1e-6)


def test_gradients_reach_the_student_alone_and_keep_their_size():
    """T (q - p), equation 2 times T^2, and (z_s - z_t) / N at a high temperature, equation 4."""
    s, t = normal(1, 6), normal(1, 6, seed=1)
    q, p = (softmax(np.asarray(z, np.float64) / 3, -1) for z in (s, t))
    gradient = jax.grad(lambda s: distill.distill_loss(s, t, None, 3.0))(s)
    np.testing.assert_allclose(gradient, 3 * (q - p), atol=3e-6)  # roundings of numbers below 3
    assert not jax.grad(lambda t: distill.distill_loss(s, t))(t).any()
    gradient = jax.grad(lambda s: distill.distill_loss(s, t, None, 1000.0))(s)
    centered = [x - x.mean() for x in (s, t)]
    np.testing.assert_allclose(gradient, (centered[0] - centered[1]) / 6, rtol=1e-2, atol=2e-3)


def test_a_class_that_the_teacher_rules_out_counts_nothing():
    t = jnp.array([[0.0, 1.0, -jnp.inf]])
    loss, gradient = jax.value_and_grad(lambda s: distill.distill_loss(s, t))(jnp.zeros((1, 3)))
    assert np.isfinite(loss) and np.isfinite(gradient).all()


def test_feature_losses_are_those_of_the_papers():
    s, t = normal(3, 4, 5, 2), normal(3, 4, 5, 7, seed=1)
    maps = [np.square(np.asarray(x, np.float64)).sum(-1).reshape(3, -1) for x in (s, t)]
    unit = [q / np.linalg.norm(q, axis=1, keepdims=True) for q in maps]
    want = np.mean(np.sum((unit[0] - unit[1]) ** 2, 1))
    np.testing.assert_allclose(distill.attention_transfer(s, t), want, rtol=1e-5)
    r = normal(2, 7, seed=2)
    want = np.mean((np.asarray(s @ r, np.float64) - t) ** 2) / 2
    np.testing.assert_allclose(distill.hint_loss(s @ r, t), want, rtol=1e-5)
    for loss in (distill.attention_transfer, lambda a, b: distill.hint_loss(a @ r, b)):
        check_grads(lambda s, loss=loss: loss(jnp.asarray(s), t), (s,), 1, ["rev"], rtol=1e-2)
        assert not jax.grad(lambda t, loss=loss: loss(s, t))(t).any()
    zeros = jnp.zeros_like(s)
    assert np.isfinite(jax.grad(distill.attention_transfer)(zeros, t)).all()


TEACHER = {"w": 3 * normal(4, 9), "b": normal(9, seed=1)}
DATA = [(normal(5, 4, seed=i), jnp.float32(i)) for i in (2, 3)] + [(normal(2, 4), jnp.float32(1))]


def network(p, x, shift):
    return x @ p["w"] + p["b"] + shift


def test_stored_logits_are_the_teachers(tmp_path):
    """float16 keeps 11 bits of z - max z; probabilities of some units in the last place."""
    store_logits(tmp_path / "a", network, TEACHER, DATA)
    store_logits(tmp_path / "b", network, TEACHER, DATA)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    logits = load_logits(tmp_path / "a", TEACHER, DATA)
    assert len(logits) == 3 and logits.classes == 9
    for i, batch in enumerate(DATA):
        z = network(TEACHER, *batch)
        z = z - z.max(-1, keepdims=True)
        np.testing.assert_allclose(logits[i], z, rtol=2**-11, atol=1e-7)


def test_the_largest_classes_keep_their_probability_and_the_rest_its_sum(tmp_path):
    store_logits(tmp_path / "top", network, TEACHER, DATA, top=3)
    logits = load_logits(tmp_path / "top", TEACHER, DATA)
    for i, batch in enumerate(DATA):
        p = np.asarray(jax.nn.softmax(network(TEACHER, *batch)))
        got = np.asarray(jax.nn.softmax(logits[i]))
        order = np.argsort(-p, -1)
        want = p.copy()
        rest = np.take_along_axis(p, order[:, 3:], -1).sum(-1, keepdims=True) / 6
        np.put_along_axis(want, order[:, 3:], np.broadcast_to(rest, (len(p), 6)), -1)
        # Log-probabilities down to -16 have steps of 2^-7 at most there: 1 % of those.
        np.testing.assert_allclose(got, want, rtol=0.01)


def test_logits_of_another_network_or_data_raise(tmp_path):
    path = tmp_path / "teacher"
    store_logits(path, network, TEACHER, iter(DATA))
    other = TEACHER | {"b": TEACHER["b"].at[0].add(1e-6)}
    with pytest.raises(ValueError, match="of another network: its parameters differ"):
        load_logits(path, other, DATA)
    with pytest.raises(ValueError, match=r"of other data: batches \[0, 1\] differ"):
        load_logits(path, TEACHER, [DATA[1], DATA[0], DATA[2]])
    with pytest.raises(ValueError, match="holds logits of 3 batches, got 2"):
        load_logits(path, TEACHER, DATA[:2])
    qj.save(tmp_path / "else", {"w": jnp.ones(2)})
    with pytest.raises(ValueError, match="holds no teacher's logits"):
        load_logits(tmp_path / "else", TEACHER, DATA)


BAD = {
    "classes": (lambda: distill.distill_loss(normal(2, 5), normal(2, 6)),
                r"student \(2, 5\), teacher \(2, 6\)"),
    "labels": (lambda: distill.distill_loss(normal(2, 5), normal(2, 5), jnp.zeros(3, int)),
               r"a label for each row of \(2, 5\), got shape \(3,\)"),
    "temperature": (lambda: distill.distill_loss(normal(2, 5), normal(2, 5), None, 0.0),
                    "temperature must be positive, got 0.0"),
    "alpha": (lambda: distill.distill_loss(normal(2, 5), normal(2, 5), None, 1.0, 1.5), "alpha"),
    "features": (lambda: distill.hint_loss(normal(2, 5), normal(2, 6)), r"\(2, 5\).*\(2, 6\)"),
    "places": (lambda: distill.attention_transfer(normal(2, 5, 3), normal(2, 6, 3)),
               r"\(2, 5, 3\).*\(2, 6, 3\)"),
    "no batches": (lambda: store_logits("x", network, TEACHER, []), "no batches"),
    "top": (lambda: store_logits("x", network, TEACHER, DATA, top=9), "top=9"),
    "NaN": (lambda: store_logits("x", network, TEACHER, [(normal(1, 4), jnp.float32("nan"))]),
            "batch 0: the logits hold NaN"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_raises(name):
    act, message = BAD[name]
    with pytest.raises(Exception, match=message) as raised:
        act()
    assert raised.type is ValueError
