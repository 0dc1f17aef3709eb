"""Model families: what the engine must be told about a model, as data. One short file each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ..content import Standing
from ..errors import LayoutError, UnsupportedModelError
from ..layout import Frame, Frames, Layout, Measures, Slots
from ..rotary import Rotary
from ..select import Layer, Presets
from .reader import Reader

__all__ = [
    "IMAGE_TEXT",
    "TEXT_IMAGE",
    "Arguments",
    "Carrier",
    "Family",
    "Reader",
    "Text",
    "all_families",
    "append_to",
    "as_given",
    "at_zero",
    "crossed",
    "encode_alone",
    "family_of",
    "insert",
    "joint",
    "noisiest",
    "sizes_of",
    "spread",
    "stacks",
    "still",
    "text_limit",
]

Arguments = dict[str, Any]
Text = Tensor | Sequence[Tensor]
"""Encoded prompts: [B, tokens, channels], or [tokens, channels] per row."""

TEXT_IMAGE = ("encoder_hidden_states", "hidden_states")
IMAGE_TEXT = ("hidden_states", "encoder_hidden_states")
"""What joint blocks return."""


class Carrier(list):
    """A list among a model's arguments that carries more, as attributes, on its way to where the model uses it.

    Offloading hooks rebuild lists when they move arguments to a device, unless these move themselves.
    """

    def to(self, *args: Any, **kwargs: Any) -> Carrier:
        """The same on another device."""

        def moved(value: Any) -> Any:
            return value.to(*args, **kwargs) if isinstance(value, Tensor) else value

        made = type(self)(map(moved, self))
        vars(made).update({name: moved(value) for name, value in vars(self).items()})
        return made


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: short name, for reports.
        models: class names of the denoisers that belong to it.
        layers: (model) -> all attention layers, in forward order.
        measure: (model, arguments of a forward) -> what it is given; one per row where rows are packed by themselves.
        arrange: (model, measures) -> the frames of its layers.
        pixels_per_token: side of the square of pixels that one image token stands for, with the usual autoencoder.
        timestep: arguments -> timesteps of the rows, Tensor [B], in the unit of the scheduler's `timesteps`.
        encode: (pipeline, prompt) -> [tokens, channels], the prompt encoded by itself.
        count: (pipeline, prompt) -> the number of tokens `encode` will give.
        append_text: (arguments, texts [B, tokens, channels]) -> arguments whose text sequence ends with the given
            texts.
        branches: guidance branches of one step in the order of their forwards.
        batch: guidance branches of one step in the order of their rows, for families whose pipelines run them as one
            batch; () for those that run one forward per branch.
        presets: named layer selectors, as functions of {stack: number of blocks}. Every family has "shared", the layers
            in which pictures of a set read each other; all of them, unless it says otherwise.
        position: (arguments, slots) -> arguments with positions for the texts that will be appended, which take these
            slots: each stands where it would stand alone. None where texts do not care where they stand.
        shadows: methods of the model or its parts, by dotted name, and the functions that stand in for them while
            controls are on it: called with the method itself and its arguments.
        hidden: name of the argument that holds the latents, batch first.
        prompt: name of the argument that holds the encoded prompts.
        watch: names of further arguments that `measure` looks into; it is asked again when they are other objects.
        sigma: timestep -> noise level, without a scheduler; None where only the scheduler knows.
        readers: tokenizers whose tokens stand in the text sequence, in its order; () where words cannot be found in it.
        rotary: model -> how queries and keys of image tokens turn with their positions; None where they do not, or not
            in steps of whole tokens.
        lists: attributes of the model that hold its blocks, in forward order, a list of them or one; () are those that
            its layers stand in. A block hands on to the next one.
        read_later: those lists of whose blocks each output is read again, far behind them.
        parts: a block or a part of one -> names within it of the parts that it calls, in that order; () where it is not
            worth parting.
        corner: (model, frames of a forward) -> where the first image token stands, by the axes of `rotary`; () where
            tokens do not turn. None where that is not known.
        returns: by stack, those arguments of a block's forward that have the form of what it returns, in its order;
            others take and return `hidden_states`.
        fused: stacks whose attention modules hold the feed-forward as well.
        table: name of the module that makes image tokens of latents and adds to each its entry of a table of positions;
            "" where positions are not added to the picture, or not only there.
        beyond: what a pipeline's guidance_scale lacks to s of u + s (c - u).
    """

    name: str
    models: tuple[str, ...]
    layers: Callable[[nn.Module], tuple[Layer, ...]]
    measure: Callable[[nn.Module, Arguments], Measures | Sequence[Measures]]
    arrange: Callable[[nn.Module, Measures], Frames]
    pixels_per_token: int
    timestep: Callable[[Arguments], Tensor]
    encode: Callable[[Any, str], Tensor]
    count: Callable[[Any, str], int]
    append_text: Callable[[Arguments, Tensor], Arguments]
    branches: tuple[str, ...] = ("cond", "uncond")
    batch: tuple[str, ...] = ()
    presets: Presets = field(default_factory=dict)
    position: Callable[[Arguments, Slots], Arguments] | None = None
    shadows: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    hidden: str = "hidden_states"
    prompt: str = "encoder_hidden_states"
    watch: tuple[str, ...] = ()
    sigma: Callable[[float], float] | None = None
    readers: tuple[Reader, ...] = ()
    rotary: Callable[[Any], Rotary] | None = None
    lists: tuple[str, ...] = ()
    read_later: tuple[str, ...] = ()
    parts: Callable[[nn.Module], Sequence[str]] = lambda block: ()
    corner: Callable[[Any, Frames], tuple[float, ...]] | None = None
    returns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fused: tuple[str, ...] = ()
    table: str = ""
    beyond: float = 0.0

    def standing(self, model: Any) -> Standing:
        """How the image tokens of a model turn with their places."""
        rotary = None if self.rotary is None else self.rotary(model)
        return Standing(rotary, None if self.corner is None else partial(self.corner, model))

    def __post_init__(self) -> None:
        object.__setattr__(self, "presets", {"shared": lambda counts: "all", **self.presets})

    def text(self, arguments: Arguments) -> Text:
        """The encoded prompts of a forward."""
        return arguments[self.prompt]

    def frames(self, model: nn.Module, arguments: Arguments) -> tuple[Frames, ...]:
        """The frames of a forward: one for all rows, or one per row."""
        measures = self.measure(model, arguments)
        rows = (measures,) if isinstance(measures, Measures) else measures
        return tuple(replace(self.arrange(model, row), corner=row.corner) for row in rows)


