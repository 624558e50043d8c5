"""Does bad or odd input raise, naming the leaf, or come through unharmed?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax.formats import IntFormat
from quantjax.spec import QuantSpec

FUNCTIONS = [qj.quantize, qj.fake_quantize]
each_function = pytest.mark.parametrize("function", FUNCTIONS)


def tree(x) -> dict:
    return {"dense": {"kernel": x}}


@each_function
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["w8", "w2", "mxfp8"])
def test_values_that_no_scale_covers_name_the_leaf(function, value, name):
    params = {"fine": {"kernel": jnp.ones((4, 2))}} | tree(jnp.ones((4, 2)).at[1, 1].set(value))
    with pytest.raises(ValueError, match="^dense/kernel: holds NaN or infinity"):
        function(params, name)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_under_jit_their_blocks_get_a_nan_scale(value):
    x = jnp.ones((4, 2)).at[1, 1].set(value)
    q = jax.jit(lambda p: qj.quantize(p, "w8"))(tree(x))["dense"]["kernel"]
    assert np.isnan(np.asarray(q.scale)).tolist() == [[False, True]]
    np.testing.assert_allclose(qj.dequantize(q)[:, 0], 1, rtol=1e-6)
    assert np.isnan(np.asarray(qj.dequantize(q))[:, 1]).all()


@pytest.mark.parametrize("name", ["w8", "w4", "w3g4", "fp8", "nf4", "ternary"])
def test_a_block_of_zeros_has_scale_one_and_stays_zero(name):
    x = jnp.zeros((8, 2)).at[:, 1].set(jnp.arange(8.0))
    q = qj.quantize(tree(x), name)["dense"]["kernel"]
    np.testing.assert_array_equal(np.asarray(q.scale)[:, 0], 1)
    np.testing.assert_array_equal(np.asarray(qj.dequantize(q))[:, 0], 0)


@pytest.mark.parametrize("name", ["w8", "w4", "fp8", "mxfp4", "nvfp4", "nf4", "binary"])
def test_one_element(name):
    x = tree(jnp.full((1, 1), 2.0))
    q = qj.quantize(x, name)
    y = qj.dequantize(q)["dense"]["kernel"]
    assert q["dense"]["kernel"].shape == y.shape == (1, 1)
    # It is the largest of its block; the stored scales of nvfp4 have three bits.
    np.testing.assert_allclose(y, 2.0, rtol=0.07)


@each_function
@pytest.mark.parametrize(
    "leaf",
    [
        jnp.zeros((0, 4)),
        jnp.float32(3.0),
        np.float32(3.0),
        2.5,
        "text",
        jnp.arange(6).reshape(2, 3),
        jnp.ones((2, 3), bool),
        jnp.ones((2, 3), jnp.float8_e4m3fn),
    ],
    ids=["empty", "scalar", "numpy scalar", "float", "text", "integers", "booleans", "float8"],
)
def test_what_can_not_be_quantized_passes_through(function, leaf):
    params = tree(leaf)
    assert function(params, "w8")["dense"]["kernel"] is leaf
    assert function(params, qj.Policy([("**", "w8")]))["dense"]["kernel"] is leaf
    assert qj.dequantize(params)["dense"]["kernel"] is leaf


def test_an_empty_tree_is_kept():
    assert qj.quantize({}, "w8") == {}
    assert qj.quantize({"a": None}, "w8") == {"a": None}


@each_function
def test_a_block_of_another_rank_names_the_leaf(function):
    policy = qj.Policy([("**", QuantSpec(format=IntFormat(8), block=(2, 2, 2)))])
    with pytest.raises(ValueError, match=r"dense/kernel: block \(2, 2, 2\) .* rank 3 != 2"):
        function(tree(jnp.ones((4, 4))), policy)


@pytest.mark.parametrize("name", ["w4g5", "w4g64", "mxfp4"])
def test_a_group_that_does_not_divide_has_a_short_last_block(name):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(67, 3)), jnp.float32)
    q = qj.quantize(tree(x), name)["dense"]["kernel"]
    (group, _), last = q.block, 67 - 67 % q.block[0]
    assert q.scale.shape == (-(-67 // group), 3)
    alone = qj.quantize(tree(x[last:]), name)  # the short block, as if it stood alone
    # A search over ranges sums the errors of each block in an order that follows the shape.
    alone = qj.dequantize(alone)["dense"]["kernel"]
    np.testing.assert_allclose(qj.dequantize(q)[last:], alone, rtol=1e-6)


@pytest.mark.parametrize("bits", [0, 9, -1, 2.5])
def test_bits_beyond_the_range_are_refused(bits):
    # Checked by the type where annotations are enforced, by the value elsewhere.
    with pytest.raises(ValueError, match=r"bits"):
        IntFormat(bits)


def test_float64_is_computed_and_returned_as_float32():
    x = np.random.default_rng(0).normal(size=(8, 4))
    policy = qj.preset("w8")
    assert "float64" in policy.resolve(tree(x))["dense/kernel"].reason
    q = qj.quantize(tree(x), policy)
    assert q["dense"]["kernel"].dtype == np.float32
    single = qj.quantize(tree(x.astype(np.float32)), policy)
    np.testing.assert_array_equal(q["dense"]["kernel"].qvalue, single["dense"]["kernel"].qvalue)


def test_an_array_that_is_there_twice_is_quantized_twice():
    x = jnp.arange(8.0).reshape(4, 2)
    q = qj.quantize({"a": {"kernel": x}, "b": {"kernel": x}}, "w8")
    np.testing.assert_array_equal(q["a"]["kernel"].qvalue, q["b"]["kernel"].qvalue)
    mixed = qj.quantize({"a": {"kernel": x}, "b": {"kernel": x}}, qj.Policy([("a/**", "w8")]))
    assert isinstance(mixed["a"]["kernel"], qj.QTensor)
    assert mixed["b"]["kernel"] is x


@each_function
def test_a_leaf_that_is_quantized_already_is_refused(function):
    q = qj.quantize(tree(jnp.ones((4, 2))), "w8")
    with pytest.raises(ValueError, match=r"dense/kernel: is quantized already \(int8\)"):
        function(q, "w4")


@each_function
def test_policy_and_like_are_one_or_the_other(function):
    params = tree(jnp.ones((4, 2)))
    q = qj.quantize(params, "w8")
    for given in ({}, {"policy": "w8", "like": q}):
        with pytest.raises(ValueError, match="either a policy or like="):
            function(params, **given)
    with pytest.raises(ValueError, match=r"like= must have the paths .*'more'"):
        function(params | {"more": jnp.ones(2)}, like=q)
    with pytest.raises(ValueError, match=r"dense/kernel: like= expects .* \(4, 2\)"):
        function(tree(jnp.ones((2, 4))), like=q)


def test_fake_quantize_has_no_activations():
    with pytest.raises(ValueError, match="dense/kernel: the policy also quantizes activations"):
        qj.fake_quantize(tree(jnp.ones((4, 2))), "w8a8")


def test_weights_for_unknown_parameters_are_refused():
    with pytest.raises(ValueError, match=r"weights= names parameters .*'other'"):
        qj.quantize(tree(jnp.ones((4, 2))), "w2", weights={"other": jnp.ones(2)})
