"""What a stage keeps of batches whose feedback is late."""

import pytest
import torch
from torch import nn

import blockprop
from blockprop.cache import GluingCache
from blockprop.correction import Correction
from blockprop.curvature import Constant
from blockprop.gluing import Gluing
from blockprop.held import Held
from blockprop.latestage import LateStage
from conftest import batch, mlp, sgd


def lower(correction, cache=None):
    torch.manual_seed(0)
    blocks = blockprop.split(mlp(depth=4), 2)
    algo = blockprop.BlockProp(blocks, nn.CrossEntropyLoss(), sgd(0.1))
    return LateStage(algo.stages[0], 2, correction, cache=cache)


@pytest.mark.parametrize("reuse", [False, True])
def test_what_is_held_counts_each_copy_of_the_weights_once(reuse):
    late = lower(Correction(curvature=Constant(0.0), reuse=reuse))
    assert late.held() == Held()
    weights = sum(p.numel() * p.itemsize for p in late.stage.block.parameters())
    x, _ = batch(8)
    outputs = [late.forward(number, x, number) for number in range(2)]
    flight = sum(value.numel() * value.itemsize for value in (x, outputs[0]))
    assert late.held() == Held(2 * flight, weights * reuse)
    late.learn(0, Gluing(outputs[0], torch.ones_like(outputs[0]), 8), 1.0, 2)
    late.update()
    assert late.held() == Held(flight, weights * reuse)
    late.forward(2, x, 2)
    assert late.held() == Held(2 * flight, 2 * weights * reuse)


def test_what_is_held_has_the_whole_cache():
    cache = GluingCache(24, dtype=torch.float64)
    late = lower(Correction(curvature=Constant(0.3), along=True, reuse=True), cache)
    x, _ = batch(8)
    output = late.forward(0, x, 0)
    late.learn(0, Gluing(output, torch.ones_like(output), 8), 1.0, 1, ids=torch.arange(8))
    assert late.held().cache == cache.size([output.shape[1:]])


def test_a_batch_is_evaluated_again_before_its_feedback_is_there():
    """Then `learn` does not, and does the same; and again only if the weights have moved."""
    found = []
    for renew in (False, True):
        late, (x, _) = lower(Correction(curvature=Constant(0.3))), batch(8)
        passes = []
        late.stage.block.register_forward_hook(lambda *_: passes.append(1))
        output = late.forward(0, x, 0)
        late.forward(1, x, 1)
        late.learn(0, Gluing(output, torch.ones_like(output), 8), 1.0, 2)
        late.update()
        before = len(passes)
        if renew:
            late.renew(1)
            assert len(passes) == before + 1
        learnt = late.learn(1, Gluing(output, torch.ones_like(output), 8), 1.0, 3)
        assert len(passes) == before + 1
        assert learnt.drift > 0
        found.append([learnt.drift, *(p.grad.clone() for p in late.stage.block.parameters())])
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*found, strict=True))


def test_what_is_evaluated_again_is_not_what_a_checkpoint_has():
    """Whoever goes on after an error, or from a checkpoint, finds the output that was sent."""
    late, (x, _) = lower(Correction(curvature=Constant(0.3))), batch(8)
    outputs = [late.forward(number, x, number) for number in range(3)]
    late.learn(0, Gluing(outputs[0], torch.ones_like(outputs[0]), 8), 1.0, 2)
    late.update()
    before = late.state_dict()
    late.renew(1)
    late.renew(1)
    flights = {number: state["output"] for number, state in late.state_dict()["flights"]}
    assert torch.equal(flights[1], outputs[1])
    drifts = [late.learn(1, Gluing(outputs[1], torch.ones_like(outputs[1]), 8), 1.0, 3).drift]
    late.renew(2)
    late.load_state_dict(before)
    drifts.append(late.learn(1, Gluing(outputs[1], torch.ones_like(outputs[1]), 8), 1.0, 3).drift)
    late.renew(2)
    late.drop(2)
    assert drifts[0] == drifts[1] > 0
    assert not late.state_dict()["flights"]
