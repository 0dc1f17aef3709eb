"""The public surface: lazy names, controls as data, reports, explanations."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import tiny
import torch

import attnctrl as ac
from attnctrl.schedule import Sigma


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_import_needs_no_torch() -> None:
    code = (
        "import sys, attnctrl; print('torch' in sys.modules, 'attach' in dir(attnctrl), attnctrl.ControlError.__name__)"
    )
    assert run_python(code + "; print('torch' in sys.modules)") == "False True ControlError\nFalse"


def test_names_stay_functions_whatever_is_imported_first() -> None:
    code = "import attnctrl.processors, attnctrl.attach, attnctrl.explain, attnctrl as a; print(a.attach, a.processors, a.explain)"
    assert run_python(code).count("<function") == 3


def test_every_public_name_is_there_and_documented() -> None:
    for name in ac.__all__:
        assert (getattr(ac, name).__doc__ or "").strip(), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ac.nothing  # noqa: B018


def test_controls_survive_json() -> None:
    regions = [ac.Region("cat", box=(0, 0, 0.5, 1)), ac.Region("dog", mask=torch.ones(2, 2))]
    stack = [
        ac.Regions(
            regions, overlap="priority", base_ratio=0.2, global_text="open", window=Sigma(1.0, 0.4), layers=["double"]
        ),
        ac.Regions([regions, regions[:1]], strength=0.5),
        ac.Isolate(background="shared", text=False, hub="source", window=(0, 0.4), branch="all"),
        ac.Isolate(regions),
    ]
    for control in stack:
        data = json.loads(json.dumps(control.to_dict()))
        back = ac.Control.from_dict(data)
        assert type(back) is type(control)
        assert back.to_dict() == control.to_dict()
        assert (back.window, back.layers) == (control.window, control.layers)
        assert [len(scene) for scene in back.scenes] == [len(scene) for scene in control.scenes]
    assert ac.Isolate().to_dict() == {"name": "isolate"}
    assert stack[2].to_dict() == {
        "name": "isolate", "background": "shared", "text": False, "hub": "source", "window": [0.0, 0.4], "branch": "all",
    }  # fmt: skip


def test_control_checks() -> None:
    region = ac.Region("cat")
    with pytest.raises(ac.ControlError, match=r"'isolate': strength must be in \[0, 1\]; found 2"):
        ac.Isolate(strength=2)
    with pytest.raises(ac.ControlError, match=r"base_ratio must be in \[0, 1\); found 1"):
        ac.Regions([region], base_ratio=1)
    with pytest.raises(ac.ControlError, match=r"overlap must be one of union, priority, background; found 'unite'"):
        ac.Regions([region], overlap="unite")
    with pytest.raises(ac.ControlError, match=r"global_text must be one of .* Did you mean 'background'"):
        ac.Regions([region], global_text="backgroud")
    with pytest.raises(ac.ControlError, match=r"hub must be one of relay, source"):
        ac.Isolate(hub="drop")
    with pytest.raises(ac.ControlError, match=r"branch must be one of cond, uncond, all, perturbed"):
        ac.Isolate(branch="negative")
    with pytest.raises(ac.ControlError, match="found a list of str"):
        ac.Regions(["cat"])
    with pytest.raises(ac.ScheduleError, match="isolate: a window"):
        ac.Isolate(window=(0.5, 0.1))
    with pytest.raises(ac.ControlError, match=r"no control named 'isolat'\. Did you mean 'isolate'"):
        ac.Control.from_dict({"name": "isolat"})
    with pytest.raises(ac.ControlError, match=r"'isolate' has no field 'backgruond'\. Did you mean 'background'"):
        ac.Control.from_dict({"name": "isolate", "backgruond": "shared"})


def test_idle() -> None:
    region = ac.Region("cat")
    assert not ac.Regions([region]).is_idle
    for idle in (
        ac.Regions([]),
        ac.Regions([region], strength=0),
        ac.Regions([replace(region, strength=0.0)]),
        ac.Isolate(window=(0.3, 0.3)),
        ac.Isolate(window=Sigma(0.5, 0.5)),
    ):
        assert idle.is_idle


def test_report() -> None:
    model = tiny.flux()
    region = ac.Region("cat", box=(0, 0, 0.5, 1), prompt_embeds=tiny.embeds(0))
    handle = ac.attach(model, [ac.Isolate(layers="single"), ac.Regions([region]), ac.Isolate(strength=0)])
    model(**tiny.flux_inputs())
    report = handle.report()
    assert json.loads(json.dumps(report.to_dict()))["forwards"] == 1
    assert [(one.name, one.layers, one.forwards, one.idle) for one in report.controls] == [
        ("isolate", "single:0-1", 1, False), ("regions", "double:0-1, single:0-1", 1, False), ("isolate", "no layers", 0, True),
    ]  # fmt: skip
    assert report.warnings == ()
    assert [(one.acted, one.rows) for one in report.controls] == [
        ("single:0-1", (("cond", 0),)), ("double:0-1, single:0-1", (("cond", 0),)), ("no layers", ()),
    ]  # fmt: skip
    assert "isolate: single:0-1; acted in 1 forwards, rows cond 0" in str(report)
    assert "32 tokens" in report.controls[0].plans[0]
    handle.detach()
    assert not handle.attached
    handle.detach()
    # what came last is told of, here and after it has left; the model is not kept for it
    assert ac.report() == report
    with ac.attach(model, ac.Isolate([region])):
        assert ac.report().controls[0].forwards == 0
        model(**tiny.flux_inputs())
        assert ac.report().controls[0].forwards == 1
    with pytest.raises(ac.ControlError, match="boom"), ac.attach(model, ac.Isolate([region])):
        raise ac.ControlError("boom")
    assert ac.report().controls[0].forwards == 0
    gone = weakref.ref(model)
    handle = ac.attach(model, ac.Isolate([region]))
    del handle, model
    gc.collect()
    assert gone() is None
    with pytest.raises(ac.ControlError, match="model of the last controls is gone"):
        ac.report()


def test_a_report_without_controls_is_an_error() -> None:
    code = "import attnctrl as ac\ntry:\n    ac.report()\nexcept ac.ControlError as error:\n    print(error)"
    assert "No controls have been on a model" in run_python(code)


def test_rows_of_a_report_are_branches_and_samples() -> None:
    from attnctrl.report import _rows

    assert _rows([("cond", 0), ("cond", 1), ("cond", 2), ("uncond", 1)]) == ", rows cond 0-2 and uncond 1"
    assert _rows([]) == ""


def test_explain_needs_no_weights() -> None:
    with torch.device("meta"):
        model = tiny.FluxTransformer2DModel(**tiny.flux().config)
    left, right = ac.Region("a red fox", box=(0, 0, 0.5, 1)), ac.Region("owl", box=(0.5, 0, 1, 1))
    stack = [
        ac.Isolate(window=(0, 0.25)),
        ac.Regions([left, right], window=(0, 0.5), layers="double"),
        ac.Isolate(strength=0),
    ]
    found = ac.explain(
        model, stack, width=64, height=32, steps=8, text_tokens=10, region_tokens={"a red fox": 6, "owl": 2}
    )
    data = json.loads(json.dumps(found.to_dict()))
    assert [(c["name"], c.get("steps"), c.get("layers")) for c in data["controls"]] == [
        ("isolate", "0-1", "double:0-1, single:0-1"), ("regions", "0-3", "double:0-1"), ("isolate", None, None),
    ]  # fmt: skip
    first, second, third = data["scenes"][0]
    assert [first["steps"], second["steps"], third["steps"]] == ["0-1", "2-3", "4-7"]
    assert first["tokens"] == {"text.global": 10, "text.region0": 6, "text.region1": 2, "image": 8}
    assert third["tokens"] == {"text.global": 10, "image": 8}
    assert first["regions"] == {"a red fox": 4, "owl": 4}
    assert [plan["layers"] for plan in first["plans"]] == ["double:0-1", "single:0-1"]
    # prompt with itself, each text with itself and its region, each region with itself and its text
    pairs = 10 * 10 + (6 + 4) ** 2 + (2 + 4) ** 2
    assert first["plans"][0]["density"] == pytest.approx(pairs / 26**2)
    # single layers have no text control, so the prompt carries over in the last of them
    assert "image of owl indirectly reads image of a red fox, from layer 4 on, through prompt" in first["influence"]
    assert "image of owl reads image of a red fox" in second["influence"]
    assert third["plans"] == []
    assert "steps 4-7: no control: the plain model" in str(found)


def test_explain_estimates_and_pipelines() -> None:
    from attnctrl.toybox.models.flux import tiny_pipeline

    model = tiny.flux()
    region = ac.Region("a red fox", box=(0, 0, 0.5, 1))
    found = ac.explain(model, ac.Regions([region], window=Sigma(1.0, 0.5)), grid=(2, 2), steps=4)
    assert [note.split(";")[0] for note in found.notes] == [
        "sigma windows are placed on evenly spaced noise levels",
        "lengths of region texts are estimated from their words",
    ]
    assert found.controls[0]["steps"] == "0-1"
    given = ac.explain(
        model, ac.Regions([region], window=Sigma(1.0, 0.5)), grid=(2, 2), sigmas=[1.0, 0.2], region_tokens=4
    )
    assert (given.notes, given.controls[0]["steps"]) == ((), "0")
    pipe = tiny_pipeline()
    counted = ac.explain(pipe, ac.Regions([region]), width=48, height=32, text_tokens=16)
    assert counted.notes == ()
    tokens = counted.scenes[0][0]["tokens"]
    assert tokens == {"text.global": 16, "text.region0": len(pipe.tokenizer_2("a red fox").input_ids), "image": 24}
