"""What every check of the simulation raises."""

from __future__ import annotations


class Violation(AssertionError):
    """Something happened that must not."""
