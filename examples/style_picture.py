"""Pictures in the style of a real one: a row of the batch is held on it at every noise level, and nothing is trained.

A photo or a poster of yours does as well: give its path, and say in words what it shows.
"""

from attnctrl.pipelines import StylePipeline
from PIL import Image, ImageDraw

POSTER = Image.new("RGB", (96, 96), "beige")
drawing = ImageDraw.Draw(POSTER)
for offset in range(0, 96, 12):
    drawing.line((offset, 0, offset, 96), fill="white", width=4)
drawing.ellipse((24, 24, 72, 72), fill="red", outline="black", width=4)

pipe = StylePipeline.from_pretrained("toy-sd")
pictures = pipe(
    ["a blue square center", "a green star center"],
    "beige background",
    picture=POSTER,
    picture_prompt="a red circle center, beige background",
    seeds=3,
)
for number, picture in enumerate(pictures):
    print(picture.save(f"out/styled-{number}.png"))

# the poster is in the PNG, so this draws the same picture again
again = pipe.again(pictures[0].record, files=pictures[0].files)
print(again.save("out/styled-again.png"))
