"""What TCP brings over the emulated links, one way and both ways at once: acknowledgements wait behind the data.

    python -m benchmarks.goodput

Two processes in namespaces of their own, one connection, as two neighbouring blocks have. It needs what the slow link
of `benchmarks.pipelines` needs: root, gcc and iproute2.
"""

import contextlib
import socket
import sys
import threading
import time
from typing import Any

from benchmarks.measure import Spread, arguments, publish, table
from benchmarks.pipelines.link import SPEEDS, Link, LinkError
from benchmarks.pipelines.processes import run

PORT = 5555
WARM = 3.0
"""Seconds that are not counted: TCP finds the bandwidth in them."""
CHUNK = 1 << 19


def flow(rank: int, settings: dict[str, Any]) -> float:
    """Mbit/s that this end receives, after the warm-up."""
    address = settings["address"], PORT
    if rank == 0:
        with socket.create_server(address) as server:
            connection, _ = server.accept()
    else:
        deadline = time.monotonic() + 10
        while True:
            try:
                connection = socket.create_connection(address)
                break
            except ConnectionRefusedError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
    begin = time.monotonic() + WARM
    end = begin + settings["seconds"]
    received = 0

    def receive() -> None:
        nonlocal received
        room = bytearray(CHUNK)
        try:
            while (count := connection.recv_into(room)) and (now := time.monotonic()) < end:
                received += count * (now >= begin)
        except OSError:
            if time.monotonic() < end - 1:  # else the other side has ended
                raise

    threading.Thread(target=receive, daemon=True).start()
    if rank == 1 or settings["both"]:
        while time.monotonic() < end - 1:
            connection.sendall(bytes(CHUNK))
        connection.settimeout(1.0)  # what is under way at the end need not get through
        with contextlib.suppress(TimeoutError, ConnectionError):
            while time.monotonic() < end:
                connection.sendall(bytes(CHUNK))
    time.sleep(max(0.0, end - time.monotonic()))
    return 8e-6 * received / settings["seconds"]


def main() -> None:
    given = arguments(__doc__)
    rounds, seconds = (2, 3.0) if given.quick else (5, 8.0)
    speeds = [speed for speed in SPEEDS if speed.mbit]
    found: dict[str, dict[str, list[float]]] = {speed.name: {"one": [], "both": []} for speed in speeds}
    for _ in range(rounds):
        for speed in speeds:
            for ways, shares in found[speed.name].items():
                try:
                    with Link(speed) as link:
                        settings = {"address": link.places[0].address, "seconds": seconds, "both": ways == "both"}
                        rates = run(flow, 2, settings, places=link.places)
                except LinkError as error:
                    sys.exit(f"the emulated link {error}")
                shares.append((rates[0] if ways == "one" else sum(rates) / 2) / speed.mbit)
    data = {name: {ways: Spread.of(shares) for ways, shares in of_link.items()} for name, of_link in found.items()}
    rows = [[speed.title, *data[speed.name].values()] for speed in speeds]
    body = [
        "Share of the link's bandwidth that arrives as payload, medians and quartiles of rounds. *Both ways*: the mean "
        f"of the two directions of one connection, both busy. The first {WARM:g} s are not counted.",
        table(["link", "one way", "both ways"], rows),
    ]
    publish("goodput", given, "What TCP brings over the emulated links", body, data)


if __name__ == "__main__":
    main()
