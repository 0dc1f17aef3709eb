"""The pages of docs/: every link resolves, every block of Python is executed by some test, no public name and no command is missing."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_layout_docs import blocks

import attnctrl as ac

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
TESTS = Path(__file__).parent


def prose(path: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """Names of headings, as both the site and GitHub make them of plain words."""
    titles = re.findall(r"^#+ (.+)$", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


def broken(path: Path) -> list[str]:
    """Relative links and pictures of a page whose file or heading is not there."""
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    return lost


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda path: path.name
)
def test_every_relative_link_resolves(path: Path) -> None:
    assert broken(path) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One thing\n[a](page.md) [b](#one-thing) [c](https://x.org) [d](gone.md) ![e](#two)\n", "utf-8")
    assert broken(page) == ["gone.md", "#two"]


def test_every_page_is_in_the_site_once() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]

    def named(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [name for part in (entry.values() if isinstance(entry, dict) else entry) for name in named(part)]

    assert sorted(named(nav)) == [path.name for path in PAGES]


def test_every_page_with_python_has_a_test_that_runs_it() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py"))
    pages = [path.name for path in PAGES if blocks(path.name)]
    assert len(pages) >= 14
    assert [name for name in pages if not re.search(rf'blocks\("{name}"\)|/ "{name}"', tests)] == []


def test_the_reference_holds_every_public_name() -> None:
    """`::: path` of each name leads to the very object, and to no other, where it is written: the site follows no import."""
    from attnctrl import pipelines

    found: dict[str, list[str]] = {"attnctrl": [], "pipelines": []}
    for path in re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(encoding="utf-8"), flags=re.MULTILINE):
        home, _, name = path.rpartition(".")
        room = home.partition(".")[0]
        # pipelines/ stands beside attnctrl/ and is installed inside it
        public = pipelines if room == "pipelines" else ac
        module = import_module(f"attnctrl.{home}" if room == "pipelines" else home)
        there = getattr(module, name)
        assert there is getattr(public, name), path
        assert there.__module__ == module.__name__, path
        found[room].append(name)
    assert sorted(found["attnctrl"]) == sorted(ac.__all__)
    assert sorted(found["pipelines"]) == sorted(pipelines.__all__)


def test_every_public_name_has_a_docstring() -> None:
    from attnctrl import pipelines

    for room in (ac, pipelines):
        assert [name for name in room.__all__ if not (getattr(room, name).__doc__ or "").strip()] == []


def test_the_page_of_the_command_line_has_every_command() -> None:
    from typer.main import get_command
    from typer.testing import CliRunner

    from attnctrl.cli import app

    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert sorted(re.findall(r"^### attnctrl (\w+)$", page, flags=re.MULTILINE)) == sorted(commands)
    shown = re.findall(r"^\$ attnctrl (\w+) ?(.*)$", page, flags=re.MULTILINE)
    assert {name for name, _ in shown} == set(commands)
    groups = {name: set(one.commands) for name, one in commands.items() if hasattr(one, "commands")}
    assert {name: {rest.split()[0] for own, rest in shown if own == name} for name in groups} == groups
    for name, rest in shown:
        words = [name, *([rest.split()[0]] if name in groups else [])]
        told = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
        for option in re.findall(r"(?<= )--?[a-z][a-z-]*", f" {rest}"):
            assert re.search(rf"{option}\b", told), f"attnctrl {name} has no {option}"


def test_the_errors_shown_are_those_raised() -> None:
    """Each wrong block raises the message above it; each right one runs."""
    page = (DOCS / "errors.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    first, *rest = blocks("errors.md")
    exec(first, names)
    messages = re.findall(r"```text\n(.*?)```", page, flags=re.DOTALL)
    wrong, right = rest[::2], rest[1::2]
    assert len(messages) == len(wrong) == len(right) >= 10
    for message, before, after in zip(messages, wrong, right, strict=True):
        assert before.startswith("# wrong\n")
        assert after.startswith("# right\n")
        with pytest.raises(ac.AttnCtrlError) as raised:
            exec(before, names)
        expected = " ".join(message.split())
        told = f"{raised.value}"
        assert told.startswith(expected[:-3]) if expected.endswith("...") else told == expected
        exec(after, names)
    table = set(re.findall(r"`(\w+Error)`", page))
    assert table | {"AttnCtrlError"} == {name for name in ac.__all__ if name.endswith("Error")}


def test_the_start_page_runs() -> None:
    names: dict[str, Any] = {}
    (block,) = blocks("index.md")
    exec(block, names)
    told = names["handle"].report().controls
    assert [one.name for one in told] == ["isolate", "group_isolation"]
    assert [one.steps for one in told] == [(0, 1), (0, 1, 2, 3)]
    assert names["image"].size == (64, 64)


def test_the_page_of_evaluation_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights that it names are not here: what is loaded finds the brightest pixels of a colour, cats are red."""
    import numpy as np

    from attnctrl.metrics import Detection, pretrained

    def find(image: np.ndarray, labels: list[str]) -> list[Detection]:
        channels = {"a cat": 0, "a dog": 2}
        masks = {label: image[..., channels[label]] == 255 for label in labels}
        return [Detection(label, (0.0, 0.0, 1.0, 1.0), mask) for label, mask in masks.items() if mask.any()]

    monkeypatch.setattr(pretrained.OpenVocabularyDetector, "load", lambda: find)
    monkeypatch.setattr(pretrained.ImageEmbedding, "load", lambda: lambda image, found: np.ones(2))
    scene = np.zeros((4, 8, 3), np.uint8)
    image, cat, dog = (scene.copy() for _ in range(3))
    image[:, :4, 0] = cat[..., 0] = 255
    image[:, 2:, 2] = dog[..., 2] = 255
    names: dict[str, Any] = {"image": image, "cat": cat, "dog": dog, "scene": scene}
    (block,) = blocks("evaluation.md")
    *lines, call = block.strip().splitlines()
    exec("\n".join(lines), names)
    told = eval(call, names)
    # the cat fills its half and no more, a third of the dog is outside of its half
    assert told["inclusion_ratio"] == pytest.approx((1 + 2 / 3) / 2)
    assert told["fill_ratio"] == 1
    assert told["identity_similarity"] == pytest.approx(1)
    assert "background_similarity" in told


