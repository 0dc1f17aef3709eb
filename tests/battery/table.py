"""The table: each control as a row, with its rule spelled out token by token. A new method adds a row and inherits the battery."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from harness import Token, regions

import attnctrl as ac

Rule = Callable[[Token, Token], float]


@dataclass(frozen=True)
class Case:
    """One stack of controls.

    Attributes:
        controls: regions -> stack.
        rules: regions -> weights of the main pass, multiplied.
        overlap: the regions overlap, and this policy applies.
        texts: region texts are in the sequence.
        base_ratio: share of the open pass.
        references: reference pictures in the sequence; region 0 is bound to the first.
        mixes: in cross attention tokens of several regions read each text in a softmax of its own.
    """

    controls: Callable[[Sequence[Any]], list[Any]]
    rules: Callable[[Sequence[Any]], list[Rule]]
    overlap: str | None = None
    texts: bool = True
    base_ratio: float = 0.0
    references: int = 0
    mixes: bool = False

    def scene(self) -> list[Any]:
        scene = regions(overlap=self.overlap is not None)
        if self.references:
            first = scene[0]
            scene[0] = ac.Region(first.prompt, box=first.box, prompt_embeds=first.prompt_embeds, reference=0)
        return scene


def regional(global_text: str, strength: Callable[[frozenset[int]], float] = lambda _: 1.0) -> Rule:
    """The table in the docstring of `Regions`."""

    def pictured(q: Token, k: Token) -> bool:
        """Image and references among themselves."""
        if q.kind == k.kind == "image":
            return True
        if q.kind == k.kind == "reference":
            return (not q.members and not k.members) or bool(q.members & k.members)
        reference, image = (q, k) if q.kind == "reference" else (k, q)
        return not reference.members or bool(reference.members & image.members)

    def rule(q: Token, k: Token) -> float:
        kinds = (q.kind, k.kind)
        if kinds == ("global", "global"):
            return 1.0
        if "register" in kinds:
            return 1.0
        if "text" in kinds and "global" in kinds:
            return 0.0
        if kinds == ("text", "text"):
            return float(q.owner == k.owner)
        if q.kind == "text":
            return float(q.owner in k.members)
        if k.kind == "text":
            return strength(k.members) if k.owner in q.members else 0.0
        cut = 1 - strength(q.members | k.members)
        if "global" in kinds:
            other = k if q.kind == "global" else q
            seen = global_text == "open" or (global_text == "background" and not other.members)
            return 1.0 if seen else cut
        return 1.0 if pictured(q, k) else cut

    return rule


LAMIC = """
    S  m  1     m     0     m
    C  1  1     A0B1  A0B1  1
    R  m  A0B1  AmB1  A0B1  m
    U  0  A0B1  A0B1  1     0
    F  m  1     m     0     m
"""
"""The paper's table without padding: columns S C R U F; AxBy is x in phase A and y in phase B."""


def lamic(phase: str, hubs: str = "relay") -> Rule:
    """Token by token, read off the paper's table. References that belong to nobody are not in it."""
    rows = [row.split() for row in LAMIC.strip().split("\n")]
    marks = {row[0] + k: mark for row in rows for k, mark in zip("SCRUF", row[1:], strict=True)}

    def letter(token: Token) -> str:
        return {"text": "S", "global": "C", "reference": "F"}.get(token.kind, "R" if token.members else "U")

    def rule(q: Token, k: Token) -> float:
        if "register" in (q.kind, k.kind):
            return 1.0
        if any(token.kind == "reference" and not token.members for token in (q, k)):
            other = k if q.kind == "reference" and not q.members else q
            seen = other.kind in ("global", "image") or not other.members
            return float(seen and not (hubs == "source" and q.kind == "global"))
        mark = marks[letter(q) + letter(k)]
        mark = mark if len(mark) == 1 else mark[mark.index(phase) + 1]
        if hubs == "source" and q.kind == "global" and k.kind in ("image", "reference"):
            return 0.0
        return float(mark == "1" or (mark == "m" and bool(q.members & k.members)))

    return rule


def isolating(
    background: str, *, hub: str = "relay", cut: float = 0.0, text: bool = True, prompt: str = "open"
) -> Rule:
    """The table in the docstring of `Isolate`."""

    def rule(q: Token, k: Token) -> float:
        if "register" in (q.kind, k.kind):
            return 1.0
        if "text" in (q.kind, k.kind):
            return 1.0 if not text or q.members & k.members else cut
        if q.kind == "global":
            return cut if hub == "source" and k.members else 1.0
        if prompt == "background" and q.kind == "image" and q.members and k.kind == "global":
            return cut
        if k.kind == "global" or "reference" in ((q.kind, k.kind) if not (q.members and k.members) else ()):
            open_reference = any(t.kind == "reference" and not t.members for t in (q, k))
            if k.kind == "global" or open_reference:
                return 1.0
        if q.members and k.members:
            return 1.0 if q.members & k.members else cut
        if not q.members and not k.members:
            return 1.0
        return 1.0 if background == "shared" or (background == "reads_all" and not q.members) else cut

    return rule


