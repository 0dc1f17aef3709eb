"""Editing on tiny pipelines of every kind, the command, and the page, executed as it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attnctrl.pipelines.editing import Editor, EditSettings
from attnctrl.pipelines.inversion import InversionSettings
from PIL import Image
from shell import save_tiny
from test_inverter import PIPES, lively, picture

import attnctrl as ac
from attnctrl import provenance
from attnctrl.attach import parts_of
from attnctrl.errors import ControlError, SceneError
from attnctrl.families import family_of
from attnctrl.schedule import run_levels
from attnctrl.select import select

PAGE = Path(__file__).parents[1] / "docs" / "editing.md"
STEPS = 4


@pytest.fixture(params=PIPES, scope="module")
def editor(request: pytest.FixtureRequest) -> Editor:
    return Editor.from_pipe(lively(request.param), request.param)


def how(prompt: str = "a blue square", **more: Any) -> EditSettings:
    return EditSettings(prompt, **{"source": "a red circle", "steps": STEPS, "guidance": 1.0, **more})


def error(editor: Editor, edit: Any, shown: Image.Image) -> float:
    return (edit.drawn.clean - editor.encode(shown)).norm().item()


def test_the_same_prompt_reconstructs_about_as_well_as_the_inversion_alone(editor: Editor) -> None:
    same = {"prompt": "a red circle", "distilled_guidance": 1.0, "layers": None}
    plain = editor.edit(picture(), how(share=0.0, **same))
    assert plain.report == ""
    settings = InversionSettings("a red circle", steps=STEPS)
    alone = editor.generate(editor.invert(picture(), settings))
    assert torch.equal(plain.drawn.latents, alone.latents)
    whole = editor.edit(picture(), how(share=1.0, **same))
    assert not torch.equal(whole.drawn.clean, plain.drawn.clean)
    # random weights are far from smooth; trained ones gain, see docs/editing.md
    assert error(editor, whole, picture()) <= 1.01 * error(editor, plain, picture())


def test_values_hold_another_prompt_back_the_more_the_longer(editor: Editor) -> None:
    bank, told, model = ac.Bank(), [], parts_of(editor.pipe)[0]
    family = family_of(model)
    same = {"layers": None, "states": ("key", "value")}
    edits = [editor.edit(picture(), how(share=share, **same)) for share in (0.0, 1.0)]
    assert error(editor, edits[1], picture()) < error(editor, edits[0], picture())
    some = editor.edit(picture(), how(share=0.5), bank=bank, progress=lambda done, of: told.append((done, of)))
    assert told == [(done, 2 * STEPS) for done in range(1, 2 * STEPS + 1)]
    assert (bank.pictures, bank.branches) == (1, ("cond",))
    # of the high-noise half, and of the layers that are asked for alone
    stages = 2 if editor.adapter.flow else 1
    assert bank.steps == tuple(range(stages * STEPS // 2))
    layers = {layer.name for layer in select(family.layers(model), "edit", family.presets)}
    assert set(bank.layers) == layers
    assert torch.equal(some.inverted.latents, edits[0].inverted.latents)
    assert not torch.allclose(some.drawn.clean, edits[0].drawn.clean)


def test_levels_of_generation_find_those_of_the_inversion(editor: Editor) -> None:
    """Every level but the noisiest of a flow model is met in both directions."""
    bank = ac.Bank()
    seen: list[float] = []
    settings, whole = InversionSettings("a red circle", steps=STEPS), ac.Bank()
    with ac.attach(editor.pipe, ac.Keep(bank=bank)):
        inverted = editor.invert(picture(), settings)
    with ac.attach(editor.pipe, ac.Keep(bank=whole)):
        assert torch.equal(editor.invert(picture(), settings, arrive=True).latents, inverted.latents)

    def note(model: Any, arguments: Any, given: dict[str, Any]) -> None:
        marks, sigmas = run_levels(editor.pipe.scheduler)
        mark = float(torch.as_tensor(given.get("timestep", arguments[1:2])).reshape(-1)[0])
        seen.append(sigmas[editor.pipe.scheduler.begin_index if editor.adapter.flow else marks.index(mark)])

    hook = parts_of(editor.pipe)[0].register_forward_pre_hook(note, with_kwargs=True)
    editor.generate(inverted)
    hook.remove()
    steps = [bank.nearest_step(sigma) for sigma in seen]
    away = [abs(bank.sigmas[step] - sigma) for step, sigma in zip(steps, seen, strict=True)]
    if editor.adapter.flow:
        assert steps == [0, *range(2 * STEPS - 1)]
        assert away[0] > 0.01
        assert max(away[1:]) < 1e-5
        assert [whole.nearest_step(sigma) for sigma in seen] == list(range(2 * STEPS))
        assert whole.sigmas[: 2 * STEPS] == pytest.approx(seen)
    else:
        assert steps == list(range(STEPS))
        assert max(away) == 0


def test_one_branch_of_the_inversion_serves_both_of_guidance(editor: Editor) -> None:
    guided = editor.edit([picture(0), picture(1)], how(guidance=3.0, negative_prompt="blue", share=0.5))
    alone = editor.edit(picture(1), how(guidance=3.0, negative_prompt="blue", share=0.5))
    torch.testing.assert_close(guided.drawn.latents[:, 1:], alone.drawn.latents, rtol=1e-3, atol=1e-3)
    assert "uncond" in guided.report
    assert "cond" in guided.report
    assert len(guided.images) == 2


def test_queries_and_texts_are_captured_and_held_on_to_where_they_are_asked_for(editor: Editor) -> None:
    bank, same = ac.Bank(), {"layers": None, "share": 1.0}
    plain = editor.edit(picture(), how(share=0.0))
    looks = editor.edit(picture(), how(states=("query", "key"), **same), bank=bank)
    assert (bank.queries, bank.texts) == (True, False)
    assert "query and key of picture 0" in looks.report
    assert not torch.equal(looks.drawn.clean, plain.drawn.clean)
    if not editor.adapter.flow:
        with pytest.raises(ac.UnsupportedModelError, match="tokens='image'"):
            editor.edit(picture(), how(tokens="all", **same))
        return
    bank = ac.Bank()
    every = editor.edit(picture(), how(tokens="all", states=("query", "key", "value"), **same), bank=bank)
    assert (bank.queries, bank.texts) == (True, True)
    assert "texts included" in every.report
    image = editor.edit(picture(), how(states=("query", "key", "value"), **same))
    assert not torch.equal(every.drawn.clean, image.drawn.clean)


def test_what_cannot_be_asked_for_is_refused() -> None:
    for more, said in (
        ({"share": 1.5}, r"share must be in \[0, 1\]"),
        ({"strength": -1.0}, "strength must be in"),
        ({"guidance": 0.5}, "guidance must be 1 or more"),
        ({"states": ("score",)}, "states is some of query, key, value"),
        ({"tokens": "text"}, "tokens must be"),
        ({"method": "magic"}, "method must be one of"),
        ({"steps": 0}, "steps must be 1 or more"),
    ):
        with pytest.raises(ControlError, match=said):
            how(**more)


# the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = save_tiny(tmp_path_factory.mktemp("models"))
    picture(size=(64, 64)).save(made / "photo.png")
    picture(size=(64, 64)).resize((60, 64)).save(made / "odd.png")
    return made


def test_the_command_writes_a_picture_that_says_how_it_was_made(call: Any, folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "o" / "edited.png"
    code, out, _ = call(
        "edit", folder / "photo.png", "--prompt", "a blue square", "--source", "a red circle", "--steps", 2,
        "--model", folder / "tiny", "-o", target, "--format", "json",
    )  # fmt: skip
    told = json.loads(out)
    assert (code, [path.name for path in target.parent.iterdir()]) == (0, ["edited.png"])
    editor = Editor.from_pretrained(str(folder / "tiny"), device="cpu")
    again = editor.edit(folder / "photo.png", EditSettings("a blue square", source="a red circle", steps=2))
    with Image.open(target) as written:
        assert np.array_equal(np.asarray(written), np.asarray(again.images[0]))
    record = provenance.read(target)
    assert record["settings"] == told["settings"] == json.loads(json.dumps(again.record["settings"]))
    assert (record["settings"]["share"], record["settings"]["method"]) == (0.3, "midpoint")
    assert again.save(tmp_path / "again.png").read_bytes() == target.read_bytes()
    with pytest.raises(SceneError, match="edited from another one"):
        provenance.restore(target)
    code, out, _ = call("info", target)
    assert code == 0
    assert "a blue square" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing.png"], "missing"),
        (["odd.png"], "multiples of 8"),
        (["pair.yaml"], "picture"),
        (["photo.png", "--method", "ddim"], "does not suit FluxPipeline"),
        (["photo.png", "--share", "2"], "share"),
        (["photo.png", "--states", "query,score"], "states is some of query, key, value"),
        (["photo.png", "--tokens", "text"], "tokens must be"),
        (["photo.png", "--model", "nowhere"], "nowhere"),
        (["photo.png", "-o", "out.jpg"], "is no PNG"),
    ],
)
def test_wrong_requests_say_so_and_write_nothing(
    call: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model = [] if "--model" in arguments else ["--model", folder / "tiny"]
    code, out, err = call("edit", folder / arguments[0], *arguments[1:], "--prompt", "a blue square", *model)
    assert (code, out) == (2, "")
    assert said in " ".join(err.split())
    assert not list(tmp_path.iterdir())


def test_a_picture_is_not_written_over(call: Any, folder: Path) -> None:
    before = (folder / "photo.png").read_bytes()
    code, _, err = call("edit", folder / "photo.png", "--prompt", "x", "-o", folder / "photo.png")
    assert code == 2
    assert "the picture itself" in " ".join(err.split())
    assert (folder / "photo.png").read_bytes() == before


def test_the_page_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    found = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    for block in found:
        exec(block, names)
    assert len(found) == 3
    assert names["found"].box == (0.375, 0.125, 1.0, 0.875)
    assert provenance.read(tmp_path / "edited.png")["settings"]["prompt"] == names["edit"].record["settings"]["prompt"]
    assert names["part"].layers == names["bank"].layers
