"""The pipelines benchmark's pure parts, its processes, and one step of every schedule."""

import json
import math
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.pipelines import bench, costs, link, methods, peers, quality, report, traffic, training
from benchmarks.pipelines.glance import KINDS, glance
from benchmarks.pipelines.memory import InFlight, kept
from benchmarks.pipelines.processes import LOOPBACK, Crew, FailedError, run
from benchmarks.pipelines.workloads import boundary, saved, workloads
from torch import nn

from blockprop.experiments.settings import Settings
from blockprop.models import mlp
from blockprop.planning.costs import Layer, Passes

FACTS = {"weights": 4000, "boundaries": {"layer2": 8, "layer3": 16, "layer4": 4}, "cut": "layer3", "batch": 128}


def pid(_rank, settings):
    Path(settings["note"]).with_suffix(f".{_rank}").write_text(str(os.getpid()))
    time.sleep(settings.get("sleep", 0))
    if settings.get("fail"):
        raise ValueError("on purpose")
    return _rank, torch.get_num_threads()


# quality


def test_quality_is_reached_by_the_median_of_three_and_not_by_one_lucky_evaluation():
    curve = [(10, 3.0), (20, 1.0), (30, 2.5), (40, 1.4), (50, 1.2)]
    assert quality.examples_to(curve, 1.5) == 40
    assert quality.examples_to(curve, 0.1) == math.inf


def test_level_is_taken_at_four_fifths_of_the_budget_and_averaged_over_seeds():
    falling = [(n, 10.0 - n) for n in range(1, 11)]
    assert quality.level([falling], 10) == 3.0  # medians lag one evaluation behind
    assert quality.level([falling, [(n, loss + 1) for n, loss in falling]], 10) == 3.5
    with pytest.raises(ValueError, match="no evaluation"):
        quality.level([[(9, 1.0)]], 10)


def test_what_diverged_never_reaches_quality():
    assert quality.examples_to([(1, 2.0), (2, math.inf)], 1.0) == math.inf


# traffic and memory


def test_traffic_reverses_where_a_batch_at_the_cut_is_as_large_as_the_weights():
    batch = traffic.reversal(weights=11_653_160, boundary=1024)
    assert traffic.pipeline(math.floor(batch), [1024]) <= traffic.data_parallel(11_653_160)
    assert traffic.pipeline(math.ceil(batch), [1024]) >= traffic.data_parallel(11_653_160)


def test_zbv_crosses_twice_and_the_large_batch_sends_all_of_it():
    (mlp3, *_) = workloads(None)
    facts = {"weights": 4000, "boundaries": dict.fromkeys(("layer2", "layer3", "layer4"), 10)}
    sent = {one.name: one.sent for one in methods.all_peers(mlp3, facts, linked=False, quick=False)}
    assert sent["1F1B, 2"] == sent["1F1B, 8"] == (128 * 10 * 4,) * 2
    assert sent["ZBV, 4"] == (128 * 20 * 4,) * 2
    assert sent["1F1B, 8 x 128"] == (8 * 128 * 10 * 4,) * 2
    assert sent["DDP"] == (4000, 4000)


def test_tensor_bytes_of_a_model_and_its_optimizer():
    model = nn.Linear(10, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(3, 10)).sum().backward()
    optimizer.step()
    assert kept([model], [optimizer]) == {"weights": 440, "gradients": 440, "optimizer": 440}


def test_bytes_in_flight_are_given_back_by_the_backward_pass():
    x = torch.ones(256, requires_grad=True)
    with InFlight([]) as count:
        for _ in range(3):
            x.exp().sum().backward()
    assert count.peak == 1024


def test_boundary_and_saved_bytes_of_two_blocks():
    model, inputs = mlp(6, 3, width=8, depth=3), torch.ones(4, 6)
    assert boundary(model, "layer2", inputs) == 8
    lower, upper = saved(model, "layer2", inputs)
    assert lower > 0
    assert upper > 0


# costs


def made_up(cost, name="layer"):
    passes = {8: Passes(cost, 2 * cost, cost, cost), 4: Passes(cost, cost, cost, cost)}
    return Layer(name, passes, update=cost, output_bytes=4, weight_bytes=8, copied=cost)


def test_costs_go_through_json():
    found = costs.Costs((made_up(1.0, "a"), made_up(0.1, "b")), 1.25)
    assert costs.Costs.of_json(json.loads(json.dumps(found.as_json()))) == found


def test_of_several_measurements_every_number_is_the_median():
    found = costs.middle([costs.Costs((made_up(cost), made_up(2 * cost)), cost) for cost in (5.0, 1.0, 2.0)])
    assert found == costs.Costs((made_up(2.0), made_up(4.0)), 2.0)


