"""Train handwritten digits with a process for every block: torchrun --nproc-per-node 2 examples/train_processes.py."""

import torch
from torch import nn

import blockprop
from blockprop.data import batches, load
from blockprop.models import mlp
from blockprop.training import score

torch.manual_seed(0)  # the same network and the same cut in every process
torch.set_num_threads(1)
data = load("digits")
model = mlp(data.input_shape, data.classes, width=128, depth=5)

blocks = blockprop.split(model, 2)
algo = blockprop.BlockProp(
    blocks,
    loss=nn.CrossEntropyLoss(),
    optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
    executor="processes",  # one block stays in this process, the others are freed
)

for epoch in range(20):
    for ids in batches(len(data.train), 64, seed=0, epoch=epoch):
        algo.step(*data.train.batch(ids), ids)
algo.finish()  # learn from what is still on its way

result = score(algo, data.test)
if algo.remote.last:
    print(f"test {result.accuracy:.1%}")
algo.close()