def sizes_of(value: Text) -> tuple[Any, ...]:
    """Sizes of the rows of a tensor or a list, which decide the layout; None for rows that are no tensors."""
    return tuple(value.shape[1:]) if isinstance(value, Tensor) else tuple(getattr(row, "shape", None) for row in value)


def still(model: Any, frames: Frames) -> tuple[float, ...]:
    """Of models whose tokens do not turn: positions are added to the picture before the first block."""
    return ()


def as_given(model: Any, frames: Frames) -> tuple[float, ...]:
    """Of models that are given places with each forward; they count from zero where nothing was run yet."""
    return frames.corner or (0.0,) * len(model.config.axes_dims_rope)


def at_zero(model: Any, frames: Frames) -> tuple[float, ...]:
    """Of models that count from zero on three axes."""
    return (0.0, 0.0, 0.0)


def stacks(*parts: tuple[str, str, str, str]) -> Callable[[nn.Module], tuple[Layer, ...]]:
    """Layers of lists of blocks: (stack, attribute that holds the blocks, attention within a block, frame).

    Parts that name the same blocks are walked together, block by block.
    """

    def find(model: nn.Module) -> tuple[Layer, ...]:
        found = []
        for blocks in dict.fromkeys(attribute for _, attribute, _, _ in parts):
            for index, block in enumerate(getattr(model, blocks)):
                for stack, attribute, inside, frame in parts:
                    module = getattr(block, inside, None) if attribute == blocks else None
                    if module is not None:
                        found.append(Layer(f"{blocks}.{index}.{inside}", stack, index, module, frame))
        return tuple(found)

    return find


def spread(chosen: Sequence[int], depth: int, counts: Mapping[str, int], *stacks: str) -> tuple[str, ...]:
    """The selector of blocks that were chosen in a model of `depth` blocks, counted through these stacks; of a model of
    another depth the blocks at the same parts of it."""
    total = sum(counts[stack] for stack in stacks)
    places = sorted({round(one * (total - 1) / (depth - 1)) for one in chosen})
    found, begin = [], 0
    for stack in stacks:
        mine = [str(place - begin) for place in places if begin <= place < begin + counts[stack]]
        found += [f"{stack}:{','.join(mine)}"] if mine else []
        begin += counts[stack]
    return tuple(found)


def joint(*order: str, registers: int = 0) -> Callable[[nn.Module, Measures], Frames]:
    """One frame, "joint": all tokens in one sequence, their kinds in the given order."""

    def arrange(model: Any, measures: Measures) -> Frames:
        return Frames.of(joint=Frame.joint(Layout.of(order=order, registers=registers, **vars(measures))))

    return arrange


def crossed(model: Any, measures: Measures) -> Frames:
    """Two frames: "self", the image alone; "cross", the image reads the text."""
    image = Layout.of(order=("image",), **vars(measures))
    return Frames.of(self=Frame.joint(image), cross=Frame(image, Layout.of(order=("text",), **vars(measures))))


