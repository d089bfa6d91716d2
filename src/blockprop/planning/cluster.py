"""The cluster that is planned for: devices of different speeds, and the links between them."""

import math
from dataclasses import dataclass

__all__ = ["LOOPBACK", "Cluster", "Link"]


@dataclass(frozen=True)
class Link:
    """A link from one device to another.

    Args:
        bandwidth: Mbit/s, above 0.
        latency: ms one way, from the last bit sent to the last bit received; default 0.
        overhead: ms that the software takes for a message on top, during which the link carries no other; default 0.
        handling: ms for which a message keeps the device at either end from its own work; default 0.
        copying: ms of it for each MB of the message, on top; default 0.
        duplex: share of the bandwidth for a message that sets out while the other direction is busy, above 0 and at
            most 1; default 1. Less over TCP on long links: acknowledgements wait behind what goes the other way.

    Raises:
        ValueError: a value out of its range.

    >>> Link(bandwidth=100, latency=20).occupied(1_250_000)
    0.1
    """

    bandwidth: float
    latency: float = 0.0
    overhead: float = 0.0
    handling: float = 0.0
    copying: float = 0.0
    duplex: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.bandwidth < math.inf:
            raise ValueError(f"bandwidth is {self.bandwidth}; expected Mbit/s, a finite number above 0")
        for name in ("latency", "overhead", "handling", "copying"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; expected ms, a finite number of at least 0")
        if not 0 < self.duplex <= 1:
            raise ValueError(f"duplex is {self.duplex}; expected a share of the bandwidth, above 0 and at most 1")

    def occupied(self, size: float, *, both: bool = False) -> float:
        """Seconds for which a message of so many bytes keeps the link from carrying another.

        Args:
            size: bytes.
            both: whether the other direction is busy when it sets out.
        """
        return self.overhead / 1e3 + 8 * size / ((self.duplex if both else 1.0) * self.bandwidth * 1e6)

    def handled(self, size: float) -> float:
        """Seconds for which a message of so many bytes keeps the device at either end from its own work."""
        return (self.handling + self.copying * size / 1e6) / 1e3

    def seconds(self, size: float) -> float:
        """Seconds from sending a message of so many bytes over an idle link to having it."""
        return self.occupied(size) + self.latency / 1e3


LOOPBACK = Link(45_000, 0.0, 0.3, 0.45, 0.28)
"""Between two processes of one machine, where one connection carries both directions: of a message's time until it is
there the processors' at both ends is a part."""


@dataclass(frozen=True)
class Cluster:
    """K devices in a row, each linked to its neighbours.

    Args:
        speeds: of each device, relative to the one that the costs were measured on; K numbers above 0.
        link: between any two neighbours.
        contention: how many times longer a device takes while another one works, at least 1; default 1. Above 1 where
            devices share the memory of one machine.

    Raises:
        ValueError: a value out of its range.
    """

    speeds: tuple[float, ...]
    link: Link
    contention: float = 1.0

    def __post_init__(self) -> None:
        if not self.speeds:
            raise ValueError("there is no device; expected the speed of at least one")
        for speed in self.speeds:
            if not 0 < speed < math.inf:
                raise ValueError(f"speed is {speed}; expected a finite number above 0, 1 for the device measured")
        if not 1 <= self.contention < math.inf:
            raise ValueError(f"contention is {self.contention}; expected a finite number of at least 1")

    def __len__(self) -> int:
        return len(self.speeds)
