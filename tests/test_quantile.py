"""Is the quantile NumPy's, for any numbers, blocks and gaps?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantjax.quantile import quantile
from tests.daily import daily

FLOATS = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


LISTS = st.sampled_from([1, 2, 9]).flatmap(lambda n: st.lists(FLOATS, min_size=n, max_size=n))
FIND = jax.jit(quantile, static_argnums=(1, 2))


@given(LISTS, st.sampled_from([0.0, 0.3, 1.0]))
def test_any_numbers(values, q):
    """float32 rounds two products and a sum: 3 of 2^-24 of the larger neighbour, which may be far
    above the result where signs differ."""
    x = np.array(values, np.float32)
    got = float(FIND(jnp.asarray(x), q, (0,)))
    expected = float(np.quantile(x.astype(np.float64), q))
    assert abs(got - expected) <= 4 * 2.0**-24 * np.abs(x).max()


@pytest.mark.parametrize("q", daily([0.0, 0.5, 0.9, 0.999, 1.0], [0.5, 0.999]))
def test_blocks_and_places_left_out(q):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 40, 7, 5)).astype(np.float32)
    got = quantile(jnp.asarray(x), q, (1, 3))
    np.testing.assert_allclose(got, np.quantile(x, q, axis=(1, 3)), rtol=1e-5, atol=1e-6)
    valid = rng.random(x.shape) < 0.7
    valid[:, 0] = True
    got = quantile(jnp.asarray(x), q, (1, 3), jnp.asarray(valid))
    expected = np.nanquantile(np.where(valid, x, np.nan), q, axis=(1, 3))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_equal_values_zeros_of_both_signs_and_jit():
    x = jnp.array([0.0, -0.0, 0.0, 2.0, 2.0, 2.0])
    assert float(quantile(x, 0.5, (0,))) == 1.0
    for q in (0.1, 0.4, 0.6, 0.99):
        assert jax.jit(lambda x, q=q: quantile(x, q, (0,)))(x) == quantile(x, q, (0,))