def test_a_workloads_cuts_are_found_among_its_layers():
    for workload in workloads(None):
        names = sorted({workload.cut, workload.recomputing_cut, *workload.four})
        layers = tuple(made_up(1.0, name) for one in names for name in (f"{one}0.part", f"{one}.part", f"{one}.rest"))
        case = costs.Costs(layers, 1.0).case(workload)
        found = [layers[index].name for index in (case.cut, case.recomputing_cut, *case.four)]
        assert found == [f"{name}.part" for name in (workload.cut, workload.recomputing_cut, *workload.four)]


def test_costs_are_measured_in_a_process_of_their_own():
    (mlp3, *_) = workloads(None)
    small = replace(mlp3, settings=replace(mlp3.settings, width=16, batch_size=8))
    found = costs.measured(small, repeats=1, seconds=0.1)
    names = [layer.name.partition(".")[0] for layer in found.layers]
    assert names == ["flatten", "layer2", "layer3", "layer4"]
    assert all(passes.backward > 0 for layer in found.layers[1:] for passes in layer.passes.values())
    assert found.contention >= 1


# command lines


def test_settings_become_a_command_line_that_means_them():
    for workload in workloads(None):
        for own in methods.own(workload, linked=True, quick=False):
            flags = bench.own_flags(workload, own, workload.settings)
            assert flags.count("--split-at") == 1
            assert flags[flags.index("--policy") + 1] == own.policy
    assert training.arguments(Settings()) == []


def test_a_run_over_a_link_is_one_worker_an_end(tmp_path):
    lower, upper = training.commands(["--seed", "1"], tmp_path, LOOPBACK, 1234)
    assert lower[:5] == ["worker", "--block", "1", "--store", "127.0.0.1:1234"]
    assert upper[2] == "2"
    assert training.commands([], tmp_path, LOOPBACK[:1], 0)[0][0] == "train"


def test_speed_is_counted_from_the_first_row_of_metrics_on():
    assert training.Trained(clock=[(100, 9.0), (300, 10.0)]).rate == 200.0
    with pytest.raises(FailedError):
        _ = training.Trained(clock=[(100, 9.0)]).rate


# the link