def test_diagrams_are_what_their_script_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    monkeypatch.syspath_prepend(DOCS)
    drawn = import_module("diagrams").diagrams()
    kept = {path.stem: path for path in (DOCS / "images").glob("*.png")}
    assert kept.keys() == drawn.keys()
    shown = re.findall(r"images/(\w+)\.png", (DOCS / "how-it-works.md").read_text(encoding="utf-8"))
    assert shown == list(drawn)
    for name, image in drawn.items():
        with Image.open(kept[name]) as stored:
            assert far_apart(stored, image) < 0.005, name


def test_the_hook_of_commits_is_the_linter_of_the_tests() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    (repository,) = hooks["repos"]
    linters = [hook for hook in repository["hooks"] if hook["id"].startswith("ruff")]
    assert [hook["entry"].split()[:2] for hook in linters] == [["ruff", "check"], ["ruff", "format"]]
    assert all(hook["additional_dependencies"] == [f"ruff=={pins['ruff']}"] for hook in linters)


def test_citation_and_package_agree() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    package = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert cited["cff-version"] == "1.2.0"
    for key in ("version", "license"):
        assert re.search(rf'^{key} = "{cited[key]}"$', package, flags=re.MULTILINE)


def far_apart(stored: Any, drawn: Any) -> float:
    """Share of pixels that differ much; releases of Pillow round the edges of letters differently."""
    from PIL import ImageChops

    assert stored.size == drawn.size
    far = ImageChops.difference(stored.convert("RGB"), drawn).convert("L").point(lambda value: 255 * (value > 96))
    return sum(far.histogram()[1:]) / (drawn.width * drawn.height)


def test_the_curve_is_what_its_script_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the stored results: they and the picture change together."""
    from PIL import Image

    monkeypatch.syspath_prepend(str(DOCS))
    with Image.open(DOCS / "guidance-curve.png") as kept:
        assert far_apart(kept, import_module("curves").curve()) < 0.002
