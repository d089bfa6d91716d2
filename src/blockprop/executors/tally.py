"""What a step of a pipeline did, added up over its microbatches."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from blockprop.executors.executor import STALENESS, LinkReport, StepReport
from blockprop.latestage import Learnt

__all__ = ["Tally"]


class Tally:
    """Losses and links of a step, as they come, and their means by the shares that they are of a batch.

    Args:
        links: how many blocks below the last live here, and so report the link above them.
    """

    def __init__(self, links: int) -> None:
        self._expected = links
        self._loss, self._share = 0.0, 0.0
        self._links: dict[int, list[tuple[Learnt, float]]] = {}

    def loss(self, value: float, share: float = 1.0) -> None:
        """A microbatch's part of a batch's mean loss, and what share of the batch's predictions it is of."""
        self._loss += value
        self._share += share

    def link(self, link: int, learnt: Learnt, share: float = 1.0) -> None:
        """What the block below a link learnt from a microbatch."""
        self._links.setdefault(link, []).append((learnt, share))

    def report(self, examples: int = 0, waited: float = 0.0) -> StepReport:
        """Of all that came.

        Args:
            examples: that the step took in.
            waited: seconds.
        """
        links = [LinkReport.of_late(_mean(parts)) for _, parts in sorted(self._links.items())]
        # while the pipeline fills, the lower links have nothing to report yet
        complete = links if len(links) == self._expected else []
        return StepReport(self._loss / self._share if self._share else math.nan, examples, complete, waited)


def _mean(parts: Sequence[tuple[Learnt, float]]) -> Learnt:
    whole = sum(share for _, share in parts)
    means = {name: sum(getattr(one, name) * share for one, share in parts) / whole for name in STALENESS}
    gluing = torch.stack([one.gluing_loss * (share / whole) for one, share in parts]).sum()
    return replace(parts[-1][0], gluing_loss=gluing, **means)
