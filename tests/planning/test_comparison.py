"""Predictions beside made-up rows."""

import pytest

from blockprop.planning.cluster import Link
from blockprop.planning.comparison import Case, compare
from blockprop.planning.costs import Layer, Passes

LAYER = Layer("layer", {8: Passes(1.0, 2.0, 1.0, 2.0)}, 0.0, 1.0, 4.0)
CASE = Case([LAYER] * 7, 8, contention=1.0, cut=4, recomputing_cut=3, four=(2, 4, 6))
LINKS = {"near": Link(1e9)}


def row(method, rate, workload="mlp", link="near"):
    return {"workload": workload, "method": method, "link": link, "samples_per_second": rate}


def test_errors_are_of_multiples_of_one_thread():
    """21 s alone; 12 s in two blocks of four and three layers, or of three with a second forward pass and four."""
    rows = [
        row("one thread", 100.0),
        row("two independent copies", 160.0),
        row("two halves apart, 3 passes below", 175.0),
        row("two halves apart, 4 passes below", 175.0),
        row("BlockProp, lock-step", 140.0),
        row("BlockProp, free-running", 175.0),
        row("GPipe, 2", 100.0),
    ]
    found = {each.method: each for each in compare(rows, {"mlp": CASE}, LINKS)}
    assert found["two independent copies"].error == pytest.approx(0.25)
    for passes in ("3 passes below", "4 passes below"):
        assert found[f"two halves apart, {passes}"].predicted == pytest.approx(1.75)
    assert found["BlockProp, lock-step"].error == pytest.approx(0.25, abs=1e-3)
    assert found["BlockProp, free-running"].error == pytest.approx(0, abs=0.02)
    assert "one thread" not in found
    # 6 s of microbatches at the lower block, four of them through both blocks but for the bubble: 18 - 1.5 s
    assert found["GPipe, 2"].predicted == pytest.approx(21 / 16.5, rel=0.02)


@pytest.mark.parametrize(
    "method",
    [
        "DDP",
        "1F1B, 4",
        "ZBV, 4",
        "1F1B, 8 x 128",
        "BlockProp, cached, E = 4",
        "GPipe, 8",
        "BlockProp, lock-step, stashed, 4 microbatches",
        "BlockProp, free-running, 2 microbatches",
    ],
)
def test_every_measured_method_is_known(method):
    (found,) = compare([row("one thread", 1.0), row(method, 1.0)], {"mlp": CASE}, LINKS)
    assert 0.5 < found.predicted < 2.01


@pytest.mark.parametrize("method", ["BlockProp, free-running, stashed", "BlockProp, free-running, int8", "GPipe"])
def test_what_is_not_known_is_left_out(method):
    assert compare([row("one thread", 1.0), row(method, 1.0)], {"mlp": CASE}, LINKS) == []


def test_over_a_slow_link_more_are_on_their_way_and_all_are_evaluated_again():
    """Two microbatches: half of each block's work is late with two on their way, all of it with four."""
    method, links = "BlockProp, free-running, 2 microbatches", {"near": Link(1e9), "wire": Link(1e9, latency=1e-6)}
    rows = [row(name, 1.0, link=link) for name in ("one thread", method) for link in links]
    near, wire = compare(rows, {"mlp": CASE}, links)
    # four layers below, of three and a half passes; now and then it waits for the top
    assert near.predicted == pytest.approx(21 / 14, rel=0.03)
    assert wire.predicted == pytest.approx(21 / 12, rel=0.02)  # three below, of four passes; four of three passes


def test_a_row_that_was_measured_apart_has_a_ratio_of_its_own():
    rows = [row("one thread", 100.0), row("DDP", 300.0) | {"ratio": 1.5}]
    (found,) = compare(rows, {"mlp": CASE}, LINKS)
    assert found.measured == 1.5


def test_a_row_is_predicted_from_the_costs_that_it_names():
    updating = Layer("layer", {8: Passes(1.0, 2.0, 1.0, 2.0)}, 3.0, 1.0, 4.0)
    cases = {"mlp": CASE, "then": Case([updating] * 7, 8, contention=1.0, cut=4, recomputing_cut=3, four=(2, 4, 6))}
    rows = [row("one thread", 100.0), *(row("GPipe, 8", 100.0) | {"costs": name} for name in (None, "then", "gone"))]
    plain, with_updates, gone = (each.predicted for each in compare(rows, cases, LINKS))
    assert plain == gone > with_updates  # which adding up the microbatches' gradients takes as well
    del cases["mlp"]
    assert [each.predicted for each in compare(rows, cases, LINKS)] == [with_updates]


def test_a_row_is_as_slow_beside_the_link_as_its_own_one_thread():
    slow = {"wire": Link(1e-4)}
    rows = [row("one thread", 1.0, link="wire"), row("DDP", 1.0, link="wire"), row("DDP", 1.0, link="wire")]
    fast, same = compare([rows[0], rows[1] | {"ratio": 0.01}, rows[2]], {"mlp": CASE}, slow)
    assert fast.predicted < 0.1 * same.predicted


def test_a_link_is_as_slow_beside_the_devices_as_one_thread_is_fast():
    """The layers take 21 s, one thread was measured to take 0.21: a link that was nothing beside it is the limit."""
    slow = {"wire": Link(1e-4)}
    found = [
        compare([row("one thread", rate, link="wire"), row("GPipe, 2", 1.0, link="wire")], {"mlp": CASE}, slow)[0]
        for rate in (CASE.predict("one thread", Link(1e9)), 100 * CASE.predict("one thread", Link(1e9)))
    ]
    assert found[0].predicted > 5 * found[1].predicted


def test_what_the_planner_does_not_know_is_left_out():
    rows = [row("one thread", 1.0), row("two threads", 2.0), row("DDP", 1.0, link="far"), row("DDP", 1.0, "other")]
    assert compare(rows, {"mlp": CASE}, LINKS) == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row("DDP", 1.0)], "workload 'mlp' has no row 'one thread'"),
        ([{"workload": "mlp", "method": "DDP", "link": "near"}], "a row has no 'samples_per_second'"),
    ],
)
def test_mistakes(rows, message):
    with pytest.raises(ValueError, match=message):
        compare(rows, {"mlp": CASE}, LINKS)
