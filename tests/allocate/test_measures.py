"""Losses are held against evaluations one by one, and against Jacobians and Hessians in full."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax.allocate import Mode, categorical, gaussian
from tests.daily import daily, dealt

from .networks import apply, divergence, inputs, mlp, scan_params, scanned

FORMATS = ["w8", "w3"]  # not in the order of their names, which is that of a dict under jit


def changed(params, path, label):
    """The tree with one kernel quantized."""
    tree = {k: dict(v) for k, v in params.items()}
    tree[path.split("/")[0]]["kernel"] = qj.fake_quantize(
        {"kernel": params[path.split("/")[0]]["kernel"]}, label
    )["kernel"]
    return tree


def fisher(params, x):
    """E[J' (diag p - p p') J] of all kernels, by path, from the Jacobian in full."""
    kernels = {p: params[p]["kernel"] for p in params}

    def outputs(k):
        return apply({p: {**params[p], "kernel": k[p]} for p in params}, x)

    jacobian = jax.jacobian(outputs)(kernels)
    p = np.asarray(jax.nn.softmax(outputs(kernels)), np.float64)
    half = np.stack([np.diag(row) - np.outer(row, row) for row in p])
    flat = np.concatenate(
        [np.asarray(jacobian[k], np.float64).reshape(*p.shape, -1) for k in params], -1
    )
    return np.einsum("nai,nab,nbj->ij", flat, half, flat) / len(p)


def changes(params, path, label):
    """dw over all kernels, one after another."""
    tree = changed(params, path, label)
    parts = [np.asarray(tree[p]["kernel"] - params[p]["kernel"], np.float64) for p in params]
    return np.concatenate([x.ravel() for x in parts])


@pytest.mark.parametrize("distribution", [categorical, gaussian])
def test_the_half_is_that_of_the_curvature(distribution):
    z, v, r = jax.random.normal(jax.random.key(0), (3, 5, 4))
    half, spread = distribution.half(z, v), distribution.spread(z, r)
    np.testing.assert_allclose(jnp.vdot(half, r), jnp.vdot(v, spread), rtol=1e-5)
    curvature = jax.vmap(jax.hessian(lambda y, x: distribution.divergence(x, y)))(z, z)
    expected = np.einsum("na,nab,nb->n", v, curvature, v)
    np.testing.assert_allclose((half**2).sum(-1), expected, rtol=1e-4)


@pytest.mark.full
def test_perturbation_is_what_an_evaluation_gives():
    params, batches = mlp(), inputs()
    report = qj.sensitivity(apply, params, batches, [*FORMATS, None], mode=Mode.PERTURBATION)
    x = jnp.concatenate(batches)
    for row in report.rows:
        for label in FORMATS:
            expected = divergence(apply(params, x), apply(changed(params, row.path, label), x))
            # The divergence is a difference of logarithms of about one, in float32.
            np.testing.assert_allclose(row.cell(label).loss, expected, rtol=1e-3, atol=2e-7)
        assert row.cell("float").loss == 0


@pytest.mark.full
def test_perturbation_takes_the_loss_it_is_given():
    params, batches = mlp(), [(x, x[:, :6]) for x in inputs()]

    def mean_square(outputs, batch):
        return jnp.mean((outputs - batch[1]) ** 2)

    report = qj.sensitivity(
        lambda p, x, y: apply(p, x), params, batches, FORMATS, mode=Mode.PERTURBATION,
        loss=mean_square, distribution=gaussian,
    )  # fmt: skip
    for row in report.rows:
        tree = changed(params, row.path, "w3")
        losses = [
            np.mean([mean_square(apply(t, x), (x, y)) for x, y in batches]) for t in (tree, params)
        ]
        np.testing.assert_allclose(row.cell("w3").loss, losses[0] - losses[1], rtol=1e-3)


@pytest.mark.full
def test_pairs_are_those_of_the_fisher_matrix():
    params, batches = mlp(), inputs(batches=2)
    matrix = fisher(params, jnp.concatenate(batches))
    report = qj.sensitivity(apply, params, batches, ["w8"], mode=Mode.PERTURBATION)
    vectors = [changes(params, item.path, item.format) for item in report.items]
    expected = np.stack(vectors) @ matrix @ np.stack(vectors).T
    # To first order in changes of about a percent; relative to the largest entry.
    np.testing.assert_allclose(report.pairs / expected.max(), expected / expected.max(), atol=0.03)


def test_fisher_predicts_by_the_fisher_matrix():
    params, x = mlp(), inputs(batches=1)
    matrix = fisher(params, x[0])
    report = qj.sensitivity(apply, params, x * 400, FORMATS, products=0)
    vectors = np.stack([changes(params, item.path, item.format) for item in report.items])
    expected = vectors @ matrix @ vectors.T
    for row in report.rows:
        for label in FORMATS:
            k = report.items.index((row.path, 0, label))
            # 400 draws have a relative deviation of sqrt(2 / 400) = 0.07; 4 of them.
            np.testing.assert_allclose(row.cell(label).loss, expected[k, k] / 2, rtol=0.28)
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    np.testing.assert_allclose(report.pairs / scale, expected / scale, atol=0.28)
    mean = np.split(np.diag(matrix), np.cumsum([p["kernel"].size for p in params.values()])[:-1])
    for row, part in zip(report.rows, mean, strict=True):
        np.testing.assert_allclose(row.gradient, part.mean(), rtol=0.2)


def test_fisher_adds_the_slope_of_the_loss():
    # Of outputs that are linear in the weights and a loss that is linear in them, all of it.
    params = {"kernel": mlp()["dense0"]["kernel"]}
    batches = inputs()
    report = qj.sensitivity(
        lambda p, x: x @ p["kernel"], params, batches, ["w3"], loss=lambda z, x: z[:, 0],
        distribution=gaussian,
    )  # fmt: skip
    x = jnp.concatenate(batches)
    change = qj.fake_quantize(params, "w3")["kernel"] - params["kernel"]
    cell = report.rows[0].cell("w3")
    np.testing.assert_allclose(cell.loss - cell.divergence, (x @ change)[:, 0].mean(), rtol=1e-4)


def test_hessian_is_the_trace():
    params, x = mlp(), inputs(batches=1)
    matrix = fisher(params, x[0])  # the Hessian of the divergence at the float model
    report = qj.sensitivity(apply, params, x * 200, FORMATS, mode=Mode.HESSIAN, products=0)
    start = 0
    for row in report.rows:
        size = row.weights.size
        mean = np.diag(matrix)[start : start + size].mean()
        start += size
        np.testing.assert_allclose(row.gradient, mean, rtol=0.15)
        square = (changes(params, row.path, "w3") ** 2).sum()
        np.testing.assert_allclose(row.cell("w3").loss, row.gradient * square / 2, rtol=1e-4)
    assert report.pairs is None


@pytest.mark.full
@pytest.mark.parametrize("mode", daily(Mode, [Mode.FISHER]))
def test_a_scan_has_a_row_for_each_layer(mode):
    params, batches = scan_params(), inputs()
    report = qj.sensitivity(scanned, params, batches, FORMATS, mode=mode)
    assert [row.name for row in report.rows] == [
        "first/kernel", "last/kernel", *(f"layers/kernel/[{i}]" for i in range(3))
    ]  # fmt: skip
    assert all(row.cell("w3").local_db is not None for row in report.rows)

    # The same network with its layers apart, in the same order of parameters.
    def unrolled(p, x):
        x = jax.nn.relu(x @ p["first"]["kernel"])
        for i in range(3):
            x = jax.nn.relu(x @ p["m"][str(i)]["kernel"])
        return x @ p["last"]["kernel"]

    apart = {
        "first": params["first"],
        "last": params["last"],
        "m": {str(i): {"kernel": w} for i, w in enumerate(params["layers"]["kernel"])},
    }
    if mode is Mode.HESSIAN:  # its signs are drawn leaf by leaf
        return
    other = qj.sensitivity(unrolled, apart, batches, FORMATS, mode=mode)
    for row, same in zip(report.rows, other.rows, strict=True):
        for label in FORMATS:
            np.testing.assert_allclose(
                row.cell(label).loss, same.cell(label).loss, rtol=2e-3, atol=2e-7
            )
            np.testing.assert_allclose(
                row.cell(label).local_db, same.cell(label).local_db, rtol=1e-4
            )


def test_products_are_measured_alone_and_behind_each_other():
    params, (x,) = mlp(), inputs(batches=1)
    report = qj.sensitivity(apply, params, [x], ["w3"])
    whole = qj.fake_quantize(params, "w3")
    float_in, both_in = x, x
    for i, row in enumerate(report.rows):
        w, q = (p[f"dense{i}"]["kernel"] for p in (params, whole))
        bias = params[f"dense{i}"]["bias"]
        y = float_in @ w
        for got, other in (
            (row.cell("w3").local_db, float_in @ q),
            (row.cell("w3").accumulated_db, both_in @ q),
        ):
            expected = 10 * np.log10((y**2).sum() / ((other - y) ** 2).sum())
            np.testing.assert_allclose(got, expected, rtol=1e-4)
        float_in, both_in = jax.nn.relu(y + bias), jax.nn.relu(both_in @ q + bias)
    # Layers behind others carry their errors too.
    assert report.rows[0].cell("w3").local_db == report.rows[0].cell("w3").accumulated_db
    assert report.rows[2].cell("w3").accumulated_db < report.rows[2].cell("w3").local_db - 1


@pytest.mark.full
def test_many_outputs_are_sketched(monkeypatch):
    from quantjax.allocate import measures

    params, batches = mlp(), inputs(batches=8, examples=64)
    exact = qj.sensitivity(apply, params, batches, ["w4"], mode=Mode.PERTURBATION)
    monkeypatch.setattr(measures, "SKETCH", 64)
    rough = qj.sensitivity(apply, params, batches, ["w4"], mode=Mode.PERTURBATION)
    scale = np.diag(exact.pairs).max()
    # 8 batches of 64 sums: a relative deviation of sqrt(2 / 512) = 0.06; 4 of them.
    np.testing.assert_allclose(rough.pairs / scale, exact.pairs / scale, atol=0.25)
    assert np.abs(rough.pairs - exact.pairs).max() > 0


BAD = [
    ({"batches": []}, "at least one batch"),
    ({"formats": []}, "formats of different names"),
    ({"formats": ["w4", "w4"]}, "formats of different names"),
    ({"formats": ["w4a8"]}, "also quantizes activations"),
    ({"formats": [3]}, "expected a preset name"),
    ({"formats": [qj.Policy([("dense0/bias", None)])]}, "no format quantizes any"),
    ({"apply": lambda p, x: (x, x)}, "one array of outputs"),
    ({"batches": [jnp.full((2, 12), jnp.nan)]}, "NaN or infinite with dense0/kernel in w4"),
]


@pytest.mark.parametrize("case, mode", dealt(BAD, Mode))
def test_bad_input_raises(case, mode):
    change, message = case
    call = {"apply": apply, "params": mlp(), "batches": inputs(), "formats": ["w4"]} | change
    with pytest.raises(ValueError, match=message):
        qj.sensitivity(**call, mode=mode)


def test_a_single_array_is_not_batches():
    with pytest.raises(TypeError, match="a single batch is"):
        qj.sensitivity(apply, mlp(), inputs()[0], ["w4"])
