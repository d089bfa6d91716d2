"""What a message between two blocks costs over loopback: seconds until it is there, and of either end's processor.

    python -m benchmarks.messages

Two processes, each with its end of an `Edge`, send each other messages of one size, as the blocks of a lock-step
pipeline do: both send, and both wait. Nothing else is computed, so that what the processors do is the messages' alone.
"""

import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from benchmarks.measure import Spread, Worker, arguments, publish, serve, table
from blockprop.runtime.edge import Edge, Post
from blockprop.runtime.message import Message
from blockprop.runtime.rendezvous import LOOPBACK, Rendezvous

SIZES = (2**12, 2**16, 2**19, 2**22, 2**23)
WARM = 20
"""Exchanges before it is measured: the first of a size go to and fro."""


def work(port: int, place: int) -> None:
    """Of one process: answer requests of a size and a number of exchanges with the seconds that each took."""
    torch.set_num_threads(1)
    post = Post()
    edge = Edge(Rendezvous((LOOPBACK, port)), "messages", upper=bool(place), post=post)
    kinds = ("output", "feedback")
    sent = 0

    def exchange(values: torch.Tensor) -> None:
        nonlocal sent
        edge.send(Message(kinds[place], sent, [values]))
        post.take(kinds[1 - place], sent)
        sent += 1

    def answer(request: dict[str, int]) -> dict[str, float]:
        values = torch.zeros(1, request["size"] // 4)
        for _ in range(WARM):
            exchange(values)
        start, processor = time.perf_counter(), time.process_time()
        for _ in range(request["count"]):
            exchange(values)
        taken = time.perf_counter() - start, time.process_time() - processor
        return {"there": taken[0] / request["count"], "processor": taken[1] / (2 * request["count"])}

    serve(answer)
    edge.close()


def main() -> None:
    given = arguments(__doc__)
    if given.worker:
        work(**given.worker)
        return
    rounds, count = (3, 50) if given.quick else (9, 200)
    host = Rendezvous((LOOPBACK, 0), host=True)
    workers = [Worker("benchmarks.messages", {"port": host.address[1], "place": place}) for place in range(2)]
    found: dict[int, list[dict[str, float]]] = {size: [] for size in SIZES}
    with ThreadPoolExecutor(2) as both:
        for _ in range(rounds):
            for size in SIZES:
                request = {"size": size, "count": max(10, count * 2**16 // max(size, 2**16))}
                answers = list(both.map(lambda worker, request=request: worker.ask(request), workers))
                found[size].append({key: statistics.fmean(one[key] for one in answers) for key in answers[0]})
        list(both.map(Worker.close, workers))
    data = {
        size: {key: Spread.of([1e3 * one[key] for one in measured]) for key in measured[0]}
        for size, measured in found.items()
    }
    rows = [[f"{size // 1024:,} KiB", one["there"], one["processor"]] for size, one in data.items()]
    body = [
        "Milliseconds, medians and quartiles of rounds. *There*: from handing a message over until the other is there, "
        "when both send at once. *Processor*: of a process, with all its threads, for each message that it sends or "
        "receives; packing and unpacking are in it.",
        table(["message", "there", "processor"], rows),
    ]
    publish("messages", given, "Messages between two blocks", body, data)


if __name__ == "__main__":
    main()
