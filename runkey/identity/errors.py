"""The error of this package."""

from __future__ import annotations

from runkey.errors import RunkeyError


class RecipeError(RunkeyError):
    """The key of a stage cannot be made: something that enters it is missing or unreadable."""
