"""What can be wrong, and the exit code that it ends in."""

from __future__ import annotations


class RecipeError(Exception):
    """The recipe is wrong (exit 2): names the key, the value seen and what would be accepted."""


class DataError(Exception):
    """The data is wrong (exit 3): names the file and what it lacks."""


class InfrastructureError(Exception):
    """A process, actor, disk or network failed (exit 4): the same command may be run again."""


class GateStopped(Exception):
    """A health or release gate stopped the run (exit 5)."""