def append_to(*masks: str) -> Callable[[Arguments, Tensor], Arguments]:
    """Appends to `encoder_hidden_states`, and ones to the key-padding masks [B, tokens] of these names, where given."""

    def append(arguments: Arguments, texts: Tensor) -> Arguments:
        prompt = arguments["encoder_hidden_states"]
        texts = texts.to(device=prompt.device, dtype=prompt.dtype)
        longer = {name: _with_ones(mask, texts) for name in masks if (mask := arguments.get(name)) is not None}
        return {**arguments, "encoder_hidden_states": torch.cat([prompt, texts], dim=1), **longer}

    return append


def insert(prompt: Tensor, texts: Tensor, mask: Tensor) -> Tensor:
    """`prompt` [B, tokens, ...] with `texts` [B, more, ...] between the real tokens and the padding of each row.

    `mask` [B, tokens] holds ones for the real tokens, which come first.
    """
    tokens, more = prompt.shape[1], texts.shape[1]
    place = torch.arange(tokens + more, device=prompt.device)
    behind = place - mask.sum(1, dtype=torch.int64)[:, None]
    source = torch.where(behind < 0, place, torch.where(behind < more, tokens + behind, place - more))
    rows = torch.arange(len(prompt), device=prompt.device)[:, None]
    return torch.cat([prompt, texts], dim=1)[rows, source]


def noisiest(arguments: Arguments) -> Tensor:
    """The timestep of each row: the highest where each token has its own, as those of a given first frame have 0."""
    timestep: Tensor = arguments["timestep"]
    return timestep.flatten(1).amax(1) if timestep.ndim > 1 else timestep


def _with_ones(mask: Tensor, texts: Tensor) -> Tensor:
    if mask.ndim != 2:
        raise LayoutError(f"A mask of the text must be [batch, tokens] to append to it; found {tuple(mask.shape)}.")
    return torch.cat([mask, mask.new_ones(mask.shape[0], texts.shape[1])], dim=1)


def encode_alone(count: Callable[[Any, str], int], **options: Any) -> Callable[[Any, str], Tensor]:
    """Encodes one prompt by itself: [tokens, channels], exactly the `count` tokens, without padding.

    Most pipelines run their encoder without a mask, so padding would carry the prompt as well and blur where a text
    ends. `options` are further arguments of the pipeline's `encode_prompt`.
    """

    @torch.no_grad()
    def encode(pipe: Any, prompt: str) -> Tensor:
        given = {"device": pipe._execution_device, "max_sequence_length": count(pipe, prompt), **options}
        return pipe.encode_prompt(prompt, do_classifier_free_guidance=False, **given)[0][0]

    return encode


def text_limit(pipe: Any) -> int:
    """The most text tokens that a pipeline's call reads unless it is told otherwise.

    Raises:
        UnsupportedModelError: where the call has no `max_sequence_length` with a number as its default.
    """
    told = signature(type(pipe).__call__).parameters.get("max_sequence_length")
    if told is None or not isinstance(told.default, int):
        raise UnsupportedModelError(
            f"The call of {type(pipe).__name__} has no max_sequence_length with a number as its default, so how many "
            "text tokens it reads is not known. Use the pipeline of diffusers that it derives from."
        )
    return told.default


def all_families() -> tuple[Family, ...]:
    """Every known family."""
    from .auraflow import AURAFLOW
    from .chroma import CHROMA
    from .cogvideox import COGVIDEOX
    from .cogview4 import COGVIEW4
    from .flux import FLUX
    from .flux2 import FLUX2
    from .hunyuan_image import HUNYUAN_IMAGE
    from .hunyuan_video import HUNYUAN_VIDEO
    from .ltx import LTX
    from .lumina2 import LUMINA2
    from .pixart import PIXART
    from .qwen import QWEN
    from .sana import SANA
    from .sd3 import SD3
    from .unet import UNET
    from .wan import WAN
    from .zimage import ZIMAGE

    images = (FLUX, SD3, UNET, FLUX2, QWEN, CHROMA, ZIMAGE, AURAFLOW, COGVIEW4, PIXART, SANA, LUMINA2, HUNYUAN_IMAGE)
    return (*images, WAN, LTX, COGVIDEOX, HUNYUAN_VIDEO)


def family_of(model: nn.Module) -> Family:
    """The family of a model.

    Raises:
        UnsupportedModelError: when there is none, with the known model classes.
    """
    families = all_families()
    names = {base.__name__ for base in type(model).__mro__}
    for family in families:
        if names & set(family.models):
            return family
    known = ", ".join(name for family in families for name in family.models)
    raise UnsupportedModelError(
        f"{type(model).__name__} is of no known family. Known models: {known}. A family file must say where its text "
        "and image tokens stand, its CFG order and its stacks of blocks."
    )
