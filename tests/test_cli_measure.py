"""The commands that measure, and `env`: what they print for people, for programs and in short."""

from __future__ import annotations

import json
import os
import sys
import types

import pytest
import tiny_pipes
from PIL import Image

from attnctrl.attach import parts_of
from attnctrl.toybox.models import flux
from attnctrl.toybox.suite import Options
from attnctrl.versions import versions

RESULT = {
    "suite": "layout", "model": "toy-flux", "n": 3, "seconds": 1.25,
    "metrics": {
        "binding": {"vanilla": 0.25, "controlled": 0.875, "delta": 0.625, "ci95": [0.5, 0.75], "better": "higher"},
        "accuracy": {"vanilla": 0.98},
    },
}  # fmt: skip


@pytest.fixture
def suites(monkeypatch):
    asked = []

    def layout(model, seeds, progress, options):
        asked.append((model, seeds, options))
        if options.grid is not None:
            options.grid(Image.new("RGB", (8, 8)))
        progress(1, 3)
        return RESULT

    module = types.ModuleType("attnctrl.toybox.suites")
    module.SUITES = {"layout": layout, "model": layout, "scorer": layout}
    module.PAIRED = {"layout": types.SimpleNamespace(variants={"other": {}})}
    monkeypatch.setitem(sys.modules, "attnctrl.toybox.suites", module)
    return asked


def test_eval_prints_the_result_of_the_suite(call, suites):
    code, out, _ = call("eval", "layout", "--seeds", 3, "--format", "json")
    printed = json.loads(out)
    assert printed.pop("command") == "attnctrl eval layout --model toy-flux --seeds 3 --format json"
    assert printed.pop("versions") == versions()
    assert (code, printed) == (0, RESULT)
    assert suites == [("toy-flux", 3, Options())]
    code, out, _ = call("eval", "layout", "-m", "other")
    assert suites[1] == ("other", 64, Options())
    row = next(line for line in out.splitlines() if "binding" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        "binding",
        "↑",
        "0.250",
        "0.875",
        "+0.625",
        "+0.500 .. +0.750",
    ]
    assert "layout on toy-flux: n = 3, 1 s" in out
    assert call("eval", "layout", "--format", "quiet")[1] == "binding\t0.250\t0.875\naccuracy\t0.980\t\n"


def test_eval_passes_on_how_to_measure(call, suites, tmp_path):
    target = tmp_path / "grid.png"
    options = ("--variants", "--split", "tune", "--rows", "--grid", target)
    assert call("eval", "layout", "--seeds", 3, *options, "--format", "quiet")[0] == 0
    ((_, _, asked),) = suites
    assert (asked.split, asked.variants, asked.rows) == ("tune", True, True)
    assert Image.open(target).size == (8, 8)
    out = call("eval", "layout", "--seeds", 3, "--variant", "other", "--variant", "third", "--format", "json")[1]
    assert suites[-1][2].variants == ("other", "third")
    assert " --seeds 3 --variant other --variant third --format json" in json.loads(out)["command"]
    out = call("eval", "layout", "--seeds", 3, "--first", 6, "--rows", "--split", "tune", "--format", "json")[1]
    assert suites[-1][2].first == 6
    assert " --seeds 3 --first 6 --rows --split tune --format json" in json.loads(out)["command"]
    code, _, err = call("eval", "model", "--first", 6)
    assert (code, "'model' have no numbers" in " ".join(err.replace("│", " ").split())) == (2, True)
    code, _, err = call("eval", "layout", "--variant", "other", "--variants")
    assert (code, "--variants measures all of them" in " ".join(err.replace("│", " ").split())) == (2, True)
    code, _, err = call("eval", "model", "--variants")
    assert code == 2
    assert call("eval", "scorer", "--rows")[0] == 2
    assert "suite 'model' has no variants; these have: layout" in " ".join(err.replace("│", " ").split())


def test_eval_knows_its_suites(call, suites):
    code, out, err = call("eval", "layuot")
    assert (code, out) == (2, "")
    assert "did you mean 'layout'?" in err.replace("\n", " ")


def test_bench_prints_the_rows(call, monkeypatch):
    import attnctrl.execute.bench as bench

    row = {
        "case": "quadrants",
        "tokens": 8704,
        "density": 0.45,
        "ours_s": 0.5,
        "unmasked_s": 1.0,
        "dense_s": 2.0,
        "plan_bytes": 2048,
        "max_err": 1e-7,
    }
    monkeypatch.setattr(bench, "bench_execute", lambda: {"suite": "execute", "rows": [row]})
    code, out, _ = call("bench", "execute", "--format", "json")
    assert (code, json.loads(out)) == (0, {"suite": "execute", "rows": [row]})
    assert call("bench", "execute", "--format", "quiet")[1] == "quadrants\t0.5000\n"
    from attnctrl.cli.bench import table

    assert [next(iter(column.cells)) for column in table({"rows": [row]}).columns] == [
        "quadrants", "8704", "0.45", "0.500", "1.000", "2.000", "0.50", "0.25", "2 KiB", "1.0e-07",
    ]  # fmt: skip


@pytest.mark.parametrize("make", [flux.tiny_pipeline, tiny_pipes.sd, tiny_pipes.sd3], ids=["flux", "sd", "sd3"])
def test_bench_idle_measures_a_forward_with_the_same_bits(make):
    from attnctrl.bench import bench_idle
    from attnctrl.cli.bench import idle_table

    pipe = make()
    (row,) = bench_idle(pipe, (32, 16), repeats=1)["rows"]
    assert row["bit_equal"]
    assert row["ratio"] == pytest.approx(row["idle_s"] / row["vanilla_s"])
    cells = [next(iter(column.cells)) for column in idle_table({"rows": [row]}).columns]
    assert cells[:3] == ["attached, idle", type(parts_of(pipe)[0]).__name__, "32 x 16"]


def test_first_forward_is_what_the_pipeline_gives_its_denoiser():
    from attnctrl.peek import first_forward

    pipe = tiny_pipes.sd()
    seen = first_forward(pipe, prompt="a red circle", width=32, height=16, guidance_scale=3.0)
    assert {"sample", "timestep", "encoder_hidden_states"} <= set(seen)
    factor = pipe.vae_scale_factor
    assert seen["sample"].shape == (2, 4, 16 // factor, 32 // factor)
    assert not pipe.unet._forward_pre_hooks
    # a run follows as if nothing had been
    assert pipe("a red circle", width=32, height=16, num_inference_steps=1).images


@pytest.mark.slow
def test_compiled_models_need_no_more_graphs_with_controls(call):
    """FLUX 6 + 6 and SD3, through both doors; another strength compiles nothing."""
    code, out, _ = call("bench", "compile", "--format", "json")
    rows = json.loads(out)["rows"]
    assert (code, len(rows)) == (0, 6)
    for row in rows:
        assert 1 <= row["controlled"] <= row["vanilla"]
        assert (row["strength"], row["off"]) == (0, 0)
    assert all(row["idle"] == 0 for row in rows if row["door"] == "processors")


def test_env_names_versions_devices_and_backends(call):
    code, out, _ = call("env", "--format", "json")
    data = json.loads(out)
    assert code == 0
    assert versions().items() <= data["versions"].items()
    assert data["devices"][0] == "cpu"
    assert (data["cores"], set(data["attention"])) == (
        os.cpu_count(),
        {"native", "flex", "flash", "xformers", "sage", "hub kernels"},
    )
    text = call("env")[1]
    assert f"diffusers      {data['versions']['diffusers']}\n" in text
    assert call("env", "--format", "quiet")[1].splitlines()[0] == f"python\t{data['versions']['python']}"
