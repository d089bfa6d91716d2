"""The table of all processes, as it is shown in a terminal and where there is none."""

import io

from rich.console import Console

from blockprop.experiments.board import Board, table
from blockprop.experiments.settings import Settings
from blockprop.runtime import Place

BOTTOM, TOP = Place(1, 2), Place(2, 2)
TOLD = {
    "step": 30, "total": 100, "epoch": 1.5, "rate": 1234.4, "loss": None, "residual": 0.00123, "age": 2.0,
    "bytes": 2.5e6, "busy": 0.876, "score": [0.25, 0.9321],
}  # fmt: skip


def shown(told):
    text = io.StringIO()
    Console(file=text, width=120).print(table("a title", told))
    return [line.split() for line in text.getvalue().splitlines() if line.strip()]


def test_a_row_for_every_process():
    top = TOLD | {"loss": 0.5, "residual": None, "age": None}
    title, head, _, *rows = shown({BOTTOM: TOLD, TOP: top, Place(2, 2, 1, 2): None})
    assert title == ["a", "title"]
    assert head[0] == "block" and head[-1] == "validation"
    assert rows[0] == ["block-1", "30/100", "1,234", "1.23e-03", "2.0", "2.5", "88%"]
    assert rows[1] == ["block-2", "30/100", "1,234", "0.5000", "2.5", "88%", "93.21%"]
    assert rows[2] == ["block-2-replica-1", "starting"]


def test_where_there_is_no_terminal_a_line_an_epoch():
    class Store(dict):
        def read(self, key):
            return self.get(key)

    store = Store()
    with Board(store, [BOTTOM, TOP], Settings(executor="processes"), quiet=False) as board:
        text = board.console.file = io.StringIO()
        board.refresh()  # nothing is told yet
        for epoch, step in ((0.5, 10), (1.1, 22), (1.7, 34), (2.0, 40)):
            told = {"epoch": epoch, "step": step, "total": 40, "loss": 0.5 if step > 10 else None}
            store["progress/block-2"] = TOLD | told
            board.refresh()
            board.refresh()
    lines = text.getvalue().splitlines()
    assert [line.partition("epoch ")[2].partition(",")[0] for line in lines] == ["1.1", "2"]
    assert all("2 processes" in line and "validation 93.21%" in line for line in lines)
