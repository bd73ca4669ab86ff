"""Runs: hooks, loops, checkpoints, ranks, status, curves."""
