"""Objectives by name, and the pairs that they are measured on.

    toybox           share of the toy world's told subjects that are there: "binding" of `attnctrl eval guidance`
    toybox-fidelity  share of all that is told: shapes, colours, the ground
    clip             torchmetrics' CLIP score (extra `heads`; the weights are fetched at first use)
    unclipped        share of the pixels' channels that are neither 0 nor 1: a guard against oversaturation
    MODULE:FUNCTION  any callable that can be imported: (images [B, 3, h, w] in [0, 1], prompts) -> B numbers

The last is code that runs: it is taken from the command line and from callers alone, never from a file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any, Literal

from torch import Tensor

from ..errors import ControlError
from .sampler import Pair
from .scores import Objective

__all__ = ["objective_of", "pairs_of_prompts", "toybox_pairs"]

Score = Callable[[Tensor, Sequence[str]], Any]
Split = Literal["tune", "test"]
CLIP = "openai/clip-vit-base-patch16"
_TASKS = 4096
"""Tasks among which the prompts of the toy world are looked up."""


def objective_of(text: str) -> Objective:
    """The objective called "NAME" or "NAME=WEIGHT".

    Raises:
        ControlError: there is none, what it needs is not installed, or the weight is no number.
    """
    name, equals, weight = text.partition("=")
    try:
        value = float(weight) if equals else 1.0
    except ValueError:
        raise ControlError(f"An objective is NAME or NAME=WEIGHT; found {text!r}, whose weight is no number.") from None
    if name in _NAMED:
        return Objective(name, _NAMED[name](), value)
    if ":" in name:
        return Objective(name, _imported(name), value)
    raise ControlError(f"There is no objective {name!r}; there are {', '.join(_NAMED)}, and MODULE:FUNCTION.")


def pairs_of_prompts(prompts: Sequence[str], seeds: int, first: int = 0) -> list[Pair]:
    """`seeds` pictures of each prompt, all of seeds of their own: first, first + 1, ..."""
    listed = [(prompt, number) for number in range(seeds) for prompt in prompts]
    return [Pair(prompt, first + place) for place, (prompt, _) in enumerate(listed)]


def toybox_pairs(count: int, split: Split = "tune") -> list[Pair]:
    """Prompts of the toy world with told subjects; searches take those of "tune", confirmations those of "test"."""
    from ..toybox.suites_guidance import GUIDANCE

    return [Pair(task.prompt, seed) for task, seed in (GUIDANCE.task(split, index) for index in range(count))]


def _toybox(metric: Literal["binding", "fidelity"]) -> Score:
    from ..toybox.suites_guidance import GUIDANCE, Task

    def binding(task: Task, images: Any) -> float:
        return GUIDANCE.values(task, images, images)["binding"]

    read = {"binding": binding, "fidelity": GUIDANCE.fidelity}[metric]
    tasks: dict[str, Task] = {}
    looked = {"tune": 0, "test": 0}

    def task_of(prompt: str) -> Task:
        # tasks are drawn as they are asked for, those of both splits in turn
        while prompt not in tasks and looked["test"] < _TASKS:
            split: Split = "tune" if looked["tune"] == looked["test"] else "test"
            task, _ = GUIDANCE.task(split, looked[split])
            looked[split] += 1
            tasks.setdefault(task.prompt, task)
        if prompt not in tasks:
            raise ControlError(
                f"Objectives of the toy world know its own prompts, and {prompt!r} is none of them. Leave the "
                "prompts out, or take another objective."
            )
        return tasks[prompt]

    def score(images: Tensor, prompts: Sequence[str]) -> list[float]:
        pixels = (images.movedim(1, -1) * 255).round().byte().cpu().numpy()
        return [read(task_of(prompt), [image]) for image, prompt in zip(pixels, prompts, strict=True)]

    return score


def _clip() -> Score:
    try:
        multimodal: Any = import_module("torchmetrics.multimodal.clip_score")
    except ImportError as error:
        raise ControlError(
            "Objective 'clip' needs torchmetrics and transformers: pip install 'attnctrl[heads]'."
        ) from error
    metric = multimodal.CLIPScore(model_name_or_path=CLIP)

    def score(images: Tensor, prompts: Sequence[str]) -> list[float]:
        found = []
        for image, prompt in zip((images * 255).round().byte(), prompts, strict=True):
            metric.reset()
            found.append(float(metric(image, prompt)))
        return found

    return score


def _unclipped() -> Score:
    return lambda images, prompts: ((images > 0) & (images < 1)).float().mean((1, 2, 3))


def _imported(name: str) -> Score:
    module, _, function = name.partition(":")
    try:
        found: Any = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ControlError(f"Objective {name!r} cannot be imported: {error}. Write MODULE:FUNCTION.") from error
    if not callable(found):
        raise ControlError(f"Objective {name!r} is no function; found {type(found).__name__}.")
    score: Score = found
    return score


_NAMED: Mapping[str, Callable[[], Score]] = {
    "toybox": partial(_toybox, "binding"),
    "toybox-fidelity": partial(_toybox, "fidelity"),
    "clip": _clip,
    "unclipped": _unclipped,
}
