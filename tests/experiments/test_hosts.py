"""Two machines, as network namespaces: the commands of the pages on several machines, word by word."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blockprop.cli import main

PAGES = Path(__file__).parents[2] / "docs/processes"
ADDRESSES = ("10.0.0.1", "10.0.0.2")


def commands(page):
    """What a page has typed on each of two machines, continued lines joined."""
    blocks = re.findall(r"(?:^    .+\n)+", (PAGES / page).read_text(), re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [next(line for line in lines if f"--listen {address}" in line) for address in ADDRESSES]


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


@pytest.fixture
def hosts():
    """Two namespaces with the pages' addresses and a cable between them."""
    if os.name != "posix" or os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2")
    names = [f"blockprop-test-{os.getpid()}-{side}" for side in "ab"]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
            for name, address in zip(names, ADDRESSES, strict=True):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
                for device in ("lo", "cable"):
                    ip("-n", name, "link", "set", device, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no namespaces here: {error.stderr.decode().strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True, timeout=20)


@pytest.mark.parametrize("page", ["workers.md", "torchrun.md"])
def test_the_commands_of_the_page_on_two_machines(tmp_path, hosts, page):
    # two threads, which is what a machine of its own may take, add up in another order than one
    few = ["--steps", "40", "--seed", "3", "--threads", "1"]
    machines = []
    for name, command in zip(hosts, commands(page), strict=True):
        folder = tmp_path / name[-1]
        folder.mkdir()
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        words = ["ip", "netns", "exec", name, "env", f"PATH={path}", *shlex.split(command), *few]
        pipe = subprocess.PIPE
        machines.append(
            subprocess.Popen(words, cwd=folder, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
        )
    try:
        ends = [machine.communicate(timeout=120) for machine in machines]
    finally:
        for machine in machines:
            if machine.poll() is None:
                os.killpg(machine.pid, signal.SIGKILL)  # torchrun's own processes, too
    assert [machine.returncode for machine in machines] == [0, 0], ends
    [run, other] = [next((tmp_path / side / "runs").iterdir()) for side in "ab"]
    assert not (run / "block-2").exists()
    shutil.copytree(other / "block-2", run / "block-2")
    assert main(["assemble", str(run)]) == 0
    local = tmp_path / "local"
    words = ["train", "--data", "digits", "--blocks", "2", "--executor", "processes", "--quiet", *few]
    assert main([*words, "--out", str(local)]) == 0
    assert main(["assemble", str(local)]) == 0
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (run, local))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
