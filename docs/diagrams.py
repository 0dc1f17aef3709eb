"""The diagrams of docs/how-it-works.md: `python docs/diagrams.py` draws them anew into docs/images/.

One picture for the idea, tokens by tokens, and one for each stage of a call. Drawn from the toy sequence below, with
Pillow alone; a test compares the pixels with what is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).parent / "images"
INK, GREY, PAPER = (32, 32, 32), (190, 190, 190), (255, 255, 255)
# Okabe and Ito's palette: told apart by colour-blind readers too
KINDS = {
    "text": (240, 228, 66),
    "A": (0, 114, 178),
    "B": (230, 159, 0),
    "rest": (86, 180, 233),
    "other": (204, 121, 167),
}
SEQUENCE = ("text",) * 3 + ("A",) * 4 + ("B",) * 4 + ("rest",) * 3
CELL, LEFT, TOP = 20, 40, 60
STAGES = ("positions", "content", "sources", "visibility", "execute", "output")

Sees = Callable[[str, str], float]


def sees_all(_query: str, _key: str) -> float:
    """The plain model."""
    return 1.0


def apart(query: str, key: str) -> float:
    """Isolation: A and B do not see each other."""
    return float({query, key} != {"A", "B"})


def softened(query: str, key: str) -> float:
    """The same at strength 0.6."""
    return apart(query, key) or 0.4


def canvas(width: int, height: int, title: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A sheet with a title, and what draws on it."""
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    write(draw, (LEFT, 8), title, 18)
    return image, draw


def write(draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int = 13) -> None:
    """Text whose top left corner is `at`."""
    draw.text(at, text, fill=INK, font=ImageFont.load_default(size))


def cell(draw: ImageDraw.ImageDraw, x: float, y: float, colour: tuple[int, int, int]) -> None:
    """One token, or one weight."""
    draw.rectangle((x, y, x + CELL - 2, y + CELL - 2), fill=colour, outline=INK)


def row(draw: ImageDraw.ImageDraw, x: float, y: float, kinds: Sequence[str]) -> None:
    """Tokens side by side."""
    for number, kind in enumerate(kinds):
        cell(draw, x + number * CELL, y, KINDS[kind])


def table(
    draw: ImageDraw.ImageDraw, x: float, y: float, queries: Sequence[str], keys: Sequence[str], sees: Sees
) -> None:
    """Weights of queries (downwards) over keys, the tokens beside them; white sees nothing."""
    row(draw, x + CELL, y, keys)
    for down, query in enumerate(queries, start=1):
        cell(draw, x, y + down * CELL, KINDS[query])
        for along, key in enumerate(keys, start=1):
            shade = round(255 - 165 * sees(query, key))
            cell(draw, x + along * CELL, y + down * CELL, (shade, shade, shade))


def arrow(draw: ImageDraw.ImageDraw, x: float, y: float, length: float, text: str = "") -> None:
    """An arrow to the right, with words above it."""
    draw.line((x, y, x + length, y), fill=INK, width=2)
    draw.polygon([(x + length, y - 5), (x + length, y + 5), (x + length + 8, y)], fill=INK)
    write(draw, (x, y - 20), text)


def track(draw: ImageDraw.ImageDraw, y: float, here: str) -> None:
    """The stages in their order, the present one marked."""
    for number, name in enumerate(STAGES):
        x = LEFT + number * 112
        draw.rectangle((x, y, x + 100, y + 22), fill=KINDS["rest"] if name == here else PAPER, outline=INK)
        write(draw, (x + 8, y + 4), name)


def tokens() -> Image.Image:
    """Attention is a table, tokens by tokens; a control says which cells are open."""
    image, draw = canvas(720, 410, "Every token reads others: a table of tokens x tokens")
    table(draw, LEFT, TOP, SEQUENCE, SEQUENCE, sees_all)
    table(draw, LEFT + 350, TOP, SEQUENCE, SEQUENCE, apart)
    legend = {"text": "text", "A": "subject A", "B": "subject B", "rest": "background"}
    for number, (kind, text) in enumerate(legend.items()):
        cell(draw, LEFT + number * 130, 376, KINDS[kind])
        write(draw, (LEFT + number * 130 + 26, 377), text)
    return image


def stage(name: str, title: str, paint: Callable[[ImageDraw.ImageDraw], None]) -> Image.Image:
    """A sheet for one stage."""
    image, draw = canvas(740, 270, title)
    track(draw, 36, name)
    paint(draw)
    return image