def softened(rule: Rule, cut: float) -> Rule:
    """What the rule cuts keeps some weight, and texts of regions have as much."""

    def soft(q: Token, k: Token) -> float:
        sees = rule(q, k)
        if "register" in (q.kind, k.kind):
            return sees
        if "text" in (q.kind, k.kind):
            return sees * (1 - cut if k.kind == "text" and q.kind != "text" else 1.0)
        return sees or cut

    return soft


def weighted(weight: float, *kinds: str) -> Rule:
    """A reference, or other kinds of keys, counts so often to the image tokens of its regions."""
    named = kinds or ("reference",)
    return lambda q, k: weight if q.kind == "image" and k.kind in named and q.members & k.members else 1.0


CASES = {
    "regions": Case(lambda r: [ac.Regions(r)], lambda r: [regional("background")]),
    "regions-open": Case(lambda r: [ac.Regions(r, global_text="open")], lambda r: [regional("open")]),
    "regions-none": Case(lambda r: [ac.Regions(r, global_text="none")], lambda r: [regional("none")]),
    "regions-soft": Case(lambda r: [ac.Regions(r, strength=0.7)], lambda r: [regional("background", lambda _: 0.7)]),
    "regions-union": Case(lambda r: [ac.Regions(r)], lambda r: [regional("background")], overlap="union", mixes=True),
    "regions-mask": Case(lambda r: [ac.Regions(r, mixing="mask")], lambda r: [regional("background")], overlap="union"),
    "regions-priority": Case(
        lambda r: [ac.Regions(r, overlap="priority")], lambda r: [regional("background")], overlap="priority"
    ),
    "regions-overlap-background": Case(
        lambda r: [ac.Regions(r, overlap="background")], lambda r: [regional("background")], overlap="background"
    ),
    "regions-base": Case(
        lambda r: [ac.Regions(r, global_text="none", base_ratio=0.3)], lambda r: [regional("none")], base_ratio=0.3
    ),
    "regions-reference": Case(lambda r: [ac.Regions(r)], lambda r: [regional("background")], references=2),
    "regions-weighted": Case(
        lambda r: [ac.Regions(r, reference_weight=3.0), ac.Isolate()],
        lambda r: [regional("background"), isolating("isolated"), weighted(3.0)],
        references=2,
    ),
    "regions-text-weighted": Case(
        lambda r: [ac.Regions(r, text_weight=3.0)],
        lambda r: [regional("background"), weighted(3.0, "text")],
    ),
    "isolate": Case(lambda r: [ac.Isolate(r)], lambda r: [isolating("isolated")], texts=False),
    "isolate-reads-all": Case(
        lambda r: [ac.Isolate(r, background="reads_all")], lambda r: [isolating("reads_all")], texts=False
    ),
    "isolate-shared": Case(
        lambda r: [ac.Isolate(r, background="shared", hub="source")],
        lambda r: [isolating("shared", hub="source")],
        texts=False,
    ),
    "isolate-soft": Case(
        lambda r: [ac.Isolate(r, strength=0.6)], lambda r: [isolating("isolated", cut=0.4)], texts=False
    ),
    "isolate-overlap": Case(lambda r: [ac.Isolate(r)], lambda r: [isolating("isolated")], texts=False, overlap="union"),
    "isolate-reference": Case(lambda r: [ac.Isolate(r)], lambda r: [isolating("isolated")], texts=False, references=2),
    "seg2any-attributes": Case(
        lambda r: [ac.Isolate(background="reads_all", prompt="background"), ac.Regions(r, global_text="open")],
        lambda r: [isolating("reads_all", prompt="background"), regional("open")],
    ),
    "lamic-b": Case(lambda r: [ac.GroupIsolation(r)], lambda r: [lamic("B")]),
    "lamic-a": Case(lambda r: [ac.GroupIsolation(r), ac.RegionModulation(window=(0, 1))], lambda r: [lamic("A")]),
    "lamic-overlap": Case(
        lambda r: [ac.GroupIsolation(r), ac.RegionModulation(window=(0, 1))], lambda r: [lamic("A")], overlap="union"
    ),
    "lamic-source": Case(lambda r: [ac.GroupIsolation(r, hubs="source")], lambda r: [lamic("B", "source")]),
    "lamic-reference": Case(
        lambda r: [ac.GroupIsolation(r), ac.RegionModulation(window=(0, 1))], lambda r: [lamic("A")], references=2
    ),
    "lamic-weighted": Case(
        lambda r: [ac.GroupIsolation(r, reference_weight=0.5, strength=0.5)],
        lambda r: [softened(lamic("B"), 0.5), weighted(0.75)],
        references=2,
    ),
    "lamic-text-weighted": Case(
        lambda r: [ac.GroupIsolation(r, text_weight=3.0, strength=0.5)],
        lambda r: [softened(lamic("B"), 0.5), weighted(2.0, "text")],
    ),
    "stack": Case(
        lambda r: [ac.Isolate(background="reads_all"), ac.Regions(r)],
        lambda r: [isolating("reads_all"), regional("background")],
    ),
    "stack-soft": Case(
        lambda r: [ac.Isolate(strength=0.5), ac.Regions(r, global_text="open", base_ratio=0.2)],
        lambda r: [isolating("isolated", cut=0.5), regional("open")],
        base_ratio=0.2,
    ),
}
