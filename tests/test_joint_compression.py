"""Do the networks that are compared meet the bytes, and is what was trained what is judged?"""

import pytest

from experiments import joint_compression as joint
from experiments.models import ArticleCNN, initialize
from experiments.post_training import Judge
from tests.daily import daily
from tests.tiny_run import make_larger_data


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    model = ArticleCNN(classes=3)
    return Judge(model, make_larger_data(), tmp_path_factory.mktemp("judge"))


@pytest.fixture(scope="module")
def params(judge):
    return initialize(judge.model, judge.data.image_shape, seed=0)


@pytest.mark.full
@pytest.mark.parametrize(
    "method", daily(["prune", "prune, quantize"], ["prune"]), ids=["floats", "8 bits"]
)
def test_the_widest_network_that_meets_the_bytes_is_taken(judge, params, method):
    bits = {"prune": 32, "prune, quantize": 8}[method]
    budget = joint.size(params, 4)
    found = joint.smaller(judge, params, method, 4)
    floats = found.tree if bits == 32 else joint.narrowed(judge, params, bits, budget)[1]
    assert found.bits == bits and joint.size(floats, bits) <= budget
    widths = (*found.judge.model.channels, found.judge.model.hidden)
    one_more = initialize(
        judge.model.clone(channels=(widths[0] + 2, widths[1] + 4), hidden=widths[2] + 6),
        judge.data.image_shape,
        seed=0,
    )
    assert joint.size(one_more, bits) > budget


@pytest.mark.full
def test_a_row_is_trained_with_a_teacher_and_judged_as_it_is_stored(judge, params):
    config = joint.Config(judge.scratch, epochs=1, batch_size=16)
    row = joint.measured(judge, params, ("prune, quantize", 4, True), config, 0, (1e-2,))
    assert row["bits"] == 8 and row["rates"] == {"0.01": row["validation_accuracy"]}
    assert row["bytes"] <= joint.size(params, 4) and row["total"] == len(judge.data.test_labels)
    assert row["widths"][0] < 32 and 0 <= row["accuracy"] <= 1


def test_a_budget_that_nothing_meets_is_refused(judge, params, monkeypatch):
    monkeypatch.setattr(joint, "STEPS", 2)  # each that is tried is a network of new shapes
    with pytest.raises(ValueError, match="no narrower network fits 10 bytes at 8 bits"):
        joint.narrowed(judge, params, 8, 10)
