"""The slow link, emulated: two network namespaces of this machine, and a small program between them.

It needs root, gcc, iproute2 and /dev/net/tun. The kernel's own shaping (netem) is not needed; it is missing on many
hosts. The program takes a share of the processor for itself, which the link tells at its end.
"""

import atexit
import os
import re
import select
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from benchmarks.pipelines.processes import LOOPBACK, Place

_SOURCE = Path(__file__).with_name("wanlink.c")
_NETWORK, _DEVICE = "10.213.77", "wan0"
_QUEUE_MS = 200
_CONGESTION = "cubic"
"""TCP's congestion control, Linux's default, so that tables do not depend on the machine's: BBR, for one, paces short
messages over a part of the round trip."""


class LinkError(RuntimeError):
    """The link cannot be made here; says what is missing."""


@dataclass(frozen=True)
class Speed:
    """How fast a link is.

    Attributes:
        name: on the command line.
        title: in tables.
        mbit: megabits a second, each way; 0 for the machine's loopback.
        delay_ms: one way.
        packet: bytes in a packet; large ones where the program would else take much of a core.
    """

    name: str
    title: str
    mbit: float = 0.0
    delay_ms: float = 0.0
    packet: int = 1500


SPEEDS = (
    Speed("loopback", "loopback"),
    Speed("fast", "1 Gbit/s, 1 ms each way", 1000, 1, 9000),
    Speed("slow", "100 Mbit/s, 20 ms each way", 100, 20),
)


def missing() -> str | None:
    """What this machine lacks for an emulated link, or None."""
    if os.geteuid() != 0:
        return "needs root"
    for tool, package in (("gcc", "gcc"), ("ip", "iproute2")):
        if shutil.which(tool) is None:
            return f"needs {package}"
    return None if Path("/dev/net/tun").exists() else "needs /dev/net/tun"


class Carried(NamedTuple):
    """What the link's program has done.

    Attributes:
        megabytes: carried, both ways together.
        dropped: packets.
        seconds: of a core, for the program itself.
    """

    megabytes: float
    dropped: int
    seconds: float

    @classmethod
    def told(cls, text: str) -> "Carried | None":
        """From what the program writes at its end: a line each way (packets, bytes, drops), and its seconds."""
        lines = [line.split() for line in text.splitlines()]
        if [len(line) for line in lines] != [3, 3, 1]:
            return None
        ways = lines[:2]
        return cls(sum(int(way[1]) for way in ways) / 1e6, sum(int(way[2]) for way in ways), float(lines[2][0]))


class Link:
    """A link as a context: `places` are its two ends. Nothing of it is left afterwards.

    Args:
        speed: how fast it is; loopback makes nothing.

    Attributes:
        places: where the two processes go.
        carried: at the end, what its program has done; None on loopback, or where it could not tell.

    Raises:
        LinkError: on entering, where it cannot be made.
    """

    def __init__(self, speed: Speed) -> None:
        self.speed = speed
        self.places: tuple[Place, Place] = LOOPBACK
        self.carried: Carried | None = None
        self._names = tuple(f"blockprop-{os.getpid()}-{side}" for side in "ab")
        self._program: subprocess.Popen[str] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> "Link":
        if not self.speed.mbit:
            return self
        if lacks := missing():
            raise LinkError(lacks)
        atexit.register(self._remove)
        try:
            self._make()
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None) or str(error)
            self._remove()
            raise LinkError(said.strip().splitlines()[-1] if said.strip() else "cannot be made") from error
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._remove()

    def _make(self) -> None:
        _remove_abandoned()
        self._folder = tempfile.TemporaryDirectory(prefix="blockprop-link-")
        program = Path(self._folder.name) / "wanlink"
        _call("gcc", "-O2", "-o", str(program), str(_SOURCE))
        for name in self._names:
            _call("ip", "netns", "add", name)
        speed = (f"{self.speed.mbit:g}", f"{self.speed.delay_ms:g}", str(_QUEUE_MS))
        self._program = subprocess.Popen(
            [program, *self._names, _DEVICE, *speed], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self._program.stdout is not None
        heard, _, _ = select.select([self._program.stdout], [], [], 10)
        if not heard or self._program.stdout.readline().strip() != "ready":
            self._program.kill()
            raise OSError(self._program.communicate()[1] or "the link's program did not start")
        for host, name in enumerate(self._names, 1):
            _call("ip", "-n", name, "link", "set", "lo", "up")
            _call("ip", "-n", name, "addr", "add", f"{_NETWORK}.{host}/24", "dev", _DEVICE)
            _call("ip", "-n", name, "link", "set", _DEVICE, "mtu", str(self.speed.packet), "up")
            # by the route: a namespace may not choose for itself what the machine does not
            _call("ip", "-n", name, "route", "replace", f"{_NETWORK}.0/24", "dev", _DEVICE, "congctl", _CONGESTION)
        a, b = (Place(name, _DEVICE, f"{_NETWORK}.{host}") for host, name in enumerate(self._names, 1))
        self.places = (a, b)

    def _remove(self) -> None:
        atexit.unregister(self._remove)
        if self._program is not None:
            self._program.terminate()
            try:
                self.carried = Carried.told(self._program.communicate(timeout=5)[1])
            except subprocess.TimeoutExpired:
                self._program.kill()
                self._program.communicate()
            self._program = None
        for name in self._names:
            if Path("/run/netns", name).exists():
                subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True, timeout=20)
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
        self.places = LOOPBACK


def _remove_abandoned() -> None:
    """Remove the namespaces of an earlier benchmark that was killed and could not do it."""
    folder = Path("/run/netns")
    for path in sorted(folder.iterdir()) if folder.exists() else []:
        made = re.fullmatch(r"blockprop-(\d+)-[ab]", path.name)
        if made and not Path("/proc", made[1]).exists():
            subprocess.run(["ip", "netns", "del", path.name], check=False, capture_output=True, timeout=20)


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
