"""Ten small icons in one style: the first picture gives it, the others read it while they are drawn."""

from attnctrl.pipelines import StylePipeline

SHAPES = ("star", "heart", "circle", "square", "triangle")
prompts = [f"a solid {color} {shape} center" for color in ("red", "blue") for shape in SHAPES]

pipe = StylePipeline.from_pretrained("toy-flux")
pictures = pipe(prompts, "white background", seeds=4, batch=6)
for number, picture in enumerate(pictures):
    picture.save(f"out/icon-{number}.png")
