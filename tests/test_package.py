"""The package as installed: its rooms, its data, its two commands, and nothing heavy before it is needed."""

from __future__ import annotations

import importlib
import importlib.resources
import json
import re
import subprocess
import sys
import zlib
from importlib import metadata
from pathlib import Path

import pytest

from attnctrl.errors import AssetError
from attnctrl.toybox import model_path

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "diffusers", "transformers", "numpy", "pydantic", "yaml", "PIL")


def python(*arguments, cwd=None):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, check=False)


def declared():
    """What setup.py hands to setuptools."""
    script = (
        "import json, setuptools\n"
        "setuptools.setup = lambda **k: print(json.dumps({key: k[key] for key in ('packages', 'package_dir', 'package_data')}))\n"
        "exec(open('setup.py').read())"
    )
    done = python("-c", script, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("cwd", [ROOT, None])
def test_the_folders_beside_the_package_are_installed_inside_it(tmp_path, cwd):
    script = (
        "import attnctrl.pipelines.scene, attnctrl.pipelines.demo\n"
        "from importlib.resources import files\n"
        "print(attnctrl.pipelines.scene.ScenePipeline.__module__)\n"
        "print((files('attnctrl.examples') / 'two_shapes.yaml').is_file())\n"
        "print((files('attnctrl.assets') / '__init__.py').is_file())\n"
    )
    done = python("-c", script, cwd=cwd or tmp_path)
    assert done.stdout.split() == ["attnctrl.pipelines.scene", "True", "True"], done.stderr


def test_every_room_is_packaged():
    packages = declared()["packages"]
    rooms = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "attnctrl").rglob("*.py")
        if "__pycache__" not in path.parts
    }
    assert rooms <= set(packages)
    for folder, package in (
        ("pipelines", "attnctrl.pipelines"),
        ("examples", "attnctrl.examples"),
        ("assets", "attnctrl.assets"),
    ):
        assert package in packages
        assert declared()["package_dir"][package] == folder
        assert (ROOT / folder / "__init__.py").is_file(), f"an editable install cannot see {folder} without it"
        assert not (ROOT / "attnctrl" / folder).exists(), f"attnctrl/{folder} would hide the folder beside it"


def files_of(folder, patterns):
    return {path for pattern in patterns for path in folder.glob(f"{pattern}/*") if path.is_file()}


def test_toy_models_and_scenes_are_package_data():
    """Every model lies whole in one of the two wheels, and attnctrl's own stays small."""
    data = declared()["package_data"]
    assets = ROOT / "assets"
    own = files_of(assets, data["attnctrl.assets"])
    listed = re.search(r"^attnctrl_models = (\[.+\])$", (assets / "pyproject.toml").read_text(), re.MULTILINE)
    assert listed is not None
    further = files_of(assets, json.loads(listed.group(1)))
    wanted = {path for model in assets.glob("toy-*") for path in model.rglob("*") if path.is_file()}
    assert own | further == wanted
    assert not own & further
    assert {path.relative_to(assets).parts[0] for path in own} == {"toy-flux", "toy-sd"}
    code = [
        path
        for folder in ("attnctrl", "pipelines", "examples")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".png", ".yaml")
    ]
    assert sum(len(zlib.compress(path.read_bytes())) for path in [*own, *code]) < 25e6
    assert data["attnctrl.examples"] == ["*.yaml", "masks/*.png", "references/*.png"]


def test_models_come_from_both_packages(tmp_path, monkeypatch):
    """A model that attnctrl itself does not bring is found in the other package."""
    place = tmp_path / "attnctrl_models"
    (place / "toy-late").mkdir(parents=True)
    (place / "__init__.py").write_text("")
    with pytest.raises(AssetError, match=r"there are: toy-flux, toy-sd.*attnctrl-models"):
        model_path("toy-late")
    (place / "toy-late" / "model_index.json").write_text("{}")
    monkeypatch.syspath_prepend(tmp_path)
    assert model_path("toy-late") == place / "toy-late"


def test_versions_agree():
    text = (ROOT / "pyproject.toml").read_text()
    version = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    assert version is not None
    assert metadata.version("attnctrl") == version.group(1)
    assert python("-m", "attnctrl", "--version").stdout == version.group(1) + "\n"
    assert (ROOT / "LICENSE").read_text().strip().startswith("Apache License")


def test_tested_versions_are_those_of_the_constraints():
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        requirement, _, marker = line.partition(";")
        if requirement.strip() and not line.startswith("#") and "<" not in marker:
            name, version = requirement.strip().split("==")
            pins[name.lower()] = version
    wanted = {
        "torch": "2.13.0",
        "diffusers": "0.42.1",
        "transformers": "5.23.0",
        "accelerate": "1.15.0",
        "pillow": "13.0.0",
    }
    assert wanted.items() <= pins.items()
    direct = re.findall(r'^    "([A-Za-z-]+)[>=<]', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert len(direct) > 15
    assert {name.lower() for name in direct} <= pins.keys()


def test_importing_attnctrl_imports_nothing_heavy():
    script = f"import sys, attnctrl, attnctrl.cli; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    assert python("-c", script).stdout == "[]\n"


def test_only_the_toybox_and_the_command_line_know_the_toybox():
    """Others import it where it is asked for, if at all."""
    known = re.compile(r"^(?:from|import) +(?:attnctrl|\.*)\.?toybox\b", flags=re.MULTILINE)
    rooms = [ROOT / "pipelines", *(one for one in (ROOT / "attnctrl").iterdir() if not one.is_symlink())]
    files = [
        path for room in rooms for path in (room.rglob("*.py") if room.is_dir() else [room]) if path.suffix == ".py"
    ]
    others = [path for path in files if not {"toybox", "cli"} & set(path.relative_to(ROOT).parts)]
    assert len(others) > 150
    assert not [str(path.relative_to(ROOT)) for path in others if known.search(path.read_text(encoding="utf-8"))]
    told = (
        "from attnctrl.toybox.world import x",
        "from ..toybox.suite import x",
        "from .toybox import x",
        "import attnctrl.toybox",
    )
    assert all(map(known.search, told))


def test_public_names_resolve():
    package = importlib.import_module("attnctrl")
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = package.no_such_name


def test_make_lists_its_targets():
    done = subprocess.run(["make", "help"], capture_output=True, text=True, cwd=ROOT, check=True)
    for target in ("demo", "test", "lint", "format", "types"):
        assert f"make {target} " in done.stdout
    assert subprocess.run(["make"], capture_output=True, text=True, cwd=ROOT, check=True).stdout == done.stdout


def test_make_refuses_an_old_python(tmp_path):
    old = tmp_path / "python-old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "-s", f"PYTHON={old}", f"VENV={tmp_path}/venv", "lint"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode != 0
    assert "needs Python 3.10 or newer" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_ci_runs_the_tests_and_stops_at_an_error():
    script = (ROOT / ".ci" / "run").read_text()
    assert "set -euo pipefail" in script
    assert "make test" in script
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
