import math
import weakref

import pytest
import torch
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset, TensorDataset

from blockprop.data import Examples


def noisy(inputs, generator):
    return inputs + torch.rand(inputs.shape, generator=generator)


def test_a_batch_is_the_rows_of_the_ids():
    examples = Examples(torch.arange(8.0).view(4, 2), torch.arange(4))
    inputs, targets = examples.batch(torch.tensor([3, 1]))
    assert inputs.tolist() == [[6, 7], [2, 3]]
    assert targets.tolist() == [3, 1]


def test_augmentation_comes_before_the_transform_and_only_with_a_generator():
    examples = Examples(torch.zeros(4, 2), torch.arange(4), transform=lambda inputs: 10 * inputs, augment=noisy)
    ids = torch.arange(4)
    exact, _ = examples.batch(ids)
    augmented, _ = examples.batch(ids, torch.Generator().manual_seed(3))
    assert torch.equal(exact, torch.zeros(4, 2))
    assert torch.equal(augmented, 10 * torch.rand(4, 2, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(examples.inputs, torch.zeros(4, 2))


def test_select_renumbers_and_keeps_the_transform():
    examples = Examples(torch.arange(4.0), torch.arange(4), transform=torch.neg, augment=noisy)
    part = examples.select(torch.tensor([2, 3]))
    assert len(part) == 2
    assert part.batch(torch.tensor([1]))[0].item() == -3
    assert part.augment is noisy


def test_a_map_style_dataset_is_stacked():
    class Squares(TorchDataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return torch.full((2,), float(index)), index**2

    examples = Examples.of(Squares())
    assert examples.inputs.tolist() == [[0, 0], [1, 1], [2, 2]]
    assert examples.targets.tolist() == [0, 1, 4]


def test_a_tensor_dataset_and_its_tensors_give_the_same():
    inputs, targets = torch.rand(2, 3), torch.tensor([1, 0])
    stacked = Examples.of(TensorDataset(inputs, targets))
    direct = Examples.of((inputs, targets))
    assert torch.equal(stacked.inputs, direct.inputs)
    assert torch.equal(stacked.targets, direct.targets)


class Endless(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ((torch.rand(3, 2), torch.zeros(2)), "3 inputs but 2 targets"),
        (
            (torch.tensor([[1.0, math.nan], [math.inf, 2.0]]), torch.zeros(2)),
            "inputs hold 2 NaN or infinite values of 4",
        ),
        ((torch.zeros(2, 1), torch.tensor([0.0, -math.inf])), "targets hold 1 NaN or infinite values of 2"),
        ((torch.tensor(1.0), torch.tensor(1.0)), "inputs is a single number"),
        ((torch.empty(0, 3), torch.empty(0)), "no examples"),
        ([], "no examples"),
        ([(torch.zeros(2), 0), (torch.zeros(3), 0)], r"input 1 has shape \[3\] but input 0 \[2\]"),
        ([(0.0, torch.zeros(2)), (0.0, torch.zeros(1))], r"target 1 has shape \[1\] but target 0 \[2\]"),
        ([(torch.zeros(2), "cat")], r"example 0 is a tuple \(Tensor, str\), not a pair.*expected \(input, target\)"),
        ([{"input": torch.zeros(2)}], "example 0 is a dict, not a pair"),
        ([5], "example 0 is a int, not a pair"),
        ([torch.zeros(3)], r"the data are a list \(Tensor\); expected a tuple of two tensors, \(inputs, targets\)"),
        (torch.zeros(3, 2), "the data are a Tensor; expected"),
        ((torch.zeros(2, 2).numpy(), torch.zeros(2).numpy()), r"the data are a tuple \(ndarray, ndarray\); expected"),
        ((torch.zeros(3), torch.zeros(3), torch.zeros(3)), r"a tuple \(Tensor, Tensor, Tensor\); expected"),
        ({"inputs": torch.zeros(3), "targets": torch.zeros(3)}, "the data are a dict; expected"),
        ("digits", "the data are a str; expected"),
        (None, "the data are a NoneType; expected"),
        (Endless(), "the data are a Endless; expected"),
        (3.0, "the data are a float; expected"),
    ],
)
def test_bad_data_are_one_line(pairs, message):
    with pytest.raises(ValueError, match=message) as caught:
        Examples.of(pairs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["transform", "augment"])
def test_what_is_applied_to_a_batch_is_a_function(name):
    with pytest.raises(ValueError, match=f"{name} is a str; expected a function"):
        Examples.of((torch.zeros(3, 2), torch.zeros(3)), **{name: "normalise"})


def test_a_repr_is_short():
    examples = Examples(torch.zeros(50_000, 3, 32, 32, dtype=torch.uint8), torch.zeros(50_000, dtype=torch.long))
    assert repr(examples) == "Examples(50000 of uint8 [3, 32, 32], targets int64)"


def test_an_error_of_the_users_own_dataset_is_not_hidden():
    class Broken(TorchDataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            raise RuntimeError("my disk is full")

    with pytest.raises(RuntimeError, match="my disk is full"):
        Examples.of(Broken())


@pytest.mark.parametrize("seed", [None, 3])
def test_inputs_and_targets_alone_are_those_of_the_batch(seed):
    def generator():
        return None if seed is None else torch.Generator().manual_seed(seed)

    examples = Examples(torch.arange(12.0).view(4, 3), torch.arange(4), transform=torch.neg, augment=noisy)
    ids = torch.tensor([3, 0])
    inputs, targets = examples.batch(ids, generator())
    for part in (examples, examples.only_inputs()):
        assert torch.equal(part.batch_inputs(ids, generator()), inputs)
    for part in (examples, examples.only_targets()):
        assert torch.equal(part.batch_targets(ids, generator()), targets)


def test_what_was_dropped_is_freed_and_refused_in_one_line():
    inputs, targets = torch.rand(4, 3), torch.arange(4)
    freed = [weakref.ref(inputs.untyped_storage()), weakref.ref(targets.untyped_storage())]
    examples = Examples(inputs, targets)
    del inputs, targets
    examples = examples.only_targets()
    assert [ref() is None for ref in freed] == [True, False]
    for ask in (examples.batch_inputs, examples.batch):
        with pytest.raises(ValueError, match="these examples were made without inputs; expected"):
            ask(torch.arange(2))
    del ask
    examples = examples.only_inputs()
    assert [ref() is None for ref in freed] == [True, True]
    assert len(examples) == len(examples.select(torch.arange(4))) == 4
    with pytest.raises(ValueError, match="these examples were made without targets"):
        examples.batch_targets(torch.arange(2))
