"""Allocations are held against all policies, and their predictions against evaluations."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantjax as qj
from quantjax.allocate import Mode, operations, predicted_loss, stored_bytes
from tests.daily import daily

from .networks import apply, divergence, inputs, mlp, scan_params, scanned

FORMATS = ["w2", "w3", "w4", "w8", None]
MODES = [(mode, pairs) for mode in Mode for pairs in (False, True)]
MODES.remove((Mode.HESSIAN, True))


@pytest.fixture(scope="module")
def reports():
    """A report by its mode, made when it is asked for."""
    return functools.cache(
        lambda mode: qj.sensitivity(apply, mlp(), inputs(), FORMATS, mode=mode, products=0)
    )


def tree_bytes(tree):
    leaves = jax.tree.leaves(tree)
    return sum(x.size * x.dtype.itemsize for x in leaves)


def budgets(report, cost=stored_bytes):
    kept = report.kept_bytes if cost is stored_bytes else 0
    by_path = {}
    for option in report.options:
        by_path.setdefault(option.path, []).append(cost(option))
    low, high = (sum(f(c) for c in by_path.values()) + kept for f in (min, max))
    return [low, *(low + share * (high - low) for share in (0.1, 0.3, 0.6)), high]


@pytest.mark.full
@pytest.mark.parametrize("case", daily(MODES, [(Mode.FISHER, True)]))
def test_no_policy_is_predicted_better(reports, case):
    mode, pairs = case
    report = reports(mode)
    paths = list(dict.fromkeys(o.path for o in report.options))
    cost = {(o.path, o.format): o.bytes for o in report.options}
    for budget in budgets(report):
        found = qj.allocate_bits(report, budget, pairs=pairs, nodes=1000)
        best = min(
            predicted_loss(report, dict(zip(paths, f, strict=True)), pairs=pairs)
            for f in itertools.product(report.formats, repeat=len(paths))
            if sum(cost[x] for x in zip(paths, f, strict=True)) + report.kept_bytes <= budget
        )
        scale = 1e-8 * (1 + abs(best))
        assert abs(found.loss - best) <= scale and abs(found.gap) <= scale
        np.testing.assert_allclose(
            predicted_loss(report, found.formats, pairs=pairs), found.loss, atol=scale
        )


def test_the_policy_costs_what_was_said(reports):
    report = reports(Mode.FISHER)
    for budget in budgets(report):
        found = qj.allocate_bits(report, budget)
        tree = jax.eval_shape(functools.partial(qj.quantize, policy=found.policy), mlp())
        assert tree_bytes(tree) == found.cost <= budget


def test_the_policy_gives_the_numbers_that_were_measured():
    # Blocks follow the sites of the model there; the policy must not need them.
    def tied(p, x):
        return x @ p["table"]["kernel"].T

    params = {"table": {"kernel": jax.random.normal(jax.random.key(0), (6, 12))}}
    report = qj.sensitivity(tied, params, inputs(), ["w3", "w8"], mode=Mode.PERTURBATION)
    found = qj.allocate_bits(report, budgets(report)[0])
    x = jnp.concatenate(inputs())
    loss = divergence(tied(params, x), tied(qj.fake_quantize(params, found.policy), x))
    np.testing.assert_allclose(loss, found.loss, rtol=1e-3)


@pytest.mark.parametrize("seed", daily(range(5), [0]))
def test_predictions_follow_what_is_measured(seed):
    params, batches = mlp(seed), inputs(seed, batches=8, examples=32)
    report = qj.sensitivity(
        apply, params, batches, ["w3", "w4", "w5", "w8"], mode=Mode.PERTURBATION
    )
    x = jnp.concatenate(batches)
    rng, rows = np.random.default_rng(seed), []
    for _ in range(20):
        formats = {row.path: str(rng.choice(report.formats)) for row in report.rows}
        policy = qj.Policy(list(formats.items()))
        measured = divergence(apply(params, x), apply(qj.fake_quantize(params, policy), x))
        rows.append([measured, *(predicted_loss(report, formats, pairs=p) for p in (True, False))])
    logs = np.log(np.array(rows)).T
    with_pairs, alone = (np.corrcoef(logs[0], other)[0, 1] for other in logs[1:])
    assert with_pairs > 0.97
    assert np.abs(logs[1] - logs[0]).mean() < np.abs(logs[2] - logs[0]).mean() or alone > 0.97


def test_tied_parameters_share_a_format(reports):
    report = reports(Mode.FISHER)
    different = 0
    for budget in budgets(report)[1:-1]:
        tied = qj.allocate_bits(report, budget, tie=["dense?/kernel"])
        assert len(set(tied.formats.values())) == 1
        two = qj.allocate_bits(report, budget, tie=["dense0/*", "dense1/*"])
        free = qj.allocate_bits(report, budget)
        assert free.loss <= two.loss <= tied.loss
        different += len(set(free.formats.values())) > 1
    assert different


def test_layers_of_a_scan_share_a_format_and_meet_each_other():
    params = scan_params()
    report = qj.sensitivity(
        scanned, params, inputs(), ["w3", "w8"], mode=Mode.PERTURBATION, products=0
    )
    found = qj.allocate_bits(report, budgets(report)[0])
    items = [k for k, item in enumerate(report.items) if item.format == "w3"]
    expected = sum(row.cell("w3").loss for row in report.rows)
    expected += np.triu(report.pairs[np.ix_(items, items)], 1).sum()
    np.testing.assert_allclose(found.loss, expected, rtol=1e-9)
    q = qj.quantize(params, found.policy)["layers"]["kernel"]
    assert q.scale.shape[0] == 3


def test_operations_and_tables_are_costs(reports):
    report = reports(Mode.FISHER)
    low, *_, high = budgets(report, operations)
    found = qj.allocate_bits(report, (low + high) / 2, cost=operations)
    # 16 examples: multiply-adds times bits.
    bits = {"w2": 2, "w3": 3, "w4": 4, "w8": 8, "float": 32}
    macs = {
        f"dense{i}/kernel": 16 * a * b for i, (a, b) in enumerate([(12, 16), (16, 16), (16, 6)])
    }
    assert found.cost == sum(macs[p] * bits[f] for p, f in found.formats.items())
    table = {(o.path, o.format): 1.0 + (o.format == "w2") for o in report.options}
    assert set(qj.allocate_bits(report, 3.0, cost=table).formats.values()) == {"float"}
    del table["dense1/kernel", "w3"]
    with pytest.raises(ValueError, match=r"dense1/kernel: the table .* no entry .*'w3'"):
        qj.allocate_bits(report, 3.0, cost=table)


def test_bad_budgets_and_patterns_raise(reports):
    report = reports(Mode.FISHER)
    low, *_, high = budgets(report)
    for budget in (low - 1, high + 1):
        with pytest.raises(ValueError, match=rf"between {low:,g},.*and {high:,g},"):
            qj.allocate_bits(report, budget)
    with pytest.raises(ValueError, match="tie pattern 'dens/.*Nearest: 'dense[012]/kernel'"):
        qj.allocate_bits(report, low, tie=["dens/kernel"])
    with pytest.raises(ValueError, match="gives no pairs"):
        qj.allocate_bits(reports(Mode.HESSIAN), low, pairs=True)