def positions(draw: ImageDraw.ImageDraw) -> None:
    """A subject's keys are turned to the place where another picture has it."""
    write(draw, (LEFT, 90), "keys of another picture stand where that picture has its subject")
    row(draw, LEFT, 120, ("rest", "other", "other", "rest", "rest", "rest"))
    arrow(draw, LEFT + 150, 129, 180, "turned by the difference")
    row(draw, LEFT + 360, 120, ("rest", "rest", "rest", "rest", "other", "other"))
    write(draw, (LEFT, 160), "in float32, by the model's own angles; nothing is encoded again")


def content(draw: ImageDraw.ImageDraw) -> None:
    """Statistics of keys become those of an anchor."""
    write(draw, (LEFT, 90), "queries, keys and values before the kernel")
    for number, height in enumerate((20, 70, 35, 50)):
        x = LEFT + number * 30
        draw.rectangle((x, 210 - height, x + 20, 210), fill=KINDS["A"], outline=INK)
        draw.rectangle((x + 360, 190 - height / 2, x + 380, 190), fill=KINDS["other"], outline=INK)
    arrow(draw, LEFT + 150, 170, 170, "mean and spread of the anchor")
    write(draw, (LEFT, 220), "own")
    write(draw, (LEFT + 360, 220), "own, in the anchor's style")


def sources(draw: ImageDraw.ImageDraw) -> None:
    """Keys of others come behind the own ones."""
    write(draw, (LEFT, 90), "further keys and values: of other rows of the batch, or of a bank")
    row(draw, LEFT, 120, SEQUENCE)
    arrow(draw, LEFT + 290, 129, 40)
    row(draw, LEFT + 350, 120, SEQUENCE + ("other",) * 3)
    write(draw, (LEFT, 160), "queries stay as they are: the picture reads more, and nothing else of it changes")


def visibility(draw: ImageDraw.ImageDraw) -> None:
    """A small table between groups instead of one between tokens."""
    groups = ("text", "A", "B", "rest")
    for number, (sees, text) in enumerate(((apart, "hard"), (softened, "strength 0.6"))):
        table(draw, LEFT + number * 190, 80, groups, groups, sees)
        write(draw, (LEFT + number * 190, 190), text)
    arrow(draw, LEFT + 370, 130, 45, "added")
    write(
        draw,
        (LEFT + 440, 95),
        "log-weights of all controls are added:\none table of groups, whatever\nthe number of tokens",
    )
    write(draw, (LEFT, 220), "0 sees, -inf does not, log(w) sees with the weight w")


def execute(draw: ImageDraw.ImageDraw) -> None:
    """Rows that agree are one call of the kernel on the keys that they see."""
    calls = {
        "text": ("text", "A", "B", "rest"),
        "A": ("text", "A", "rest"),
        "B": ("text", "B", "rest"),
        "rest": ("text", "A", "B", "rest"),
    }
    write(draw, (LEFT, 80), "queries")
    write(draw, (LEFT + 200, 80), "keys that they see")
    for number, (kind, seen) in enumerate(calls.items()):
        y = 104 + number * 30
        row(draw, LEFT, y, [one for one in SEQUENCE if one == kind])
        arrow(draw, LEFT + 110, y + 9, 60)
        row(draw, LEFT + 200, y, [one for one in SEQUENCE if one in seen])
    write(
        draw, (LEFT, 240), "the selected kernel runs on parts; the planner picks a masked call only where it is faster"
    )


def output(draw: ImageDraw.ImageDraw) -> None:
    """What was executed is mixed with something else."""
    write(draw, (LEFT, 90), "the executed call, before the model goes on")
    row(draw, LEFT, 120, ("A",) * 4)
    write(draw, (LEFT + 96, 122), "(1 - strength) x attention")
    row(draw, LEFT, 155, ("other",) * 4)
    write(draw, (LEFT + 96, 157), "strength x another map, or a matching token of another picture")
    arrow(draw, LEFT + 20, 205, 60)
    row(draw, LEFT + 110, 196, ("A", "other") * 2)


def diagrams() -> dict[str, Image.Image]:
    """Every diagram by the name of its file."""
    stages = {
        "positions": ("1. Positions: where a token seems to stand", positions),
        "content": ("2. Content: what queries, keys and values are", content),
        "sources": ("3. Sources: whose keys are there", sources),
        "visibility": ("4. Visibility: who sees whom", visibility),
        "execute": ("5. Execute: one plan, the kernel you selected", execute),
        "output": ("6. Output: what becomes of the result", output),
    }
    return {"tokens": tokens(), **{name: stage(name, *told) for name, told in stages.items()}}


def main() -> None:
    """Write them all."""
    HERE.mkdir(exist_ok=True)
    for name, image in diagrams().items():
        # few colours: files stay small
        image.quantize(64, dither=Image.Dither.NONE).save(HERE / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
