"""What surrounds a run: status file, checkpoints, curves, result files, progress."""
