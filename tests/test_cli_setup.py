"""Options of how a model is loaded: they act, pictures tell of them, and replay does the same or says why it cannot."""

from __future__ import annotations

import json
import shutil
from functools import partialmethod

import numpy as np
import pytest
import tiny_pipes
import torch
from attnctrl.pipelines import ScenePipeline, setup
from attnctrl.pipelines.setup import Lora, Setup
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from PIL import Image
from shell import save_tiny

from attnctrl import files, provenance
from attnctrl.cli.loading import Loading
from attnctrl.errors import AssetError, ControlError, SceneError, UnsupportedModelError
from attnctrl.scene import load_scene
from attnctrl.toybox.models.flux import tiny_pipeline

CPU = ["--device", "cpu", "--format", "quiet"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny model, its scene, and a LoRA for it."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    made = save_tiny(tmp_path_factory.mktemp("setups"))
    transformer = FluxTransformer2DModel.from_pretrained(made / "tiny" / "transformer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        (made / "loras").mkdir()
        FluxPipeline.save_lora_weights(
            made / "loras", get_peft_model_state_dict(transformer), weight_name="ink.safetensors"
        )
        foreign = {"transformer.no_such_layer.lora_A.weight": torch.zeros(2, 4)}
        FluxPipeline.save_lora_weights(made / "loras", foreign, weight_name="foreign.safetensors")
    return made


@pytest.fixture(scope="module")
def ink(folder):
    return folder / "loras" / "ink.safetensors"


@pytest.fixture(scope="module")
def plain(folder):
    """The scene's picture by the model as it is."""
    return ScenePipeline.from_pretrained(str(folder / "tiny"), device="cpu")(load_scene(folder / "pair.yaml"))[0]


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


# LoRAs


def test_a_lora_acts_as_in_diffusers_and_travels_with_the_picture(call, folder, ink, plain, tmp_path):
    drawn = tmp_path / "pair-5.png"
    line = ["generate", folder / "pair.yaml", "-o", tmp_path, *CPU]
    assert call(*line, "--lora", f"{ink}:0.5")[::2] == (0, "")
    assert (pixels(drawn) != np.asarray(plain.image).astype(int)).any()
    own = FluxPipeline.from_pretrained(folder / "tiny")
    own.load_lora_weights(ink.parent, weight_name=ink.name, adapter_name="ink")
    own.set_adapters(["ink"], [0.5])
    expected = ScenePipeline.from_pipe(own)(load_scene(folder / "pair.yaml"))[0]
    assert (pixels(drawn) == np.asarray(expected.image).astype(int)).all()
    (told,) = provenance.read(drawn)["setup"]["loras"]
    assert (told["name"], told["scale"], len(told["sha256"])) == ("ink.safetensors", 0.5, 64)
    assert "ink.safetensors" in call("info", drawn)[1]

    model = ["-m", folder / "tiny"]
    code, out, err = call("replay", drawn, *model)
    assert (code, out) == (1, "")
    assert "was drawn with the LoRA 'ink.safetensors'" in err
    assert "is not there; put the file there, or give it as --lora PATH" in err
    assert call("replay", drawn, *model, "--lora", ink)[:2] == (0, f"{drawn}: bit-equal\n")  # with its scale
    code, _, err = call("replay", drawn, *model, "--lora", f"{ink}:2")
    assert code == 1
    assert "setup.loras" in err
    shutil.copy(ink, tmp_path)
    assert call("replay", drawn, *model) == (0, f"{drawn}: bit-equal\n", "")
    assert call("generate", drawn, *model, "-o", tmp_path / "again", *CPU)[::2] == (0, "")
    assert (tmp_path / "again" / "pair-5.png").read_bytes() == drawn.read_bytes()
    shutil.copy(folder / "loras" / "foreign.safetensors", tmp_path / "ink.safetensors")
    code, _, err = call("replay", drawn, *model)
    assert code == 1
    assert "is another file" in err


def test_loras_add_up_and_none_is_left_at_scale_zero(folder, ink, plain):
    def drawn(*texts):
        loaded = Setup(loras=tuple(Lora.of(f"{ink}:{scale}") for scale in texts))
        pipe = ScenePipeline.from_pretrained(str(folder / "tiny"), device="cpu", setup=loaded)
        return np.asarray(pipe(load_scene(folder / "pair.yaml"))[0].image).astype(int)

    assert (drawn(0) == np.asarray(plain.image)).all()
    once = drawn(0.75)
    assert np.abs(drawn(0.25, 0.5) - once).max() <= 1
    assert np.abs(once - np.asarray(plain.image)).max() > 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere.safetensors", "no such file"),
        ("loras", "a folder"),
        ("pair.yaml", "no safetensors file"),
    ],
)
def test_what_is_no_lora_is_refused_before_a_model_is_loaded(call, folder, tmp_path, monkeypatch, text, message):
    monkeypatch.setattr(ScenePipeline, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.chdir(folder)
    code, out, err = call("generate", "pair.yaml", "-o", tmp_path, "--lora", text)
    assert (code, out) == (2, "")
    assert "--lora" in err
    assert message in err


def test_a_lora_of_another_model_is_an_error(call, folder, tmp_path):
    code, out, err = call(
        "generate", folder / "pair.yaml", "-o", tmp_path, "--lora", folder / "loras" / "foreign.safetensors", *CPU
    )
    assert (code, out) == (1, "")
    assert "foreign.safetensors'" in err
    assert list(tmp_path.iterdir()) == []


def test_without_peft_it_says_what_to_install(folder, ink, monkeypatch):
    monkeypatch.setattr(setup, "find_spec", lambda name: None)
    with pytest.raises(AssetError, match=r"package peft, which is not installed; run: pip install 'attnctrl\[lora\]'"):
        Setup(loras=(Lora.of(str(ink)),)).applied(tiny_pipeline(), "cpu")


def test_paths_and_scales_are_told_apart(ink):
    assert (Lora.of(f"{ink}:0.5").source, Lora.of(f"{ink}:0.5").scale) == (str(ink), 0.5)
    assert (Lora.of(str(ink)).scale, Lora.of(str(ink), {Lora.of(str(ink)).sha256: 0.7}).scale) == (1, 0.7)
    assert Lora.of("owner/name:1.5") == Lora("owner/name", 1.5)
    assert Lora.of("owner/name").record() == {"name": "owner/name", "scale": 1.0}


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"name": "ink.safetensors"}, r"setup is damaged \(KeyError: 'scale'\); name an unchanged picture"),
        ("ink", r"setup is damaged \(TypeError"),
        ({"name": "../loras/ink.safetensors", "scale": 1, "sha256": "0"}, "ink.safetensors is not there; put the file"),
        ({"name": "../loras", "scale": 1}, "loras is not there"),
    ],
)
def test_records_are_no_way_to_other_files(tmp_path, told, message):
    with pytest.raises((SceneError, AssetError), match=message):
        Loading(device="cpu").setup({"setup": {"loras": [told]}}, tmp_path)


