"""Search for better values of a spec's fields: the space, trials as training runs, the study, its report."""
