"""Is a product with a scale per group exact inside the groups?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantjax.ops import force, grouped_dot, grouped_pays
from quantjax.ops.forms import FORMS
from tests.daily import dealt

RNG = np.random.default_rng(0)


def problem(batch=(), rows=3, groups=4, group=32, columns=5, dtype=np.int8):
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max + 1
    x = RNG.integers(low, high, (*batch, rows, groups * group)).astype(dtype)
    w = RNG.integers(-128, 128, (*batch, groups * group, columns)).astype(np.int8)
    scale = RNG.uniform(0.1, 1, (*batch, groups, columns)).astype(np.float32)
    return x, w, scale


def check(got, x, w, scale):
    """G + 1 roundings of float32: of each group's scaled sum, and of the sums of groups."""
    groups = scale.shape[-2]
    parts = [
        np.einsum("...mk,...kn->...mn", a.astype(np.float64), b.astype(np.float64))
        for a, b in zip(np.split(x, groups, -1), np.split(w, groups, -2), strict=True)
    ]
    terms = [part * scale[..., i : i + 1, :].astype(np.float64) for i, part in enumerate(parts)]
    assert got.dtype == jnp.float32 and got.shape == terms[0].shape
    assert np.all(np.abs(got - sum(terms)) <= (groups + 1) * 2.0**-24 * sum(map(np.abs, terms)))


@pytest.mark.parametrize("rows, dtype, form", dealt([1, 3], [np.int8, np.uint8], FORMS))
def test_it_is_the_scaled_sum_of_exact_sums(rows, dtype, form):
    args = problem(rows=rows, dtype=dtype)
    with force(form):
        got = grouped_dot(*map(jnp.asarray, args))
        jitted = jax.jit(lambda *a: grouped_dot(*a))(*args)
    check(got, *args)
    check(jitted, *args)


def test_one_group_of_one_scale_is_exact():
    x, w, _ = problem(groups=1, group=512)
    x[:], w[:, 0] = -128, -128
    got = grouped_dot(*map(jnp.asarray, (x, w, np.ones((1, 5), np.float32))))
    np.testing.assert_array_equal(got, x.astype(np.int32) @ w.astype(np.int32))


@pytest.mark.parametrize("batch", [(2,), (2, 3)])
def test_batches_and_vmap_of_them(batch):
    args = problem(batch)
    check(grouped_dot(*map(jnp.asarray, args)), *args)
    check(jax.vmap(grouped_dot)(*map(jnp.asarray, args)), *args)


def test_vmap_over_x_alone():
    x, w, scale = map(jnp.asarray, problem(rows=6))
    got = jax.vmap(lambda x: grouped_dot(x[None], w, scale)[0])(x)
    check(got, *map(np.asarray, (x, w, scale)))


def test_groups_that_do_not_divide_the_sum_are_refused():
    x, w, scale = map(jnp.asarray, problem(groups=4, group=3))
    with pytest.raises(ValueError, match="5 groups do not divide a sum of 12 codes"):
        grouped_dot(x, w, jnp.ones((5, 5)))


def test_the_gradient_reaches_the_scales():
    x, w, scale = map(jnp.asarray, problem())
    got = jax.grad(lambda s: grouped_dot(x, w, s).sum())(scale)
    parts = [
        a @ b for a, b in zip(np.split(np.int32(x), 4, 1), np.split(np.int32(w), 4), strict=True)
    ]
    np.testing.assert_array_equal(got, np.stack([p.sum(0) for p in parts]))


def test_short_groups_pay_at_few_rows_alone():
    assert grouped_pays(512, 64) and grouped_pays(128, 32)
    assert not grouped_pays(512, 32) and not grouped_pays(1, 16)
