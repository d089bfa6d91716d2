"""What is claimed of blockprop's time and memory, measured: `overhead`, `memory` and `threads`, each run by -m."""
