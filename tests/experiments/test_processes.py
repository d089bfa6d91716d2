"""Real processes: the launcher, torchrun, workers; their numbers, their ends, and what they leave behind."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blockprop.cli import main
from blockprop.runtime import processes
from conftest import free_port

BLOCKPROP = [sys.executable, "-m", "blockprop"]
SMALL = ["--data", "digits", "--depth", "4", "--width", "16", "--quiet", "--threads", "1"]
TWO = [*SMALL, "--blocks", "2", "--split-at", "layer3", "--microbatches", "1"]
PROCESSES = ["--executor", "processes"]
MASTER = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}


def start(*words, **variables):
    environment = {**ENVIRONMENT, **variables}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def ended(process, timeout=120):
    out, error = process.communicate(timeout=timeout)
    return process.returncode, out, error


def weights(path):
    return load_file(path / "model.safetensors")


def same(one: Path, other: Path):
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def rows(folder: Path):
    """Its training rows of metrics."""
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in found if row["kind"] == "train"]


def children_of(pid):
    """Processes whose parent it is."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(path.parent.name))
    return found


def environment_of(pid):
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The same schedule in one process."""
    out = tmp_path_factory.mktemp("local") / "run"
    assert main(["train", *TWO, "--schedule", "pipelined", "--steps", "50", "--out", str(out)]) == 0
    return out


def test_the_launcher_gives_the_numbers_of_one_process(tmp_path, local):
    out = tmp_path / "run"
    assert main(["train", *TWO, *PROCESSES, "--steps", "50", "--out", str(out)]) == 0
    with pytest.raises(FileNotFoundError):
        weights(out)  # no process holds the whole network
    assert main(["assemble", str(out)]) == 0
    assert same(out, local)
    summary, expected = (json.loads((path / "summary.json").read_text()) for path in (out, local))
    for key in ("test_loss", "test_accuracy", "validation_loss"):
        assert summary[key] == pytest.approx(expected[key], rel=1e-6)
    said = summary["processes"]
    assert said.keys() == {"block-1", "block-2"}
    assert said["block-1"]["bytes_per_step"]["up"] > 60 * 16 * 4
    assert said["block-1"]["memory"]["weights"] == sum(value.numel() * 4 for value in weights(out / "block-1").values())
    last = rows(out / "block-1")[-1]
    assert 0 <= last["busy"] <= 1
    assert last["age"] == [2.0]
    assert main(["assemble", str(out)]) == 2  # nothing is overwritten


def test_torchrun_gives_the_same(tmp_path, local):
    out = tmp_path / "run"
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    code, _, error = ended(
        start(*torchrun, "-m", "blockprop", "train", *TWO, *PROCESSES, "--steps", "50", "--out", out)
    )
    assert code == 0, error
    assert main(["assemble", str(out)]) == 0
    assert same(out, local)


def test_a_script_differs_by_its_executor_alone(tmp_path):
    """The example under torchrun, beside the same lines with the pipeline in one process."""
    example = Path(__file__).parents[2] / "examples/train_processes.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    code, out, error = ended(start(*torchrun, str(example)))
    assert code == 0, error
    simulated = tmp_path / "simulated.py"
    text = example.read_text()
    text = text.replace('executor="processes"', "executor=PipelinedExecutor()").replace("algo.remote.last", "True")
    simulated.write_text(
        text.replace("import blockprop\n", "import blockprop\nfrom blockprop.executors import PipelinedExecutor\n", 1)
    )
    code, expected, error = ended(start(sys.executable, str(simulated)))
    assert code == 0, error
    assert out == expected
    assert out.startswith("test 9")


def test_workers_give_the_same(tmp_path, local):
    store = f"127.0.0.1:{free_port()}"
    words = [*TWO, "--store", store, "--steps", "50"]
    outs = [tmp_path / "one", tmp_path / "two"]  # as on two machines
    workers = [start(*BLOCKPROP, "worker", "--block", str(k + 1), *words, "--out", outs[k]) for k in range(2)]
    for worker in workers:
        code, _, error = ended(worker)
        assert code == 0, error
    shutil.copytree(outs[0] / "block-1", outs[1] / "block-1")
    assert main(["assemble", str(outs[1])]) == 0
    assert same(outs[1], local)


@pytest.mark.parametrize("more", [[], ["--policy", "free-running"]])
def test_a_resumed_run_goes_on(tmp_path, more):
    settings = [word for word in TWO if not more or word not in ("--microbatches", "1")]
    if more:
        settings = [*SMALL, "--blocks", "2", "--split-at", "layer3"]
    whole = tmp_path / "whole"
    words = [*settings, *PROCESSES, *more, "--warmup", "0", "--checkpoint-every", "20"]
    assert main(["train", *words, "--steps", "50", "--out", str(whole)]) == 0
    stopped = tmp_path / "stopped"
    shutil.copytree(whole, stopped)
    for path in [*stopped.glob("block-*/checkpoints/*50*"), *stopped.glob("block-*/model*"), stopped / "summary.json"]:
        path.unlink()
    next(stopped.glob("block-2/checkpoints/*40*")).rename(stopped / "block-2/checkpoints/step-00000030.safetensors")
    assert main(["train", "--resume", "--quiet", "--out", str(stopped)]) == 2  # no step that both have
    (stopped / "block-2/checkpoints/step-00000030.safetensors").rename(
        stopped / "block-2/checkpoints/step-00000040.safetensors"
    )
    assert main(["train", "--resume", "--quiet", "--out", str(stopped)]) == 0
    assert json.loads((stopped / "summary.json").read_text())["steps"] == 50
    if not more:
        for path in (whole, stopped):
            assert main(["assemble", str(path)]) == 0
        assert same(whole, stopped)
        # what was sent before the stop counts
        sent = [[row["bytes_up"] for row in rows(path / "block-1")] for path in (whole, stopped)]
        assert sent[0] == sent[1]
        said = [json.loads((path / "summary.json").read_text())["processes"]["block-1"] for path in (whole, stopped)]
        assert said[0]["bytes_per_step"] == said[1]["bytes_per_step"]


def test_weights_of_an_earlier_end_are_not_assembled(tmp_path, capsys):
    """A finished run that is lengthened, and stopped before its new end."""
    out = tmp_path / "run"
    assert main(["train", *TWO, *PROCESSES, "--steps", "20", "--out", str(out)]) == 0
    process = start(*BLOCKPROP, "train", "--resume", "--steps", "100000", "--quiet", "--out", str(out))
    try:
        deadline = time.monotonic() + 60
        while any((out / f"block-{k}" / "model.safetensors").exists() for k in (1, 2)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.terminate()
        ended(process)
    assert main(["assemble", str(out)]) == 2
    assert "expected a finished run" in capsys.readouterr().err


def test_two_blocks_by_two_replicas(tmp_path):
    one, four = tmp_path / "one", tmp_path / "four"
    # replicas measure κ, and what feedback is long, each for itself
    words = ["train", *TWO, "--curvature", "0.3", "--trust", "none", "--steps", "42", "--batch-size", "60"]
    words += ["--train-size", "1260"]
    assert main([*words, "--schedule", "pipelined", "--out", str(one)]) == 0
    assert main([*words, *PROCESSES, "--replicas", "2", "--out", str(four)]) == 0
    assert main(["assemble", str(four)]) == 0
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(four)[name], value, rtol=1e-3, atol=1e-5)


def test_replicas_come_to_the_end_together(tmp_path):
    """An epoch's last batch is shared as 16 and 15 examples, of which one has two parts of eight and the other one."""
    words = ["train", *SMALL, "--microbatches", "4", "--batch-size", "64", "--train-size", "95", "--steps", "6"]
    words += ["--blocks", "3", "--latency", "3", "--lost", "0.2", "--seed", "9"]  # a draw that makes a difference
    process = start(*BLOCKPROP, *words, *PROCESSES, "--replicas", "2", "--out", tmp_path / "run")
    code, _, error = ended(process)
    assert code == 0, error


