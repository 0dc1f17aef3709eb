"""Two subjects in places of their own, one in a drawn mask, each with the looks of its reference picture."""

from attnctrl.pipelines import LayoutPipeline, Subject
from PIL import Image, ImageDraw


def draw(shape: str, color: str, size: int = 48) -> Image.Image:
    """A reference picture: one shape on white."""
    picture = Image.new("RGB", (size, size), "white")
    getattr(ImageDraw.Draw(picture), shape)((size // 6, size // 6, size * 5 // 6, size * 5 // 6), fill=color)
    return picture


mask = Image.new("L", (64, 64))
ImageDraw.Draw(mask).ellipse((34, 14, 62, 50), fill=255)

pipe = LayoutPipeline.from_pretrained("toy-flux")
picture = pipe(
    "a red circle left, a blue square right, white background",
    [
        Subject("a red circle left, white background", box=(0.05, 0.25, 0.45, 0.75), reference=draw("ellipse", "red")),
        Subject("a blue square right, white background", mask=mask, reference=draw("rectangle", "blue")),
    ],
    seeds=3,
)[0]
print(picture.save("out/layout.png"))
