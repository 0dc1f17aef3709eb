"""Scenes on a tiny FLUX of the real classes: equal to plain Diffusers without control, seeded, recorded, and traceless."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from attnctrl.pipelines import ScenePipeline
from attnctrl.pipelines.models import Model, find_model, find_scene_model, read_defaults
from attnctrl.pipelines.outline import Outline
from diffusers import FluxKontextPipeline, FluxPipeline
from PIL import Image
from shell import DEFAULTS, SIZE, save_tiny

from attnctrl import provenance
from attnctrl.errors import AssetError, SceneError, UnsupportedModelError
from attnctrl.scene import Scene, load_scene
from attnctrl.versions import versions

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def pipe(folder):
    return ScenePipeline.from_pretrained(str(folder / "tiny"), device="cpu")


@pytest.fixture(scope="module")
def scene(folder):
    return load_scene(folder / "pair.yaml")


def pixels(picture):
    return np.asarray(picture.image)


def test_without_control_it_is_plain_diffusers(pipe, scene):
    ours = pipe(scene, [5], controlled=False)[0]
    plain = pipe.pipe(
        scene.prompt, negative_prompt="", width=SIZE, height=SIZE, num_inference_steps=2, guidance_scale=1.0, true_cfg_scale=3.0,
        max_sequence_length=40, generator=torch.Generator().manual_seed(5),
    ).images[0]  # fmt: skip
    assert (pixels(ours) == np.asarray(plain)).all()
    assert ours.report == ""
    assert not ours.controlled


def test_control_changes_the_picture_says_where_and_leaves(pipe, scene):
    before = {name: id(one) for name, one in pipe.pipe.transformer.attn_processors.items()}
    vanilla = pixels(pipe(scene, [5], controlled=False)[0])
    controlled = pipe(scene, [5])[0]
    assert (pixels(controlled) != vanilla).mean() > 0.5
    assert "regions: " in controlled.report
    assert "isolate: " in controlled.report
    regions, isolate = controlled.record["report"]["controls"]
    assert (regions["rows"], regions["steps"], isolate["steps"]) == ([("cond", 0)], [0, 1], [0])
    assert controlled.record["report"]["forwards"] == 4
    assert (pixels(pipe(scene, [5], controlled=False)[0]) == vanilla).all()
    assert {name: id(one) for name, one in pipe.pipe.transformer.attn_processors.items()} == before


def test_a_scene_without_controls_is_the_plain_model(pipe, scene):
    bare = pipe(scene.replace(controls=[]), [5])[0]
    assert (pixels(bare) == pixels(pipe(scene, [5], controlled=False)[0])).all()
    assert not bare.controlled


def test_pictures_depend_on_their_own_seed_only(pipe, scene):
    state = torch.get_rng_state()
    together = pipe(scene, [5, 6])
    torch.manual_seed(1234)
    alone = pipe(scene, [6])[0]
    assert (pixels(together[1]) == pixels(alone)).all()
    assert (pixels(together[0]) != pixels(alone)).any()
    assert [picture.seed for picture in together] == [5, 6]
    assert (pixels(pipe(scene)[0]) == pixels(together[0])).all()  # the scene's seed is 5
    torch.set_rng_state(state)


def test_the_global_generator_is_neither_read_nor_set(pipe, scene):
    torch.manual_seed(99)
    state = torch.get_rng_state()
    python_state = np.random.get_state()[1].copy()
    first = pixels(pipe(scene, [1])[0])
    assert (torch.get_rng_state() == state).all()
    assert (np.random.get_state()[1] == python_state).all()
    torch.manual_seed(100)
    assert (pixels(pipe(scene, [1])[0]) == first).all()


def test_progress_counts_every_step(pipe, scene):
    seen = []
    pipe(scene.replace(steps=3), [1, 2], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)] * 2


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_that_no_scene_could_hold_are_refused(pipe, scene, seed):
    with pytest.raises(SceneError, match="seed: must be in"):
        pipe(scene, [seed])


# settings and sizes


def test_what_the_scene_leaves_open_comes_from_the_folder(pipe, scene):
    settings = pipe.settings(scene)
    assert (settings.width, settings.height, settings.steps) == (SIZE, SIZE, 2)
    assert (settings.guidance_scale, settings.true_cfg_scale, settings.max_sequence_length) == (1.0, 3.0, 40)
    own = pipe.settings(scene.replace(width=32, height=48, steps=7, guidance_scale=0, true_cfg_scale=1))
    assert (own.width, own.height, own.steps, own.guidance_scale, own.true_cfg_scale) == (32, 48, 7, 0.0, 1.0)
    assert pipe(scene.replace(width=32, height=48, steps=1))[0].image.size == (32, 48)


def test_without_a_defaults_file_the_values_are_those_of_flux(pipe, scene):
    settings = ScenePipeline(pipe.pipe, {"name": "x"}).settings(scene)
    own = pipe.pipe.default_sample_size * pipe.pipe.vae_scale_factor
    assert (settings.width, settings.height, settings.steps) == (own, own, 28)
    assert (settings.guidance_scale, settings.true_cfg_scale, settings.max_sequence_length, settings.auto_resize) == (
        3.5,
        1.0,
        512,
        True,
    )


def test_a_size_off_the_grid_is_refused_with_the_next_one(pipe, scene, monkeypatch):
    monkeypatch.setattr(pipe.pipe, "vae_scale_factor", 8)
    with pytest.raises(SceneError, match="width must be a multiple of 16 for this model; found 40; try 32"):
        pipe.settings(scene.replace(width=40))


# references


@pytest.fixture
def with_reference(folder):
    def make(color):
        Image.new("RGB", (32, 48), color).save(folder / "reference.png")
        subject = {"prompt": "a red circle", "box": [0, 0, 0.5, 1], "reference": "reference.png"}
        return load_scene(folder / "pair.yaml").replace(subjects=[subject], controls=[{"name": "regions"}])

    return make


def test_a_reference_makes_it_kontext_on_the_same_modules(pipe, with_reference):
    red = pipe(with_reference((255, 0, 0)))[0]
    assert red.image.size == (SIZE, SIZE)
    assert red.record["pipeline"] == "FluxKontextPipeline"
    assert (pixels(red) != pixels(pipe(with_reference((0, 0, 255)))[0])).any()
    assert isinstance(pipe.pipe, FluxPipeline)
    assert set(red.files) == {"reference.png"}


def test_kontext_without_control_is_plain_kontext(pipe, with_reference):
    ours = pipe(with_reference((9, 200, 9)), [3], controlled=False)[0]
    kontext = FluxKontextPipeline(**pipe.pipe.components)
    kontext.set_progress_bar_config(disable=True)
    plain = kontext(
        image=Image.new("RGB", (32, 48), (9, 200, 9)), prompt="a red circle and a blue square", negative_prompt="", true_cfg_scale=3.0,
        guidance_scale=1.0, width=SIZE, height=SIZE, max_area=SIZE * SIZE, _auto_resize=False, num_inference_steps=2,
        max_sequence_length=40, generator=torch.Generator().manual_seed(3),
    ).images[0]  # fmt: skip
    assert (pixels(ours) == np.asarray(plain)).all()


def test_several_references_come_in_and_each_belongs_to_its_subject(pipe, folder):
    for name, color in (("r.png", (255, 0, 0)), ("b.png", (0, 0, 255))):
        Image.new("RGB", (24, 16), color).save(folder / name)

    def drawn(left, right, **keys):
        subjects = [
            {"prompt": "a red circle", "box": [0, 0, 0.5, 1], "reference": left},
            {"prompt": "a blue square", "box": [0.5, 0, 1, 1], "reference": right},
        ]
        return pipe(load_scene(folder / "pair.yaml").replace(subjects=subjects, **keys))[0]

    picture = drawn("r.png", "b.png")
    assert "warning" not in picture.report
    assert (pixels(picture) != pixels(drawn("b.png", "r.png"))).mean() > 0.3
    assert (pixels(picture) != pixels(drawn("r.png", "b.png", reference_positions="region"))).mean() > 0.3
    assert (pixels(picture) != pixels(drawn("r.png", "b.png", reference_pixels=64))).mean() > 0.3
    path = picture.save(folder / "saved.png")
    scene, _ = provenance.restore(path)
    assert (pixels(pipe(scene)[0]) == pixels(picture)).all()
    outline = Outline.of(find_model(str(folder / "tiny")))
    tokens = outline.explain(scene).to_dict()["scenes"][0][0]["tokens"]
    assert (tokens["reference.0"], tokens["reference.1"]) == (6, 6)
    shrunk = outline.explain(scene.replace(reference_pixels=64)).to_dict()["scenes"][0][0]["tokens"]
    assert (shrunk["reference.0"], shrunk["reference.1"]) == (1, 1)


@pytest.mark.parametrize(("width", "height"), [(64, 32), (40, 72), (8, 64)])
def test_kontext_keeps_the_size_asked_for(pipe, with_reference, width, height):
    scene = with_reference((0, 0, 0)).replace(width=width, height=height, steps=1)
    assert pipe(scene, controlled=False)[0].image.size == (width, height)


# provenance


def test_a_saved_picture_can_be_made_again(pipe, with_reference, tmp_path):
    picture = pipe(with_reference((1, 2, 3)), [7])[0]
    path = picture.save(tmp_path / "p.png")
    scene, record = provenance.restore(path)
    again = pipe(scene)[0]
    assert (pixels(again) == pixels(picture)).all()
    assert again.save(tmp_path / "q.png").read_bytes() == path.read_bytes()
    assert provenance.differences(record, again.record) == []


def test_the_record_is_complete_and_holds_no_path(pipe, scene, folder, tmp_path):
    picture = pipe(scene, [7])[0]
    record = picture.record
    assert record["scene"] == {
        **scene.to_dict(), "seed": 7, "width": SIZE, "height": SIZE, "steps": 2, "guidance_scale": 1.0, "true_cfg_scale": 3.0,
    }  # fmt: skip
    assert record["model"] == {"name": "tiny", "fingerprint": provenance.fingerprint(folder / "tiny")}
    assert (record["device"], record["dtype"], record["pipeline"], record["controlled"]) == (
        "cpu",
        "float32",
        "FluxPipeline",
        True,
    )
    assert record["scheduler"]["class"] == "FlowMatchEulerDiscreteScheduler"
    assert record["scheduler"]["config"]["shift"] == 1.5
    assert record["versions"] == versions()
    assert record["settings"]["max_sequence_length"] == DEFAULTS["max_sequence_length"]
    data = picture.save(tmp_path / "p.png").read_bytes()
    text = provenance.to_text(record)["attnctrl"]
    assert str(folder) not in text
    assert str(tmp_path).encode() not in data
    # made at another time, the same bytes
    assert pipe(scene, [7])[0].save(tmp_path / "q.png").read_bytes() == data


# the user's own pipeline, and finding models


def test_from_pipe_leaves_the_pipeline_as_it_is(pipe, scene, folder):
    own = FluxPipeline.from_pretrained(folder / "tiny")
    own.set_progress_bar_config(disable=True)
    wrapped = ScenePipeline.from_pipe(own)
    assert wrapped.pipe is own
    assert wrapped.identity == {"name": "tiny", "fingerprint": provenance.fingerprint(folder / "tiny")}
    assert wrapped.defaults == DEFAULTS
    assert (pixels(wrapped(scene)[0]) == pixels(pipe(scene)[0])).all()
    assert ScenePipeline.from_pipe(own, "mine").identity["name"] == "mine"


def test_other_pipelines_are_refused(pipe):
    with pytest.raises(
        UnsupportedModelError,
        match=r"ScenePipeline runs on FluxPipeline, .*found FluxTransformer2DModel; load one of these",
    ):
        ScenePipeline.from_pipe(pipe.pipe.transformer)


def test_models_are_found_by_name(folder, tmp_path):
    found = find_model(str(folder / "tiny"))
    assert (found.folder, found.defaults) == (folder / "tiny", DEFAULTS)
    assert find_model("owner/name") == Model("owner/name", "owner/name")
    with pytest.raises(AssetError, match="neither a folder nor a hub id"):
        find_model("no-such-model")
    with pytest.raises(AssetError, match="is no Diffusers folder"):
        find_model(str(tmp_path))


def test_the_model_of_a_scene_stays_beside_it(folder, tmp_path):
    assert find_scene_model("./tiny", folder).folder == (folder / "tiny").resolve()
    assert find_scene_model("owner/name", folder) == Model("owner/name", "owner/name")
    (tmp_path / "link").symlink_to(folder / "tiny")
    with pytest.raises(SceneError, match="the folder must lie in the scene's folder"):
        find_scene_model("./link", tmp_path)
    with pytest.raises(AssetError, match="is no Diffusers folder"):
        find_scene_model("./none", tmp_path)


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "must hold a JSON object; found list")])
def test_a_damaged_defaults_file_is_an_error(tmp_path, text, message):
    (tmp_path / "attnctrl.json").write_text(text)
    with pytest.raises(AssetError, match=message):
        read_defaults(tmp_path)


def test_the_first_script_runs(pipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ScenePipeline, "from_pretrained", lambda name: pipe if name == "toy-flux" else None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    runpy.run_path(str(EXAMPLES / "first_picture.py"))
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'first_picture.png'}\n"
    scene, record = provenance.restore(tmp_path / "out" / "first_picture.png")
    assert [subject.name for subject in scene.subjects] == ["circle", "square"]
    assert record["controlled"] is True


SCENES = sorted(path for path in EXAMPLES.glob("*.yaml") if path.stem != "story")  # a story has a test of its own


@pytest.mark.parametrize("path", SCENES, ids=lambda path: path.stem)
def test_the_example_scenes_act(pipe, path):
    """Those for models of the Hub are drawn small, by a model that knows none of their words."""
    scene = load_scene(path)
    own = scene.model.startswith("toy-")
    small = {} if own else {"width": SIZE, "height": SIZE, "guidance_scale": None}
    picture = pipe(scene.replace(steps=2, text_encoding=scene.text_encoding if own else "auto", **small))[0]
    assert picture.controlled
    assert "warning" not in picture.report
    assert all(subject.prompt in scene.prompt for subject in scene.subjects)


# the outline


def test_the_outline_tells_what_the_pipeline_does_without_weights(folder, scene, with_reference, tmp_path):
    for path in sorted((folder / "tiny").rglob("*")):
        if path.is_file() and path.suffix != ".safetensors":
            target = tmp_path / "bare" / path.relative_to(folder / "tiny")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    outline = Outline.of(find_model(str(tmp_path / "bare")))
    assert {parameter.device.type for parameter in outline.transformer.parameters()} == {"meta"}
    told = outline.explain(scene).to_dict()
    assert told["steps"] == 2
    assert [(control["name"], control["steps"]) for control in told["controls"]] == [
        ("regions", "0-1"),
        ("isolate", "0"),
    ]
    first = told["scenes"][0][0]
    assert first["tokens"] == {"text.global": 40, "text.region0": 4, "text.region1": 4, "image": 64}
    assert first["regions"] == {"circle": 32, "square": 32}
    assert outline.explain(with_reference((0, 0, 0))).to_dict()["scenes"][0][0]["tokens"]["reference.0"] == 4 * 6


def test_the_outline_has_the_noise_levels_of_the_run(pipe, folder, scene):
    outline = Outline.of(find_model(str(folder / "tiny")))
    pipe(scene.replace(steps=5), controlled=False)
    assert outline.sigmas(outline.settings(scene.replace(steps=5))) == pytest.approx(
        pipe.pipe.scheduler.sigmas[:5].tolist(), abs=1e-7
    )


def test_kontext_resizes_references_to_its_own_resolutions(folder, with_reference):
    outline = Outline.of(find_model(str(folder / "tiny")))
    scene = with_reference((0, 0, 0))
    free = Outline.settings(outline, scene)
    assert outline.references(scene, free) == [(6, 4)]
    outline.defaults["auto_resize"] = True
    # 32 x 48 has the proportions 2:3; Kontext's nearest resolution is 832 x 1248
    assert outline.references(scene, outline.settings(scene)) == [(1248 // 8, 832 // 8)]


def test_scenes_made_in_memory_run_too(pipe):
    scene = Scene.from_dict({"version": 1, "prompt": "a red circle", "steps": 1})
    assert pipe(scene)[0].image.size == (SIZE, SIZE)
