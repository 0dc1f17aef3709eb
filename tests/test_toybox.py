"""The world renders what it says, captions tell only what is true, and training can be resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attnctrl.pipelines.runner import Runner
from diffusers import AutoencoderKL

from attnctrl.errors import AssetError
from attnctrl.toybox import data, export, flow, model_path, text, train, vae, world
from attnctrl.toybox.models import RECIPES, flux, sd, sd3
from attnctrl.toybox.models.base import v_prediction


def scenes(count: int, subjects: int, seed: int = 0) -> list[world.WorldScene]:
    rng = np.random.default_rng(seed)
    return [world.sample_scene(rng, subjects) for _ in range(count)]


def test_rendering_is_pure_and_masks_hold_the_colour() -> None:
    subject = world.WorldSubject("square", "red", "solid", 0.5, 0.5, 0.3)
    scene = world.WorldScene((subject,), "white")
    first, second = world.render(scene), world.render(scene)
    assert np.array_equal(first.image, second.image)
    inner = first.image[26:38, 26:38].reshape(-1, 3)
    assert np.all(inner == world.COLORS["red"])
    assert np.all(first.image[0] == world.BACKGROUNDS["white"])
    side = 2 * 0.8 * 0.3
    assert first.boxes[0] == pytest.approx((0.5 - side / 2, 0.5 - side / 2, 0.5 + side / 2, 0.5 + side / 2), abs=1 / 64)


@pytest.mark.parametrize("shape", world.SHAPES)
def test_signed_distance_is_a_distance(shape: str) -> None:
    y, x = np.mgrid[-1.5:1.5:120j, -1.5:1.5:120j]
    d = world.signed_distance(shape, x, y)
    assert d.min() < 0 < d.max()
    step = 3 / 119
    slope = np.hypot(*np.gradient(d, step))
    assert np.quantile(np.abs(slope - 1), 0.9) < 0.05
    assert 0.3 < np.mean(d < 0) * 9 < np.pi


def test_later_subjects_lie_on_top() -> None:
    below = world.WorldSubject("circle", "red", "solid", 0.5, 0.5, 0.3)
    above = replace(below, color="blue", radius=0.15)
    picture = world.render(world.WorldScene((below, above), "white"))
    assert not np.any(picture.masks[0] & picture.masks[1])
    assert tuple(picture.image[32, 32]) == world.COLORS["blue"]


@pytest.mark.parametrize("subjects", [1, 2, 3, 4])
def test_subjects_do_not_overlap_and_lie_inside(subjects: int) -> None:
    for scene in scenes(30, subjects):
        assert len(scene.subjects) == subjects
        for i, a in enumerate(scene.subjects):
            assert a.radius <= a.x <= 1 - a.radius
            assert a.radius <= a.y <= 1 - a.radius
            for b in scene.subjects[:i]:
                assert np.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius


def test_a_full_caption_tells_everything_and_an_empty_telling_nothing() -> None:
    subject = world.WorldSubject("star", "green", "dotted", 0.2, 0.8, 0.12)
    scene = world.WorldScene((subject,), "beige", world.WorldStyle("hatched"))
    rng = np.random.default_rng(0)
    told = world.caption(scene, rng, world.EVERYTHING)
    assert told == "a small dotted green star bottom left, beige background, hatched style"
    assert world.caption(scene, rng, world.Telling(0, 0, 0, 0, 0, 0, 0)) == "a thing"


def test_captions_never_lie() -> None:
    rng = np.random.default_rng(1)
    for scene in scenes(200, 2, seed=3):
        words = set(world.caption(scene, rng).replace(",", "").split())
        assert words & set(world.COLORS) <= {s.color for s in scene.subjects}
        assert words & set(world.SHAPES) <= {s.shape for s in scene.subjects}
        assert words & set(world.PATTERNS) <= {s.pattern for s in scene.subjects}
        assert words & set(world.BACKGROUNDS) <= {scene.background}
        assert words & set(world.STYLES) <= {scene.style.name}


def test_every_word_is_one_token_and_the_longest_caption_fits() -> None:
    clip, t5 = text.clip_tokenizer(), text.t5_tokenizer()
    for word in world.WORDS:
        assert len(clip(word).input_ids) == 3
        assert len(t5(word if word.isalpha() else f"a{word}").input_ids) == 2 + (not word.isalpha())
    rng = np.random.default_rng(2)
    told = [world.caption(scene, rng, world.EVERYTHING) for scene in scenes(50, 4)]
    unknown = t5.unk_token_id
    for caption in told:
        assert len(t5(caption).input_ids) <= text.MAX_LENGTH
        assert len(clip(caption).input_ids) <= text.MAX_LENGTH
        assert unknown not in t5(caption).input_ids


def test_byte_pairs_take_the_commonest_pair_and_break_ties_by_the_alphabet() -> None:
    assert text.byte_pairs(["aab", "aac"]) == [("a", "a"), ("aa", "b</w>"), ("aa", "c</w>")]
    assert text.byte_pairs(["a"]) == []


def test_token_owner_is_the_subject_that_covers_most() -> None:
    masks = np.zeros((2, 16, 16), dtype=bool)
    masks[0, :8, :8] = True
    masks[1, 8:, :4] = True
    masks[1, 8, 8] = True
    assert data.token_owner(masks, 16, 16).tolist() == [0, -1, 1, -1]


def test_packing_is_that_of_flux() -> None:
    from diffusers import FluxPipeline

    latents = torch.arange(2 * 16 * 4 * 6, dtype=torch.float32).view(2, 16, 4, 6)
    assert torch.equal(data.pack(latents), FluxPipeline._pack_latents(latents, 2, 16, 4, 6))


@pytest.fixture(scope="module")
def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**flux.TINY_FLUX.vae).eval()


def test_balancing_keeps_reconstructions_and_orders_the_channels(tiny_vae: AutoencoderKL) -> None:
    """Uncorrelated channels in order of what the picture owes them; those that the decoder ignores are exactly zero."""
    images = vae.sample_images(np.random.default_rng(0), 128, 32)
    x = vae.images_to_tensor(images[:4])
    with torch.no_grad():
        # two directions that nothing reads
        tiny_vae.post_quant_conv.weight[:, 3] = tiny_vae.post_quant_conv.weight[:, 7] = 0.0
        before = tiny_vae.decode(tiny_vae.encode(x).latent_dist.mode()).sample
        vae.balance(tiny_vae, images)
        after = tiny_vae.decode(tiny_vae.encode(x).latent_dist.mode()).sample
        z = tiny_vae.encode(vae.images_to_tensor(images)).latent_dist.mode()
    assert torch.allclose(before, after, atol=2e-3)
    flat = z.permute(0, 2, 3, 1).flatten(0, 2)
    std = flat.std(0)
    assert torch.allclose(flat.mean(0), torch.zeros(16), atol=1e-2)
    assert float(std[0]) == pytest.approx(vae.TOP_STD, rel=0.05)
    alive = std > 0
    assert 4 < int(alive.sum()) <= 14
    assert (std[:-1] + 1e-3 >= std[1:]).all()
    assert torch.equal(flat[:, ~alive], torch.zeros_like(flat[:, ~alive]))
    correlation = torch.corrcoef(flat[:, alive].T)
    assert (correlation - torch.eye(int(alive.sum()))).abs().max() < 5e-2
    # what never varies hardly counts in the flow's loss
    weights = flow.channel_weights(data.pack(z))
    assert torch.equal(weights, torch.where(alive.repeat_interleave(4), 1.0, 0.02))


def test_truth_of_tokens() -> None:
    subject = world.WorldSubject("heart", "blue", "striped", 0.25, 0.25, 0.2)
    scene = world.WorldScene((subject,), "gray")
    owner = torch.from_numpy(data.token_owner(world.render(scene).masks, 64, 64))[None]
    shard = data.Shard(64, 64, [scene], torch.zeros(1, 64, 64), owner, torch.zeros(1, 36, 64), torch.zeros(1))
    told = data.truth(shard, np.array([0]))
    centre = 1 * 8 + 1  # the token whose middle is (0.1875, 0.1875)
    assert told["shape"][0, centre] == world.SHAPES.index("heart") + 1
    assert told["color"][0, centre] == list(world.COLORS).index("blue") + 1
    assert told["place"][0, centre].tolist() == pytest.approx([0.25, 0.25, 0.8])
    assert told["shape"][0, -1] == 0
    assert told["present"][0, -1] == 0


@pytest.fixture(scope="module")
def shards(tiny_vae: AutoencoderKL) -> dict:
    return {(64, 64): {n: data.make_shard(tiny_vae, n, n, 16, 64, 64, lambda _: None) for n in (1, 2, 3, 4)}}


TINY = {
    "toy-flux": lambda vae: flux.flux_pipeline(flux.TINY_FLUX, vae),
    "toy-sd": lambda vae: sd.sd_pipeline(
        sd.SDSizes(channels=(32, 32, 32), head_dim=16, text_width=32, text_layers=1), vae
    ),
    "toy-sd3": lambda vae: sd3.sd3_pipeline(
        sd3.SD3Sizes(heads=2, head_dim=16, blocks=2, text_width=32, text_layers=2), vae
    ),
}


def new_flow(tiny_vae: AutoencoderKL, name: str = "toy-flux") -> flow.Flow:
    torch.manual_seed(0)
    return flow.Flow(RECIPES[name], TINY[name](tiny_vae))


def test_every_recipe_has_a_tiny_twin() -> None:
    assert set(TINY) == set(RECIPES)


def run(one: flow.Flow, shards: dict, seed: int, steps: int) -> list[float]:
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    return [one.step(flow.draw(shards, rng, 8, [(64, 64)], [1.0]), generator, 1.0) for _ in range(steps)]


@pytest.mark.parametrize("name", TINY)
def test_training_learns_and_resumes_exactly(tiny_vae: AutoencoderKL, shards: dict, name: str) -> None:
    one = new_flow(tiny_vae, name)
    losses = run(one, shards, 0, 12)
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    state = one.state()
    on = run(one, shards, 1, 2)
    other = new_flow(tiny_vae, name)
    other.load_state(state)
    assert run(other, shards, 1, 2) == on


def test_channels_of_no_weight_do_not_count(tiny_vae: AutoencoderKL, shards: dict) -> None:
    one = new_flow(tiny_vae)
    batch = flow.draw(shards, np.random.default_rng(0), 8, [(64, 64)], [1.0])
    whole = one.loss(batch, torch.Generator().manual_seed(0))[1]
    one.weights = torch.cat([torch.ones(32), torch.zeros(32)])
    first = one.loss(batch, torch.Generator().manual_seed(0))[1]
    one.weights = 1 - one.weights
    second = one.loss(batch, torch.Generator().manual_seed(0))[1]
    assert first + second == pytest.approx(whole)
    assert min(first, second) > 0


def test_rate_falls_to_zero_in_the_last_quarter() -> None:
    assert train.rate_factor(0, 0.0) < 0.01
    assert train.rate_factor(50_000, 0.5) == 1
    assert train.rate_factor(87_500, 0.875) == pytest.approx(0.5)
    assert train.rate_factor(100_000, 1.0) == 0
    assert train.rate_factor(50_000, 0.6, decay=0.8) == pytest.approx(0.5)


def test_orthogonalised_updates_have_singular_values_near_one() -> None:
    from attnctrl.toybox.muon import orthogonalise

    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 24, 48), (2, 48, 24)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=generator)))
        assert 0.6 < values.min() < values.max() < 1.3


def test_unknown_model_is_named_with_those_there_are() -> None:
    with pytest.raises(AssetError, match=r"no embedded model 'toy-nothing'; there are: .*toy-flux"):
        model_path("toy-nothing")


def test_a_run_without_checkpoint_starts_from_the_exported_weights(
    tiny_vae: AutoencoderKL, shards: dict, tmp_path
) -> None:
    one = new_flow(tiny_vae)
    assert train.warm_start(one, tmp_path / "nothing") == (0, 0.0)
    run(one, shards, 0, 3)
    with train.averaged(one):
        export.export(one.pipeline, tmp_path / "model", {}, {"samples": 24, "seconds": 5})
    other = new_flow(tiny_vae)
    assert train.warm_start(other, tmp_path / "model") == (24, 5.0)
    for name, weight in one.average.items():
        kept = weight.half().float() if weight.is_floating_point() else weight
        assert torch.equal(other.modules.state_dict()[name], kept)
        assert torch.equal(other.average[name], kept)


@pytest.mark.parametrize("name", TINY)
def test_the_export_loads_in_one_dtype_and_draws_alike(tiny_vae: AutoencoderKL, tmp_path, name: str) -> None:
    """By stock Diffusers, from safetensors, with the settings of the recipe beside it."""
    from diffusers import DiffusionPipeline

    recipe = RECIPES[name]
    torch.manual_seed(0)
    pipe = TINY[name](tiny_vae)
    denoiser = getattr(pipe, recipe.trained[0])
    before = {k: v.clone() for k, v in denoiser.state_dict().items()}
    folder = export.export(pipe, tmp_path / "model", recipe.settings, {"samples": 0, "seconds": 0})
    assert all(torch.equal(v, before[k]) for k, v in denoiser.state_dict().items())
    loaded = DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    assert type(loaded) is type(pipe)
    assert {getattr(loaded, part).dtype for part in (*recipe.trained, "vae")} == {torch.float32}
    assert not (tmp_path / "model.tmp").exists()
    kept = json.loads((folder / "attnctrl.json").read_text())
    assert kept == {**recipe.settings, "training": {"samples": 0, "seconds": 0}}

    def draw(one) -> np.ndarray:
        one.set_progress_bar_config(disable=True)
        return Runner.of(one, {**kept, "size": (32, 32), "steps": 2}).draw(["a red circle"], [0])[0].astype(float)

    assert np.abs(draw(loaded) - draw(pipe)).max() <= 5


def test_tokens_and_latents_are_each_others_inverse() -> None:
    latents = torch.randn(2, 16, 6, 10, generator=torch.Generator().manual_seed(0))
    tokens = data.pack(latents)
    assert torch.equal(data.unpack(tokens, (3, 5)), latents)
    # token (1, 2) holds the latents of rows 2 and 3, columns 4 and 5
    assert torch.equal(tokens[:, 1 * 5 + 2].view(2, 16, 2, 2), latents[:, :, 2:4, 4:6])


def test_velocity_gives_back_clean_and_noise() -> None:
    """x0 = sqrt(a) x - sqrt(1 - a) v, noise = sqrt(1 - a) x + sqrt(a) v; the last level holds no signal at all."""
    pipe = SimpleNamespace(scheduler=sd.ddim_scheduler())
    noise = v_prediction(pipe)
    generator = torch.Generator().manual_seed(0)
    clean, random = torch.randn(2, 64, 8, 4, generator=generator).unbind(0)
    times = noise.times(64, generator)
    assert 0 <= times.min() <= times.max() <= 999
    times[0] = 999
    kept = pipe.scheduler.alphas_cumprod[times.long()][:, None, None]
    x, v = noise.mix(clean, random, times), noise.target(clean, random, times)
    torch.testing.assert_close(kept.sqrt() * x - (1 - kept).sqrt() * v, clean)
    torch.testing.assert_close((1 - kept).sqrt() * x + kept.sqrt() * v, random)
    assert torch.equal(x[0], random[0])
    assert torch.equal(v[0], -clean[0])


def test_the_sampler_of_toy_sd_inverts_its_noise() -> None:
    """DDIM with the true velocity of one picture ends at the picture, from pure noise in five steps."""
    scheduler = sd.ddim_scheduler()
    target = v_prediction(SimpleNamespace(scheduler=scheduler)).target
    generator = torch.Generator().manual_seed(0)
    clean, random = torch.randn(2, 1, 8, 4, generator=generator).unbind(0)
    scheduler.set_timesteps(5)
    x = random
    for t in scheduler.timesteps:
        x = scheduler.step(target(clean, random, t[None].float()), int(t), x).prev_sample
    torch.testing.assert_close(x, clean, atol=1e-4, rtol=1e-4)
