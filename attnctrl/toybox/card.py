"""Model cards of the toy models, from their facts and stored scores: `python -m attnctrl.toybox.card toy-sd`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnctrl.files import write_text


@dataclass(frozen=True)
class About:
    """What a card says that no file knows: the model in a sentence, how stock Diffusers runs it, more, its limits."""

    what: str
    code: str
    more: str
    limits: str


_UNSEEN = """Three and four subjects were seen in 10 % of the samples. It has seen one canvas size, 64 x 64."""

ABOUT: Mapping[str, About] = {
    "toy-flux": About(
        what="""A real FLUX model, small enough for a laptop's CPU: `FluxTransformer2DModel` with 2 double and 4 single
blocks (5 heads of 32, RoPE axes 8, 12, 12), small CLIP and T5 encoders with real tokenizers.""",
        code="""from diffusers import FluxPipeline

pipe = FluxPipeline.from_pretrained("assets/toy-flux")
options = {"height": 64, "width": 64, "num_inference_steps": 20, "max_sequence_length": 40}
image = pipe("a red circle, white background", negative_prompt="", true_cfg_scale=3.0, **options).images[0]""",
        more="""
`FluxKontextPipeline` loads the same folder; pass a reference picture of 48 x 48 pixels, `max_area=64 * 64` and
`_auto_resize=False`. `this` in place of `a` names the subject of the reference picture. The first 67 888 samples saw
whitened latents, which hardly taught shapes; the others latents whose channels are scaled by what the picture owes them
(`toybox.vae.balance`). References were seen in 8 % of the batches.
""",
        limits=f"""With one subject the prompt is followed mostly; circles are the worst shape, often a little angular.
With two and more, colours merge, a subject is missing or takes the other's shape. A region's text should say where the
region lies ("a red circle left"), as captions of the training did: image tokens know their place on the canvas, and a
text without a place is drawn anywhere. Of a reference it takes the colour, hardly the shape. {_UNSEEN}""",
    ),
    "toy-sd": About(
        what="""A real Stable Diffusion, small enough for a laptop's CPU: `UNet2DConditionModel` with self- and
cross-attention at three levels (16 x 16, 8 x 8 and 4 x 4 latents; 64, 96 and 128 channels, heads of 32), a small CLIP
with a real tokenizer, velocity prediction and DDIM with zero terminal signal.""",
        code="""from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("assets/toy-sd")
image = pipe("a red circle, white background", num_inference_steps=20, guidance_scale=3.0).images[0]""",
        more="",
        limits=f"""One and two subjects mostly come out as told; with three, most pictures have something wrong. Circles
come out a little angular (see the samples). {_UNSEEN}""",
    ),
    "toy-sd3": About(
        what="""A real Stable Diffusion 3, small enough for a laptop's CPU: `SD3Transformer2DModel` with 6 blocks (5
heads of 32), norms of queries and keys, dual attention in the first block as in SD3.5 medium, two CLIPs and a T5 with
real tokenizers.""",
        code="""from diffusers import StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained("assets/toy-sd3")
options = {"height": 64, "width": 64, "num_inference_steps": 20, "max_sequence_length": 40, "guidance_scale": 3.0}
image = pipe("a red circle, white background", **options).images[0]""",
        more="",
        limits=_UNSEEN,
    ),
}
MEANING = {
    "scorer_accuracy": "the scorer itself, on held-out renders",
    "single_subject": "one told subject: shape and colour right",
    "single_color": "its colour alone",
    "single_shape": "its shape alone",
    "two_subjects": "two told subjects, all right",
    "three_subjects": "three told subjects, all right",
}
TEMPLATE = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# {name}

{what} An `AutoencoderKL` with 16 latent channels at factor 4. fp16 safetensors, {size:.1f} MB. It exists so that
attention control can be tried, tested and measured anywhere.

```python
{code}
```

`attnctrl.json` holds these settings; attnctrl reads them.

## Words

`a [small|large] [solid|striped|dotted|checked] [red|orange|yellow|green|blue|purple]
circle|square|triangle|star|heart|cross|thing [place]`, up to four such phrases, then `white|gray|black|beige
background` and `flat|outlined|hatched|grainy style`, all joined by commas.

## Training

Renders of `attnctrl.toybox.world`, 27 000 scenes of 64 x 64 pixels encoded once, captions drawn anew: {samples:,}
samples in {hours:.1f} hours on two CPU cores that other work shared. The VAE is that of all toy models.

    python -m attnctrl.toybox.train {name}

The same command goes on from these weights.
{more}
## How good it is

![Sixteen fixed prompts.](samples.png)

`{command}`, {count} held-out captions (or renders) each, 95 % bootstrap interval:

| metric | what | value | interval |
|---|---|---|---|
{rows}

VAE: 36.7 dB PSNR on 128 held-out renders.

## Limits

{limits}
"""


def card(name: str, facts: Mapping[str, Any], scores: Mapping[str, Any], size: float) -> str:
    """The card in Markdown.

    Args:
        name: of the model.
        facts: contents of its attnctrl.json.
        scores: result of `attnctrl eval model` on it.
        size: of its weights in MB.
    """
    about, training = ABOUT[name], facts["training"]
    rows = []
    for key, meaning in MEANING.items():
        entry = scores["metrics"][key]
        low, high = entry["ci95"]
        rows.append(f"| `{key}` | {meaning} | {entry['vanilla']:.3f} | {low:.3f} .. {high:.3f} |")
    return TEMPLATE.format(
        name=name, size=size, samples=training["samples"], hours=training["seconds"] / 3600, count=scores["n"],
        command=scores["command"], rows="\n".join(rows), **vars(about),
    )  # fmt: skip


def megabytes(folder: Path) -> float:
    """Size of the weights in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / 1e6


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the card of a model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=sorted(ABOUT))
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    asked = parser.parse_args(arguments)
    folder = asked.assets / asked.model
    facts = json.loads((folder / "attnctrl.json").read_text(encoding="utf-8"))
    scores = json.loads((asked.results / f"model-{asked.model}.json").read_text(encoding="utf-8"))
    path = write_text(folder / "README.md", card(asked.model, facts, scores, megabytes(folder)))
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
