"""What the steps since the last look add up to."""

import math
from dataclasses import dataclass, field
from typing import Any

from blockprop.executors import StepReport
from blockprop.executors.executor import STALENESS

__all__ = ["Means"]


@dataclass
class Means:
    """Running means over examples, of the loss and of every link's gluing loss."""

    examples: int = 0
    loss: float = 0.0
    gluing: list[float] = field(default_factory=list)
    unstable: int = 0
    silent: int = 0
    unlinked: int = 0
    age: list[float] = field(default_factory=list)
    drift: list[float] = field(default_factory=list)
    curvature: list[float] = field(default_factory=list)
    limited: list[float] = field(default_factory=list)
    input_age: list[float] = field(default_factory=list)
    unknown: dict[str, list[int]] = field(default_factory=dict)
    waited: float = 0.0

    @classmethod
    def restored(cls, saved: dict[str, Any]) -> "Means":
        """As they were; what an older checkpoint has not is unknown of its examples."""
        made = cls(**saved)
        linked = made.examples - made.unlinked
        for name in STALENESS:
            if name not in saved and linked:
                links = [0.0] * len(made.gluing)
                setattr(made, name, links)
                made.unknown[name] = [linked for _ in links]
        return made

    def add(self, report: StepReport) -> None:
        """Count a step in."""
        self.examples += report.examples
        self.waited += report.waited
        if math.isnan(report.loss):
            self.silent += report.examples
        else:
            self.loss += report.loss * report.examples
        self.unstable += not report.stable
        if not report.links:
            self.unlinked += report.examples
            return
        self.gluing = _added(self.gluing, report.gluing_loss, report.examples)
        for name in STALENESS:
            found = [float(getattr(link, name)) for link in report.links]
            known = [0.0 if math.isnan(value) else value for value in found]
            setattr(self, name, _added(getattr(self, name), known, report.examples))
            missing = [report.examples * math.isnan(value) for value in found]
            before = self.unknown.get(name, [0] * len(found))
            self.unknown[name] = [a + b for a, b in zip(before, missing, strict=True)]

    def values(self) -> dict[str, Any]:
        """The means, ready for the metrics."""
        heard = self.examples - self.silent
        linked = max(self.examples - self.unlinked, 1)
        values = {
            "loss": self.loss / heard if heard else math.nan,
            "gluing_loss": [value / linked for value in self.gluing],
            "unstable_steps": self.unstable,
        }
        if any(self.age):
            values |= {name: self._of_links(name, linked) for name in STALENESS}
        return values

    def _of_links(self, name: str, linked: int) -> list[float]:
        """Means over the examples of which it is known."""
        totals: list[float] = getattr(self, name)
        unknown = self.unknown.get(name, [0] * len(totals))
        return [
            total / (linked - missing) if linked > missing else math.nan
            for total, missing in zip(totals, unknown, strict=True)
        ]


def _added(sums: list[float], values: list[float], examples: int) -> list[float]:
    return [a + b * examples for a, b in zip(sums or [0.0] * len(values), values, strict=True)]
