"""Datasets: where their files come from, how they are read and checked, and in what order they are seen."""

from blockprop.data.catalogue import NAMES, load
from blockprop.data.dataset import Dataset, Task
from blockprop.data.examples import Examples, Split
from blockprop.data.order import batch_generator, batches

__all__ = ["NAMES", "Dataset", "Examples", "Split", "Task", "batch_generator", "batches", "load"]
