"""Three reference pictures, each bound to a place of its own, and the same picture where they are merely concatenated.

The scene examples/three_references.yaml says the same for `attnctrl generate`.
"""

from pathlib import Path

from attnctrl.pipelines import LayoutPipeline, Subject

LOOKS = Path("examples/references")
THINGS = [
    ("this thing top left", (0, 0, 0.5, 0.5), "one.png"),
    ("this thing top right", (0.5, 0, 1, 0.5), "two.png"),
    ("this thing bottom", (0, 0.5, 1, 1), "three.png"),
]

pipe = LayoutPipeline.from_pretrained("toy-flux")
prompt = "this thing top left, this thing top right, this thing bottom, white background"
subjects = [Subject(words, box=box, reference=LOOKS / name) for words, box, name in THINGS]
bound = pipe(prompt, subjects, seeds=2)[0]
print(bound.report)
print(bound.save("out/references.png"))

# controls=[] leaves the references in and binds them to nothing
loose = pipe(prompt, subjects, seeds=2, controls=[])[0]
print(loose.save("out/references-loose.png"))

# what the PNG carries is enough to draw it again, reference pictures included
print(sorted(bound.files))
