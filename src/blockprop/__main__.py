"""`python -m blockprop`."""

from blockprop.cli import run_and_exit

run_and_exit()
