"""The commands of ``wholegrad``: each module has ``add(commands)`` and ``run(args)``."""
