import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from blockprop.models import gpt


@pytest.fixture
def model():
    torch.manual_seed(0)
    return gpt(11, context=8, width=16, depth=2, heads=2)


def test_the_children_and_the_shapes(model):
    assert [name for name, _ in model.named_children()] == ["embed", "block1", "block2", "head"]
    assert model(torch.zeros(3, 8, dtype=torch.long)).shape == (3, 8, 11)
    assert model(torch.zeros(3, 5, dtype=torch.long)).shape == (3, 5, 11)


def test_no_logit_depends_on_a_later_token(model):
    first = torch.randint(11, (1, 8), generator=torch.Generator().manual_seed(0))
    second = first.clone()
    second[0, 5:] = (second[0, 5:] + 1) % 11
    before, after = model(first), model(second)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.isclose(before[:, 5:], after[:, 5:]).all(dim=-1).any()


def test_positions_matter(model):
    logits = model(torch.zeros(1, 8, dtype=torch.long))
    assert not torch.allclose(logits[0, 0], logits[0, 1])


def test_attention_is_that_of_torch(model):
    ours = model.block1.attention.branch
    theirs = nn.MultiheadAttention(16, 2, batch_first=True)
    theirs.in_proj_weight, theirs.in_proj_bias = ours.project.weight, ours.project.bias
    theirs.out_proj.weight, theirs.out_proj.bias = ours.contract.weight, ours.contract.bias
    features = torch.rand(3, 8, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(8)
    torch.testing.assert_close(ours(features), theirs(features, features, features, attn_mask=mask)[0])


def test_it_starts_out_undecided_and_learns(model):
    tokens = torch.arange(9).repeat(4, 1)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(40):
        loss = functional.cross_entropy(model(inputs).movedim(-1, 1), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(11), abs=0.2)
    assert losses[-1] < 0.2


def test_dropout_is_for_training_only():
    model = gpt(11, context=8, width=16, depth=1, dropout=0.5)
    tokens = torch.zeros(1, 8, dtype=torch.long)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize(("width", "heads"), [(8, 1), (32, 1), (96, 3), (128, 4)])
def test_there_is_a_head_for_every_32_features(width, heads):
    assert gpt(5, width=width, depth=1).block1.attention.branch.heads == heads


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocabulary": 0}, "vocabulary is 0"),
        ({"context": 0}, "context is 0"),
        ({"width": 0}, "width is 0"),
        ({"depth": 0}, "depth is 0"),
        ({"heads": 0}, "heads is 0"),
        ({"width": 10, "heads": 4}, "width 10 is not divisible by 4 heads.* a width of 12"),
        ({"dropout": 1}, "dropout is 1"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        gpt(**{"vocabulary": 5, **arguments})
    assert "\n" not in str(caught.value)


def test_an_input_longer_than_the_context_is_refused(model):
    with pytest.raises(ValueError, match="the input has 9 tokens but the model's context is 8"):
        model(torch.zeros(1, 9, dtype=torch.long))
