"""Banks: keys and values of pictures, kept once and read by later ones."""

from .store import Bank, Entry, Held, Recalled, checked_branch

__all__ = ["Bank", "Entry", "Held", "Recalled", "checked_branch"]
