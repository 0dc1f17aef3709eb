"""Stories that go on by a bank: as beside the pictures that are read, at the cost of the new rows alone."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from attnctrl.pipelines import Shot, Story
from test_subjects_pipeline import BALL, CAST, LEFT, RIGHT, SHOTS, SIZES, pixels, wrapped

import attnctrl as ac
from attnctrl import provenance
from attnctrl.errors import ControlError, ScheduleError

EVERYBODY = [SHOTS[1], SHOTS[0], SHOTS[2]]
NEW = [
    Shot("{ball} left, {box} right", boxes={"ball": LEFT, "box": RIGHT}, seed=11),
    Shot("white background", seed=12),
    Shot("{box} left", boxes={"box": LEFT}, seed=13),
]
STORIES = {
    "sd3": ("sd3", "subjects", {}, SHOTS),
    "sd3-first": ("sd3", "subjects", {}, EVERYBODY),
    "flux": ("flux", "subjects", {}, SHOTS),
    "flux-kept": ("flux", "subjects", {"reposition": None}, SHOTS),
    "flux-resample": ("flux", "subjects", {"reposition": "resample"}, SHOTS),
    "unet": ("unet", "subjects", {}, SHOTS),
    "unet-keys": ("unet", "subjects", {"harmony": 0.0}, SHOTS),
    "unet-consistory": ("unet", "consistory", {}, SHOTS),
    "sd3-storysync": ("sd3", "storysync", {}, SHOTS),
    "sd3-harmony": ("sd3", "subjects", {"harmony": 0.5}, EVERYBODY),
    "unet-resample": ("unet", "subjects", {"harmony": 0.0, "reposition": "resample"}, SHOTS),
    "unet-storydiffusion": ("unet", "storydiffusion", {"anchors": 2}, SHOTS),
    "sd3-ir-diffusion": ("sd3", "ir-diffusion", {}, SHOTS),
    "flux-ir-diffusion": ("flux", "ir-diffusion", {"reposition": "rope"}, SHOTS),
    "sd3-scene": ("sd3", "scene", {"anchors": 2}, SHOTS),
}
AGAIN = """
import sys
sys.path[:0] = {path!r}
import json
import numpy as np
import attnctrl as ac
from attnctrl.pipelines import Story
from test_subjects_bank import NEW, pixels, wrapped
pipe = wrapped("sd3")
bank = ac.Bank.load({file!r}, pipe.pipe)
story = Story.of(json.loads({record!r}))
np.save({out!r}, np.stack([pixels(one) for one in pipe.more(story, NEW, bank=bank).pictures]))
"""


@contextmanager
def outputs(pipe):
    """What the denoiser gives out at each forward, [rows, ...]."""
    seen = []
    model = getattr(pipe.pipe, "unet", None) or pipe.pipe.transformer
    hook = model.register_forward_hook(lambda module, given, out: seen.append(out[0].clone()))
    yield seen
    hook.remove()


@pytest.fixture(scope="module")
def sd3():
    pipe = wrapped("sd3")
    story, bank = pipe(CAST, EVERYBODY, **SIZES), ac.Bank()
    pipe.keep(story, bank)
    return pipe, story, bank


@pytest.mark.parametrize("name", STORIES)
def test_new_pictures_are_those_beside_the_storys(name):
    kind, preset, options, shots = STORIES[name]
    pipe = wrapped(kind)
    story = pipe(CAST, shots, preset=preset, options=options, **SIZES)
    bank = ac.Bank()
    need = pipe.need(story, bank)
    kept = pipe.keep(story, bank)
    assert need == bank.nbytes > 0
    assert len(kept) == story.anchors == bank.pictures
    for one, two in zip(kept, story.pictures, strict=False):
        assert np.abs(pixels(one) - pixels(two)).max() <= 1
    with outputs(pipe) as joint:
        beside = pipe.more(story, NEW)
    with outputs(pipe) as alone:
        found = pipe.more(story, NEW, bank=bank)
    # plain queries cost a forward more
    assert len(joint) == len(alone) == 4 + (name == "unet-consistory")
    for one, two in zip(joint[2:], alone[2:], strict=True):
        branches = len(two) // 3
        assert len(one) == branches * (story.anchors + 3)
        mine = one.unflatten(0, (branches, -1))[:, story.anchors :].flatten(0, 1)
        assert (mine - two).abs().max() < 2e-5
    for one, two in zip(found.pictures, beside.pictures, strict=True):
        assert np.abs(pixels(one) - pixels(two)).max() <= 1
    assert (pixels(found.pictures[0]) != pixels(found.rehearsal.pictures[0])).any()
    # what is read makes the difference, and goes on doing so
    third = pipe.more(found, NEW[:1], bank=bank).pictures[0]
    assert np.abs(pixels(third) - pixels(found.pictures[0])).max() <= 1


def test_what_is_kept_while_a_story_is_drawn_is_what_keep_draws_for(sd3):
    pipe, story, bank = sd3
    while_drawn = ac.Bank()
    again = pipe(CAST, EVERYBODY, bank=while_drawn, **SIZES)
    assert all((pixels(one) == pixels(two)).all() for one, two in zip(again.pictures, story.pictures, strict=True))
    assert while_drawn.entries.keys() == bank.entries.keys()
    assert (while_drawn.pictures, while_drawn.names) == (1, ("ball", "box"))
    for entry, packed in bank.entries.items():
        assert (packed.states - while_drawn.entries[entry].states).abs().max() < 2e-5


def test_another_process_goes_on_to_the_bit(sd3, tmp_path):
    pipe, story, bank = sd3
    record = provenance.read(story.pictures[1].save(tmp_path / "a.png"))
    here = pipe.more(story, NEW, bank=bank)
    file, out = bank.save(tmp_path / "cast.safetensors"), tmp_path / "out.npy"
    told = {"path": [str(Path(__file__).parent)], "file": str(file), "out": str(out)}
    script = AGAIN.format(record=json.dumps(record), **told)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(out), np.stack([pixels(one) for one in here.pictures]))


def test_records_name_the_bank_and_pictures_are_drawn_again_to_the_bit(sd3, tmp_path):
    pipe, story, bank = sd3
    later = pipe.more(story, NEW[:2], bank=bank)
    record = provenance.read(later.pictures[0].save(tmp_path / "a.png"))
    assert [one["prompt"] for one in record["story"]["shots"]] == [
        "a red circle left, a blue square right",
        "white background",
    ]
    again = pipe.again(record, bank=ac.Bank.load(bank.save(tmp_path / "cast.safetensors")))
    assert (pixels(again) == pixels(later.pictures[0])).all()
    assert json.loads(json.dumps(again.record["story"])) == record["story"]
    with pytest.raises(ControlError, match="none was given"):
        pipe.again(record)
    other = ac.Bank()
    pipe.keep(pipe(CAST, [EVERYBODY[0], Shot("{ball}", seed=3)], seed=3, **{**SIZES, "num_inference_steps": 1}), other)
    with pytest.raises(ControlError, match="is another"):
        pipe.again(record, bank=other)


@pytest.mark.parametrize("dtype", [None, "float8"])
def test_outputs_travel_with_the_file(dtype, tmp_path):
    """Of a UNet, which takes in outputs by default: kept in the window of that alone, and told before."""
    pipe, bank = wrapped("unet"), ac.Bank(dtype)
    story = pipe(CAST, SHOTS, bank=bank, **SIZES)
    assert pipe.need(story, ac.Bank(dtype)) == bank.nbytes
    kept = {entry.step: packed.output is not None for entry, packed in bank.entries.items()}
    assert kept == {0: True, 1: False}
    loaded = ac.Bank.load(bank.save(tmp_path / "cast.safetensors"))
    first, second = (pixels(pipe.more(story, NEW[:1], bank=one).pictures[0]) for one in (bank, loaded))
    assert (first == second).all()


@pytest.mark.parametrize("kind", ["sd3", "unet"])
def test_a_new_picture_without_a_bank_is_drawn_again_as_well(kind, tmp_path):
    """Its record says who is read, also where all of the story read each other."""
    pipe = wrapped(kind)
    later = pipe.more(pipe(CAST, SHOTS, **SIZES), NEW[:1])
    record = provenance.read(later.pictures[0].save(tmp_path / "a.png"))
    assert record["story"]["anchors"] == record["story"]["options"]["anchors"] == 3
    assert (pixels(pipe.again(record)) == pixels(later.pictures[0])).all()


def test_narrow_banks_stay_near(sd3):
    pipe, story, bank = sd3
    narrow = ac.Bank("bfloat16", "cpu")
    assert pipe.need(story, narrow) == bank.nbytes // 2
    pipe.keep(story, narrow)
    assert narrow.nbytes == bank.nbytes // 2
    exact, near = (pixels(pipe.more(story, NEW[:1], bank=one).pictures[0]) for one in (bank, narrow))
    plain = pixels(pipe.more(story, NEW[:1], bank=bank).rehearsal.pictures[0])
    assert np.abs(near - exact).mean() < 0.2 * np.abs(plain - exact).mean()


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_nobody_known_in_the_new_pictures_reads_nobody(kind):
    pipe, bank = wrapped(kind), ac.Bank()
    story = pipe(CAST, EVERYBODY, bank=bank, **SIZES)
    found = pipe.more(story, NEW[1:2], bank=bank)
    assert (pixels(found.pictures[0]) == pixels(found.rehearsal.pictures[0])).all()


def test_what_cannot_be_is_refused(sd3):
    pipe, story, bank = sd3
    moved = pipe(CAST, EVERYBODY[:2], options={"reposition": "table"}, **SIZES)
    alone = pipe([BALL], SHOTS[:1], **SIZES)
    harmonized = pipe(CAST, EVERYBODY, options={"harmony": 0.5}, **SIZES)
    late = pipe(CAST, EVERYBODY, options={"harmony": 0.5, "window": (0.7, 1.0)}, **SIZES)
    slow = pipe(CAST, EVERYBODY, **{**SIZES, "num_inference_steps": 3})
    three = pipe(CAST, EVERYBODY, options={"anchors": 3}, **SIZES)
    refused = [
        (lambda: pipe.keep(story, bank), ControlError, "not empty"),
        (lambda: pipe.need(moved, ac.Bank()), ControlError, "mode='table' draws the story's.*reposition=None"),
        (
            lambda: pipe.more(harmonized, NEW, bank=bank),
            ControlError,
            "takes in outputs of attention, and the bank holds keys",
        ),
        (
            lambda: pipe.need(late, ac.Bank()),
            ControlError,
            r"outputs in the window \(0.1, 0.6\).*\(0.7, 1.0\) of 'edit'",
        ),
        (lambda: pipe.keep(alone, ac.Bank()), ControlError, "pictures read nobody"),
        (lambda: pipe.more(three, NEW, bank=bank), ControlError, "read 3 of its pictures, and the bank holds 1"),
        (lambda: pipe.more(story, NEW, bank=ac.Bank()), ControlError, "the bank holds 0"),
        (lambda: pipe.more(slow, NEW, bank=bank), ScheduleError, "bank is of a run"),
        (lambda: pipe.more(Story.of(story.pictures[0].record), NEW), ControlError, "holds no pictures to read"),
        (lambda: Story.of({}), ControlError, "not that of a picture of a story"),
    ]
    for call, error, message in refused:
        with outputs(pipe) as seen, pytest.raises(error, match=message):
            call()
        # a bank of another run is found out when it is read, all else before anything is drawn
        assert len(seen) <= (0 if error is ControlError else 4)
