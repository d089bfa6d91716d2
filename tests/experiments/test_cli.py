"""The command line as a user meets it: real runs on digits, and every mistake in one line with status 2."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from blockprop.cli import main
from blockprop.experiments.folder import claimed
from blockprop.models import mlp

QUICK = ["--data", "digits", "--width", "16", "--quiet", "--threads", "1"]


def train(out: Path, *more: str, steps: int = 12) -> int:
    return main(["train", *QUICK, "--steps", str(steps), "--out", str(out), *more])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_leaves_everything_in_its_folder(tmp_path):
    assert train(tmp_path / "run", "--blocks", "2") == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert {
        "algorithm", "data", "model", "blocks", "seed", "epochs", "samples", "seconds", "samples_per_second",
        "test_loss", "test_accuracy", "gluing_loss", "versions", "origin",
    } <= summary.keys()  # fmt: skip
    assert 0 <= summary["test_accuracy"] <= 1
    assert summary["samples"] == 12 * 64
    assert len(summary["gluing_loss"]) == 1
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["cut"]["layers"] == [["flatten", "layer1.linear", "layer1.relu"], ["layer2"]]
    assert config["lr"] == 0.1
    model = mlp((1, 8, 8), 10, width=16, depth=2)
    model.load_state_dict(load_file(tmp_path / "run/model.safetensors"))
    assert list((tmp_path / "run/checkpoints").glob("*.safetensors"))


@pytest.mark.parametrize(
    "more",
    [
        ["--algorithm", "backprop"],
        ["--form", "published", "--h-steps", "3", "--h-lr", "0.1"],
        ["--form", "rescaled", "--blocks", "2"],
        ["--form", "proximal", "--h-solver", "gauss-newton"],
        ["--form", "proximal", "--h-solver", "backtracking", "--huber", "0.5"],
        ["--form", "proximal", "--h-solver", "momentum", "--h-steps", "2"],
        ["--blocks", "4", "--depth", "4", "--penalty", "1", "2", "3", "--block-lr", ".1", ".1", ".05", ".05"],
        ["--executor", "threads", "--devices", "cpu", "cpu"],
        ["--optimizer", "adamw", "--lr-schedule", "cosine", "--warmup", "3", "--clip", "1", "--accumulate", "2"],
        ["--precision", "bfloat16", "--recompute", "--dropout", "0.2", "--norm", "layer"],
        ["--model", "resnet18", "--batch-size", "16"],
        ["--w-damping", "1", "--momentum", "0.5"],
        ["--depth", "3", "--split-at", "layer2", "layer3", "--block-lr", ".1", ".2", ".1"],
        ["--train-size", "100", "--validation", "0", "--evaluate-on", "test"],
    ],
    ids=lambda more: " ".join(more)[:40],
)
def test_settings_train(tmp_path, more):
    assert train(tmp_path / "run", *more, steps=2 if "resnet18" in more else 12) == 0


def test_a_text_of_the_users_own(tmp_path):
    text = tmp_path / "own.txt"
    text.write_text("to be or not to be, that is the question. " * 200)
    out = tmp_path / "run"
    arguments = ["--context", "16", "--width", "32", "--depth", "2", "--steps", "5", "--quiet"]
    arguments += ["--diagnose-every", "2", "--form", "proximal", "--h-solver", "gauss-newton"]
    assert main(["train", "--data", str(text), *arguments, "--out", str(out)]) == 0
    assert json.loads((out / "summary.json").read_text())["model"] == "gpt"


def test_resume_continues_bit_for_bit(tmp_path):
    settings = ["--dropout", "0.2", "--norm", "batch", "--checkpoint-every", "5"]
    assert train(tmp_path / "whole", *settings, steps=30) == 0
    assert train(tmp_path / "parts", *settings, steps=17) == 0
    assert main(["train", "--resume", "--out", str(tmp_path / "parts"), "--steps", "30", "--quiet"]) == 0
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all((whole[name] == parts[name]).all() for name in whole)


def test_resuming_a_finished_run_says_so_and_changes_nothing(tmp_path, capsys):
    assert train(tmp_path / "run", steps=3) == 0
    assert "already finished" not in capsys.readouterr().out
    before = files(tmp_path / "run")
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("already finished; give more --epochs or --steps to continue: test loss ")
    assert printed.count("\n") == 1
    after = files(tmp_path / "run")
    assert {name for name in after if after[name] != before.get(name)} <= {n for n in after if "tensorboard" in n}
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), "--steps", "2", "--quiet"]) == 2
    assert "at step 3, beyond the 2 steps" in capsys.readouterr().err
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), "--steps", "4", "--quiet"]) == 0
    assert "already finished" not in capsys.readouterr().out


def test_epochs_are_shown_rounded(tmp_path, capsys):
    assert main(["train", *(word for word in QUICK if word != "--quiet"), "--steps", "3", "--out", str(tmp_path)]) == 0
    assert ": epoch 0.14, loss" in capsys.readouterr().err
    assert json.loads((tmp_path / "summary.json").read_text())["epochs"] == 0.1429
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["epoch"] == 0.142857


@pytest.mark.parametrize("out", ["file", "file/run", "file/deep/run"])
@pytest.mark.parametrize("command", ["train", "compare --seeds 0", "report {run}"])
def test_a_file_in_the_place_of_the_folder(tmp_path, capsys, out, command):
    train(tmp_path / "run", steps=1)
    (tmp_path / "file").write_text("mine")
    before = files(tmp_path)
    assert main([*command.format(run=tmp_path / "run").split(), "--out", str(tmp_path / out)]) == 2
    assert capsys.readouterr().err == (
        f"blockprop: error: {tmp_path / 'file'} is a file, not a folder; name another --out\n"
    )
    assert files(tmp_path) == before


def test_an_error_of_the_system_is_one_line(tmp_path, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert train(tmp_path / "run") == 2
    assert capsys.readouterr().err == f"blockprop: error: {tmp_path}: Permission denied\n"


def test_a_run_that_recorded_null_for_its_defaults_resumes_and_records_them(tmp_path):
    settings = ["--data", "digits", "--quiet", "--steps"]
    assert main(["train", *settings, "30", "--out", str(tmp_path / "whole")]) == 0
    assert main(["train", *settings, "17", "--out", str(tmp_path / "parts")]) == 0
    path = tmp_path / "parts/config.json"
    nulls = dict.fromkeys(("width", "depth", "augment", "h_lr", "threads"))
    old = {**json.loads(path.read_text()), **nulls}
    old["schedule"] = old.pop("lr_schedule")
    path.write_text(json.dumps(old))
    resumed = ["train", "--resume", "--out", str(tmp_path / "parts"), "--steps", "30", "--width", "300", "--quiet"]
    assert main(resumed) == 0
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all((whole[name] == parts[name]).all() for name in whole)
    assert json.loads(path.read_text()) == json.loads((tmp_path / "whole/config.json").read_text())


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_killed_run_resumes_and_ends_as_if_nothing_had_happened(tmp_path):
    settings = [*QUICK, "--dropout", "0.2", "--steps", "1500", "--checkpoint-every", "40"]
    command = [sys.executable, "-m", "blockprop", "train", *settings, "--out"]
    assert subprocess.run([*command, str(tmp_path / "whole")], timeout=120, check=False).returncode == 0
    victim = subprocess.Popen([*command, str(tmp_path / "killed")])
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("killed/checkpoints/*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(victim.pid, signal.SIGKILL)
    assert victim.wait(timeout=30) == -signal.SIGKILL
    assert not (tmp_path / "killed/summary.json").exists()
    assert main(["train", "--resume", "--out", str(tmp_path / "killed"), "--quiet"]) == 0
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all((whole[name] == killed[name]).all() for name in whole)


def test_compare_and_report(tmp_path, capsys):
    arguments = ["compare", *QUICK, "--steps", "12", "--seeds", "0", "1", "--out", str(tmp_path / "c")]
    variants = ["--variant", "backprop", "--variant", "exact", "--variant", "published h-lr=0.1"]
    assert main([*arguments, *variants]) == 0
    printed = capsys.readouterr().out
    assert "backprop" in printed and "blockprop exact" in printed and "blockprop published" in printed
    table = (tmp_path / "c/comparison.md").read_text()
    png = (tmp_path / "c/comparison.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    before = {name: content for name, content in files(tmp_path / "c").items() if "seed" in name}
    assert main([*arguments, *variants]) == 0, "finished runs are kept"
    assert {name: content for name, content in files(tmp_path / "c").items() if "seed" in name} == before
    assert main(["report", str(tmp_path / "c"), "--out", str(tmp_path / "r")]) == 0
    assert (tmp_path / "r/comparison.md").read_text() == table


def test_variants_inherit_what_is_of_use_to_some_of_them(tmp_path):
    arguments = ["compare", *QUICK, "--steps", "2", "--seeds", "0", "--out", str(tmp_path / "c")]
    arguments += ["--penalty", "10", "--h-momentum", "0.3", "--form", "proximal"]
    for variant in ("backprop", "exact", "h-solver=momentum h-steps=2"):
        arguments += ["--variant", variant]
    assert main(arguments) == 0
    assert main(arguments) == 0, "they are known again"
    configs = [json.loads(path.read_text()) for path in sorted((tmp_path / "c").rglob("config.json"))]
    assert [(config["penalty"], config["h_momentum"]) for config in configs] == [
        ([1.0], 0.5),
        ([10.0], 0.5),
        ([10.0], 0.3),
    ]


def test_a_comparison_records_a_divergence(tmp_path, capsys):
    arguments = [
        "compare",
        *QUICK,
        "--steps",
        "12",
        "--seeds",
        "0",
        "--out",
        str(tmp_path / "c"),
        "--variant",
        "backprop",
    ]
    assert main([*arguments, "--variant", "exact lr=1e38"]) == 0
    assert "1 diverged" in capsys.readouterr().out


def test_compare_in_processes_gives_the_same_runs(tmp_path):
    arguments = ["compare", *QUICK, "--steps", "12", "--seeds", "0", "1", "--variant", "exact"]
    assert main([*arguments, "--out", str(tmp_path / "one")]) == 0
    assert main([*arguments, "--out", str(tmp_path / "two"), "--jobs", "2"]) == 0
    for seed in ("seed-0", "seed-1"):
        one, two = (load_file(tmp_path / name / "exact" / seed / "model.safetensors") for name in ("one", "two"))
        assert all((one[name] == two[name]).all() for name in one)


MISTAKES = [
    ("train --data nope", "unknown dataset"),
    ("train --data mnist --data-dir {tmp}", "does not exist"),
    ("train --model nope", "unknown model"),
    ("train --model gpt", "does not go with"),
    ("train --blocks 3", "cannot cut 2 layers into 3 blocks"),
    ("train --blocks 0", "number of blocks is 0"),
    ("train --blocks two", "--blocks"),
    ("train --blocks 2.5", "--blocks: 2.5 is not a whole number"),
    ("train --steps 7.5", "--steps: 7.5 is not a whole number"),
    ("compare --out {tmp}/c --seeds 0 1.5", "1.5 is not a whole number"),
    ("train --width 0", "width is 0"),
    ("train --depth 0", "depth is 0"),
    ("train --dropout 1", "dropout is 1"),
    ("train --norm nope", "--norm"),
    ("train --algorithm nope", "--algorithm"),
    ("train --form nope", "--form"),
    ("train --form exact --h-steps 2", "proximal"),
    ("train --form exact --h-lr 3", "2λγ_h = 1"),
    ("train --h-solver gauss-newton", "proximal"),
    ("train --form rescaled --h-solver backtracking", "proximal"),
    ("train --h-steps 0", "h-steps is 0"),
    ("train --penalty 0", "λ is 0"),
    ("train --penalty 1 2", "2 values for 1 links"),
    ("train --huber 1", "squared penalty"),
    ("train --form proximal --huber -1", "delta is -1"),
    ("train --executor nope", "--executor"),
    ("train --devices nowhere", "nowhere"),
    ("train --devices cpu cpu cpu", "3 devices"),
    ("train --algorithm backprop --form published", "--form is of blockprop"),
    ("train --algorithm backprop --penalty 10", "--penalty is of blockprop"),
    ("train --algorithm backprop --huber 1", "--huber is of blockprop"),
    ("train --algorithm backprop --h-steps 2", "--h-steps is of blockprop"),
    ("train --algorithm backprop --h-lr 0.1", "--h-lr is of blockprop"),
    ("train --algorithm backprop --recompute", "--recompute is of blockprop"),
    ("train --algorithm backprop --executor threads", "--executor is of blockprop"),
    ("train --algorithm backprop --diagnose-every 5", "--diagnose-every is of blockprop"),
    ("train --h-momentum 0.9", "--h-momentum is of --h-solver momentum, not of descent"),
    ("train --form proximal --h-solver gauss-newton --h-lr 0.1", "gauss-newton has no step size"),
    ("train --optimizer nope", "--optimizer"),
    ("train --optimizer muon --momentum 0.9", "--momentum"),
    ("train --optimizer adam --momentum 1", "--momentum is 1"),
    ("train --split-at layer2 --blocks 3", "--split-at names 1 cuts"),
    ("train --split-at nope", "no module 'nope'"),
    ("train --train-size 0", "train size is 0"),
    ("train --train-size 5000", "from 1 to 1293"),
    ("train --w-damping 0", "damping is 0"),
    ("train --w-damping 1 --optimizer adam", "of sgd, not of adam"),
    ("train --lr 0", "--lr is 0"),
    ("train --schedule pipelined --trust -1", "--trust is -1"),
    ("train --schedule pipelined --latency 2 --latency-chances 1 2", "expected 3 numbers"),
    ("train --schedule pipelined --latency-chances 1", "--latency-chances is of --latency"),
    ("schedule --blocks 2 --latency 1 --latency-chances 1 1 1", "expected 2 numbers"),
    ("train --executor processes --policy free-running --feedback stashed --repeats 1", "--repeats is of targets"),
    ("train --executor processes --policy free-running --schedule cached --newest", "--newest is of --schedule"),
    ("train --schedule pipelined --trust inf", "--trust is inf"),
    ("train --trust 1", "--trust is of --schedule pipelined"),
    ("train --lr nan", "--lr is nan"),
    ("train --block-lr 0.1", "1 step sizes for 2 blocks"),
    ("train --clip 0", "clip is 0"),
    ("train --accumulate 0", "accumulate is 0"),
    ("train --batch-size 0", "batch size is 0"),
    ("train --epochs 0", "epochs is 0"),
    ("train --epochs 1 --steps 2", "--epochs and --steps"),
    ("train --seed -1", "--seed is -1"),
    ("train --threads 0", "--threads is 0"),
    ("train --validation 1", "validation"),
    ("train --augment", "augment"),
    ("train --log-every 0", "log-every is 0"),
    ("train --resume --out {tmp}/none", "there is no"),
    ("train --resume --out {tmp}/none/config.json/x", "there is no"),
    ("train --resume", "--out"),
    ("train --nope 3", "--nope"),
    ("compare --out {tmp}/c --variant nope", "nope"),
    ("compare --out {tmp}/c --variant lr=x", "lr"),
    ("compare --out {tmp}/c --variant form=published --algorithm backprop", "--form is of blockprop"),
    ("compare --out {tmp}/c --variant backprop --penalty 10", "--penalty is of blockprop"),
    ("compare --out {tmp}/c --h-momentum 0.9", "--h-momentum is of --h-solver momentum"),
    ("compare --out {tmp}/c --seeds 1 1", "no seed twice"),
    ("compare --out {tmp}/c --seed 3", "expected --seeds"),
    ("schedule --copies 2", "no effect without --lost"),
    ("train --optimizer nesterov --momentum 0", "nesterov is a kind of momentum"),
    ("train --weight-decay nan", "--weight-decay is nan"),
    ("train --seed 99999999999999999999", "--seed is 99999999999999999999"),
    ("train --context 5", "--context is of text"),
    ("train --threads 100000", "--threads is 100000"),
    ("compare --out {tmp}/c --jobs 0", "jobs is 0"),
    ("compare", "--out"),
    ("figure 4", "4"),
    ("figure 2 --width 3", "--width is of figure 3"),
    ("figure 2 --redraw --out {tmp}/f", "holds no runs to draw"),
    ("figure 2 --quick --jobs 0 --out {tmp}/f", "jobs is 0"),
    ("figure 2 --quick --seeds 1 1 --out {tmp}/f", "none twice"),
    ("gap --quick --seeds 1000 --out {tmp}/g", "chooses step sizes"),
    ("report {tmp}/none", "there is no folder"),
    ("report {tmp}", "no finished run"),
    ("report", "at least one folder"),
    ("nope", "nope"),
]


@pytest.mark.parametrize(("command", "message"), MISTAKES, ids=[command for command, _ in MISTAKES])
def test_a_mistake_is_one_line_and_status_2_and_leaves_no_file(command, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command.format(tmp=tmp_path).split()) == 2
    printed = capsys.readouterr().err.strip()
    assert printed.startswith("blockprop: error: ")
    assert "\n" not in printed and "Traceback" not in printed
    assert message in printed
    assert files(tmp_path) == {}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: None, "already holds a run"),
        (lambda run: ["--resume", "--width", "8"], "--width is 8"),
        (lambda run: ["--resume", "--seed", "3"], "--seed is 3"),
    ],
)
def test_a_run_is_never_overwritten(tmp_path, capsys, damage, message):
    train(tmp_path / "run")
    before = files(tmp_path / "run")
    more = damage(tmp_path / "run") or []
    assert main(["train", "--out", str(tmp_path / "run"), "--quiet", *more]) == 2
    assert message in capsys.readouterr().err
    assert files(tmp_path / "run") == before


def test_two_processes_do_not_train_in_one_folder(tmp_path, capsys):
    train(tmp_path / "run")
    capsys.readouterr()
    with claimed(tmp_path / "run"):
        assert main(["train", "--resume", "--out", str(tmp_path / "run"), "--steps", "20", "--quiet"]) == 2
    assert "another process is training in" in capsys.readouterr().err
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), "--steps", "20", "--quiet"]) == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", "four"), ("penalty", 3), ("lr", "fast"), ("data_dir", 7), ("form", "new"), ("blocks", True)],
)
def test_a_configuration_with_a_value_of_a_wrong_type(tmp_path, capsys, key, value):
    train(tmp_path / "run")
    path = tmp_path / "run/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    capsys.readouterr()
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), "--steps", "20", "--quiet"]) == 2
    printed = capsys.readouterr().err.strip()
    assert f"config.json has {value!r} for {key}; expected one written by a run" in printed and "\n" not in printed


@pytest.mark.parametrize("where", ["flip", "cut", "empty", "foreign", "config", "no-config"])
def test_damaged_runs_are_refused_and_left_alone(tmp_path, capsys, where):
    train(tmp_path / "run")
    newest = max((tmp_path / "run/checkpoints").glob("*.safetensors"))
    content = bytearray(newest.read_bytes())
    config = tmp_path / "run/config.json"
    match where:
        case "flip":
            content[len(content) // 2] ^= 1
            newest.write_bytes(content)
        case "cut":
            newest.write_bytes(content[:-7])
        case "empty":
            newest.write_bytes(b"")
        case "foreign":
            newest.write_bytes((tmp_path / "run/model.safetensors").read_bytes())
        case "config":
            config.write_text(config.read_text()[:-9])
        case "no-config":
            config.unlink()
    before = files(tmp_path / "run")
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), "--steps", "20", "--quiet"]) == 2
    printed = capsys.readouterr().err.strip()
    assert printed.startswith("blockprop: error: ") and "\n" not in printed
    assert files(tmp_path / "run") == before


def test_a_text_that_was_edited_is_not_what_the_run_began_with(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    words = ["--data", str(text), "--model", "gpt", "--width", "16", "--depth", "2", "--context", "16", "--quiet"]
    words += ["--steps", "4", "--checkpoint-every", "2", "--threads", "1"]
    assert main(["train", *words, "--out", str(tmp_path / "run")]) == 0
    text.write_text("a" + text.read_text()[:-1])  # as long, with the same characters
    capsys.readouterr()
    assert main(["train", "--resume", "--steps", "6", "--quiet", "--out", str(tmp_path / "run")]) == 2
    assert "are not those that the run began with" in capsys.readouterr().err
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    assert main(["train", "--resume", "--steps", "6", "--quiet", "--out", str(tmp_path / "run")]) == 0
