"""Who may see whom, as a table over kinds of tokens: the language in which isolation and regions are written.

    RULES = Rules.parse('''
            S C P R U F O
         S  m 0 0 m 0 m 0
         C  0 1 1 1 1 1 1
         ...
    ''')

Rows are queries, columns keys. The letters, after LAMIC (arXiv 2508.00477): S text of a region, C prompt, P padding of
the prompt, R image tokens of regions, U image tokens of none, F reference picture bound to regions, O reference picture
that is open to all. The marks: 1 sees, 0 does not, m sees where both belong to a common region.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .errors import ControlError
from .groups import Group

__all__ = ["LETTERS", "Rules", "letter_of"]

LETTERS = "SCPRUFO"
MARKS = "01m"
_TEXTS = {"region_text": "S", "phrase": "S", "global": "C", "filling": "P"}


@dataclass(frozen=True)
class Rules:
    """A table: the mark of each pair of letters, query first."""

    marks: Mapping[str, str]

    @classmethod
    def parse(cls, text: str) -> Rules:
        """The table in `text`: a line of column letters, then a line for each row.

        Raises:
            ControlError: when it is no full table.
        """
        columns, *rows = [line.split() for line in text.strip().splitlines() if line.strip()] or [[]]
        marks = {row[0] + column: mark for row in rows for column, mark in zip(columns, row[1:], strict=False)}
        wanted = {q + k for q in LETTERS for k in LETTERS}
        whole = all(len(row) == len(columns) + 1 for row in rows) and len(rows) == len(columns) == len(LETTERS)
        wrong = sorted({mark for mark in marks.values() if mark not in MARKS})
        if not whole or set(marks) != wanted or wrong:
            raise ControlError(
                f"A table of rules has the columns and rows {' '.join(LETTERS)} and the marks {' '.join(MARKS)}; found "
                f"{len(rows)} rows, columns {' '.join(columns) or 'none'}"
                f"{', marks ' + ' '.join(wrong) if wrong else ''}. Write a line of letters, then a line for each row."
            )
        return cls(marks)

    def with_marks(self, mark: str, *pairs: str) -> Rules:
        """The table with another mark at `pairs`, such as "RU"; a letter "*" stands for all of them."""
        places = {q + k for pair in pairs for q in _letters(pair[0]) for k in _letters(pair[1])}
        return Rules({pair: mark if pair in places else old for pair, old in self.marks.items()})

    def sees(self, q: Group, k: Group, own: frozenset[int]) -> bool:
        """Whether queries of q see keys of k, for a control of the regions `own`. What is not theirs stays as it is."""
        row, column = letter_of(q, own), letter_of(k, own)
        if row is None or column is None:
            # texts of other controls are to texts of this one as the prompt is
            if "S" not in (row, column) or not q.kind == k.kind == "region_text":
                return True
            row, column = row or "C", column or "C"
        mark = self.marks[row + column]
        return mark == "1" or (mark == "m" and bool(q.members & k.members & own))

    def __str__(self) -> str:
        lines = [" ".join([row, *(self.marks[row + column] for column in LETTERS)]) for row in LETTERS]
        return "\n".join(["  " + " ".join(LETTERS), *lines])


def letter_of(group: Group, own: frozenset[int]) -> str | None:
    """The letter of a group for a control of the regions `own`; None for what rules do not speak of: registers of the
    model, padding that nobody sees, and texts of other controls.
    """
    mine = bool(group.members & own)
    if group.kind in ("region_text", "phrase"):
        return "S" if mine else None
    if group.kind == "image":
        return "R" if mine else "U"
    if group.kind == "reference":
        return "F" if mine else "O"
    return _TEXTS.get(group.kind)


def _letters(letter: str) -> str:
    return LETTERS if letter == "*" else letter
