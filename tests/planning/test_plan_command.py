"""`blockprop plan`, as a user meets it."""

import json

import pytest

from blockprop.cli import main

SMALL = ["--width", "16", "--depth", "6", "--batch-size", "8", "--repeats", "1"]


def test_the_table_has_every_method(capsys):
    assert main(["plan", "mlp", *SMALL, "--blocks", "3"]) == 0
    shown = capsys.readouterr().out
    assert "6 layers, K = 3, batch of 8, 1000 Mbit/s, 1 ms" in shown.splitlines()[0]
    for name in ("one device", "DDP", "GPipe", "1F1B", "zero bubble"):
        assert any(line.strip().startswith(f"{name} ") for line in shown.splitlines())
    for name in ("lock-step", "stashed", "free-running", "cached"):
        assert f"BlockProp, {name}" in shown


def test_json_has_all_numbers(capsys):
    words = ["--blocks", "2", "--speeds", "1", "0.5", "--bandwidth", "10", "--latency", "2", "--json"]
    assert main(["plan", "mlp", *SMALL, *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cluster"]["speeds"] == [1.0, 0.5]
    assert found["cluster"]["link"] == {
        "bandwidth": 10.0,
        "latency": 2.0,
        "overhead": 0.3,
        "handling": 0.45,
        "copying": 0.28,
        "duplex": 1.0,
    }
    assert found["setting"]["batch_size"] == 8
    assert len(found["methods"]) == 9
    assert all(len(each["busy"]) == 2 and each["samples_per_second"] > 0 for each in found["methods"])


def test_the_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["plan", "mlp", *SMALL, "--blocks", "4", "--plot", str(tmp_path / "map.png")]) == 0
    assert (tmp_path / "map.png").stat().st_size > 1000
    assert "bandwidth of a link" in (tmp_path / "map.svg").read_text()
    capsys.readouterr()
    assert main(["plan", "mlp", *SMALL, "--blocks", "4", "--plot", str(tmp_path / "map.svg")]) == 2
    assert "map.png is there already" in capsys.readouterr().err
    assert main(["plan", "mlp", *SMALL, "--blocks", "4", "--plot", str(tmp_path / "map.pdf")]) == 2
    assert "ends in .png, .svg or nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vgg"], "unknown model 'vgg'"),
        (["mlp", "--blocks", "0"], "--blocks is 0"),
        (["mlp", "--blocks", "3", "--speeds", "1", "2"], "--speeds has 2 numbers; expected one for all devices, or 3"),
        (["mlp", "--bandwidth", "0"], "bandwidth is 0.0; expected"),
        (["mlp", "--batch-size", "2"], "cannot cut 2 examples into 4 microbatches"),
        (["mlp", "--blocks", "3"], "cannot cut 2 layers into 3 blocks; expected at most 2: give fewer --blocks"),
        (["mlp", "--contention", "0.5"], "contention is 0.5"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys):
    assert main(["plan", *words, "--repeats", "1"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
