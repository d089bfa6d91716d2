import pytest
import torch
from torch.utils.data import TensorDataset

from blockprop.data import Dataset


def pairs(n=20, *, targets=None):
    return torch.rand(n, 3), torch.arange(n) % 4 if targets is None else targets


@pytest.mark.parametrize(
    ("targets", "task", "outputs", "shape"),
    [
        (torch.arange(20) % 4, "classification", 4, []),
        ((torch.arange(20) % 4).to(torch.uint8), "classification", 4, []),
        (torch.arange(40).view(20, 2) % 7, "language", 7, [2]),
        (torch.rand(20), "regression", 1, [1]),
        (torch.rand(20, 5, dtype=torch.float64), "regression", 5, [5]),
    ],
)
def test_the_targets_tell_the_task(targets, task, outputs, shape):
    data = Dataset.from_tensors(pairs(targets=targets), pairs(targets=targets))
    assert (data.task, data.classes, data.input_shape) == (task, outputs, (3,))
    batch = data.test.batch(torch.tensor([0, 1]))[1]
    assert list(batch.shape) == [2, *shape]
    assert batch.dtype == (torch.float32 if task == "regression" else torch.int64)


def test_validation_is_taken_from_train_alone():
    data = Dataset.from_tensors(pairs(20), TensorDataset(*pairs(10)), validation=0.25)
    assert (len(data.train), len(data.validation), len(data.test)) == (15, 5, 10)


def test_no_validation_is_a_set_of_length_zero():
    data = Dataset.from_tensors(pairs(), pairs(), validation=0)
    assert len(data.validation) == 0


def test_the_sample_is_two_transformed_inputs_even_of_a_single_example():
    one = torch.ones(1, 3, 4), torch.tensor([0])
    data = Dataset.from_tensors(one, one, transform=lambda inputs: inputs.flatten(1) * 2)
    assert data.input_shape == (12,)
    assert torch.equal(data.sample, torch.full((2, 12), 2.0))


def test_classes_may_exceed_what_the_targets_show():
    assert Dataset.from_tensors(pairs(), pairs(), classes=9).classes == 9


@pytest.mark.parametrize(
    ("train", "test", "options", "message"),
    [
        (pairs(), (torch.rand(5, 2), torch.zeros(5, dtype=torch.long)), {}, "a training input .* but a test input"),
        (pairs(), (torch.rand(5, 3), torch.zeros(5)), {}, "a training target .* but a test target"),
        (pairs(), pairs(), {"classes": 3}, "targets run from 0 to 3; expected class numbers from 0 to 2"),
        (pairs(targets=torch.arange(20) - 1), pairs(), {}, "targets run from -1 to 18"),
        (pairs(targets=torch.rand(20)), pairs(targets=torch.rand(20)), {"classes": 2}, "targets are floats"),
        (pairs(targets=torch.rand(20, 2, 2)), pairs(), {}, r"targets have shape \[20, 2, 2\]"),
        (pairs(targets=torch.zeros(20, dtype=torch.cfloat)), pairs(), {}, "train: targets are torch.complex64"),
        (pairs(), pairs(), {"classes": 0}, "classes is 0; expected a whole number"),
        (pairs(), pairs(), {"classes": "4"}, "classes is '4'; expected a whole number"),
        (pairs(), pairs(), {"classes": True}, "classes is True; expected a whole number"),
        (pairs(), pairs(), {"validation": 1.0}, "validation is 1.0"),
        (pairs(), pairs(), {"validation": None}, "validation is a NoneType; it is a fraction"),
        (pairs(), pairs(), {"validation": pairs()}, "validation is a tuple; it is a fraction"),
        (pairs(), pairs(0), {}, "test: the data hold no examples"),
        (pairs(), None, {}, "test: the data are a NoneType; expected"),
        (*pairs(), {}, r"train: the data are a Tensor; expected a tuple of two tensors, \(inputs, targets\)"),
    ],
)
def test_bad_data_are_one_line(train, test, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        Dataset.from_tensors(train, test, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("targets", "what"),
    [(torch.arange(20) % 4, "4 classes"), (torch.rand(20, 2), "2 values"), (torch.zeros(20, 5).long(), "1 tokens")],
)
def test_a_repr_is_short(targets, what):
    data = Dataset.from_tensors(pairs(targets=targets), pairs(targets=targets), name="mine")
    assert repr(data) == f"Dataset('mine': train 18, validation 2, test 20; inputs [3], {what})"


@pytest.mark.parametrize("drop", [["only_inputs"], ["only_targets"], ["only_inputs", "only_targets"]])
def test_a_dataset_of_one_side_keeps_its_form(drop):
    whole = Dataset.from_tensors(pairs(), pairs(8), validation=0.25)
    data = whole
    for name in drop:
        data = getattr(data, name)()
    assert (data.classes, data.input_shape, data.task) == (4, (3,), "classification")
    assert repr(data) == repr(whole)
    for part in ("train", "validation", "test"):
        ours, theirs = getattr(data, part), getattr(whole, part)
        assert len(ours) == len(theirs)
        assert (ours.inputs.is_meta, ours.targets.is_meta) == ("only_targets" in drop, "only_inputs" in drop)
        if drop == ["only_inputs"]:
            assert torch.equal(ours.batch_inputs(torch.arange(2)), theirs.batch_inputs(torch.arange(2)))
        if drop == ["only_targets"]:
            assert torch.equal(ours.batch_targets(torch.arange(2)), theirs.batch_targets(torch.arange(2)))
