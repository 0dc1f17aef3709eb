"""The table of guests: what else may be on a model while controls are, how it is put there, and what is checked."""

from __future__ import annotations

import guest_caches as caches
import guest_checks as check
import guest_guiders as guiders
import guest_kinds as kinds
import torch
from guest_checks import Guest

COMPILED_BLOCKS = "torch.compile of repeated blocks"
NO_BLOCKS = {"sd3": "diffusers names no repeated blocks for it"}
NO_CONTEXT = dict.fromkeys(("sd3", "unet"), "diffusers' caches of blocks are not made for it")
NO_LORA = {"pixart": "diffusers' class takes no LoRA"}
OWN_KERNEL = ("sd3", "unet", "auraflow", "cogview4", "pixart", "cogvideox", "lumina2", "sana")
NO_CHECKPOINTS = {"hunyuan-image": "diffusers' refiner fails under it"}
NO_DISPATCH = "its processors call PyTorch's kernel themselves"

UNTOUCHED = "nothing is controlled in the layers that it perturbs or leaves out; all others are"
NO_SCORES = dict.fromkeys(
    (
        *("flux", "sd3", "flux2", "chroma", "auraflow", "lumina2", "wan", "wan-i2v", "ltx"),
        *("cogvideox", "hunyuan-video", "sana"),
    ),
    "diffusers takes no scores from its processors",
)
NO_SKIPPING = {
    **dict.fromkeys(
        ("flux", "sd3", "qwen"), "diffusers gives image and text on in the wrong order where it skips a block"
    ),
    **dict.fromkeys(("chroma", "zimage", "auraflow", "lumina2", "sana"), "diffusers cannot skip its blocks"),
}

NO_HALVES = "diffusers' FasterCache fails on its outputs, which are no pictures"
NO_FASTER = "diffusers finds none of its layers"
CACHED = "layers that the cache skips keep what they gave under the same controls; it is emptied where those change"
HALVES = "controls with branch='all' act"

EVERYWHERE: dict[str, Guest] = {
    "LoRA loaded": Guest(kinds.once(kinds.lora), absent=NO_LORA),
    "LoRA fused": Guest(kinds.once(kinds.fused_lora), absent=NO_LORA),
    "bfloat16": Guest(kinds.nothing, options={"dtype": torch.bfloat16}),
    "CPU offload (accelerate)": Guest(kinds.once(kinds.cpu_offload)),
    "group offload": Guest(kinds.once(kinds.group_offload)),
    "fp8 layerwise casting": Guest(kinds.once(kinds.fp8)),
    "another attention backend": Guest(
        kinds.math_backend, backend="_native_math", absent=dict.fromkeys(OWN_KERNEL, NO_DISPATCH)
    ),
    "the user's forward hooks": Guest(kinds.once(kinds.user_hooks)),
    "gradient checkpointing, no gradients": Guest(kinds.once(kinds.checkpointing), absent=NO_CHECKPOINTS),
    "gradient checkpointing, with gradients": Guest(
        kinds.once(kinds.checkpointing), check.refused("no_grad"), gradients=True, absent=NO_CHECKPOINTS
    ),
    "a guider's perturbed attention": Guest(
        guiders.put(guiders.perturbing), guiders.left_alone(guiders.perturbing), note=UNTOUCHED, absent=NO_SCORES
    ),
    "a guider's skipped layers": Guest(
        guiders.put(guiders.skipping), guiders.left_alone(guiders.skipping), note=UNTOUCHED, absent=NO_SKIPPING
    ),
}
"""Guests that every family of the battery meets."""

GUESTS: dict[str, Guest] = {
    **EVERYWHERE,
    "float16": Guest(kinds.nothing, options={"dtype": torch.float16}),
    "fused qkv projections": Guest(
        kinds.once(lambda setting: setting.model.fuse_qkv_projections()),
        absent={"sd3": "diffusers' own fused processor fails on the dual layers of SD3.5"},
    ),
    "ControlNet residuals": Guest(kinds.once(kinds.residuals)),
    "IP-Adapter": Guest(kinds.ip_adapter, note="its own kernel calls stay untouched"),
    "bmm and sliced processors": Guest(
        kinds.once(kinds.slow_processors),
        note="AttnProcessor2_0 stands in for them in the forwards in which controls act",
        absent=dict.fromkeys(("flux", "sd3"), "they are not made for its layers"),
    ),
    "a second attachment": Guest(kinds.nothing, check.nested, note="the stacks act together and leave in any order"),
    f"{COMPILED_BLOCKS}, then attached": Guest(kinds.compiled_blocks, absent=NO_BLOCKS),
    f"attached, then {COMPILED_BLOCKS}": Guest(kinds.compiled_blocks, check.acts_before, absent=NO_BLOCKS),
    "torch.compile of the whole model, then attached": Guest(kinds.compiled),
    "attached, then torch.compile of the whole model": Guest(
        kinds.compiled, check.refused("torch.compile.model. first", before=True)
    ),
    "pyramid attention broadcast": Guest(caches.put(caches.pyramid()), caches.cached, note=CACHED),
    "FasterCache, batch kept whole": Guest(
        caches.put(caches.faster(is_guidance_distilled=True)),
        caches.cached,
        note=CACHED,
        absent={"unet": NO_FASTER},
    ),
    "FasterCache, without the other half": Guest(
        caches.put(caches.faster(), rows=2),
        caches.refuses_halves,
        note=HALVES,
        absent={"unet": NO_FASTER, "flux": NO_HALVES},
    ),
    "first-block cache": Guest(caches.put(caches.first_block), caches.cached, note=CACHED, absent=NO_CONTEXT),
    "TaylorSeer cache": Guest(caches.put(caches.taylor), caches.cached, note=CACHED, absent=NO_CONTEXT),
    "MagCache": Guest(caches.put(caches.magnitude), caches.cached, note=CACHED, absent=NO_CONTEXT),
    "diffusers' own PAG": Guest(
        caches.perturbed,
        caches.refuses_split_batches,
        note="in its own layers; controls whose `layers` leave them out act",
        absent={"flux": "diffusers has none for it"},
    ),
}
