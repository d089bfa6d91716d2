"""Train a five-layer perceptron on handwritten digits as four decoupled blocks. Needs no download."""

import torch
from torch import nn

import blockprop
from blockprop.data import batches, load
from blockprop.diagnostics import alignment
from blockprop.models import mlp
from blockprop.training import score

torch.manual_seed(0)
data = load("digits")
model = mlp(data.input_shape, data.classes, width=128, depth=5, dropout=0.1)

blocks = blockprop.split(model, 4)  # or split(model, at=["layer3"])
algo = blockprop.BlockProp(
    blocks,
    loss=nn.CrossEntropyLoss(),
    optimizer=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
)
print(blocks)

for epoch in range(20):
    for ids in batches(len(data.train), 64, seed=0, epoch=epoch):
        inputs, targets = data.train.batch(ids)
        report = algo.step(inputs, targets)
    print(f"epoch {epoch + 1}: last loss {report.loss:.3f}, validation {score(algo, data.validation).accuracy:.1%}")

print(f"test {score(algo, data.test).accuracy:.1%}")
for k, block in enumerate(alignment(algo, inputs, targets), 1):
    print(f"block {k}: cosine {block.cosine:.6f} to backprop's gradient, norm ratio {block.norm_ratio:.6f}")