def test_eight_blocks(tmp_path):
    out = tmp_path / "run"
    words = ["--data", "digits", "--depth", "8", "--width", "16", "--quiet", "--blocks", "8", "--steps", "60"]
    assert main(["train", *words, *PROCESSES, "--out", str(out)]) == 0
    assert main(["train", *words, "--schedule", "pipelined", "--threads", "1", "--out", str(tmp_path / "one")]) == 0
    assert main(["assemble", str(out)]) == 0
    assert same(out, tmp_path / "one")


def up(out: Path, timeout=90):
    """Wait until a run that was just started is training."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if (out / "block-1/metrics.jsonl").exists() and (out / "block-1/metrics.jsonl").stat().st_size:
            return
        time.sleep(0.1)
    raise AssertionError("the run did not start")


@pytest.fixture
def hears_ctrl_c():
    """Tests that were started in the background ignore Ctrl-C, and would hand that down to what they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("hears_ctrl_c")
@pytest.mark.parametrize(
    ("whom", "blocks"), [("ctrl-c", 2), ("ctrl-c", 8), ("terminated", 2), ("block", 2), ("launcher", 2)]
)
def test_whoever_is_ended_all_end_in_seconds(tmp_path, whom, blocks):
    out = tmp_path / "run"
    words = TWO if blocks == 2 else ["--data", "digits", "--depth", str(blocks), "--blocks", str(blocks), "--quiet"]
    launcher = start(*BLOCKPROP, "train", *words, *PROCESSES, "--steps", "1000000", "--log-every", "5", "--out", out)
    up(out)
    children = children_of(launcher.pid)
    assert len(children) == blocks
    [temporary] = {environment_of(child)["TMPDIR"] for child in children}
    began = time.monotonic()
    match whom:
        case "ctrl-c":
            launcher.send_signal(signal.SIGINT)
        case "terminated":
            launcher.send_signal(signal.SIGTERM)
        case "block":
            os.kill(children[0], signal.SIGKILL)
        case "launcher":
            launcher.kill()
    code, _, error = ended(launcher)
    while any(map(alive, children)) and time.monotonic() - began < 10:
        time.sleep(0.02)
    assert not any(map(alive, children))
    assert time.monotonic() - began < 5
    assert not Path(temporary).exists()
    if whom in ("ctrl-c", "terminated"):
        assert code == 130
        assert error.splitlines() == ["blockprop: stopped; a run with a checkpoint continues with --resume"]
    if whom == "block":
        assert code == 2
        assert error.strip() == (
            "blockprop: error: the process of block-1 was ended by signal 9, perhaps for lack of memory"
        )


