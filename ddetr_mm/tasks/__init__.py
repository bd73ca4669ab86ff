"""One module per subcommand: the sequence of a task, not its logic.

Every module has ``run(arguments)``, called by :mod:`ddetr_mm.cli` with the parsed arguments. It raises
:class:`ddetr_mm.errors.InputError` for wrong input and returns nothing.
"""
