"""What is claimed of blockprop's time and memory, measured: `overhead`, `memory`, `threads` and more, by -m."""
