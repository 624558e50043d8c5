"""Do the tree functions treat every leaf as the policy says, and nothing else?"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax import affine
from quantjax.formats import IntFormat
from quantjax.spec import Granularity, QuantSpec


def normal(*shape: int, seed: int = 0, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def net():
    return {
        "conv": {"kernel": normal(3, 3, 4, 8), "bias": normal(8, seed=1)},
        "head": {"kernel": normal(8, 5, seed=2), "bias": normal(5, seed=3)},
        "step": jnp.int32(7),
    }


def is_q(x) -> bool:
    return isinstance(x, qj.QTensor)


def quantized(tree) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_q)
    return [jax.tree_util.keystr(k, simple=True, separator="/") for k, v in leaves if is_q(v)]


def test_the_same_tree_with_quantized_leaves():
    p = net()
    q = qj.quantize(p, "w8")
    assert quantized(q) == ["conv/kernel", "head/kernel"]
    assert jax.tree.structure(jax.tree.map(lambda _: 0, q, is_leaf=is_q)) == jax.tree.structure(p)
    for path in [("conv", "bias"), ("head", "bias")]:  # no copies of what is left alone
        assert q[path[0]][path[1]] is p[path[0]][path[1]]
    assert q["step"] is p["step"]
    d = qj.dequantize(q)
    assert d["conv"]["bias"] is p["conv"]["bias"]
    for a, b in zip(jax.tree.leaves(d), jax.tree.leaves(p), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
    f = qj.fake_quantize(p, "w8")
    jax.tree.map(np.testing.assert_array_equal, f, d)
    assert f["step"] is p["step"]


def test_an_explicit_policy_a_resolved_one_and_a_name_are_one():
    p = net()
    by_name = qj.quantize(p, "w4g8")
    for policy in (qj.preset("w4g8"), qj.preset("w4g8").resolve(p), qj.Policy(otherwise="w4g8")):
        jax.tree.map(np.testing.assert_array_equal, qj.quantize(p, policy), by_name)


def test_under_jit_grad_and_eval_shape():
    p = net()
    policy = qj.Policy([("conv/kernel", "w4")], otherwise="w8")
    q = qj.quantize(p, policy)
    jitted = jax.jit(functools.partial(qj.quantize, policy=policy))(p)
    assert quantized(jitted) == quantized(q)
    jax.tree.map(np.testing.assert_array_equal, jitted["head"], q["head"])  # absmax
    shapes = jax.eval_shape(functools.partial(qj.quantize, policy=policy), p)
    assert shapes["conv"]["kernel"].shape == (3, 3, 4, 8)
    assert shapes["conv"]["kernel"].nbytes == q["conv"]["kernel"].nbytes
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), p)
    again = jax.eval_shape(functools.partial(qj.quantize, policy=policy), abstract)
    assert jax.tree.structure(again) == jax.tree.structure(q)
    back = jax.eval_shape(qj.dequantize, again)
    assert jax.tree.map(lambda x: x.shape, back) == jax.tree.map(lambda x: x.shape, p)


def test_one_scale_each():
    """Where scales lie: per channel, group, tensor, row of an embedding, layer, rank 1."""
    for name, leaf, fields, shape in [
        ("kernel", normal(8, 6), {}, (1, 6)),
        ("weight", normal(8, 6), {}, (8, 1)),
        ("embedding", normal(8, 6), {}, (8, 1)),
        ("kernel", normal(8, 6), dict(group=4), (2, 6)),
        ("kernel", normal(9, 6), dict(group=4), (3, 6)),  # a short last block
        ("kernel", normal(8, 6), dict(block=(4, 4)), (2, 2)),
        ("kernel", normal(8, 6), dict(block=Granularity.TENSOR), (1, 1)),
        ("kernel", normal(3, 8, 6), dict(stacked=1), (3, 1, 6)),
        ("kernel", normal(3, 8, 6), dict(stacked=1, block=Granularity.TENSOR), (3, 1, 1)),
        ("kernel", normal(2, 3, 8, 6), dict(stacked=2, group=4), (2, 3, 2, 6)),
        ("bias", normal(6), {}, (1,)),
    ]:
        policy = qj.Policy([(name, QuantSpec(format=IntFormat(8), **fields))])
        q = qj.quantize({name: leaf}, policy)[name]
        assert q.scale.shape == shape and q.scale.dtype == jnp.float32
        assert q.shape == leaf.shape


def test_stacked_layers_are_quantized_alone():
    x = normal(3, 8, 6)
    for spec in [
        QuantSpec(format=IntFormat(4), observer=qj.mse(steps=20)),
        QuantSpec(format=qj.Codebook.learned(2)),
    ]:
        layers = dataclasses.replace(spec, stacked=1)
        stacked = qj.quantize({"kernel": x}, qj.Policy([("kernel", layers)]))["kernel"]
        for i in range(3):
            layer = jax.tree.map(lambda a: a[i], stacked)  # noqa: B023
            own = qj.quantize({"kernel": x[i]}, qj.Policy([("kernel", spec)]))["kernel"]
            # Two compiled searches may sum in another order: 2^-20 of the scale.
            a, b = affine.dequantize_array(layer), affine.dequantize_array(own)
            np.testing.assert_allclose(a, b, rtol=2.0**-20)


# Keys.

STOCHASTIC = QuantSpec(format=IntFormat(4), rounding=qj.Rounding.STOCHASTIC)


def test_noise_depends_on_the_path_and_the_key_alone(key):
    x = normal(16, 8)
    policy = qj.Policy([("**", STOCHASTIC)])
    both = qj.fake_quantize({"a": {"kernel": x}, "b": {"kernel": x}}, policy, key=key)
    a, b = both["a"]["kernel"], both["b"]["kernel"]
    assert bool((a != b).any())
    alone = qj.fake_quantize({"a": {"kernel": x}}, policy, key=key)
    np.testing.assert_array_equal(alone["a"]["kernel"], a)
    other = qj.fake_quantize({"a": {"kernel": x}}, policy, key=jax.random.key(1))
    assert bool((other["a"]["kernel"] != a).any())


def test_nearest_rounding_takes_no_notice_of_a_key(key):
    p = net()
    jax.tree.map(np.testing.assert_array_equal, qj.quantize(p, "w8", key=key), qj.quantize(p, "w8"))


# Weights.


def test_weights_are_matched_by_path():
    p = {"a": {"kernel": normal(64, 4)}, "b": {"kernel": normal(64, 4, seed=1)}}
    w = jnp.where(jnp.arange(64)[:, None] < 8, 100.0, 0.01)  # broadcasts over columns
    plain, weighted = qj.quantize(p, "w2"), qj.quantize(p, "w2", weights={"a": {"kernel": w}})
    jax.tree.map(np.testing.assert_array_equal, weighted["b"], plain["b"])

    def error(q):
        return float(
            jnp.sum(w * (affine.dequantize_array(q["a"]["kernel"]) - p["a"]["kernel"]) ** 2)
        )

    assert error(weighted) < error(plain)
    none = qj.quantize(p, "w2", weights={"a": {"kernel": None}, "b": {"kernel": None}})
    jax.tree.map(np.testing.assert_array_equal, none, plain)
    faked = qj.fake_quantize(p, "w2", weights={"a": {"kernel": w}})
    jax.tree.map(np.testing.assert_array_equal, faked, qj.dequantize(weighted))
    with pytest.raises(ValueError, match="not there.*'c/kernel'"):
        qj.quantize(p, "w2", weights={"c": {"kernel": w}})


# like=.


def test_like_keeps_formats_and_scales_of_another_tree():
    p = net()
    q = qj.quantize(p, qj.Policy([("conv/kernel", "nvfp4")], otherwise="w4"))
    moved = jax.tree.map(lambda x: x * 0.9 if x.ndim else x, p)
    r = qj.quantize(moved, like=q)
    np.testing.assert_array_equal(r["head"]["kernel"].scale, q["head"]["kernel"].scale)
    assert bool((r["head"]["kernel"].qvalue != q["head"]["kernel"].qvalue).any())
    assert jax.tree.structure(r) == jax.tree.structure(q)
    assert r["conv"]["bias"] is moved["conv"]["bias"]
    with pytest.raises(ValueError, match="paths of params"):
        qj.quantize({"conv": p["conv"]}, like=q)
    wrong = {**p, "head": {**p["head"], "kernel": normal(8, 6)}}
    with pytest.raises(ValueError, match=r"head/kernel: like= expects a float array of shape"):
        qj.quantize(wrong, like=q)


def test_a_policy_or_like_and_not_both():
    p = net()
    for arguments in [dict(), dict(policy="w8", like=qj.quantize(p, "w8"))]:
        with pytest.raises(ValueError, match="either a policy or like="):
            qj.quantize(p, **arguments)


def test_fake_quantize_refuses_activations():
    with pytest.raises(ValueError, match="conv/kernel: the policy also quantizes activations"):
        qj.fake_quantize(net(), "w8a8")
    assert qj.quantize(net(), "w8a8")["conv"]["kernel"].act is not None


def test_the_second_call_does_not_compile_again():
    p = net()
    qj.dequantize(qj.quantize(p, "w4"))
    counts = []

    def listen(name: str, *args, **kwargs) -> None:
        if "compile" in name:
            counts.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        qj.dequantize(qj.quantize(jax.tree.map(lambda x: x, p), "w4"))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert counts == []


def test_dequantize_leaves_floats_alone():
    p = net()
    d = qj.dequantize(p)
    assert all(a is b for a, b in zip(jax.tree.leaves(d), jax.tree.leaves(p), strict=True))


def test_a_tree_of_placeholders_prints():
    q = qj.quantize(net(), "w4")
    axes = jax.tree.map(lambda _: 0, q)  # as for vmap
    assert "QTensor(int4, shape=?" in repr(axes)
    assert "shape=(8, 5)" in repr(q["head"]["kernel"])
