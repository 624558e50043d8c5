"""Does an unmodified model run on quantized parameters, whatever it was written with?

One table of models (`models.py`), the same questions to each."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import quantjax as qj
from quantjax.interpret import intercept, sites
from tests.daily import daily

from .models import CASES, Case


class Subject:
    """A case with its programs, so that each is compiled once for all questions."""

    def __init__(self, case: Case):
        self.case, self.traces = case, 0
        self.float_run = jax.jit(case.apply)
        self.run = jax.jit(self.intercepted)

    def intercepted(self, params: Any, x: Any) -> Any:
        self.traces += 1
        return intercept(self.case.apply)(params, x)

    @functools.cached_property
    def sites(self) -> Any:
        return sites(self.case.apply, self.case.params, self.case.x)

    @functools.cache  # noqa: B019 - a subject lives as long as the tests of its model
    def quantized(self, policy: str | qj.Policy) -> Any:
        quantize = functools.partial(qj.quantize, policy=policy, sites=self.sites)
        return jax.jit(quantize)(self.case.params)

    @functools.cache  # noqa: B019
    def dequantized(self, policy: str | qj.Policy) -> Any:
        return jax.jit(qj.dequantize)(self.quantized(policy))


# Daily is one model of each framework: a scan with a tied table, convolutions, weights that are
# (outputs, inputs), experts; and a recurrent one, but not where programs take long to compile.
FEW = ("linen decoder", "nnx CNN", "equinox MLP", "plain experts")
every_model, few_models = (
    pytest.mark.parametrize("subject", models, indirect=True, scope="module")
    for models in (daily(CASES, {*FEW, "haiku LSTM"}), daily(CASES, FEW))
)


@pytest.fixture(scope="module")
def subject(request) -> Subject:
    return Subject(CASES[request.param]())


@pytest.fixture(autouse=True)
def _asked(request, subject):
    """Skips what the model has a written reason to skip."""
    question = request.function.__name__.removeprefix("test_")
    for name, reason in subject.case.skips.items():
        if question.startswith(name):
            pytest.skip(reason)


def each(check, *trees: Any) -> None:
    jax.tree.map(check, *trees)


def equal_products(got: Any, expected: Any) -> None:
    """The same products of the same values, to the rounding of float32 sums: XLA adds in another
    order where it fuses, and a few layers amplify that."""
    scale = float(jnp.max(jnp.abs(expected)))
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5 * max(scale, 1))


@every_model
def test_identity_is_bit_exact(subject):
    """Float parameters give what the function gives."""
    case = subject.case
    each(
        np.testing.assert_array_equal,
        subject.run(case.params, case.x),
        subject.float_run(case.params, case.x),
    )


# Groups that cut what a product sums over, two codes a byte. The range is the largest magnitude,
# which compiles faster than the search of the preset "w4g4".
W4G4 = qj.Policy(otherwise=qj.QuantSpec(format=qj.IntFormat(4), group=4))


@every_model
def test_weights_alone_are_dequantize_then_apply(subject):
    weights_alone(subject, "w8")


@few_models
def test_groups_alone_are_dequantize_then_apply(subject):
    weights_alone(subject, W4G4)


def weights_alone(subject, policy):
    got = subject.run(subject.quantized(policy), subject.case.x)
    each(equal_products, got, subject.float_run(subject.dequantized(policy), subject.case.x))


@few_models
def test_activations_of_8_bits_are_close(subject):
    got = subject.run(subject.quantized("w8a8"), subject.case.x)

    def near(a, b):
        # Weights and activations each round by half of 1/127 of a maximum, some 1 % of a normal
        # row; a few layers add up.
        assert float(jnp.linalg.norm(a - b)) <= 0.05 * float(jnp.linalg.norm(b))

    each(near, got, subject.float_run(subject.case.params, subject.case.x))


@few_models
def test_nan_and_infinity_pass_through(subject):
    x = subject.case.x

    def same(a, b):
        np.testing.assert_array_equal(jnp.isnan(a), jnp.isnan(b))

    def lost_nothing(a, b):  # an activation has one scale a row, so more of it may become NaN
        assert not bool((jnp.isnan(b) & ~jnp.isnan(a)).any())

    for bad in (jnp.nan, jnp.inf):
        wrong = x.at[(0,) * x.ndim].set(bad)
        expected = subject.float_run(subject.dequantized("w8"), wrong)
        met = any(bool(jnp.isnan(y).any()) for y in jax.tree.leaves(expected))
        assert met or bad == jnp.inf  # which a sigmoid hides
        each(same, subject.run(subject.quantized("w8"), wrong), expected)
        each(lost_nothing, subject.run(subject.quantized("w8a8"), wrong), expected)


@few_models
def test_highest_precision_keeps_floats(subject):
    case = subject.case
    with jax.default_matmul_precision("highest"):
        report = intercept(case.apply).report(subject.quantized("w8a8"), case.x)
    assert report.sites and not any(site.act for site in report.sites)


@every_model
def test_a_second_call_does_not_compile(subject):
    case, q = subject.case, subject.quantized("w8")
    subject.run(q, case.x)
    traces = subject.traces
    subject.run(subject.quantized("w8"), case.x // 2 if case.x.dtype == np.int32 else case.x / 2)
    assert subject.traces == traces


@few_models
def test_vmap_and_scan_over_inputs_are_a_loop(subject):
    case, q = subject.case, subject.quantized("w8")
    xs = jnp.stack([case.x, case.x[::-1]])
    loop = [subject.run(q, x) for x in xs]

    @jax.jit
    def both(q, xs):
        _, scanned = jax.lax.scan(lambda _, x: (None, subject.intercepted(q, x)), None, xs)
        return jax.vmap(subject.intercepted, (None, 0))(q, xs), scanned

    for got in both(q, xs):
        each(lambda y, *one: equal_products(y, jnp.stack(one)), got, *loop)


@few_models
def test_gradients_of_inputs_and_float_leaves(subject):
    case, q = subject.case, subject.quantized("w8")
    leaves, structure = jax.tree.flatten(q, is_leaf=lambda a: isinstance(a, qj.QTensor))
    free = [
        i
        for i, a in enumerate(leaves)
        if not isinstance(a, qj.QTensor) and np.issubdtype(getattr(a, "dtype", bool), np.floating)
    ]

    def loss(run, tree):
        leaves = jax.tree.leaves(tree, is_leaf=lambda a: isinstance(a, qj.QTensor))

        def of(moving, x):
            filled = list(leaves)
            for i, a in zip(free, moving, strict=True):
                filled[i] = a
            y = run(jax.tree.unflatten(structure, filled), x)
            return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(y))

        return jax.jit(jax.grad(of, (0, 1) if jnp.issubdtype(case.x.dtype, jnp.floating) else 0))

    moving = [leaves[i] for i in free]
    got = loss(subject.intercepted, q)(moving, case.x)
    expected = loss(case.apply, subject.dequantized("w8"))(moving, case.x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * max(1, float(jnp.abs(b).max())))
        assert bool(jnp.isfinite(a).all())


@few_models
def test_bfloat16_stays(subject):
    case = subject.case

    def low(a):
        return a.astype(jnp.bfloat16) if a.dtype == np.float32 else a

    params = jax.tree.map(low, case.params)
    for preset in ("w8", "w8a8"):
        quantize = functools.partial(qj.quantize, policy=preset, sites=subject.sites)
        got = jax.eval_shape(intercept(case.apply), jax.eval_shape(quantize, params), low(case.x))
        assert got == jax.eval_shape(case.apply, params, low(case.x))


@few_models
def test_sharded_parameters_give_the_same(subject):
    """Codes and scales cut along their last axis, the input along its first."""
    case, q = subject.case, subject.quantized("w8")
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def put(a, axis, name):
        if not isinstance(a, jax.Array) or jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            return a
        entries = [None] * a.ndim
        if a.ndim and a.shape[axis] % mesh.shape[name] == 0:
            entries[axis] = name
        return jax.device_put(a, jax.NamedSharding(mesh, P(*entries)))

    got = subject.run(jax.tree.map(lambda a: put(a, -1, "model"), q), put(case.x, 0, "data"))
    each(equal_products, got, subject.run(q, case.x))


@every_model
def test_strictly_nothing_becomes_float_before_its_product(subject):
    q, case = subject.quantized("w8"), subject.case
    report = intercept(case.apply, strict=True).report(q, case.x)
    assert not [r for r in report.remarks if r.path]


@every_model
def test_sites_are_those_of_abstract_parameters(subject):
    case, found = subject.case, subject.sites
    assert len({s.path for s in found}) == case.used
    shapes = jax.eval_shape(lambda p: p, case.params)
    assert sites(case.apply, shapes, case.x) == found
    for s in found:
        axes = (*s.contracting, *s.batch, *s.output)
        assert sorted(axes) == list(range(len(s.param_shape)))


@every_model
def test_the_report_names_every_parameter(subject):
    case = subject.case
    report = intercept(case.apply).report(subject.quantized("w8"), case.x)
    names = [row.path for row in qj.summary(case.params).rows if row.shape is not None]
    text = str(report).replace("\n  ", " ")
    assert names and all(name in text for name in names)