def test_a_launcher_that_was_stopped_goes_on(tmp_path):
    """With Ctrl-Z, and the store with it, for longer than any other store may be silent here."""
    (tmp_path / "sitecustomize.py").write_text(
        "from blockprop.runtime import Rendezvous\nRendezvous.__init__.__kwdefaults__['silence'] = 1.0\n"
    )
    out = tmp_path / "run"
    words = [*BLOCKPROP, "train", *TWO, *PROCESSES, "--log-every", "1", "--steps", "1000", "--out", out]
    launcher = start(*words, PYTHONPATH=str(tmp_path))
    up(out)
    launcher.send_signal(signal.SIGSTOP)
    time.sleep(3)
    launcher.send_signal(signal.SIGCONT)
    code, _, error = ended(launcher)
    assert (code, error) == (0, "")
    assert json.loads((out / "summary.json").read_text())["steps"] == 1000


IMPATIENT = """
import sys
from blockprop.runtime import Rendezvous, failure
failure.SILENCE = Rendezvous.__init__.__kwdefaults__["silence"] = 2.0
from blockprop.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize("frozen", [1, 2])
def test_a_frozen_process_is_noticed(tmp_path, frozen):
    """With the first block's process the store is frozen as well."""
    words = [sys.executable, "-c", IMPATIENT, "worker", *TWO, "--steps", "1000000", "--log-every", "5"]
    words += ["--store", f"127.0.0.1:{free_port()}", "--out", str(tmp_path / "run")]
    workers = {k: start(*words, "--block", str(k)) for k in (1, 2)}
    up(tmp_path / "run")
    began = time.monotonic()
    workers[frozen].send_signal(signal.SIGSTOP)
    code, _, error = ended(workers.pop(3 - frozen))
    assert code == 3
    assert time.monotonic() - began < 20
    where = "store" if frozen == 1 else "block-2"
    why = "its process has not answered" if frozen == 1 else "it has given no sign of life"
    lines = [line for line in error.splitlines() if line.startswith("blockprop: ")]
    assert len(lines) == 1
    assert f"stopped, since {where} failed: {why} for 2 seconds" in lines[0]
    workers[frozen].send_signal(signal.SIGCONT)  # it finds the others gone
    code, _, _ = ended(workers[frozen])
    assert code != 0


