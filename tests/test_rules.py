"""The language of rules: parsing, marks, and what letters stand for."""

from __future__ import annotations

import pytest

from attnctrl.errors import ControlError
from attnctrl.groups import Group
from attnctrl.rules import LETTERS, Rules, letter_of

TEXT = """
       S C P R U F O
    S  m 1 1 m 0 m 0
    C  1 1 1 0 0 1 1
    P  1 1 1 1 1 1 1
    R  m 0 1 m 0 m 1
    U  0 0 1 0 1 0 1
    F  m 1 1 m 0 m 0
    O  0 1 1 1 1 0 1
"""
OWN = frozenset([0, 1])
GROUPS = {
    "S0": Group("region_text", 0, frozenset([0])),
    "S1": Group("phrase", 1, frozenset([1])),
    "C": Group("global"),
    "P": Group("filling"),
    "R0": Group("image", members=frozenset([0])),
    "R01": Group("image", members=frozenset([0, 1])),
    "U": Group("image", members=frozenset([2])),
    "F1": Group("reference", 0, frozenset([1])),
    "O": Group("reference", 1, frozenset([2])),
    "register": Group("register"),
    "pad": Group("pad"),
    "foreign": Group("region_text", 2, frozenset([2])),
}


def test_letters_are_those_of_the_controls_own_regions() -> None:
    letters = {name: letter_of(group, OWN) for name, group in GROUPS.items()}
    assert {name: letter for name, letter in letters.items() if letter != name[0]} == {
        "register": None,
        "pad": None,
        "foreign": None,
    }


@pytest.mark.parametrize(
    ("pair", "sees"),
    [
        ("S0 S0", True), ("S0 S1", False), ("S0 R0", True), ("S1 R0", False), ("S1 R01", True), ("R01 S1", True),
        ("R0 R01", True), ("R0 F1", False), ("R01 F1", True), ("U S0", False), ("C R0", False), ("C F1", True),
        ("F1 O", False), ("R0 O", True), ("register U", True), ("R0 pad", True), ("R0 foreign", True),
        ("S0 foreign", True), ("foreign S1", True),
    ],
)  # fmt: skip
def test_marks_say_who_sees_whom(pair: str, sees: bool) -> None:
    q, k = (GROUPS[name] for name in pair.split())
    assert Rules.parse(TEXT).sees(q, k, OWN) is sees


def test_texts_of_others_are_to_ones_own_as_the_prompt_is() -> None:
    """Among appended texts alone; words of the prompt are nobody's appended text."""
    parted = Rules.parse(TEXT).with_marks("0", "SC", "CS")
    own, foreign, words = GROUPS["S0"], GROUPS["foreign"], GROUPS["S1"]
    assert [parted.sees(own, foreign, OWN), parted.sees(foreign, own, OWN)] == [False, False]
    assert parted.sees(words, foreign, OWN)


def test_marks_are_changed_by_pair_and_by_row() -> None:
    rules = Rules.parse(TEXT)
    changed = rules.with_marks("0", "CP", "*O")
    assert {pair for pair in rules.marks if rules.marks[pair] != changed.marks[pair]} == {
        "CP", "CO", "PO", "RO", "UO", "OO",
    }  # fmt: skip


def test_a_table_is_written_as_it_is_read() -> None:
    rules = Rules.parse(TEXT)
    assert str(rules).split() == TEXT.split()
    assert Rules.parse(str(rules)) == rules


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "0 rows"),
        (TEXT.replace("m", "x"), "marks x"),
        (TEXT.rsplit("\n", 2)[0], "6 rows"),
        (TEXT.replace("    S  m 1", "    S  m"), "7 rows"),
        (TEXT.replace("S C P", "S C C"), "columns S C C"),
    ],
)
def test_what_is_no_table_is_refused(text: str, found: str) -> None:
    with pytest.raises(ControlError, match=f"{LETTERS[0]} {LETTERS[1]}.*{found}"):
        Rules.parse(text)
