"""Provenance: what is recorded, what comes back, and what a stranger's picture cannot do."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from attnctrl import files, provenance, versions
from attnctrl.errors import SceneError
from attnctrl.scene import Scene
from attnctrl.scenefile import SceneMemory

SCENE = {
    "version": 1, "prompt": "two things", "seed": 3,
    "subjects": [
        {"prompt": "a", "mask": "masks/m.png", "name": "ä"},
        {"prompt": "b", "box": [0.5, 0.0, 1.0, 1.0], "reference": "r.png"},
    ],
}  # fmt: skip
IMAGE = Image.new("RGB", (4, 4), (1, 2, 3))


def png(array):
    return files.png_bytes(Image.fromarray(np.array(array, dtype=np.uint8)))


@pytest.fixture
def named():
    return {"masks/m.png": png([[255, 0]]), "r.png": png(np.random.default_rng(0).integers(0, 256, (300, 300, 3)))}


def record(**changes):
    return {"scene": Scene.from_dict({**SCENE, "subjects": SCENE["subjects"][1:]}, SceneMemory({"r.png": png([[1]])})).to_dict(),
            "seed": 3, "controlled": True, **changes}  # fmt: skip


def save(path, content, embedded=None):
    return files.write_png(path, IMAGE, provenance.to_text(content, embedded))


def test_a_picture_brings_its_scene_and_files_back(tmp_path, named):
    scene = Scene.from_dict(SCENE, SceneMemory(named))
    path = save(tmp_path / "p.png", {"scene": scene.to_dict(), "seed": 41, "controlled": False}, named)
    again, told = provenance.restore(path)
    assert again.to_dict() == {**scene.to_dict(), "seed": 41}
    assert (told["seed"], told["controlled"], told["format"]) == (41, False, 1)
    assert again.regions()[0].mask.tolist() == [[1, 0]]
    assert again.references()[0].tobytes() == scene.references()[0].tobytes()


def test_equal_records_give_equal_bytes_in_any_order(named):
    one = provenance.to_text({"a": 1, "b": {"c": 2, "d": 3}}, named)
    other = provenance.to_text({"b": {"d": 3, "c": 2}, "a": 1}, dict(reversed(named.items())))
    assert files.png_bytes(IMAGE, one) == files.png_bytes(IMAGE, other)


def test_large_files_come_in_parts_that_readers_accept(tmp_path, monkeypatch):
    data = np.random.default_rng(1).bytes(2_000_000)
    text = provenance.to_text({}, {"r.png": data})
    parts = json.loads(text["attnctrl"])["files"]["r.png"]["chunks"]
    assert len(parts) == 6
    assert all(len(text[key]) <= PngImagePlugin.MAX_TEXT_CHUNK for key in parts)


def test_what_is_too_large_is_recorded_by_digest_and_must_be_the_same_file(tmp_path, named, monkeypatch):
    monkeypatch.setattr(provenance, "MAX_EMBEDDED_BYTES", len(named["r.png"]) - 1)
    scene = Scene.from_dict(SCENE, SceneMemory(named))
    path = save(tmp_path / "p.png", {"scene": scene.to_dict(), "seed": 3}, named)
    entry = provenance.read(path)["files"]
    assert entry["r.png"]["chunks"] == []
    assert len(entry["masks/m.png"]["chunks"]) == 1
    with pytest.raises(SceneError, match=r"'r.png' is too large to be in the picture and not beside it"):
        provenance.restore(path)
    (tmp_path / "r.png").write_bytes(named["r.png"])
    assert provenance.restore(path)[0].references()[0].tobytes() == scene.references()[0].tobytes()
    (tmp_path / "r.png").write_bytes(png([[1]]))
    with pytest.raises(SceneError, match=r"'r.png' is not the file the picture was made with"):
        provenance.restore(path)


def test_the_sum_of_embedded_files_is_bounded(monkeypatch):
    monkeypatch.setattr(provenance, "MAX_EMBEDDED_TOTAL", 25)
    listed = json.loads(provenance.to_text({}, dict.fromkeys("abc", b"x" * 10))["attnctrl"])["files"]
    assert [len(listed[name]["chunks"]) for name in "abc"] == [1, 1, 0]


def test_pictures_without_a_record_are_told_apart(tmp_path):
    plain = tmp_path / "plain.png"
    IMAGE.save(plain)
    with pytest.raises(SceneError, match="carries no record of attnctrl"):
        provenance.read(plain)
    IMAGE.save(tmp_path / "x.jpg")
    with pytest.raises(SceneError, match="not a readable PNG"):
        provenance.read(tmp_path / "x.jpg")
    with pytest.raises(SceneError, match="missing or not a regular file"):
        provenance.read(tmp_path / "none.png")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the record in the picture is damaged; found JSONDecodeError"),
        ("[1]", "reads records of format 1; found a list"),
        ('{"format": 2}', "reads records of format 1; found 2; use the attnctrl that wrote it"),
        ('{"format": 1}', "damaged; found KeyError: 'scene'"),
        ('{"format": 1, "scene": 5, "seed": 1}', "damaged; found TypeError"),
        ('{"format": 1, "scene": {}, "seed": 1, "files": []}', "damaged; found AttributeError"),
        ('{"format": 1, "scene": {}, "seed": 1, "files": {"a": {"chunks": ["no"], "sha256": ""}}}', "damaged; found KeyError: 'no'"),
        ('{"format": 1, "scene": {"version": 1, "prompt": "x", "evil": 1}, "seed": 1}', "evil: unknown key"),
        ('{"format": 1, "scene": {"version": 1, "prompt": "x"}, "seed": "1"}', "seed: input should be a valid integer"),
    ],
)  # fmt: skip
def test_strange_records_are_refused_with_words(tmp_path, text, message):
    path = files.write_png(tmp_path / "p.png", IMAGE, {"attnctrl": text})
    with pytest.raises(SceneError) as caught:
        provenance.restore(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_embedded_files_are_verified(tmp_path, named):
    text = provenance.to_text(record(), {"r.png": named["r.png"]})
    key = json.loads(text["attnctrl"])["files"]["r.png"]["chunks"][0]
    swapped = files.write_png(tmp_path / "p.png", IMAGE, {**text, key: "AAAA"})
    with pytest.raises(SceneError, match="not the file the picture was made with"):
        provenance.restore(swapped)
    broken = files.write_png(tmp_path / "q.png", IMAGE, {**text, key: "*"})
    with pytest.raises(SceneError, match="damaged"):
        provenance.restore(broken)


def test_a_picture_cannot_name_files_outside_its_folder(tmp_path, named):
    inside = tmp_path / "in"
    inside.mkdir()
    (tmp_path / "r.png").write_bytes(named["r.png"])
    subject = {"prompt": "b", "box": [0, 0, 1, 1], "reference": "../r.png"}
    content = {
        "scene": {**SCENE, "subjects": [subject]},
        "seed": 0,
        "files": {"../r.png": {"chunks": [], "sha256": ""}},
    }
    path = files.write_png(inside / "p.png", IMAGE, {"attnctrl": json.dumps({"format": 1, **content})})
    with pytest.raises(SceneError, match=r"leaves the scene's folder \('\.\.'\)"):
        provenance.restore(path)


def test_differences_name_what_changed():
    then = {
        "versions": {"torch": "1", "numpy": "2"},
        "device": "cpu",
        "settings": {"steps": 4},
        "scene": {"prompt": "a"},
        "seed": 1,
    }
    now = {
        "versions": {"torch": "2", "numpy": "2"},
        "device": "cuda",
        "settings": {"steps": 4},
        "scene": {"prompt": "b"},
        "seed": 2,
    }
    assert provenance.differences(then, now) == ["device: cpu then, cuda now", "versions.torch: 1 then, 2 now"]
    assert provenance.differences(then, then) == []


def test_versions_are_those_installed():
    import platform

    import diffusers
    import torch

    known = versions.versions()
    assert set(known) == {"python", *versions.LIBRARIES}
    assert (known["python"], known["diffusers"]) == (platform.python_version(), diffusers.__version__)
    assert torch.__version__.startswith(known["torch"].partition("+")[0])
    assert versions.version_of("no-such-package-here") == "not installed"


@pytest.mark.parametrize("limit", [2**31, 0])
def test_the_fingerprint_follows_weights_and_configurations_only(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(provenance, "_WHOLE_HASH_BYTES", limit)
    monkeypatch.setattr(provenance, "_SAMPLE", 4)
    weights = tmp_path / "transformer" / "w.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(bytes(range(40)))
    (tmp_path / "model_index.json").write_text("{}")
    first = provenance.fingerprint(tmp_path)
    assert first.startswith("sha256:" if limit else "sha256-sampled:")
    assert len(first.partition(":")[2]) == 16
    for name in ("README.md", "attnctrl.json", "picture.png"):
        (tmp_path / name).write_text("changed")
    assert provenance.fingerprint(tmp_path) == first
    seen = {first}
    for position in (0, 19, 39):  # beginning, middle and end
        weights.write_bytes(bytes(255 if i == position else i for i in range(40)))
        seen.add(provenance.fingerprint(tmp_path))
    weights.write_bytes(bytes(range(41)))
    seen.add(provenance.fingerprint(tmp_path))
    weights.write_bytes(bytes(range(40)))
    (tmp_path / "model_index.json").write_text('{"a": 1}')
    seen.add(provenance.fingerprint(tmp_path))
    (tmp_path / "model_index.json").write_text("{}")
    assert provenance.fingerprint(tmp_path) == first
    weights.rename(weights.with_name("v.safetensors"))
    seen.add(provenance.fingerprint(tmp_path))
    assert len(seen) == 7