@pytest.mark.usefixtures("hears_ctrl_c")
@pytest.mark.parametrize("whom", ["parent", "all, as from a keyboard"])
def test_the_runs_of_a_comparison_end_with_it(tmp_path, whom):
    words = ["compare", *SMALL, "--steps", "1000000", "--seeds", "0", "1", "--variant", "exact", "--jobs", "2"]
    parent = start(*BLOCKPROP, *words, "--out", tmp_path)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("exact/seed-*/metrics.jsonl"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    children = children_of(parent.pid)
    assert len(children) >= 2
    if whom == "parent":
        parent.kill()
    else:
        for pid in (*children, parent.pid):
            os.kill(pid, signal.SIGINT)
    code, _, error = ended(parent)
    if whom != "parent":
        assert code == 130
        assert error.splitlines()[-1].startswith("blockprop: stopped")
    deadline = time.monotonic() + 10
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, children))


@pytest.mark.parametrize("serving", [1, 2])
def test_workers_with_other_settings(tmp_path, serving):
    """Also where the one that fails serves the store."""
    words = [*TWO, "--store", f"127.0.0.1:{free_port()}", "--steps", "50", "--out", str(tmp_path / "run")]
    serves = {k: "--serve" if k == serving else "--no-serve" for k in (1, 2)}
    workers = [
        start(*BLOCKPROP, "worker", "--block", "1", *words, "--lr", "0.1", serves[1]),
        start(*BLOCKPROP, "worker", "--block", "2", *words, "--lr", "0.2", serves[2]),
    ]
    (one, _, first), (two, _, second) = map(ended, workers)
    assert (one, two) == (3, 2)
    assert "--lr is 0.2 for block-2 and 0.1 for block-1" in second
    assert "stopped, since block-2 failed: --lr is 0.2" in first


def test_a_store_that_does_not_answer(tmp_path, capfd):
    """One line, of which torch's own would be the lesser part."""
    words = ["worker", *SMALL, "--block", "2", "--store", f"127.0.0.1:{free_port()}", "--wait", "1"]
    began = time.monotonic()
    assert main([*words, "--out", str(tmp_path / "run")]) == 2
    assert time.monotonic() - began < 20
    (line,) = capfd.readouterr().err.splitlines()
    assert "no store answers at 127.0.0.1" in line


@pytest.mark.usefixtures("hears_ctrl_c")
def test_a_worker_that_waits_for_others_hears_ctrl_c(tmp_path):
    """And a worker whose neighbours do not come says so, in the time it was given."""
    words = [*BLOCKPROP, "worker", *TWO, "--block", "1", "--out", str(tmp_path / "run")]
    patient = start(*words, "--store", f"127.0.0.1:{free_port()}", "--wait", "500")
    impatient = start(*words, "--store", f"127.0.0.1:{free_port()}", "--wait", "2")
    code, _, error = ended(impatient)
    assert code == 3
    assert "the other end of edge 1-2/0 did not come within 2 seconds" in error
    assert patient.poll() is None
    began = time.monotonic()
    patient.send_signal(signal.SIGINT)
    code, _, error = ended(patient)
    assert code == 130
    assert time.monotonic() - began < 5
    assert error.splitlines() == ["blockprop: stopped; a run with a checkpoint continues with --resume"]


