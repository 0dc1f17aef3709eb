"""A picture that is there, drawn again with another prompt: its layout stays, what the prompt speaks of changes.

`share` is the part of the steps in which the picture's own values are kept: more holds on to the picture.
"""

from attnctrl.pipelines.editing import Editor, EditSettings
from PIL import Image, ImageDraw

picture = Image.new("RGB", (64, 64), "white")
ImageDraw.Draw(picture).ellipse((16, 16, 48, 48), fill="red")
source = "a red circle center, white background"

editor = Editor.from_pretrained("toy-flux")
for name, prompt, share in (
    ("blue", "a blue circle center, white background", 0.3),
    ("held", "a blue circle center, white background", 0.8),
):
    edit = editor.edit(picture, EditSettings(prompt, source=source, share=share))
    print(edit.save(f"out/edit-{name}.png"))

# what acted, and where
print(edit.report)

# `attnctrl edit photo.png --source ... --prompt ... -o edited.png` does the same
settings = edit.record["settings"]
print(settings["method"], settings["steps"], settings["share"])