def test_a_link_without_the_rights_says_so(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(link.LinkError, match="root"), link.Link(link.SPEEDS[2]):
        pass


def test_a_link_without_a_compiler_says_so(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(link.shutil, "which", lambda tool: None if tool == "gcc" else tool)
    with pytest.raises(link.LinkError, match="gcc"), link.Link(link.SPEEDS[1]):
        pass


def test_loopback_needs_nothing():
    with link.Link(link.SPEEDS[0]) as made:
        assert made.places == LOOPBACK
    assert made.carried is None


def test_what_the_links_program_tells_is_read_and_what_it_could_not_tell_is_not():
    assert link.Carried.told("9 2500000 1\n7 500000 0\n0.25\n") == (3.0, 1, 0.25)
    assert link.Carried.told("wan0: Operation not permitted\n") is None


# the report


def measured(name, ratios, **more):
    return report.row("mlp3", "loopback", name, {"rates": [100 * r for r in ratios], "ratios": ratios, **more})


def test_time_to_quality_is_examples_over_speed_and_what_is_never_reached_says_so():
    made = report.with_quality(measured("x", [2.0, 2.0]), [1.0, math.inf])
    assert made["time"] == 0.5
    assert "1.00; 1 never" in report.cells(made)[3]
    never = report.with_quality(measured("x", [2.0, 2.0]), [math.inf])
    assert "time" not in never
    assert report.cells(never)[3] == "> 2"


def test_a_row_whose_speed_is_measured_anew_keeps_what_it_learnt():
    before = report.with_quality({**measured("x", [1.0]), "lr": 0.2}, [1.0, math.inf], "≈")
    made = report.with_quality_of(measured("x", [2.0, 2.0]), before)
    assert (made["ratio"], made["time"], made["examples"]) == (2.0, 0.5, [1.0, None])
    assert (made["mark"], made["lr"]) == ("≈", 0.2)
    assert report.with_quality_of(measured("x", [2.0]), {}) == measured("x", [2.0])


def test_a_page_with_a_measured_a_failed_and_a_skipped_part(tmp_path):
    memory = [{"weights": 1e6, "gradients": 1e6, "optimizer": 0, "activations": 2e6}]
    rows = {
        "one thread": report.with_quality(measured("one thread", [1.0, 1.0], memory=memory), [1.0], "="),
        "ZBV, 2": report.row("mlp3", "loopback", "ZBV, 2", {"rates": [], "ratios": [], "failed": "not done in 3 s"}),
    }
    results = {
        "facts": {"mlp3": FACTS},
        "verified": {"mlp3": {"DDP": 1e-15, "ZBV, 2": "failed: x"}},
        "quality": {"mlp3": {"level": 0.5, "examples": 1000.0}},
        "groups": {"mlp3/loopback": {"rows": rows, "measured": "a Z80"}, "mlp3/slow": {"skipped": "needs root"}},
    }
    report.write(results, {"mlp3": "An MLP"}, tmp_path, "python -m benchmarks.pipelines")
    page = (tmp_path / "README.md").read_text()
    assert "not measured: not done in 3 s" in page
    assert "Not measured: the emulated link needs root." in page
    assert "**more than DDP**" in page
    assert "Measured with a Z80" in page
    assert json.loads((tmp_path / "results.json").read_text())["rows"][0]["ratio"] == 1.0


def test_a_glance_shows_the_soonest_of_a_kind_and_the_fastest_where_none_is_there():
    learnt = {
        "GPipe, 4": report.with_quality(measured("GPipe, 4", [1.5]), [1.0], "="),
        "ZBV, 2": report.with_quality(measured("ZBV, 2", [2.0]), [1.0], "="),
        "1F1B, 8 x 128": report.with_quality(measured("1F1B, 8 x 128", [3.0]), [math.inf]),
        "BlockProp, lock-step, stashed, 2 microbatches": measured(
            "BlockProp, lock-step, stashed, 2 microbatches", [1.2]
        ),
        "BlockProp, lock-step, stashed, 8 microbatches": measured(
            "BlockProp, lock-step, stashed, 8 microbatches", [0.9]
        ),
        "DDP": report.row("mlp3", "loopback", "DDP", {"rates": [], "ratios": [], "failed": "x"}),
    }
    results = {"groups": {"mlp3/loopback": {"rows": learnt}, "mlp3/slow": {"skipped": "needs root"}}}
    heading, _, link_title, shown = glance(results, {"mlp3": "An MLP", "gpt": "A GPT"})
    assert (heading, link_title) == ("## At a glance", "### loopback")
    assert [line.split(" | ") for line in shown.splitlines()] == [
        ["| ", "An MLP |"],
        ["| ---", "--- |"],
        ["| torch's best schedule", "0.50 (2.00); ZBV, 2 |"],
        ["| 1F1B, several batches at a time", "never (3.00) |"],
        ["| lock-step, stashed, more microbatches", "(1.20); 2 |"],
    ]
    assert glance({"groups": {}}, {"mlp3": "An MLP"}) == []


def test_every_method_that_learns_is_in_the_glance():
    for linked in (False, True):
        for workload in workloads(None):
            facts = FACTS | {"boundaries": dict.fromkeys({workload.cut, *workload.four}, 8)}
            peers_of = methods.all_peers(workload, facts, linked=linked, quick=False)
            learning = [one.name for one in peers_of if one.learning != "none" and one.name != methods.BASE]
            learning += [one.name for one in methods.own(workload, linked=linked, quick=False)]
            assert [name for name in learning if not any(belongs(name) for _, belongs in KINDS)] == []


# processes


def test_processes_answer_and_are_gone(tmp_path):
    assert run(pid, 2, {"note": str(tmp_path / "note")}) == [(0, 1), (1, 1)]
    for rank in range(2):
        assert not Path("/proc", (tmp_path / f"note.{rank}").read_text()).exists()


def test_a_failure_is_said_and_one_that_hangs_is_ended(tmp_path):
    with pytest.raises(FailedError, match="on purpose"):
        run(pid, 1, {"note": str(tmp_path / "note"), "fail": True})
    with (
        pytest.raises(FailedError, match="not done in 2 s"),
        Crew(pid, {"note": str(tmp_path / "late"), "sleep": 60}, LOOPBACK, 2.0) as crew,
    ):
        crew.answers()
    assert not Path("/proc", (tmp_path / "late.0").read_text()).exists()


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zbv", "ddp"])
def test_a_synchronous_schedule_takes_backprops_gradient(tmp_path, schedule):
    model = mlp(6, 3, width=8, depth=4)
    batches = [torch.randn(16, 6) for _ in range(3)], [torch.randint(3, (16,)) for _ in range(3)]
    torch.save({"model": model, "inputs": batches[0], "targets": batches[1]}, tmp_path / "file")
    cuts = ["layer2", "layer3", "layer4"] if schedule == "zbv" else ["layer3"]
    settings = {
        "file": str(tmp_path / "file"),
        "meeting": str(tmp_path / "meeting"),
        "optimizer": ("sgd", 0.1, 0.9),
        "verify": True,
        "schedule": schedule,
        "microbatches": 4,
        "cuts": cuts,
    }
    work = peers.ddp if schedule == "ddp" else peers.pipeline
    assert all(one["difference"] < 1e-12 for one in run(work, 2, settings))