# offloading, backends, compilation


def test_offloading_is_for_gpus_and_a_cpu_replays_without(call, folder, tmp_path):
    line, drawn = ["generate", folder / "pair.yaml", "-o", tmp_path, *CPU], tmp_path / "pair-5.png"
    code, out, err = call(*line, "--cpu-offload", "model")
    assert (code, out) == (1, "")
    assert "cpu_offload 'model' keeps in CPU memory what does not run on a GPU; this run is on the CPU" in err
    assert call(*line)[::2] == (0, "")
    with Image.open(drawn) as image:
        record = {**provenance.read(drawn), "setup": {"cpu_offload": "model"}}
        files.write_png(drawn, image, provenance.to_text(record))
    code, out, err = call("replay", drawn, "-m", folder / "tiny", "--device", "cpu")
    assert (code, out) == (0, f"{drawn}: bit-equal\n")
    assert "setup.cpu_offload: model then, None now" in err


@pytest.mark.parametrize(
    ("how", "method", "told"),
    [
        ("model", "enable_model_cpu_offload", {"device": "cuda:1"}),
        ("sequential", "enable_sequential_cpu_offload", {"device": "cuda:1"}),
        ("group", "enable_group_offload", {"onload_device": torch.device("cuda:1"), "offload_type": "leaf_level"}),
    ],
)
def test_offloading_is_that_of_diffusers_and_nothing_is_moved_before(monkeypatch, how, method, told):
    """What it does on a GPU is not seen here."""
    calls = []
    monkeypatch.setattr(FluxPipeline, method, lambda self, **given: calls.append(given))
    monkeypatch.setattr(FluxPipeline, "to", lambda *_, **__: pytest.fail("moved"))
    pipe = tiny_pipeline()
    assert Setup(cpu_offload=how).applied(pipe, "cuda:1") is pipe
    assert calls == [told]