SCRIPT = """
import sys
import torch
from torch import nn
import blockprop
from blockprop.runtime import processes

rank, failing = int(sys.argv[1]), int(sys.argv[2])
model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6 - (rank == failing == 1), 2))  # blocks whose shapes do not meet
algo = blockprop.BlockProp(
    blockprop.split(model, 2, by="layers"),
    nn.CrossEntropyLoss(),
    lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    executor=processes(),
)
for step in range(20):
    if step == 10 and rank == failing == 0:
        raise ValueError("the data are at their end")
    algo.step(torch.randn(8, 4), torch.zeros(8, dtype=torch.long), ids=torch.arange(8))
"""


@pytest.mark.parametrize("failing", [0, 1])
def test_of_a_script_the_one_error_is_said_in_all_processes(tmp_path, failing):
    """Started by their variables alone: one has the error, the other says where; the store is the first's."""
    (tmp_path / "script.py").write_text(SCRIPT)
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    began = time.monotonic()
    scripts = [
        start(sys.executable, str(tmp_path / "script.py"), str(rank), str(failing), RANK=str(rank), **variables)
        for rank in (0, 1)
    ]
    ends = [ended(script) for script in scripts]
    assert [code for code, _, _ in ends] == [1, 1]
    assert time.monotonic() - began < 60
    said, heard = ends[failing][2], ends[1 - failing][2]
    assert "Traceback" in said and "Traceback" not in heard
    [line] = heard.splitlines()
    assert line.startswith(f"blockprop: block-{2 - failing} stopped, since block-{failing + 1} failed: ")
    assert said.strip().splitlines()[-1] == line.split("failed: ")[1]


DEAF = """
import sys, time
import torch
from torch import nn
from blockprop.runtime import failure
failure.SILENCE = 2.0
import blockprop
from blockprop.runtime import processes

algo = blockprop.BlockProp(
    blockprop.split(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)), 2, by="layers"),
    nn.CrossEntropyLoss(),
    lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    executor=processes(),
)
algo.step(torch.randn(8, 4), torch.zeros(8, dtype=torch.long), ids=torch.arange(8))
if sys.argv[1] == "1":
    raise ValueError("the data are at their end")
time.sleep(100)  # of its own, in which nothing tells it that a neighbour is lost
"""


def test_a_script_that_does_not_hear_of_a_failure_is_ended(tmp_path):
    (tmp_path / "script.py").write_text(DEAF)
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    began = time.monotonic()
    scripts = [
        start(sys.executable, str(tmp_path / "script.py"), str(rank), RANK=str(rank), **variables) for rank in (0, 1)
    ]
    (deaf, _, line), (failed, _, _) = map(ended, scripts)
    assert (deaf, failed) == (1, 1)
    assert time.monotonic() - began < 60
    assert line == "blockprop: block-1 stopped, since block-2 failed: ValueError: the data are at their end\n"


SECOND = """
import os, time
import torch
from torch import nn
import blockprop
from blockprop.runtime import processes

for run in range(2):
    if run and os.environ["RANK"] == "0":
        time.sleep(1)
    torch.manual_seed(run)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    algo = blockprop.BlockProp(
        blockprop.split(model, 2, by="layers"),
        nn.CrossEntropyLoss(),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        executor=processes(),
    )
    for _ in range(5):
        algo.step(torch.randn(8, 4), torch.zeros(8, dtype=torch.long), ids=torch.arange(8))
    algo.finish()
    algo.close()
"""


def test_a_script_meets_the_others_again(tmp_path):
    """One run after another; the slower process of the second must not be found where it was in the first."""
    (tmp_path / "script.py").write_text(SECOND)
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    scripts = [start(sys.executable, str(tmp_path / "script.py"), RANK=str(rank), **variables) for rank in (0, 1)]
    assert [ended(script, 60) for script in scripts] == [(0, "", ""), (0, "", "")]


def test_the_one_error_is_said_once(tmp_path):
    """A step size at which it diverges: the last block sees it, and all end."""
    words = ["train", *TWO, *PROCESSES, "--lr", "1e9", "--warmup", "0", "--steps", "500", "--out", tmp_path / "run"]
    code, out, error = ended(start(*BLOCKPROP, *words))
    assert code == 2
    assert out == ""
    assert error.count("error") == 1
    assert "the loss is" in error


