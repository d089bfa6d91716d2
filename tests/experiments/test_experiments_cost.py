"""`blockprop cost`, as a user meets it."""

import json

import pytest
import torch

from blockprop.cli import main

SMALL = ["--batch-size", "4", "--repeats", "1"]


@pytest.mark.parametrize(
    "arguments",
    [
        [
            "mlp",
            "--width",
            "16",
            "--depth",
            "4",
            "--blocks",
            "3",
            "--h-steps",
            "2",
            "--norm",
            "batch",
            "--dropout",
            "0.2",
        ],
        ["resnet18", "--width", "2"],
        ["preact-resnet18", "--width", "2", "--blocks", "3"],
        ["gpt", "--width", "16", "--depth", "2", "--context", "8"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_the_table_has_every_form_beside_the_bounds(arguments, capsys):
    threads = torch.get_num_threads()
    assert main(["cost", *arguments, *SMALL]) == 0
    shown = capsys.readouterr().out
    assert arguments[0] in shown.splitlines()[0]
    for name in ("published", "published, nothing shared", "exact", "rescaled", "proximal", "exact, cached"):
        assert any(line.strip().startswith(f"{name} ") for line in shown.splitlines())
    assert "…" not in shown
    (counted,) = [line for line in shown.splitlines() if "nothing shared" in line]
    assert counted.split()[-1] == "within"
    assert "C(backprop) + C(forward)" in shown
    assert torch.get_num_threads() == threads


def test_json_has_all_numbers(capsys):
    assert main(["cost", "mlp", "--width", "16", "--json", *SMALL]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "mlp"
    assert found["cut"]["layers"] == [["flatten", "layer1.linear", "layer1.relu"], ["layer2"]]
    assert found["forward"]["flops"] == 2 * 4 * 16 * (784 + 10)
    first = found["cases"][0]
    assert first["nothing_shared"]
    assert first["lower_bound"] < first["flops"]["total"] < first["upper_bound"]
    assert first["flops"]["total"] == sum(first["flops"][part] for part in ("forward", "h_step", "w_step"))
    assert first["seconds"]["total"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mpl"], "unknown model 'mpl'; expected one of mlp, resnet18, preact-resnet18, gpt"),
        (["mlp", "--blocks", "9"], "at most 2"),
        (["mlp", "--blocks", "1"], "at least 2 blocks"),
        (["mlp", "--h-steps", "0"], "h-steps is 0"),
        (["mlp", "--repeats", "0"], "repeats is 0"),
        (["mlp", "--batch-size", "0"], "batch size is 0"),
        (["gpt", "--context", "0"], "context is 0"),
        (["mlp", "--width", "0"], "width is 0"),
        (["resnet18", "--depth", "3"], "no use for depth"),
        ([], "model"),
    ],
)
def test_mistakes_take_one_line(arguments, message, capsys):
    assert main(["cost", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert message.lower() in said.lower()
