"""Inversion on tiny pipelines of every kind, the trajectory's file, and the command."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import tiny_pipes
import torch
from attnctrl.pipelines.inversion import InversionSettings, Inverter
from attnctrl.pipelines.latents import decibels, squared_error
from PIL import Image
from shell import save_tiny

import attnctrl
from attnctrl.attach import parts_of
from attnctrl.errors import AssetError, ControlError, LayoutError, ScheduleError, UnsupportedModelError
from attnctrl.inversion import Trajectory
from attnctrl.schedule import run_levels
from attnctrl.toybox.models import flux

PIPES = {"flux": flux.tiny_pipeline, "sd3": tiny_pipes.sd3, "sd": tiny_pipes.sd, "sdxl": tiny_pipes.sdxl}
STEPS = 4


def lively(name):
    """A tiny pipeline whose denoiser answers moderately, so that few steps can follow, but more than nothing."""
    pipe = PIPES[name]()
    if name == "flux":
        with torch.random.fork_rng():
            torch.manual_seed(3)
            for parameter in pipe.transformer.parameters():
                if parameter.ndim > 1:
                    torch.nn.init.normal_(parameter, std=1 / parameter.shape[1] ** 0.5)
    if hasattr(pipe, "unet"):
        pipe.unet.conv_out.weight.mul_(0.1)
    return pipe


def picture(seed=0, size=(32, 16)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(params=PIPES, scope="module")
def inverter(request):
    return Inverter.from_pipe(lively(request.param), request.param)


def how(**more):
    return InversionSettings(**{"prompt": "a red circle", "steps": STEPS, **more})


def stock(inverter, start, guidance):
    """The latents that the pipeline itself draws from `start`, by Euler or DDIM."""
    from diffusers import DDIMScheduler

    pipe = inverter.pipe
    flux_like = hasattr(pipe, "_pack_latents")
    arguments = {"true_cfg_scale": guidance, "guidance_scale": 1.0} if flux_like else {"guidance_scale": guidance}
    if not inverter.adapter.flow:
        assert isinstance(pipe.scheduler, DDIMScheduler)
    return pipe(
        "a red circle", negative_prompt="blue", width=32, height=16, num_inference_steps=STEPS, latents=start,
        output_type="latent", **arguments,
    ).images  # fmt: skip


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_generation_is_the_pipelines_own(inverter, guidance):
    method = "euler" if inverter.adapter.flow else "ddim"
    settings = how(method=method, guidance=guidance, negative_prompt="blue")
    trajectory = inverter.invert(picture(), settings)
    again = inverter.generate(trajectory)
    torch.testing.assert_close(again.clean, stock(inverter, trajectory.noisiest, guidance), rtol=1e-4, atol=1e-4)
    assert again.sigmas == trajectory.sigmas
    assert not torch.allclose(
        again.clean, inverter.generate(trajectory, how(method=method, prompt="a blue square")).clean
    )


def test_a_picture_comes_back_the_better_the_more_steps(inverter):
    clean = inverter.encode(picture())
    errors = []
    for steps in (4, 16):
        again = inverter.generate(inverter.invert(picture(), how(steps=steps)))
        errors.append((again.clean - clean).norm().item())
    # by timesteps spaced evenly, DDIM's last intervals stay long in log-SNR
    assert errors[1] < errors[0] / (2 if inverter.adapter.flow else 1.25)


def test_the_path_starts_at_the_vaes_mode_and_has_the_schedulers_levels(inverter):
    pipe, before = inverter.pipe, inverter.pipe.scheduler
    state = {name: value for name, value in vars(before).items() if not isinstance(value, torch.Tensor)}
    trajectory = inverter.invert(picture(), how())
    assert pipe.scheduler is before
    assert {name: value for name, value in vars(before).items() if not isinstance(value, torch.Tensor)} == state
    pixels = pipe.image_processor.preprocess(picture())
    config = pipe.vae.config
    mode = (pipe.vae.encode(pixels).latent_dist.mode() - (config.shift_factor or 0)) * config.scaling_factor
    torch.testing.assert_close(trajectory.clean, inverter.adapter.pack(pipe, mode))
    assert (len(trajectory.sigmas), len(trajectory.latents)) == (STEPS + 1,) * 2
    assert trajectory.latents.dtype == torch.float32
    torch.testing.assert_close(inverter.adapter.unpack(pipe, trajectory.clean, (32, 16)), mode)
    stock(inverter, trajectory.noisiest, 1.0)
    _, sigmas = run_levels(before)
    assert trajectory.sigmas[:-1] == pytest.approx(sigmas)
    assert trajectory.record["settings"]["method"] == ("midpoint" if inverter.adapter.flow else "ddim")


def test_pictures_of_a_batch_are_those_of_single_runs(inverter):
    both = inverter.invert([picture(0), picture(1)], how(guidance=2.0))
    for row in range(2):
        alone = inverter.invert(picture(row), how(guidance=2.0))
        torch.testing.assert_close(both.latents[:, row : row + 1], alone.latents, rtol=1e-4, atol=1e-4)
    assert [one.size for one in inverter.pictures(both)] == [(32, 16)] * 2


def test_d_e_the_same_seed_gives_the_same_inversion_and_the_global_generator_is_left_alone(inverter):
    settings = how(method="controlled" if inverter.adapter.flow else "ddim", seed=5)
    before = torch.get_rng_state()
    first = inverter.invert(picture(), settings)
    assert torch.equal(first.latents, inverter.invert(picture(), settings).latents)
    assert torch.equal(before, torch.get_rng_state())
    if inverter.adapter.flow:
        other = inverter.invert(picture(), how(method="controlled", seed=6))
        assert not torch.allclose(first.noisiest, other.noisiest)


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_controlled_ends_on_the_noise_and_holds_on_to_the_picture(name):
    inverter = Inverter.from_pipe(lively(name))
    settings = how(method="controlled", gamma=1.0, eta=1.0, window=(0.0, 1.0), seed=5)
    trajectory = inverter.invert(picture(), settings)
    noise = torch.randn(trajectory.clean.shape, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(trajectory.noisiest, noise, rtol=0, atol=1e-5)
    torch.testing.assert_close(inverter.generate(trajectory).clean, trajectory.clean, rtol=0, atol=1e-5)


# controls


def boxes():
    return [attnctrl.Region("a red circle", box=(0, 0, 0.5, 1)), attnctrl.Region("a blue star", box=(0.5, 0, 1, 1))]


def test_controls_act_in_their_windows_in_both_directions(inverter):
    """In a window of high noise: the clean half of the way up is the plain one, bit for bit."""
    plain = inverter.invert(picture(), how())
    controls = [attnctrl.Regions(boxes(), window=(0.0, 0.5)), attnctrl.Isolate(window=(0.0, 0.5))]
    with attnctrl.attach(inverter.pipe, controls) as handle:
        held = inverter.invert(picture(), how())
        again = inverter.generate(plain)
        report = handle.report()
    assert torch.equal(held.latents[STEPS // 2 :], plain.latents[STEPS // 2 :])
    assert not torch.allclose(held.latents[0], plain.latents[0])
    assert not torch.allclose(again.latents[1], inverter.generate(plain).latents[1])
    assert not report.warnings


def test_idle_controls_change_no_bit(inverter):
    plain = inverter.invert(picture(), how(guidance=2.0))
    with attnctrl.attach(inverter.pipe, [attnctrl.Isolate(boxes(), strength=0.0)]):
        assert torch.equal(inverter.invert(picture(), how(guidance=2.0)).latents, plain.latents)
    assert torch.equal(inverter.invert(picture(), how(guidance=2.0)).latents, plain.latents)


def test_c_f_forwards_of_a_walk(inverter):
    count = []
    model = parts_of(inverter.pipe)[0]
    hook = model.register_forward_hook(lambda *_: count.append(1))
    trajectory = inverter.invert(picture(), how())
    inverter.generate(trajectory)
    hook.remove()
    assert len(count) == (4 if inverter.adapter.flow else 2) * STEPS


def test_half_precision_keeps_its_weights_and_a_path_in_float32():
    pipe = lively("flux").to(torch.bfloat16)
    weights = {name: one.clone() for name, one in pipe.vae.state_dict().items()}
    trajectory = Inverter.from_pipe(pipe).invert(picture(), how())
    assert trajectory.latents.dtype == torch.float32
    assert torch.isfinite(trajectory.latents).all()
    assert pipe.vae.dtype == torch.bfloat16
    assert all(torch.equal(one, weights[name]) for name, one in pipe.vae.state_dict().items())


def test_zero_terminal_signal():
    from diffusers import DDIMScheduler

    pipe = lively("sd")
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
        set_alpha_to_one=True,
    )  # fmt: skip
    inverter = Inverter.from_pipe(pipe)
    trajectory = inverter.invert(picture(), how(steps=10))
    assert trajectory.sigmas[0] == math.inf
    assert torch.isfinite(trajectory.latents).all()
    assert torch.isfinite(inverter.generate(trajectory).latents).all()
    assert torch.equal(trajectory.at(math.inf), trajectory.noisiest)


# errors


def test_what_cannot_be_inverted_is_refused():
    inverter = Inverter.from_pipe(lively("flux"))
    with pytest.raises(LayoutError, match=r"multiples of 8 .* found 30 x 16; crop or resize the picture to 24 x 16"):
        inverter.invert(picture(size=(32, 16)).resize((30, 16)))
    with pytest.raises(LayoutError, match="one size"):
        inverter.invert([picture(), picture(size=(16, 16))])
    with pytest.raises(ControlError, match="'ddim' does not suit FluxPipeline, which takes midpoint"):
        inverter.invert(picture(), how(method="ddim"))
    with pytest.raises(AssetError, match="missing"):
        inverter.invert("nowhere.png")
    with pytest.raises(ControlError, match="method must be one of midpoint"):
        how(method="magic")
    with pytest.raises(ControlError, match=r"gamma must be in \[0, 1\]"):
        how(gamma=2.0)
    from tiny_mmdit_pipes import chroma

    with pytest.raises(UnsupportedModelError, match="Inverter runs on FluxPipeline"):
        Inverter.from_pipe(chroma())


def test_schedulers_without_levels_to_walk_are_refused_and_put_back():
    from diffusers import DDIMScheduler, FlowMatchHeunDiscreteScheduler

    for name, other in (("sd3", FlowMatchHeunDiscreteScheduler()), ("sd", FlowMatchHeunDiscreteScheduler())):
        pipe = lively(name)
        pipe.scheduler = other
        with pytest.raises(UnsupportedModelError, match="found FlowMatchHeunDiscreteScheduler"):
            Inverter.from_pipe(pipe).invert(picture(), how())
        assert pipe.scheduler is other
    pipe = lively("sd")
    pipe.scheduler = other = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="sample")
    with pytest.raises(UnsupportedModelError, match="prediction_type is 'sample'"):
        Inverter.from_pipe(pipe).invert(picture(), how())
    assert pipe.scheduler is other


# the trajectory's file


def trajectory(sigmas=(math.inf, 1.0, 0.1)):
    record = {"model": {"name": "tiny", "fingerprint": "sha256:1"}, "size": [32, 16]}
    return Trajectory(torch.randn(len(sigmas), 1, 4, generator=torch.Generator().manual_seed(0)), sigmas, record)


def test_a_trajectory_is_read_back_exactly(tmp_path):
    made = trajectory()
    found = Trajectory.load(made.save(tmp_path / "new" / "t.safetensors"), made.record["model"])
    assert torch.equal(found.latents, made.latents)
    assert (found.sigmas, found.record) == (made.sigmas, made.record)
    renamed = {"name": "moved", "fingerprint": "sha256:1"}
    assert Trajectory.load(tmp_path / "new" / "t.safetensors", renamed).sigmas == made.sigmas


def test_other_models_and_other_files_are_refused(tmp_path):
    path = trajectory().save(tmp_path / "t.safetensors")
    with pytest.raises(AssetError, match=r"belongs to tiny \(sha256:1\), but the model here is tiny \(sha256:2\)"):
        Trajectory.load(path, {"name": "tiny", "fingerprint": "sha256:2"})
    with pytest.raises(AssetError, match="belongs to tiny"):
        Trajectory.load(path, {"name": "tiny"})
    (tmp_path / "bad.safetensors").write_bytes(path.read_bytes()[:50])
    for name in ("bad.safetensors", "missing.safetensors"):
        with pytest.raises(AssetError, match="is no trajectory of attnctrl"):
            Trajectory.load(tmp_path / name)


def test_generation_refuses_paths_of_other_models_and_without_their_story():
    inverter = Inverter.from_pipe(lively("flux"), "tiny")
    made = inverter.invert(picture(), how(method="euler", steps=1))
    with pytest.raises(AssetError, match=r"belongs to other .*, but the model here is tiny"):
        inverter.generate(Trajectory(made.latents, made.sigmas, {**made.record, "model": {"name": "other"}}))
    bare = Trajectory(made.latents, made.sigmas, {"model": made.record["model"], "size": [32, 16]})
    with pytest.raises(ControlError, match="record lacks settings; give `settings`"):
        inverter.generate(bare)
    assert inverter.generate(bare, how(method="euler", steps=1)).sigmas == made.sigmas


def test_levels_are_looked_up_and_missing_ones_refused():
    made = trajectory()
    assert torch.equal(made.at(1.0 + 1e-6), made.latents[1])
    assert torch.equal(made.clean, made.latents[2])
    with pytest.raises(ScheduleError, match=r"no latents at sigma 0.5; the nearest of its 3 levels is 0.1"):
        made.at(0.5)
    with pytest.raises(ScheduleError, match="noisiest first"):
        trajectory((0.1, 1.0))


# quality and the command


def test_errors_of_pixels_are_those_of_pictures():
    shown = picture()
    pixels = torch.from_numpy(np.array(shown)).permute(2, 0, 1)[None] / 255
    assert squared_error(pixels, [shown]) == pytest.approx([0], abs=1e-12)
    assert squared_error((pixels + 0.1), [shown]) == pytest.approx([0.01])
    assert (decibels(0.01), decibels(0)) == (pytest.approx(20), 100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = save_tiny(tmp_path_factory.mktemp("models"))
    picture(size=(64, 64)).save(made / "photo.png")
    picture(size=(64, 64)).resize((60, 64)).save(made / "odd.png")
    return made


def test_the_command_writes_a_trajectory_of_its_model_and_says_what_came_back(call, folder, tmp_path):
    code, out, _ = call(
        "invert",
        folder / "photo.png",
        "--model",
        folder / "tiny",
        "--steps",
        3,
        "-o",
        tmp_path / "o",
        "--format",
        "json",
    )
    told = json.loads(out)
    assert code == 0
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == [
        "photo.inversion.json", "photo.reconstruction.png", "photo.trajectory.safetensors"
    ]  # fmt: skip
    assert json.loads((tmp_path / "o" / "photo.inversion.json").read_text()) == told
    inverter = Inverter.from_pretrained(str(folder / "tiny"), device="cpu")
    found = Trajectory.load(told["trajectory"], inverter.identity)
    with Image.open(folder / "photo.png") as shown:
        (error,) = squared_error(inverter.pixels(found.clean, (64, 64)), [shown.convert("RGB")])
        again = inverter.generate(found)
        (back,) = squared_error(inverter.pixels(again.clean, (64, 64)), [shown.convert("RGB")])
    assert told["vae"] == {"mse": pytest.approx(error), "psnr": pytest.approx(decibels(error))}
    assert told["round_trip"] == {"mse": pytest.approx(back), "psnr": pytest.approx(decibels(back))}
    assert (len(found.sigmas), told["settings"]["method"]) == (4, "midpoint")
    with Image.open(told["reconstruction"]) as written:
        assert np.array_equal(np.asarray(written), np.asarray(inverter.pictures(again)[0]))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing.png"], "missing"),
        (["odd.png"], "multiples of 8"),
        (["pair.yaml"], "picture"),
        (["photo.png", "--method", "magic"], "method must be one of"),
        (["photo.png", "--method", "ddim"], "does not suit FluxPipeline"),
        (["photo.png", "--gamma", "3"], "gamma"),
        (["photo.png", "--model", "nowhere"], "nowhere"),
    ],
)
def test_wrong_requests_say_so_and_write_nothing(call, folder, tmp_path, arguments, said):
    given = [folder / arguments[0], *arguments[1:]]
    model = [] if "--model" in arguments else ["--model", folder / "tiny"]
    code, out, err = call("invert", *given, *model, "-o", tmp_path / "o")
    assert (code, out) == (2, "")
    assert said in " ".join(err.split())
    assert not (tmp_path / "o").exists()


def test_the_bench_compares_methods_on_the_same_renders(folder):
    from attnctrl.cli.bench import inversion_table
    from attnctrl.toybox.inversion import bench_inversion

    inverter = Inverter.from_pretrained(str(folder / "tiny"), device="cpu")
    ticks = []
    result = bench_inversion(inverter, 2, (1, 2), progress=lambda done, total: ticks.append((done, total)))
    assert [(row["method"], row["steps"], row["forwards"]) for row in result["rows"]] == [
        ("midpoint", 1, 4), ("midpoint", 2, 8), ("euler", 1, 2), ("euler", 2, 4), ("fireflow", 1, 4), ("fireflow", 2, 6)
    ]  # fmt: skip
    assert ticks == [(i, 12) for i in range(1, 13)]
    assert all(row["rms"] <= row["worst"] and row["least_psnr"] <= row["psnr"] for row in result["rows"])
    assert [row["gain"] is None for row in result["rows"]] == [True, False] * 3
    assert inversion_table(result).row_count == 6
