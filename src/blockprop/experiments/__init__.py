"""Runs: settings, one run with all it leaves behind, comparisons of several, and their tables and plots."""
