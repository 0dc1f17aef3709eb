"""The command line: exit codes, streams, messages, whole files, and pictures made end to end on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import yaml
from attnctrl.pipelines import base
from PIL import Image
from shell import SCENE, SIZE, save_tiny

from attnctrl import files, provenance
from attnctrl.cli import run
from attnctrl.versions import version_of

COMMANDS = (
    "generate", "invert", "edit", "check", "demo", "maps", "eval", "bench execute", "bench idle", "bench inversion", "env",
    "info", "replay", "layout", "style", "subjects", "explain", "models",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("scenes"))


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


# help, version, usage


def test_help_imports_nothing_heavy():
    """Which is what makes it instant: half a second at most on a machine that is not busy."""
    # pydantic is typer's own for the options of commands
    heavy = ["torch", "diffusers", "transformers", "numpy", "yaml", "PIL", "scipy"]
    script = (
        "import sys, attnctrl.cli as cli\n"
        f"codes = [cli.run([*line.split(), '--help']) for line in {('', *COMMANDS)!r}]\n"
        f"found = set({heavy!r}) & set(sys.modules)\n"
        "sys.exit(str(found) if any(codes) or found else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("Usage: attnctrl") == 1 + len(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(call, command):
    code, out, err = call(*command.split(), "--help")
    assert (code, err) == (0, "")
    assert "Example" in out
    assert f"attnctrl {command}" in out


def test_version_is_data(call):
    assert call("--version") == (0, version_of("attnctrl") + "\n", "")


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "attnctrl", "generate"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "SCENE" in done.stderr


# generate


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    """Seeds 5 and 6 of the pair, made by the command."""
    output = tmp_path_factory.mktemp("out")
    assert (
        run(
            [
                "generate",
                str(folder / "pair.yaml"),
                "-o",
                str(output),
                "-n",
                "2",
                "--device",
                "cpu",
                "--format",
                "quiet",
            ]
        )
        == 0
    )
    return output


def test_generate_writes_whole_pictures_and_lists_them(call, folder, tmp_path, made):
    code, out, _ = call("generate", folder / "pair.yaml", "-o", tmp_path / "o", "-n", 2, "--format", "json")
    data = json.loads(out)
    assert code == 0
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["pair-5.png", "pair-6.png"]
    first = data["images"][0]
    assert (first["path"], first["seed"], first["size"]) == (str(tmp_path / "o" / "pair-5.png"), 5, [SIZE, SIZE])
    assert first["controlled"] is True
    assert first["model"] == {"name": "tiny", "fingerprint": provenance.fingerprint(folder / "tiny")}
    assert [image["seed"] for image in data["images"]] == [5, 6]
    for name in ("pair-5.png", "pair-6.png"):  # the same bytes as an hour ago
        assert (tmp_path / "o" / name).read_bytes() == (made / name).read_bytes()
    assert (pixels(made / "pair-5.png") != pixels(made / "pair-6.png")).any()


def test_forms_of_the_result(call, folder, tmp_path):
    arguments = ["generate", folder / "pair.yaml", "-o", tmp_path, "--steps", 1, "--again"]
    path = str(tmp_path / "pair-5.png")
    assert call(*arguments, "--format", "quiet") == (0, path + "\n", "")
    code, out, _ = call(*arguments)
    assert code == 0
    assert out.startswith(f"{path}  seed 5  {SIZE} x {SIZE}  ")


def test_a_bar_counts_the_steps_on_a_terminal(call, folder, tmp_path, monkeypatch):
    updates = []
    monkeypatch.setattr("rich.progress.Progress.update", lambda _, task, **told: updates.append((task, told)))
    arguments = ["generate", folder / "pair.yaml", "-o", tmp_path, "--steps", 3, "--again"]
    assert call(*arguments)[0] == 0
    assert updates == []
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    code, out, _ = call(*arguments)
    assert (code, len(out.splitlines())) == (0, 1)
    assert updates == [(0, {"completed": step, "total": 3}) for step in (1, 2, 3)]
    assert call(*arguments, "--format", "quiet")[2] == ""
    assert len(updates) == 3


def test_a_seed_alone_is_the_same_picture(call, folder, tmp_path, made):
    assert call("generate", folder / "pair.yaml", "-o", tmp_path, "--seed", 6)[0] == 0
    assert (tmp_path / "pair-6.png").read_bytes() == (made / "pair-6.png").read_bytes()


def test_no_control_is_another_picture_and_remembers(call, folder, tmp_path, made):
    assert call("generate", folder / "pair.yaml", "-o", tmp_path, "--no-control")[0] == 0
    assert (pixels(tmp_path / "pair-5.png") != pixels(made / "pair-5.png")).any()
    assert provenance.read(tmp_path / "pair-5.png")["controlled"] is False
    code, _, err = call("generate", tmp_path / "pair-5.png", "-m", folder / "tiny", "-o", tmp_path / "again")
    assert (code, err) == (0, "")
    assert (tmp_path / "again" / "pair-5.png").read_bytes() == (tmp_path / "pair-5.png").read_bytes()


def test_a_picture_makes_itself_again(call, folder, tmp_path, made):
    beside = folder / "pair-6.png"
    beside.write_bytes((made / "pair-6.png").read_bytes())  # its model is ./tiny, so it stands where the scene stood
    code, out, err = call("generate", beside, "-o", tmp_path, "--format", "quiet")
    assert (code, out, err) == (0, f"{tmp_path / 'pair-6.png'}\n", "")
    assert (tmp_path / "pair-6.png").read_bytes() == beside.read_bytes()


def test_what_differs_from_the_first_run_is_said(call, folder, tmp_path, made, monkeypatch):
    monkeypatch.setattr(base, "versions", lambda: {"torch": "9.9"})
    code, _, err = call("generate", made / "pair-5.png", "-m", folder / "tiny", "-o", tmp_path)
    assert code == 0
    assert "versions.torch: " in err
    assert "then, 9.9 now" in err


def test_options_override_the_scene(call, folder, tmp_path):
    assert (
        call("generate", folder / "pair.yaml", "-o", tmp_path, "--steps", 3, "--dtype", "bfloat16", "--seed", 0)[0] == 0
    )
    record = provenance.read(tmp_path / "pair-0.png")
    assert (record["settings"]["steps"], record["scene"]["steps"], record["dtype"], record["seed"]) == (
        3,
        3,
        "bfloat16",
        0,
    )


def test_a_picture_is_made_again_in_its_own_number_format(call, folder, tmp_path):
    assert call("generate", folder / "pair.yaml", "-o", tmp_path / "a", "--dtype", "bfloat16")[0] == 0
    assert call("generate", tmp_path / "a" / "pair-5.png", "-m", folder / "tiny", "-o", tmp_path / "b")[0] == 0
    assert (tmp_path / "b" / "pair-5.png").read_bytes() == (tmp_path / "a" / "pair-5.png").read_bytes()


def test_several_scenes_share_one_loading(call, folder, tmp_path, monkeypatch):
    from attnctrl.pipelines import ScenePipeline

    loads = []
    load = ScenePipeline.from_pretrained.__func__
    monkeypatch.setattr(
        ScenePipeline, "from_pretrained", classmethod(lambda cls, *a, **k: loads.append(a) or load(cls, *a, **k))
    )
    (folder / "other.yaml").write_text(SCENE.replace("seed: 5", "seed: 8"))
    assert call("generate", folder / "pair.yaml", folder / "other.yaml", "-o", tmp_path, "--steps", 1)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other-8.png", "pair-5.png"]
    assert len(loads) == 1


def test_two_scenes_never_write_one_file(call, folder, tmp_path):
    (tmp_path / "pair.yaml").write_text(SCENE)
    code, out, err = call(
        "generate", folder / "pair.yaml", tmp_path / "pair.yaml", "-m", folder / "tiny", "-o", tmp_path / "o"
    )
    assert (code, out) == (2, "")
    assert "belongs to" in err
    assert not (tmp_path / "o").exists()


def test_a_picture_is_never_written_over_its_source(call, folder, made):
    before = (made / "pair-5.png").read_bytes()
    code, _, err = call("generate", made / "pair-5.png", "-m", folder / "tiny", "-o", made, "--steps", 1)
    assert code == 2
    assert "choose another -o" in err
    assert (made / "pair-5.png").read_bytes() == before


def test_a_bad_scene_stops_all_before_a_model_is_loaded(call, folder, tmp_path, monkeypatch):
    from attnctrl.pipelines import ScenePipeline

    monkeypatch.setattr(ScenePipeline, "from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    (tmp_path / "bad.yaml").write_text(SCENE.replace("subjects", "subjectz"))
    code, out, err = call("generate", folder / "pair.yaml", tmp_path / "bad.yaml", "-o", tmp_path / "o")
    assert (code, out) == (2, "")
    assert "subjectz: unknown key" in err
    assert "did you mean 'subjects'?" in err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("layers", ["triple", "single:0-99"])
def test_a_scene_that_does_not_fit_the_model_exits_with_two(call, folder, layers):
    data = yaml.safe_load(SCENE)
    data["controls"][0]["layers"] = layers
    (folder / "unfit.yaml").write_text(yaml.safe_dump(data))
    for command in (["check"], ["generate", "-o", folder / "unfit"]):
        code, out, err = call(command[0], folder / "unfit.yaml", *command[1:])
        assert (code, out) == (2, ""), command
        assert err.startswith("error: ")
    assert not (folder / "unfit").exists() or not list((folder / "unfit").iterdir())


def test_models_that_are_not_there(call, folder, tmp_path):
    for model in ("no-such-model", tmp_path):
        code, out, err = call("generate", folder / "pair.yaml", "-m", model, "-o", tmp_path / "o")
        assert (code, out) == (2, "")
        assert "--model" in err
    (tmp_path / "pair.yaml").write_text(SCENE)
    code, _, err = call("generate", tmp_path / "pair.yaml", "-o", tmp_path / "o")
    assert code == 1
    assert "is no Diffusers folder" in err


def test_a_device_that_is_not_there(call, folder, tmp_path):
    for device in ("cuda:99", "toaster"):
        code, out, err = call("generate", folder / "pair.yaml", "-o", tmp_path / "o", "--device", device)
        assert (code, out) == (2, "")
        assert "--device" in err
        assert not (tmp_path / "o").exists()


def test_a_failure_leaves_no_part_of_a_file_and_exits_with_one(call, folder, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", fail)
    code, out, err = call("generate", folder / "pair.yaml", "-o", tmp_path, "--steps", 1)
    assert (code, out) == (1, "")
    assert "error: [Errno 28] No space left on device" in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code", "text"), [(KeyboardInterrupt, 130, "interrupted"), (ZeroDivisionError, 1, "add --debug")]
)
def test_interrupts_and_surprises(call, folder, tmp_path, monkeypatch, error, code, text):
    from attnctrl.pipelines import ScenePipeline

    def surprise(*_, **__):
        raise error

    monkeypatch.setattr(ScenePipeline, "__call__", surprise)
    arguments = ["generate", folder / "pair.yaml", "-o", tmp_path]
    assert call(*arguments)[0] == code
    assert text in call(*arguments)[2]
    assert list(tmp_path.iterdir()) == []
    if error is ZeroDivisionError:
        for place in (["--debug", *arguments], [*arguments, "--debug"]):
            with pytest.raises(ZeroDivisionError):
                call(*place)


def test_warnings_of_the_library_are_lines_on_stderr(call, folder, tmp_path):
    data = yaml.safe_load(SCENE)
    data["controls"] = [{"name": "regions", "branch": "uncond"}]
    data["true_cfg_scale"] = 1.0  # no unconditional branch: the control never acts
    (folder / "silent.yaml").write_text(yaml.safe_dump(data))
    code, out, err = call("generate", folder / "silent.yaml", "-o", tmp_path, "--format", "json")
    assert code == 0
    assert json.loads(out)["images"][0]["seed"] == 5
    assert err.startswith("warning: 'regions'")


# check


def test_check_needs_no_weights_and_tells_tokens_regions_and_layers(call, folder, tmp_path):
    for path in (folder / "tiny").rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            target = tmp_path / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    (tmp_path / "pair.yaml").write_text(SCENE)
    code, out, err = call("check", tmp_path / "pair.yaml", "--format", "json")
    data = json.loads(out)
    assert (code, err) == (0, "")
    assert data["settings"]["width"] == SIZE
    assert data["regions"][0] == {
        "name": "circle",
        "prompt": "a red circle",
        "box": [0, 0, 0.5, 1],
        "mask": False,
        "strength": 1,
    }
    first = data["explanation"]["scenes"][0][0]
    assert first["tokens"] == {"text.global": 40, "text.region0": 4, "text.region1": 4, "image": 64}
    assert data["explanation"]["controls"][1]["layers"] == "double:0-1, single:0-1"
    code, out, _ = call("check", tmp_path / "pair.yaml")
    assert code == 0
    assert f"pair.yaml: valid\n./tiny, {SIZE} x {SIZE}, 2 steps, guidance 1, true CFG 3\n" in out
    assert "circle: 'a red circle' in box 0, 0, 0.5, 1, strength 1" in out
    assert "tokens text.global 40, text.region0 4, text.region1 4, image 64" in out
    assert call("check", tmp_path / "pair.yaml", "--format", "quiet")[1] == f"{tmp_path / 'pair.yaml'}\n"


def test_check_says_when_boxes_have_no_effect(call, folder):
    data = {**yaml.safe_load(SCENE), "controls": []}
    (folder / "idle.yaml").write_text(yaml.safe_dump(data))
    code, out, _ = call("check", folder / "idle.yaml")
    assert code == 0
    assert "no controls: boxes and masks have no effect" in out


def test_check_says_what_becomes_of_a_subject_without_a_place(call, folder):
    Image.new("RGB", (16, 16)).save(folder / "look.png")
    data = {**yaml.safe_load(SCENE), "controls": [], "subjects": [{"prompt": "a red circle", "reference": "look.png"}]}
    (folder / "look.yaml").write_text(yaml.safe_dump(data))
    code, out, _ = call("check", folder / "look.yaml")
    assert code == 0
    assert "a red circle: a reference for the whole picture; without a place its prompt is not used" in out


def test_check_reads_pictures_and_prints_the_schema(call, folder, made):
    assert call("check", made / "pair-5.png", "-m", folder / "tiny")[0] == 0
    code, out, _ = call("check", "--schema")
    assert code == 0
    assert json.loads(out)["title"] == "attnctrl scene"


# demo


def test_demo_draws_both_rows_for_all_seeds(call, folder, tmp_path):
    path = tmp_path / "deep" / "demo.png"
    code, out, _ = call("demo", "-m", folder / "tiny", "--seeds", 1, "--steps", 1, "-o", path, "--format", "json")
    data = json.loads(out)
    assert (code, data["path"], data["pictures"]) == (0, str(path), 6)
    with Image.open(path) as sheet:
        records = json.loads(sheet.info["attnctrl-demo"])
        assert sheet.width > 2 * 240
        assert sheet.height > 2 * 240
    assert [record["controlled"] for record in records] == [False] * 3 + [True] * 3
    assert [len(record["scene"]["subjects"]) for record in records] == [2, 4, 2] * 2
    assert [path.name for path in path.parent.iterdir()] == ["demo.png"]
