"""Where words of a prompt are attended to, what was found as a region of the next picture, and perturbed attention."""

import torch
from attnctrl.pipelines import ScenePipeline
from PIL import Image

import attnctrl as ac
from attnctrl import files, maps

wrapper = ScenePipeline.from_pretrained("toy-sd", device="cpu")
pipe, steps = wrapper.pipe, wrapper.defaults["steps"]
prompt = "a red circle left, a blue square right, gray background"
words = {"circle": "red circle", "square": "blue square"}


def draw(text: str) -> Image.Image:
    """One picture, always from the same noise."""
    return pipe(text, num_inference_steps=steps, generator=torch.Generator().manual_seed(1)).images[0]


with maps.record(pipe, words, prompt=prompt) as found:
    image = draw(prompt)
sheet = maps.legend(image, {name: found[name][0] for name in words})
print(files.write_png("out/maps.png", sheet))

# the circle's place, as it was found, holds a star now
mask, undecided = maps.otsu(found["circle"][0])
print(f"{mask.sum()} of {mask.numel()} tokens are the circle's{' (undecided)' if undecided else ''}")
star = "a green star left, a blue square right, gray background"
regions = ac.in_prompt(pipe, star, [ac.Region("a green star left", mask=mask)])
with ac.attach(pipe, ac.preset("texts", regions)):
    print(files.write_png("out/maps-star.png", draw(star)))

# guidance away from attention in which each token reads itself alone
with ac.attach(pipe, ac.Perturb("identity", layers="middle", scale=2.0)) as handle:
    print(files.write_png("out/perturbed.png", draw(prompt)))
print(handle.report())
