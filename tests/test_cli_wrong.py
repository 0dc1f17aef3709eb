"""Requests that cannot work: exit code 2, nothing written, and a message of what was asked, what was found, what to do."""

from __future__ import annotations

import pytest
from PIL import Image
from shell import SCENE, save_tiny

OVER = "a red circle and a blue square"
PAIR = ["layout", OVER, "-s", "a red circle", "-s", "a blue square"]

WRONG = {
    "no such command": (["paint"], ["paint", "No such command"]),
    "no such option": (["generate", "pair.yaml", "--stepz", "3"], ["--stepz", "--steps"]),
    "no scene": (["generate"], ["SCENE", "Missing"]),
    "a scene that is not there": (["generate", "gone.yaml"], ["gone.yaml", "is missing or not a regular file", "name an existing file"]),
    "a key that scenes do not have": (["generate", "key.yaml"], ["subjectz: unknown key", "did you mean 'subjects'?"]),
    "a control that is unknown": (["check", "control.yaml"], ["controls[0]", "regionz", "did you mean 'regions'?"]),
    "a box outside of the picture": (["check", "box.yaml"], ["subjects[0].box", "1.5"]),
    "steps below one": (["generate", "pair.yaml", "--steps", "0"], ["--steps", "should be greater than or equal to 1"]),
    "steps in words": (["generate", "pair.yaml", "--steps", "many"], ["--steps", "should be a valid integer"]),
    "no pictures": (["generate", "pair.yaml", "-n", "0"], ["--num", "should be greater than or equal to 1"]),
    "a seed below zero": (["layout", OVER, "--seed", "-1"], ["--seed", "should be greater than or equal to 0"]),
    "too much guidance": (
        ["generate", "pair.yaml", "--guidance-scale", "500"], ["--guidance-scale", "should be less than or equal to 100"],
    ),
    "a number format": (["generate", "pair.yaml", "--dtype", "int8"], ["--dtype", "int8", "bfloat16"]),
    "a device": (["generate", "pair.yaml", "--device", "toaster"], ["--device", "'toaster' cannot be used here"]),
    "a way of offloading": (["generate", "pair.yaml", "--cpu-offload", "disk"], ["--cpu-offload", "disk", "sequential"]),
    "an attention backend": (
        ["generate", "pair.yaml", "--attention-backend", "flush"],
        ["--attention-backend", "No attention backend 'flush'", "take one of", "flash"],
    ),
    "a LoRA that is not there": (
        ["generate", "pair.yaml", "--lora", "gone.safetensors:0.5"],
        ["--lora", "'gone.safetensors': no such file", "name a safetensors file, as PATH or PATH:SCALE"],
    ),
    "a LoRA that is something else": (
        ["style", "a", "b", "--lora", "pair.yaml"], ["--lora", "'pair.yaml' is no safetensors file", "convert it"],
    ),
    "a model": (["generate", "pair.yaml", "-m", "no-model"], ["--model", "no model 'no-model'", "name toy-flux"]),
    "an embedded model": (["layout", OVER, "-a", "0,0,1,1", "-m", "toy-flax"], ["--model", "'toy-flax'", "toy-flux"]),
    "two scenes for one file": (
        ["generate", "pair.yaml", "other/pair.yaml", "-m", "tiny"], ["would write", "pair-5.png", "choose another -o"],
    ),
    "a picture of others": (["replay", "foreign.png"], ["carries no record of attnctrl", "name a PNG as attnctrl wrote it"]),
    "a document for a picture": (["info", "pair.yaml"], ["pair.yaml", "not a readable PNG", "name a picture of attnctrl"]),
    "a subject without a place": (
        ["layout", OVER], ["--at", "found 0 for the prompt alone", "give one --at for each --subject"],
    ),
    "fewer places than subjects": (
        [*PAIR, "--at", "0,0,.5,1"], ["--at", "found 1 for 2 subjects (a red circle, a blue square)", "in the same order"],
    ),
    "more references than subjects": (
        [*PAIR, "-a", "0,0,.5,1", "-a", ".5,0,1,1", "-r", "look.png"],
        ["--reference", "found 1 for 2 subjects", "or - for none"],
    ),
    "three numbers": (
        ["layout", OVER, "--at", "0,0,1"], ["'0,0,1' has 3 numbers", "a box has four", "such as 0.05,0.2,0.45,0.8"],
    ),
    "neither box nor mask": (["layout", OVER, "--at", "left"], ["'left' is neither a box", "nor the file of a mask"]),
    "a box in pixels": (["layout", OVER, "--at", "0,0,512,512"], ["subjects[0].box", "512"]),
    "a box from right to left": (["layout", OVER, "--at", "0.6,0,0.4,1"], ["subjects[0].box", "0.6"]),
    "an empty mask": (["layout", OVER, "--at", "black.png"], ["the mask is empty", "paint the subject's place white"]),
    "a reference that is not there": (
        ["layout", OVER, "-a", "0,0,1,1", "-r", "gone.png"], ["--reference", "no picture 'gone.png'", "name a file, or -"],
    ),
    "no place and no look": (
        ["layout", OVER, "-a", "-"], ["a subject needs a box, a mask or a reference", "add 'box: [x0, y0, x1, y1]'"],
    ),
    "no room for a background": (
        ["layout", OVER, "-a", "0,0,1,1", "--background", "a wall"],
        ["nothing is outside the boxes and masks", "'a wall'", "make room for it"],
    ),
    "a width between tokens": (["layout", OVER, "-a", "0,0,1,1", "--width", "99"], ["width", "99", "multiple of 8"]),
    "a preset": (
        ["layout", OVER, "-a", "0,0,1,1", "--preset", "lamic-fix"], ["--preset", "no preset 'lamic-fix'", "lamic-fixed"],
    ),
    "a set of one": (["style", "a red circle"], ["two prompts or more", "found 1"]),
    "an empty prompt": (["style", "a red circle", " "], ["Prompt 1 is empty", "say what that picture shows"]),
    "a style that is not there": (
        ["style", "a cat", "--picture", "gone.png", "--picture-prompt", "x"], ["--picture", "gone.png"],
    ),
    "a style without words": (
        ["style", "a cat", "--picture", "look.png"], ["--picture-prompt", "the model reads what the picture shows"],
    ),
    "words of no picture": (["style", "a", "b", "--picture-prompt", "x"], ["are of a picture; give --picture with them"]),
    "a batch of one": (["style", "a", "b", "--batch", "1"], ["--batch", "should be greater than or equal to 2"]),
    "a story and its parts": (["subjects", "--cast", "b=x"], ["give a story file, or at least one --cast and one --shot"]),
    "the same words twice": (["maps", "pair.yaml", "-w", "Red", "-w", "red"], ["Red, red are the same words", "name each once"]),
    "a picture over itself": (["replay", "made.png", "-o", "made.png"], ["is the picture itself", "choose another file"]),
    "an edited JPEG": (["edit", "look.png", "-p", "x", "-o", "x.jpg"], ["x.jpg is no PNG", "ends in .png"]),
    "a suite": (["eval", "layouts"], ["no suite 'layouts'", "did you mean 'layout'?"]),
    "a measurement": (["bench", "walk"], ["walk", "No such command"]),
    "a picture that is not there": (["check", "gone.png"], ["gone.png", "is missing or not a regular file", "name an existing file"]),
    "a demo as JPEG": (["demo", "-o", "x.jpg"], ["--output", "'x.jpg' must end in .png"]),
    "a scene and its schema": (["check", "pair.yaml", "--schema"], ["give a scene file, or --schema"]),
    "nothing to check": (["check"], ["give a scene file, or --schema"]),
    "a preset to explain": (["explain", "pair.yaml", "--preset", "lamick"], ["no preset 'lamick'", "lamic"]),
    "a form": (["models", "--format", "xml"], ["--format", "xml", "json"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = save_tiny(tmp_path_factory.mktemp("wrong"))
    (made / "other").mkdir()
    (made / "other" / "pair.yaml").write_text(SCENE)
    (made / "key.yaml").write_text(SCENE.replace("subjects:", "subjectz:"))
    (made / "control.yaml").write_text(SCENE.replace("name: regions", "name: regionz"))
    (made / "box.yaml").write_text(SCENE.replace("[0, 0, 0.5, 1]", "[0, 0, 1.5, 1]"))
    for name, color in (("foreign", "red"), ("look", "red"), ("black", "black"), ("made", "red")):
        Image.new("RGB", (16, 16), color).save(made / f"{name}.png")
    return made


@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests_say_what_was_found_and_what_to_do(call, folder, monkeypatch, name):
    line, told = WRONG[name]
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    code, out, err = call(*line)
    message = " ".join(err.replace("│", " ").split())
    assert (code, out) == (2, ""), message
    assert [part for part in told if part not in message] == [], message
    assert "Traceback" not in err
    assert sorted(folder.rglob("*")) == before


def test_the_table_is_long_and_meets_every_command_that_draws():
    assert len(WRONG) >= 30
    assert {line[0] for line, _ in WRONG.values()} >= {
        "generate",
        "layout",
        "style",
        "subjects",
        "maps",
        "edit",
        "replay",
    }
