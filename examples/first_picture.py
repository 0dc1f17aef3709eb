"""Attention control on a Diffusers pipeline in five lines: two shapes, each in its own box."""

from attnctrl.pipelines import ScenePipeline

from attnctrl.scene import load_scene

scene = load_scene("examples/two_shapes.yaml")
picture = ScenePipeline.from_pretrained("toy-flux")(scene)[0]
print(picture.save("out/first_picture.png"))
