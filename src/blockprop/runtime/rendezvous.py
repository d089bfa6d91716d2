"""Where the processes of a run find each other, say how far they are, and say what went wrong.

All of it is in one TCPStore. It has no authentication: whoever reaches its port can read and change it. So it listens
on this machine alone unless told otherwise.
"""

import contextlib
import ipaddress
import itertools
import json
import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from blockprop.errors import first_line

__all__ = ["Place", "Rendezvous", "listens_on", "parse_address", "serves_the_store"]

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Place:
    """Which process this is in a mesh of K blocks by R replicas.

    Attributes:
        block: k, from 1.
        blocks: K.
        replica: r, from 0.
        replicas: R.
    """

    block: int
    blocks: int
    replica: int = 0
    replicas: int = 1

    @classmethod
    def of_rank(cls, rank: int, blocks: int, replicas: int = 1) -> "Place":
        """The place of a rank: the replicas of a block have consecutive ranks.

        >>> Place.of_rank(3, blocks=2, replicas=2)
        Place(block=2, blocks=2, replica=1, replicas=2)
        """
        return cls(rank // replicas + 1, blocks, rank % replicas, replicas)

    @property
    def top(self) -> bool:
        """Whether it holds the last block."""
        return self.block == self.blocks

    @property
    def next(self) -> "Place":
        """The place of the next rank; after the last, of the first.

        >>> Place(block=2, blocks=2, replica=1, replicas=2).next
        Place(block=1, blocks=2, replica=0, replicas=2)
        """
        rank = (self.block - 1) * self.replicas + self.replica
        return Place.of_rank((rank + 1) % (self.blocks * self.replicas), self.blocks, self.replicas)

    @property
    def name(self) -> str:
        """For a person, and for folders."""
        return f"block-{self.block}" + (f"-replica-{self.replica}" if self.replica else "")


def parse_address(address: str) -> tuple[str, int]:
    """HOST:PORT as a pair.

    Raises:
        ValueError: it is not one.

    >>> parse_address("127.0.0.1:29500")
    ('127.0.0.1', 29500)
    >>> parse_address("[::1]:29500")
    ('::1', 29500)
    """
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (host and colon and port.isdigit() and 0 < int(port) < 2**16):
        raise ValueError(f"store address is {address!r}; expected HOST:PORT, such as {LOOPBACK}:29500")
    return host, int(port)


def _is_loopback(host: str) -> bool:
    """Whether a name or an address is of this machine alone; False for a name that cannot be resolved."""
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def listens_on(name: str, host: str, listen: str) -> str:
    """The address that a store listens on, where this process serves it.

    Args:
        name: what names the store.
        host: the store's, by that name.
        listen: this process's address.

    Raises:
        ValueError: the store is for other machines, and the process listens on its own alone.

    >>> listens_on("--store", "::1", "127.0.0.1"), listens_on("--store", "10.0.0.1", "0.0.0.0")
    ('::1', '0.0.0.0')
    """
    if _is_loopback(listen) and not _is_loopback(host):
        raise ValueError(
            f"{name} is {host}, where other machines meet, and this process would listen on {listen} alone; "
            "expected --listen with this machine's address"
        )
    try:  # where the others look for it, if that is an address of this machine's and no router's
        with socket.socket(_family(host)) as probe:
            probe.bind((host, 0))
    except OSError:
        return listen
    return host


def _await(address: tuple[str, int], timeout: float) -> None:
    """Return when something listens there; torch's client, as long as nothing does, prints the stack of each failure.

    Raises:
        TimeoutError: nothing does in time.
    """
    deadline = time.monotonic() + timeout
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection(address, max(left, 0.1)).close()
        except OSError as error:
            if left <= 0:
                raise TimeoutError(error.strerror or str(error)) from error
            time.sleep(0.1)
        else:
            return


_MEETINGS = itertools.count()
_SERVED: list["Rendezvous"] = []
"""What serves the store of this process, for later rendezvous as well."""


def serves_the_store() -> bool:
    """Whether, by torchrun's variables, this process and not torchrun serves the store where the processes meet."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and os.environ.get("RANK") == "0"


def _own_address(listen: str) -> str:
    """How this process reaches a port that it listens on itself, whatever others call this machine."""
    return {"0.0.0.0": LOOPBACK, "::": "::1"}.get(listen, listen)


class Rendezvous:
    """A connection to the store of a run.

    Args:
        address: host and port of the store; port 0, where it is served here, is any that is free.
        host: whether this process serves it.
        listen: the address that the store listens on, if it is served here; default this machine alone.
        prefix: of all its keys; runs after each other at one store have different ones.
        timeout: seconds to wait for the store to answer, default 60.
        patience: seconds to wait for other processes, default 600.
        silence: seconds without an answer after which the store counts as lost, default 60.

    Attributes:
        address: host and port of the store.

    Raises:
        ValueError: the port is in use, or no store answers.
    """

    def __init__(
        self,
        address: tuple[str, int],
        *,
        host: bool = False,
        listen: str = LOOPBACK,
        prefix: str = "blockprop",
        timeout: float = 60.0,
        patience: float = 600.0,
        silence: float = 60.0,
    ) -> None:
        self.patience, self.silence = patience, silence
        try:
            if host:
                server = socket.socket(_family(listen))
                server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    server.bind((listen, address[1]))
                    server.listen(1024)
                except OSError as error:
                    server.close()
                    raise ValueError(
                        f"the store cannot listen on {listen}:{address[1]} ({error.strerror}); name another --store"
                    ) from error
                address = address[0], int(server.getsockname()[1])
                # the store alone would listen on all of the machine's addresses
                self._tcp = TCPStore(
                    _own_address(listen),
                    address[1],
                    is_master=True,
                    wait_for_workers=False,
                    master_listen_fd=server.detach(),
                    timeout=timedelta(seconds=timeout),
                )
            else:
                _await(address, timeout)
                self._tcp = TCPStore(*address, is_master=False, timeout=timedelta(seconds=timeout))
        except (DistError, RuntimeError, TimeoutError) as error:
            raise ValueError(
                f"no store answers at {address[0]}:{address[1]} within {timeout:g} seconds ({first_line(error)}); "
                "expected the process that serves it to be up, and its port to be reachable"
            ) from error
        self.address = address
        self._prefix = prefix
        self._failure: dict[str, str] = {}  # once it is known here, also when the store is gone; shared with `again`
        self.store: Store = PrefixStore(prefix, self._tcp)

    @classmethod
    def of_torchrun(cls, listen: str = LOOPBACK, timeout: float = 60.0) -> "Rendezvous":
        """The store that torchrun started, by the usual environment variables.

        Args:
            listen: the address that the store listens on where not torchrun but this process serves it.
            timeout: seconds to wait for the store to answer, default 60.

        Raises:
            ValueError: they are not set, no store answers, or it would be served where other machines are not heard.
        """
        missing = [key for key in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE") if key not in os.environ]
        if missing:
            raise ValueError(f"{missing[0]} is not set; expected the environment that torchrun makes")
        address = parse_address(f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}")
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        # one after another in a script, the same in all processes: the later must not find what the earlier left
        number = next(_MEETINGS)
        host = serves_the_store() and number == 0
        if host:
            listen = listens_on("MASTER_ADDR", address[0], listen)
        prefix = f"blockprop/{attempt}/{number}"
        found = cls(address, host=host, listen=listen, prefix=prefix, timeout=timeout)
        if host:
            _SERVED.append(found)
        return found

    def again(self) -> "Rendezvous":
        """Another connection to the same store, for another thread: a call that waits holds up its connection."""
        other = object.__new__(Rendezvous)
        other._tcp, other._prefix = self._tcp.clone(), self._prefix  # type: ignore[attr-defined]
        other.address, other.patience, other.silence = self.address, self.patience, self.silence
        other._failure = self._failure
        other.store = PrefixStore(self._prefix, other._tcp)
        return other

    def write(self, key: str, value: Any) -> None:
        """Put a JSON value under a key."""
        self.store.set(key, json.dumps(value))

    def read(self, key: str) -> Any:
        """The JSON value under a key; None if there is none."""
        return json.loads(self.store.get(key)) if self.store.check([key]) else None

    def wait(self, key: str, timeout: float | None = None) -> Any:
        """The JSON value under a key, once it is there. It can be interrupted.

        Args:
            key: of the value.
            timeout: seconds, default `patience`.

        Raises:
            ValueError: it does not come in time, or the store is gone.
        """
        timeout = self.patience if timeout is None else timeout
        deadline = time.monotonic() + timeout
        try:
            while (value := self.read(key)) is None:
                if time.monotonic() > deadline:
                    raise ValueError(f"{key!r} did not come within {timeout:g} seconds")
                time.sleep(0.02)
        except (DistError, RuntimeError) as error:
            raise ValueError(f"{key!r} did not come: the store does not answer ({first_line(error)})") from error
        return value

    def fail(self, where: str, why: str) -> None:
        """Say what went wrong, unless another process has said so before."""
        with contextlib.suppress(Exception):  # the store may be what went wrong
            self.store.compare_set("failure", "", json.dumps({"where": where, "why": why}))

    def know(self, where: str, why: str) -> None:
        """Remember here what went wrong, where the store cannot be asked; for all connections of this process."""
        self._failure |= {"where": where, "why": why}

    def failure(self) -> dict[str, str] | None:
        """What went wrong first, and where: keys "where" and "why"; None while all is well."""
        if not self._failure:
            self._failure |= self.read("failure") or {}
        return self._failure or None