def test_under_torchrun_the_one_error_is_said_once(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["train", *TWO, *PROCESSES, "--lr", "1e9", "--warmup", "0", "--steps", "500", "--out", tmp_path / "run"]
    began = time.monotonic()
    code, _, error = ended(start(*torchrun, "-m", "blockprop", *words))
    assert code == 1
    assert time.monotonic() - began < 60
    [line] = [line for line in error.splitlines() if line.startswith("blockprop: ")]  # the others are torchrun's
    assert line.startswith("blockprop: error: the loss is")


def test_a_store_for_others_is_opened_by_a_flag_alone(monkeypatch):
    for name, value in {**MASTER, "MASTER_ADDR": "10.0.0.1", "RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"MASTER_ADDR is 10.0.0.1, where other machines meet.*expected --listen"):
        processes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", *TWO, *PROCESSES, "--recompute"], "--recompute is of"),
        (["train", *SMALL, "--policy", "free-running"], "--policy is of --executor processes"),
        (
            ["train", *SMALL, *PROCESSES, "--policy", "free-running", "--repeats", "2", "--microbatches", "3"],
            "--repeats is of whole",
        ),
        (
            ["train", *SMALL, *PROCESSES, "--policy", "free-running", "--newest", "--microbatches", "3"],
            "--newest is of whole",
        ),
        (["train", *TWO, *PROCESSES, "--in-flight", "3"], "--in-flight is of --policy free-running"),
        (["train", *TWO, *PROCESSES, "--newest"], "--newest is of --policy free-running"),
        (["train", *SMALL, *PROCESSES, "--policy", "free-running", "--replicas", "2"], "--replicas average"),
        (["train", *SMALL, *PROCESSES, "--policy", "free-running", "--schedule", "sync"], "has no use for"),
        (["train", *SMALL, *PROCESSES, "--split-by", "time"], "--split-by time is measured anew"),
        (["train", *SMALL, *PROCESSES, "--replicas", "0"], "--replicas is 0"),
        (["train", *SMALL, *PROCESSES, "--replicas", "2", "--schedule", "cached"], "--replicas share a batch anew"),
        (["worker", *SMALL, "--block", "1", "--store", "nowhere"], "expected HOST:PORT"),
        (["worker", *SMALL, "--block", "1", "--store", "10.0.0.1:29500"], "expected --listen with this machine's"),
        (["worker", *SMALL, "--block", "2", "--store", "10.0.0.1:29500"], "expected --listen with this machine's"),
        (
            ["worker", *SMALL, "--block", "3", "--store", "127.0.0.1:29500"],
            "--block is 3; expected a number from 1 to 2",
        ),
    ],
)
def test_mistakes_are_said_before_anything_is_started(tmp_path, capsys, words, message):
    assert main([*words, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_port_in_use(tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        store = f"127.0.0.1:{taken.getsockname()[1]}"
        assert main(["worker", *SMALL, "--block", "1", "--store", store, "--out", str(tmp_path / "run")]) == 2
    assert "cannot listen on" in capsys.readouterr().err


def test_a_world_of_another_size(tmp_path, capsys, monkeypatch):
    for key, value in {"RANK": "0", "WORLD_SIZE": "3", **MASTER}.items():
        monkeypatch.setenv(key, value)
    assert main(["train", *TWO, *PROCESSES, "--out", str(tmp_path / "run")]) == 2
    assert "torchrun started 3 processes for 2 blocks" in capsys.readouterr().err


def test_under_torchrun_a_run_resumes_as_what_it_is(tmp_path, monkeypatch):
    """Without --executor, which is left at its default."""
    assert main(["train", *TWO, *PROCESSES, "--steps", "4", "--out", str(tmp_path / "run")]) == 0
    asked = []

    def joins(settings, out, **more):
        asked.append((settings.executor, settings.steps, more["resume"]))
        return json.loads((out / "summary.json").read_text())

    monkeypatch.setattr("blockprop.commands.train.of_torchrun", joins)
    for key, value in {"RANK": "0", "WORLD_SIZE": "2", **MASTER}.items():
        monkeypatch.setenv(key, value)
    assert main(["train", "--resume", "--steps", "6", "--out", str(tmp_path / "run")]) == 0
    assert asked == [("processes", 6, True)]
