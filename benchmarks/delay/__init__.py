"""Learning under delay, beside backprop: `python -m benchmarks.delay`."""
