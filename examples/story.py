"""A story of four panels with two characters, and one panel more that is told later.

The sheets show the rehearsal with the places where the characters were found, and beside it what was drawn with shared
attention.
"""

from pathlib import Path

from attnctrl.pipelines import Character, MultiSubjectPipeline, Shot, Story

OUT = Path("out")
CAST = [Character("ball", "a red circle"), Character("star", "a blue star")]
PANELS = [
    Shot("{ball} left, {star} right, white background"),
    Shot("{star} top, {ball} bottom, gray background"),
    Shot("{ball} center, beige background"),
    Shot("{star} left, {ball} right, black background"),
]
LATER = [Shot("{star} center, beige background")]


def save(story: Story, name: str) -> None:
    """The pictures, each with its record, and the sheet."""
    for number, picture in enumerate(story.pictures):
        print(picture.save(OUT / f"{name}-{number}.png"))
    story.sheet().save(OUT / f"{name}.png")


pipe = MultiSubjectPipeline.from_pretrained("toy-sd")
story = pipe(CAST, PANELS, seed=4)
save(story, "story")
save(pipe.more(story, LATER, seed=8), "later")
