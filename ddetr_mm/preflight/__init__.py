"""What can be proved about a run before it starts."""
