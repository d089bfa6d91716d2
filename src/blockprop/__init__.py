"""Train neural networks as decoupled blocks, glued by a penalty.

blocks = blockprop.split(model, 4)
algo = blockprop.BlockProp(
    blocks, loss=nn.CrossEntropyLoss(), optimizer=lambda params: torch.optim.SGD(params, lr=0.1)
)
report = algo.step(inputs, targets)
"""

from importlib.metadata import version

from blockprop.algorithm import BlockProp
from blockprop.augmented import augmented_loss
from blockprop.backprop import Backprop
from blockprop.blocks import Blocks
from blockprop.executors import StepReport
from blockprop.hsolvers import Backtracking, GaussNewton, GradientDescent, Solution
from blockprop.inference import energies, predict
from blockprop.losses import OutputLoss
from blockprop.penalties import Huber, Squared
from blockprop.split import split

__all__ = [
    "Backprop",
    "Backtracking",
    "BlockProp",
    "Blocks",
    "GaussNewton",
    "GradientDescent",
    "Huber",
    "OutputLoss",
    "Solution",
    "Squared",
    "StepReport",
    "augmented_loss",
    "energies",
    "predict",
    "split",
]

__version__ = version("blockprop")
