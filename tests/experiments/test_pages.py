"""The commands that the pages on processes have for one machine, word by word but for the port, one after the other."""

import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from conftest import free_port

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs/processes"


def commands(page):
    """What a page has typed on one machine, in order; workers that follow each other are started together."""
    lines = [line.strip() for line in re.findall(r"^    .+$", (PAGES / page).read_text(), re.MULTILINE)]
    typed = [line for line in lines if line.startswith(("blockprop ", "torchrun ")) and "--nnodes" not in line]
    typed = [line for line in typed if "--listen" not in line]
    return [list(group) for _, group in itertools.groupby(typed, lambda line: "worker" in line or line)]


@pytest.mark.parametrize(("page", "count"), [("launch.md", 3), ("workers.md", 3), ("torchrun.md", 2)])
def test_the_commands_of_the_page_on_this_machine(tmp_path, page, count):
    port = str(free_port())
    found = [[line.replace("29500", port) for line in group] for group in commands(page)]
    assert sum(map(len, found)) == count
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for group in found:
        pipe = subprocess.PIPE
        started = [
            subprocess.Popen(shlex.split(line), cwd=tmp_path, env=environment, stdout=pipe, stderr=pipe, text=True)
            for line in group
        ]
        ends = [process.communicate(timeout=120) for process in started]
        assert [process.returncode for process in started] == [0] * len(group), ends
    if page != "torchrun.md":
        [run] = (tmp_path / "runs").iterdir()
        assert len(load_file(run / "model.safetensors")) > 2
