"""`attnctrl explain` and `models`, and what the shell is told: from configurations and families' data, without weights."""

from __future__ import annotations

import json
import sys

import pytest
from shell import save_tiny

from attnctrl.cli import run
from attnctrl.families import all_families


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = save_tiny(tmp_path_factory.mktemp("explained"))
    for path in (made / "tiny").rglob("*.safetensors"):
        path.unlink()
    return made


# explain


def test_explain_tells_what_reaches_what_and_when(call, folder):
    """Two steps: regions read their own texts in both, and are apart in the first."""
    code, out, err = call("explain", folder / "pair.yaml", "--format", "json")
    data = json.loads(out)
    assert (code, err) == (0, "")
    assert data["model"] == "./tiny"
    told = {
        branch: [(one["name"], one["steps"]) for one in found["controls"]] for branch, found in data["branches"].items()
    }
    assert told == {
        "cond": [("regions", "0-1"), ("isolate", "0")],
        "uncond": [("regions", ""), ("isolate", "")],
    }  # fmt: skip
    first, second = data["branches"]["cond"]["scenes"][0]
    reach = {(one["reader"], one["source"]): (one["layer"], one["through"]) for one in second["reach"]}
    assert reach["image of circle", "image of square"] == (1, [])
    assert reach["image of circle", "text of square"] == (2, ["image of square"])
    apart = {(one["reader"], one["source"]): (one["layer"], one["through"]) for one in first["reach"]}
    assert apart["image of circle", "image of square"] != (1, [])
    assert data["branches"]["uncond"]["scenes"][0][0]["reach"] == []


def test_explain_is_the_same_for_people_and_as_lines(call, folder):
    code, out, err = call("explain", folder / "pair.yaml")
    assert (code, err) == (0, "")
    assert "./tiny (flux), 2 steps" in out
    assert "steps in rows of the negative prompt" in out
    assert "in rows of the prompt" in out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert ["isolate", "1", "double:0-1, single:0-1", "0", "none"] in rows
    lines = call("explain", folder / "pair.yaml", "--format", "quiet")[1].splitlines()
    assert "cond\t1\timage of circle\timage of square\tdirectly" in lines
    assert all(len(line.split("\t")) == 5 for line in lines)


def test_explain_compares_presets(call, folder):
    """Which stack never lets another's words in: that of LAMIC with hubs that relay nothing."""

    def leaks(preset):
        code, out, _ = call("explain", folder / "pair.yaml", "--preset", preset, "--steps", 4, "--format", "quiet")
        assert code == 0
        parts = [line.split("\t") for line in out.splitlines()]
        return {(steps, how.split(",")[0]) for branch, steps, reader, read, how in parts if (reader, read) == PAIR}

    assert leaks("texts") == {("0-3", "directly")}
    assert leaks("regional-prompting") != leaks("texts")


PAIR = ("image of circle", "image of square")


def test_check_points_on_and_tells_no_influence(call, folder):
    out = call("check", folder / "pair.yaml")[1]
    assert "isolate: layers double:0-1, single:0-1; steps 0; branch cond" in out
    assert "reads" not in out


# models


def test_models_are_those_that_are_there(call):
    code, out, err = call("models", "--format", "json")
    data = json.loads(out)
    assert (code, err) == (0, "")
    assert [(one["name"], one["pipeline"], one["size"]) for one in data["models"]] == [
        ("toy-flux", "FluxPipeline", [64, 64]),
        ("toy-sd", "StableDiffusionPipeline", [64, 64]),
        ("toy-sd3", "StableDiffusion3Pipeline", [64, 64]),
    ]
    families = {one["family"]: one for one in data["families"]}
    assert list(families) == [family.name for family in all_families()]
    assert families["flux"]["models"] == ["FluxTransformer2DModel"]
    assert families["flux"]["pipelines"] == {
        "ScenePipeline": ["FluxPipeline", "FluxKontextPipeline"],
        "LayoutPipeline": ["FluxPipeline", "FluxKontextPipeline"],
        "MultiSubjectPipeline": ["FluxPipeline"],
        "StylePipeline": ["FluxPipeline", "FluxKontextPipeline"],
    }
    assert families["flux2"]["pipelines"] == {"LayoutPipeline": ["Flux2Pipeline", "Flux2KleinPipeline"]}
    assert families["sana"]["pipelines"] == {}
    assert families["flux"]["works"] == ["words", "moves"]
    assert families["unet"]["works"] == ["words", "guided together"]
    assert families["wan"]["works"] == ["moves"]
    assert "style" in families["flux"]["layers"]


def test_models_for_people(call):
    out = call("models")[1]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert ["toy-sd", "StableDiffusionPipeline", "64 x 64", "20", "3"] in rows
    (unet,) = [row for row in rows if row[0] == "unet"]
    assert unet[1:3] == ["UNet2DConditionModel", "generate, layout, subjects, style"]
    assert call("models", "--format", "quiet")[1].split() == ["toy-flux", "toy-sd", "toy-sd3"]


# what the shell is told


@pytest.mark.parametrize(
    ("line", "index", "told"),
    [
        ("attnctrl la", 1, ["layout"]),
        ("attnctrl generate --att", 2, ["--attention-backend"]),
        ("attnctrl layout x --cpu-offload s", 4, ["sequential"]),
        ("attnctrl layout x --model toy-s", 4, ["toy-sd", "toy-sd3"]),
        ("attnctrl bench in", 2, ["inversion"]),
    ],
)
def test_the_shell_completes_commands_options_and_values(monkeypatch, capsys, line, index, told):
    monkeypatch.setenv("_ATTNCTRL_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(index))
    assert run([]) == 0
    assert capsys.readouterr().out.split() == told


def test_the_script_for_the_shell_is_shown(call, monkeypatch):
    monkeypatch.setattr("typer.completion._get_shell_name", lambda: "bash")
    code, out, err = call("--show-completion")
    assert (code, err) == (0, "")
    assert "_ATTNCTRL_COMPLETE=complete_bash" in out
    assert "--show-completion" in call("--help")[1]


def test_completing_imports_nothing_heavy(tmp_path):
    import os
    import subprocess

    script = "import sys; from attnctrl.cli import run; code = run([]); print(sorted({'torch', 'diffusers'} & set(sys.modules)))"
    told = {"_ATTNCTRL_COMPLETE": "complete_bash", "COMP_WORDS": "attnctrl layout x --model toy", "COMP_CWORD": "4"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={**os.environ, **told}
    )
    assert done.stdout.split() == ["toy-flux", "toy-sd", "toy-sd3", "[]"]
