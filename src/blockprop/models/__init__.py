"""Networks to train, each a Sequential that can be cut into consecutive blocks between any two children."""

from blockprop.models.catalogue import NAMES, build
from blockprop.models.gpt import gpt
from blockprop.models.mlp import mlp
from blockprop.models.resnet import resnet18

__all__ = ["NAMES", "build", "gpt", "mlp", "resnet18"]
