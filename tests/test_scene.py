"""The scene: values, limits, messages with the nearest key, and files that cannot leave their folder."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scene_tools import BASE, LEFT, RIGHT, refusal, refused_file, save_mask, write

from attnctrl import scene as module
from attnctrl.controls import CONTROLS
from attnctrl.errors import SceneError
from attnctrl.region import coverage, membership
from attnctrl.scene import Scene, load_scene, scene_schema

# values


def test_what_is_written_is_what_is_read(tmp_path):
    scene = load_scene(
        write(tmp_path, {**BASE, "subjects": [LEFT, {**RIGHT, "name": "square", "strength": 0.5}], "seed": 7})
    )
    assert (scene.prompt, scene.seed, scene.model) == (BASE["prompt"], 7, "toy-flux")
    assert (scene.width, scene.height, scene.steps, scene.guidance_scale, scene.negative_prompt) == (None,) * 4 + ("",)
    first, second = scene.regions()
    assert (first.prompt, first.box, first.name, first.strength) == ("a red circle", (0.0, 0.25, 0.5, 0.75), None, 1.0)
    assert (second.prompt, second.box, second.name, second.strength) == (
        "a blue square",
        (0.5, 0.25, 1.0, 0.75),
        "square",
        0.5,
    )
    assert scene.folder == tmp_path.resolve()


def test_json_is_read_as_well(tmp_path):
    path = write(tmp_path, json.dumps({**BASE, "subjects": [LEFT]}), "scene.json")
    assert load_scene(path).regions()[0].box == tuple(LEFT["box"])


def test_a_scene_survives_its_own_dictionary():
    data = {
        **BASE, "negative_prompt": "fog", "model": "owner/name", "width": 640, "height": 480, "units": "pixels", "steps": 9,
        "guidance_scale": 2.5, "true_cfg_scale": 3, "seed": 2**63 - 1, "background": "a gray wall",
        "reference_positions": "apart", "reference_pixels": 4096, "text_encoding": "joint",
        "subjects": [{"prompt": "x", "name": "n", "box": [0, 0, 320, 240.5], "strength": 0.25}],
        "controls": [{"name": "regions", "window": [0, 0.5], "layers": ["single:0", "double"]}, {"name": "isolate"}],
    }  # fmt: skip
    once = Scene.from_dict(data)
    text = json.dumps(once.to_dict())
    again = Scene.from_dict(json.loads(text))
    assert again == once
    assert json.dumps(again.to_dict()) == text
    assert {key: value for key, value in once.to_dict().items() if key != "subjects"} == {
        key: value for key, value in data.items() if key != "subjects"
    }
    assert once.to_dict()["subjects"] == [
        {**data["subjects"][0], "mask": None, "reference": None, "negative_prompt": ""}
    ]


def test_pixel_boxes_equal_normalised_boxes():
    pixels = {
        **BASE,
        "units": "pixels",
        "width": 640,
        "height": 320,
        "subjects": [{"prompt": "x", "box": [160, 80, 480, 320]}],
    }
    shares = {**BASE, "width": 640, "height": 320, "subjects": [{"prompt": "x", "box": [0.25, 0.25, 0.75, 1]}]}
    one, other = Scene.from_dict(pixels).regions()[0], Scene.from_dict(shares).regions()[0]
    assert one.box == other.box == (0.25, 0.25, 0.75, 1.0)


def test_units_are_said_never_guessed():
    # [0, 0, 1, 1] in pixels is one pixel, not the whole picture
    scene = Scene.from_dict(
        {**BASE, "units": "pixels", "width": 64, "height": 32, "subjects": [{"prompt": "x", "box": [0, 0, 1, 1]}]}
    )
    assert scene.regions()[0].box == (0.0, 0.0, 1 / 64, 1 / 32)


@given(st.integers(8, 500), st.integers(8, 500), st.data())
def test_pixel_boxes_cover_the_same_tokens(width, height, data):
    width, height = width * 8, height * 8
    x0, y0 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    box = [x0, y0, data.draw(st.integers(x0 + 1, width)), data.draw(st.integers(y0 + 1, height))]
    shares = [box[0] / width, box[1] / height, box[2] / width, box[3] / height]
    size = {**BASE, "width": width, "height": height} if max(width, height) <= 4096 else None
    if size is None:
        return
    pixels = Scene.from_dict({**size, "units": "pixels", "subjects": [{"prompt": "x", "box": box}]}).regions()
    normal = Scene.from_dict({**size, "subjects": [{"prompt": "x", "box": shares}]}).regions()
    assert bool((coverage(pixels[0], (6, 5)) == coverage(normal[0], (6, 5))).all())


def test_background_is_a_region_of_everything_else():
    scene = Scene.from_dict({**BASE, "width": 64, "height": 64, "subjects": [LEFT], "background": "a gray wall"})
    circle, wall = scene.regions()
    assert (wall.prompt, wall.name) == ("a gray wall", "background")
    inside, outside = membership([circle, wall], (8, 8)).reshape(2, 8, 8)
    assert bool((inside ^ outside).all())
    assert int(inside.sum()) == 4 * 4
    assert bool(inside[2:6, :4].all())


def test_background_respects_masks(tmp_path):
    save_mask(tmp_path / "m.png", [[255, 0], [0, 0]])
    scene = load_scene(write(tmp_path, {**BASE, "subjects": [{"prompt": "x", "mask": "m.png"}], "background": "wall"}))
    shape, wall = membership(scene.regions(), (4, 4)).reshape(2, 4, 4)
    assert bool((shape ^ wall).all())
    assert bool(shape[:2, :2].all())
    assert int(shape.sum()) == 4


def test_a_background_needs_room():
    data = {**BASE, "subjects": [{"prompt": "x", "box": [0, 0, 1, 1]}], "background": "wall"}
    assert "background: nothing is outside the boxes and masks" in refusal(data)


# what is refused, and what the message says


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": 3}, "stepz: unknown key; found 3; did you mean 'steps'?"),
        ({"colour": "red"}, "colour: unknown key; found 'red'; known here: background, controls, guidance_scale"),
        ({"subjects": [{**LEFT, "strenght": 1}]}, "subjects[0].strenght: unknown key; found 1; did you mean 'strength'?"),
        ({"subjects": [LEFT, {"promt": "x"}]}, "subjects[1].promt: unknown key; found 'x'; did you mean 'prompt'?"),
        ({"subjects": [{"box": [0, 0, 1, 1]}]}, "subjects[0].prompt: this key is required; found nothing; add 'prompt: ...'"),
        ({"version": None}, "version: the version is a whole number; found None; write 'version: 1'"),
        ({"version": 2}, "version: this attnctrl reads scenes of version 1; found 2; install the attnctrl that wrote it"),
        ({"version": True}, "version: the version is a whole number; found True"),
        ({"prompt": ""}, "prompt: string should have at least 1 character; found ''; expected: the whole picture, in words"),
        ({"prompt": "x" * 4001}, "prompt: string should have at most 4000 characters"),
        ({"prompt": 3}, "prompt: input should be a valid string; found 3"),
        ({"seed": "3"}, "seed: input should be a valid integer; found '3'"),
        ({"seed": True}, "seed: input should be a valid integer; found True"),
        ({"seed": -1}, "seed: input should be greater than or equal to 0; found -1"),
        ({"seed": 2**63}, "seed: input should be less than or equal to 9223372036854775807"),
        ({"width": 100}, "width: input should be a multiple of 8; found 100"),
        ({"width": 4104}, "width: input should be less than or equal to 4096; found 4104"),
        ({"height": 0}, "height: input should be greater than or equal to 8; found 0"),
        ({"width": 64.0}, "width: input should be a valid integer; found 64.0"),
        ({"steps": 0}, "steps: input should be greater than or equal to 1; found 0"),
        ({"steps": 501}, "steps: input should be less than or equal to 500; found 501"),
        ({"guidance_scale": float("nan")}, "guidance_scale: input should be a finite number; found nan"),
        ({"guidance_scale": -0.5}, "guidance_scale: input should be greater than or equal to 0"),
        ({"units": "percent"}, "units: input should be 'normalised' or 'pixels'; found 'percent'"),
        ({"units": "pixels", "subjects": [LEFT]}, "boxes in pixels need the picture's size; found no width or height"),
        ({"model": "../up"}, "model: not a model's name; found ../up; write toy-flux"),
        ({"model": "/abs/path"}, "model: not a model's name"),
        ({"model": "./a/../../b"}, "model: not a model's name"),
        ({"subjects": [{"prompt": "x"}]}, "subjects[0]: a subject needs a box, a mask or a reference; found none"),
        ({"subjects": [{**LEFT, "mask": "m.png"}]}, "subjects[0]: a subject has a box or a mask; found both"),
        ({"subjects": [{**LEFT, "strength": 1.5}]}, "subjects[0].strength: input should be less than or equal to 1"),
        ({"subjects": [{**LEFT, "name": "a"}, {**RIGHT, "name": "a"}]}, "names must differ; found 'a' more than once"),
        ({"subjects": [LEFT] * 33}, "subjects: tuple should have at most 32 items"),
        ({"subjects": {"a": LEFT}}, "subjects: input should be a valid tuple; found {'a'"),
        ({"controls": [{"name": "isolate"}] * 17, "subjects": [LEFT]}, "controls: tuple should have at most 16 items"),
    ],
)  # fmt: skip
def test_messages_name_the_key_the_value_and_the_remedy(change, message):
    assert message in refusal({**BASE, **change})


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([0.6, 0, 0.4, 1], "a box needs x0 < x1 and y0 < y1; found [0.6, 0.0, 0.4, 1.0]; write it as [left, top, right, bottom]"),
        ([0, 0.5, 1, 0.5], "a box needs x0 < x1 and y0 < y1"),
        ([-0.1, 0, 0.5, 1], "not inside the picture [0, 0, 1, 1] in normalised units; found [-0.1, 0.0, 0.5, 1.0]; move or shrink"),
        ([0, 0, 1.01, 1], "not inside the picture"),
        ([0, 0, 320, 240], "not inside the picture [0, 0, 1, 1] in normalised units; found [0.0, 0.0, 320.0, 240.0]; add 'units: pixels'"),
        ([0, 0, 1], "a box is four numbers; found [0, 0, 1]; write it as [left, top, right, bottom]"),
        ([0, 0, 1, 1, 1], "a box is four numbers"),
        ([0, 0, 1, "1"], "box[3]: input should be a valid number; found '1'"),
        ([0, 0, 1, float("inf")], "box[3]: input should be a finite number; found inf"),
        ("1234", "a box is four numbers; found '1234'"),
    ],
)  # fmt: skip
def test_boxes_are_checked(box, message):
    text = refusal({**BASE, "subjects": [{"prompt": "x", "box": box}]})
    assert "subjects[0].box" in text
    assert message in text


def test_pixel_boxes_end_with_the_picture():
    data = {**BASE, "units": "pixels", "width": 64, "height": 32, "subjects": [{"prompt": "x", "box": [0, 0, 64, 33]}]}
    assert (
        "not inside the picture [0, 0, 64, 32] in pixels units; found [0.0, 0.0, 64.0, 33.0]; move or shrink"
        in refusal(data)
    )


def test_all_problems_come_at_once_under_the_name_of_the_file(tmp_path):
    path = write(tmp_path, {**BASE, "stepz": 1, "subjects": [{**LEFT, "bocks": 1}]})
    lines = refused_file(path).splitlines()
    assert lines[0] == f"{path}: 2 problems"
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["subjects[0].bocks", "stepz"]


# controls


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "regionz"}, "controls[0].name: unknown control; found 'regionz'; did you mean 'regions'?"),
        ({"nam": "regions"}, "controls[0]: a control needs a name"),
        ({"name": ["x"]}, "controls[0].name: unknown control; found ['x']"),
        ({"name": "regions", "strenght": 1}, "controls[0].strenght: 'regions' has no such parameter; found 1; did you mean 'strength'?"),
        ({"name": "regions", "strength": "high"}, "controls[0].strength: input should be a valid number; found 'high'"),
        ({"name": "regions", "strength": 2.0}, "strength must be in [0, 1]; found 2"),
        ({"name": "regions", "global_text": "opn"}, "controls[0].global_text: must be one of open, background, none; found 'opn'; did you mean 'open'?"),
        ({"name": "regions", "window": "01"}, "controls[0].window: input should be a valid list"),
        ({"name": "regions", "window": [0.5, 0.2]}, "a window needs 0 <= start <= stop <= 1"),
        ({"name": "regions", "window": {"sigma": [1, 2, 3]}}, "controls[0]: "),
        ({"name": "regions", "layers": [1]}, "controls[0].layers: input should be a valid string"),
        ({"name": "regions", "regions": [{"mask": "x"}]}, "controls[0].regions: the regions are the scene's subjects"),
        ({"name": "isolate", "text": "yes"}, "controls[0].text: input should be a valid boolean; found 'yes'"),
    ],
)  # fmt: skip
def test_controls_are_checked_against_their_own_fields(entry, message):
    assert message in refusal({**BASE, "subjects": [LEFT], "controls": [entry]})


def test_a_control_without_a_place_to_act_is_refused():
    assert "controls[0]: 'isolate' needs a box or a mask to act on" in refusal(
        {**BASE, "controls": [{"name": "isolate"}]}
    )


def test_controls_get_the_regions_of_the_scene():
    entries = [{"name": "isolate", "window": [0, 0.5]}, {"name": "regions", "base_ratio": 0.25}]
    isolate, regions = Scene.from_dict({**BASE, "subjects": [LEFT, RIGHT], "controls": entries}).build_controls()
    assert (isolate.name, isolate.window, regions.name, regions.base_ratio) == ("isolate", (0.0, 0.5), "regions", 0.25)
    assert [region.box for region in regions.regions] == [tuple(LEFT["box"]), tuple(RIGHT["box"])]
    assert len(isolate.regions) == 0  # it takes those that the other declares, so that texts and places are one
    entries = [{"name": "regions", "layers": "all/2"}, {"name": "open_texts", "layers": "not all/2"}]
    _, between = Scene.from_dict({**BASE, "subjects": [LEFT, RIGHT], "controls": entries}).build_controls()
    assert len(between.regions) == 0


def test_controls_of_guidance_and_reuse_are_told_by_scenes():
    entries = [
        {"name": "skip", "what": "attention", "layers": "mid.self", "window": [0, 0.2]},
        {"name": "nag", "negative_prompt": "green", "scale": 4.0},
        {"name": "reuse", "policy": "pab", "every": 3, "between": [100, 900]},
    ]
    skip, nag, reuse = Scene.from_dict({**BASE, "controls": entries}).build_controls()
    assert (skip.what, skip.window, nag.scale, reuse.every, reuse.between) == ("attention", (0, 0.2), 4, 3, (100, 900))
    assert "negative_embeds" in refusal({**BASE, "controls": [{**entries[1], "negative_embeds": [1]}]})
    assert "needs layers" in refusal({**BASE, "controls": [{"name": "skip"}]})


def test_isolate_alone_gets_the_regions():
    (isolate,) = Scene.from_dict({**BASE, "subjects": [LEFT], "controls": [{"name": "isolate"}]}).build_controls()
    assert [region.box for region in isolate.regions] == [tuple(LEFT["box"])]


def test_controls_left_out_mean_text_regions_where_there_are_places():
    assert [control.name for control in Scene.from_dict({**BASE, "subjects": [LEFT]}).build_controls()] == ["regions"]
    assert Scene.from_dict(BASE).build_controls() == []
    assert Scene.from_dict({**BASE, "subjects": [LEFT], "controls": []}).build_controls() == []


# replacing, and the schema


def test_replace_checks_again():
    scene = Scene.from_dict({**BASE, "subjects": [LEFT]})
    assert scene.replace(steps=3).steps == 3
    assert scene.steps is None
    with pytest.raises(SceneError, match="steps"):
        scene.replace(steps=0)


def test_the_schema_names_every_key_and_every_parameter():
    schema = scene_schema()
    assert set(schema["properties"]) == set(Scene.model_fields)
    assert schema["required"] == ["version", "prompt"]
    assert schema["additionalProperties"] is False
    assert set(schema["$defs"]["Subject"]["properties"]) == {
        *("prompt", "name", "box", "mask", "reference", "strength", "negative_prompt"),
    }
    entries = schema["properties"]["controls"]["anyOf"][0]["items"]["oneOf"]
    assert {entry["properties"]["name"]["const"] for entry in entries} == set(CONTROLS)
    regions = next(entry for entry in entries if entry["properties"]["name"]["const"] == "regions")
    assert regions["properties"]["global_text"]["enum"] == ["open", "background", "none"]
    assert regions["additionalProperties"] is False
    assert "regions" not in regions["properties"]
    assert json.loads(json.dumps(schema)) == schema


@pytest.mark.parametrize("text", ["toy-flux", "./here", "./a/b", "black-forest-labs/FLUX.1-dev"])
def test_names_of_models(text):
    assert module.is_model_name(text)


@pytest.mark.parametrize(
    "text", ["here", "../a", "/a/b", "./a/../b", "a/b/c", "https://x/y", "a\\b", "./a\\b", "", "a/..", "../b"]
)
def test_names_that_are_no_models(text):
    assert not module.is_model_name(text)
