"""The output loss: a mean and a count, whatever the loss's own reduction."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import blockprop
from blockprop import OutputLoss

OUT = torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, 3.0], [1.0, 1.0, 1.0], [-2.0, 0.0, 2.0]], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 1])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)])
@pytest.mark.parametrize("ignored", [-100, 1])
def test_the_mean_is_torchs_mean_for_every_reduction(reduction, weight, ignored):
    mean, count = OutputLoss(nn.CrossEntropyLoss(weight, reduction=reduction, ignore_index=ignored))(OUT, LABELS)
    torch.testing.assert_close(mean, functional.cross_entropy(OUT, LABELS, weight, ignore_index=ignored))
    total = functional.cross_entropy(OUT, LABELS, weight, ignore_index=ignored, reduction="sum")
    assert float(mean) * count == pytest.approx(float(total), rel=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)])
@pytest.mark.parametrize("ignored", [-100, 1])
def test_per_example_losses_sum_to_the_batchs(reduction, weight, ignored):
    loss = OutputLoss(nn.CrossEntropyLoss(weight, reduction=reduction, ignore_index=ignored, label_smoothing=0.1))
    found = loss.per_example(OUT, LABELS)
    expected = functional.cross_entropy(
        OUT, LABELS, weight, ignore_index=ignored, reduction="none", label_smoothing=0.1
    )
    torch.testing.assert_close(found, expected)
    mean, count = loss(OUT, LABELS)
    assert float(found.sum()) == pytest.approx(float(mean) * count, rel=1e-12)


def test_per_example_losses_of_tokens_and_of_any_function():
    tokens, labels = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    expected = functional.cross_entropy(tokens.movedim(-1, 1), labels, reduction="none").sum(1)
    torch.testing.assert_close(OutputLoss(nn.CrossEntropyLoss()).per_example(tokens, labels), expected)
    other = torch.randn(4, 3, dtype=torch.float64)
    for loss in (nn.MSELoss(), nn.functional.mse_loss):
        torch.testing.assert_close(OutputLoss(loss).per_example(OUT, other), (OUT - other).square().mean(1))
    soft = OUT.softmax(1)
    torch.testing.assert_close(
        OutputLoss(nn.CrossEntropyLoss()).per_example(OUT, soft), functional.cross_entropy(OUT, soft, reduction="none")
    )
    with pytest.raises(ValueError, match="labels run from 0 to 4"):
        OutputLoss(nn.CrossEntropyLoss()).per_example(OUT, torch.tensor([0, 1, 2, 4]))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nll_and_label_smoothing(reduction):
    mean, count = OutputLoss(nn.NLLLoss(reduction=reduction))(OUT.log_softmax(1), LABELS)
    torch.testing.assert_close(mean, functional.cross_entropy(OUT, LABELS))
    assert count == 4
    mean, _ = OutputLoss(nn.CrossEntropyLoss(label_smoothing=0.1, reduction=reduction))(OUT, LABELS)
    torch.testing.assert_close(mean, functional.cross_entropy(OUT, LABELS, label_smoothing=0.1))


def test_probabilities_as_targets():
    soft = OUT.softmax(1)
    mean, count = OutputLoss(nn.CrossEntropyLoss())(OUT, soft)
    torch.testing.assert_close(mean, functional.cross_entropy(OUT, soft))
    assert count == 4
    assert OutputLoss(nn.CrossEntropyLoss()).correct(OUT, soft) is None


def test_classes_second_or_last():
    outputs, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    expected = functional.cross_entropy(outputs.flatten(0, 1), labels.flatten())
    for given, class_dim in ((outputs, None), (outputs, -1), (outputs.movedim(-1, 1), None), (outputs.mT, 1)):
        mean, count = OutputLoss(nn.CrossEntropyLoss(), class_dim)(given, labels)
        torch.testing.assert_close(mean, expected)
        assert count == 10
    with pytest.raises(ValueError, match="do not go with"):
        OutputLoss(nn.CrossEntropyLoss(), class_dim=1)(outputs, labels)


def test_an_ambiguous_class_dimension_is_asked_for():
    outputs, labels = torch.randn(2, 5, 5), torch.randint(5, (2, 5))
    with pytest.raises(ValueError, match="class_dim"):
        OutputLoss(nn.CrossEntropyLoss())(outputs, labels)
    last, _ = OutputLoss(nn.CrossEntropyLoss(), class_dim=-1)(outputs, labels)
    torch.testing.assert_close(last, functional.cross_entropy(outputs.mT, labels))
    second, _ = OutputLoss(nn.CrossEntropyLoss(), class_dim=1)(outputs, labels)
    torch.testing.assert_close(second, functional.cross_entropy(outputs, labels))


def test_correct_counts_predictions():
    assert OutputLoss(nn.CrossEntropyLoss()).correct(OUT, LABELS) == 1
    assert OutputLoss(nn.CrossEntropyLoss()).correct(OUT, OUT.argmax(1)) == 4
    outputs = torch.eye(3)[torch.tensor([[0, 1], [2, 2]])]  # [N, T, C]
    assert OutputLoss(nn.CrossEntropyLoss()).correct(outputs, torch.tensor([[0, 1], [2, 0]])) == 3
    assert OutputLoss(nn.MSELoss()).correct(OUT, OUT) is None


def test_functions_count_examples():
    mean, count = OutputLoss(functional.mse_loss)(OUT, OUT + 2)
    assert (float(mean), count) == (4.0, 4.0)
    mean, count = OutputLoss(lambda a, b: (a - b).square().sum(1))(OUT, OUT + 2)
    assert (float(mean), count) == (12.0, 4.0)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 2, 3]), "labels run from 0 to 3 but the network has 3 outputs"),
        (torch.tensor([0, -1, 2, 1]), "labels run from -1 to 2"),
        (torch.full((4,), -100), "ignore_index"),
        (torch.tensor([0, 1, 2]), "outputs have 4 rows and targets 3"),
        (torch.tensor([[0], [1], [2], [1]]), "do not go with class labels"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        OutputLoss(nn.CrossEntropyLoss())(OUT, labels)


def test_an_ignored_label_need_not_be_a_class():
    labels = torch.tensor([0, -100, 2, 1])
    mean, count = OutputLoss(nn.CrossEntropyLoss())(OUT, labels)
    assert count == 3
    torch.testing.assert_close(mean, functional.cross_entropy(OUT, labels))


def test_it_is_exported():
    assert blockprop.OutputLoss is OutputLoss


def test_a_column_of_outputs_is_not_paired_with_a_row_of_targets():
    with pytest.raises(ValueError, match="all with all"):
        OutputLoss(nn.MSELoss())(torch.zeros(4, 1), torch.zeros(4))


def test_a_class_is_not_a_loss():
    with pytest.raises(ValueError, match="expected an instance: CrossEntropyLoss"):
        OutputLoss(nn.CrossEntropyLoss)