def test_the_backend_is_the_one_named_and_of_this_model_alone(call, folder, tmp_path):
    before = _AttentionBackendRegistry._active_backend
    pipe = Setup(attention_backend="_native_math").applied(tiny_pipeline(), "cpu")
    chosen = {one.processor._attention_backend.value for one in pipe.transformer.modules() if hasattr(one, "processor")}
    assert chosen == {"_native_math"}
    assert _AttentionBackendRegistry._active_backend is before
    line = ["generate", folder / "pair.yaml", "-o", tmp_path, *CPU, "--attention-backend", "_native_math"]
    assert call(*line)[::2] == (0, "")
    assert provenance.read(tmp_path / "pair-5.png")["setup"] == {"attention_backend": "_native_math"}
    assert call("replay", tmp_path / "pair-5.png", "-m", folder / "tiny")[::2] == (0, "")


def test_backends_that_cannot_be_are_refused(call, folder, tmp_path):
    code, _, err = call("generate", folder / "pair.yaml", "-o", tmp_path, "--attention-backend", "flush")
    assert code == 2
    assert "No attention backend 'flush'; take one of" in err
    with pytest.raises(UnsupportedModelError, match="'_native_npu' cannot be used here"):
        Setup(attention_backend="_native_npu").applied(tiny_pipeline(), "cpu")
    with pytest.raises(UnsupportedModelError, match="processors of UNet2DConditionModel call PyTorch's kernel"):
        Setup(attention_backend="native").applied(tiny_pipes.sd(), "cpu")
    with pytest.raises(ControlError, match="is one of model, sequential, group; found 'disk'"):
        Setup(cpu_offload="disk")


def test_compiled_blocks_are_recorded_and_replayed(call, folder, plain, tmp_path, monkeypatch):
    """With the eager backend, which compiles nothing and takes no compiler."""
    whole = FluxTransformer2DModel.compile_repeated_blocks
    monkeypatch.setattr(FluxTransformer2DModel, "compile_repeated_blocks", partialmethod(whole, backend="eager"))
    compiled = Setup(compile=True).applied(tiny_pipeline(), "cpu").transformer
    assert all(block._compiled_call_impl is not None for block in compiled.transformer_blocks)
    line = ["generate", folder / "pair.yaml", "-o", tmp_path, *CPU, "--steps", 1, "--compile"]
    assert call(*line)[::2] == (0, "")
    assert provenance.read(tmp_path / "pair-5.png")["setup"] == {"compile": True}
    code, out, _ = call("replay", tmp_path / "pair-5.png", "-m", folder / "tiny", "--format", "json")
    assert (code, json.loads(out)["differences"]) == (0, [])


def test_stories_and_sets_take_the_same_options(call, folder, ink, tmp_path):
    common = ["--lora", ink, "--steps", 1, "--true-cfg-scale", 2, "-m", folder / "tiny", *CPU]
    shots = ["--cast", "ball=a red circle", "--shot", "{ball} left", "--shot", "{ball} right"]
    assert call("subjects", *shots, *common, "-o", tmp_path)[0] == 0
    assert call("style", "a red circle", "two cats", *common, "-o", tmp_path)[0] == 0
    for name in ("story-1.png", "style-1.png"):
        record = provenance.read(tmp_path / name)
        assert record["setup"]["loras"] == [Lora.of(str(ink)).record()]
        assert (record["settings"]["steps"], record["settings"]["true_cfg_scale"]) == (1, 2)
        assert call("replay", tmp_path / name, "-m", folder / "tiny", "--lora", ink)[0] == 0
