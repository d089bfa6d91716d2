"""Freed memory: kept by a process that is told so, given back by one that is not."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from blockprop.planning.allocator import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory()

def use():
    torch.ones(16_000_000) + torch.ones(16_000_000)

for _ in range(12):  # until the pieces have found their places
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    use()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how):
    ran = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
    kept, count = ran.stdout.split()
    return kept == "True", int(count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page faults as Linux counts them")
def test_what_is_used_again_costs_no_new_pages():
    kept, count = faults("keep")
    if not kept:
        pytest.skip("the C library is not glibc")
    assert count < 1000 < faults("not")[1]
