"""Layouts in Python: subjects with boxes, masks and reference pictures, several layouts in one call of the pipeline.

pipe = LayoutPipeline.from_pretrained("toy-flux")
cat = Subject("a red circle", box=(0.05, 0.25, 0.45, 0.75), reference="cat.png")
pipe("a red circle and a blue square", [cat, Subject("a blue square", box=(0.55, 0.25, 0.95, 0.75))])[0].save("p.png")
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attnctrl.pipelines.base import NATIVE, PIPELINES, Progress, ScenePicture, Wrapper, stock_name
from attnctrl.pipelines.settings import entries_of, keys_of, per_text, seeds_of

from attnctrl.errors import AssetError, ControlError, LayoutError, SceneError, UnsupportedModelError
from attnctrl.scene import Scene
from attnctrl.scenefile import MAX_PICTURE_BYTES, FileRefused, SceneMemory, read_bounded

if TYPE_CHECKING:
    import torch

    from attnctrl.controls import Control
    from attnctrl.phrases import TextEncoding
    from attnctrl.region import Overlap, Region

__all__ = ["LayoutPipeline", "Subject"]

_SIDE = 512  # rows and columns on which the place of subjects without one is drawn
_WITHOUT = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline")


@dataclass(frozen=True, eq=False)
class Subject:
    """One thing in the picture.

    Attributes:
        prompt: what it is, in words.
        box: (x0, y0, x1, y1) as shares of width and height in [0, 1].
        mask: instead of a box, its place: PIL picture, path, array or tensor [H, W]; lighter than half is inside.
        reference: picture of what it looks like, PIL or path. With neither box nor mask, its place is what no box and
            no mask of the layout covers.
        strength: in [0, 1]; 0 is not there.
        negative_prompt: what guidance moves away from in its place, instead of the whole picture's.
        name: in reports and errors.
    """

    prompt: str
    box: Sequence[float] | None = None
    mask: Any = None
    reference: Any = None
    strength: float = 1.0
    negative_prompt: str = ""
    name: str | None = None


class LayoutPipeline(Wrapper):
    """Draws layouts on a pipeline, the user's own or one loaded by name. The pipeline stays what it is."""

    runs_on = (*PIPELINES, *NATIVE)

    def __call__(
        self,
        prompt: str | Sequence[str],
        subjects: Sequence[Subject] | Sequence[Sequence[Subject]] = (),
        background: str | Sequence[str | None] | None = None,
        negative_prompt: str | Sequence[str] = "",
        *,
        preset: str | None = None,
        controls: Sequence[Control] | Callable[[list[list[Region]]], Sequence[Control]] | None = None,
        overlap: Overlap = "union",
        text_encoding: TextEncoding = "auto",
        reference_positions: Literal["corner", "region", "apart"] = "corner",
        reference_pixels: int | None = None,
        width: int | None = None,
        height: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        true_cfg_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seeds: int | Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> list[ScenePicture]:
        """Pictures of one layout, or of several in one batch: those of the first prompt, then those of the second.

        Args:
            prompt: the whole picture, in words; or one per layout, then with one list of subjects each.
            subjects: what stands where.
            background: what is outside all boxes and masks; one text for all layouts, or one for each.
            negative_prompt: what guidance moves away from; one for all, or one for each.
            preset: name of a stack of controls, see `attnctrl.presets`; if left out, "references" where subjects have
                some, else "layout", or "texts" on UNets, whose coarse levels isolation hurts, or "emphasis" on SD3 (see
                docs/layout.md).
            controls: instead of a preset: a list (its `Regions` hold what they hold), or a function of the regions of
                each layout; [] for none.
            overlap: what becomes of tokens in several places, for presets.
            text_encoding: of subjects and background: "joint", they are words of the prompt, encoded with it;
                "separate", each is encoded by itself; "auto", words of the prompt where it holds them.
            reference_positions, reference_pixels: see `attnctrl.pipelines.with_references`.
            width, height, num_inference_steps, guidance_scale, true_cfg_scale: the model's own where left out.
            num_images_per_prompt: pictures of each layout.
            generator: gives the seeds of the pictures; a list gives one of each.
            seeds: of the pictures: the first, from which they count up (0 if left out), or all of them.
            progress: called after every step with (steps done, steps in all).

        Raises:
            SceneError: a layout asks for what cannot be, or for what the model cannot do.
            AssetError: a mask or reference cannot be read.
            ControlError: an unknown preset, or numbers of things that do not fit together.
        """
        from attnctrl.presets import against, default_preset

        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        layouts = _per_prompt(subjects, len(prompts), "subjects", Subject, isinstance(prompt, str))
        grounds = per_text(background, len(prompts), "background")
        negatives = per_text(negative_prompt, len(prompts), "negative_prompt")
        common = {
            **keys_of(width, height, num_inference_steps, guidance_scale, true_cfg_scale),
            "text_encoding": text_encoding,
            "reference_positions": reference_positions,
            "reference_pixels": reference_pixels,
        }
        scenes = [
            scene_of(
                {**common, "prompt": text, "negative_prompt": negative or "", "background": ground}, own, f"layout {i}"
            )
            for i, (text, own, ground, negative) in enumerate(zip(prompts, layouts, grounds, negatives, strict=True))
        ]
        self.check_texts(scenes)
        if any(scene.references() for scene in scenes) and stock_name(self.pipe, _WITHOUT):
            able = ", ".join(name for name in self.runs_on if name not in _WITHOUT)
            raise UnsupportedModelError(
                f"reference: {type(self.pipe).__name__} follows no reference picture; leave references out, or load "
                f"one of {able}."
            )
        regions = [self.regions(scene) for scene in scenes]
        shown = any(region.reference is not None for own in regions for region in own)
        preset = preset or ("references" if shown else default_preset(self.pipe))
        acting = _controls(preset, regions, overlap) if controls is None else _given(controls, regions)
        scenes = [
            scene.replace(controls=entries_of(_controls(preset, [own], overlap) if controls is None else acting))
            if own
            else scene
            for scene, own in zip(scenes, regions, strict=True)
        ]
        if acting:
            acting += against(regions)
        numbers = seeds_of(seeds, generator, len(prompts), num_images_per_prompt)
        return self.draw(scenes, numbers, acting, bool(acting), progress)


def scene_of(keys: dict[str, Any], subjects: Sequence[Subject], label: str) -> Scene:
    """The layout as a scene, with its masks and references as files in memory."""
    from attnctrl.sceneplaces import outside_of

    files: dict[str, bytes] = {}
    entries, masks = [], []
    for i, subject in enumerate(subjects):
        where = f"{label}, subjects[{i}]"
        entry: dict[str, Any] = {
            key: getattr(subject, key) for key in ("prompt", "name", "strength", "negative_prompt")
        }
        if subject.box is not None:
            entry["box"] = [float(value) for value in subject.box]
        if subject.mask is not None:
            masks.append((i, _mask(subject.mask, f"{where}.mask")))
            entry["mask"], files[f"mask-{i}.png"] = f"mask-{i}.png", _png(masks[-1][1])
        if subject.reference is not None:
            entry["reference"], files[f"reference-{i}.png"] = f"reference-{i}.png", _file(subject.reference, where)
        entries.append(entry)
    if loose := [entry for entry in entries if "reference" in entry and not {"box", "mask"} & entry.keys()]:
        places = [*(tuple(one["box"]) for one in entries if "box" in one), *(_array(mask) for _, mask in masks)]
        rest = outside_of(places, (keys["height"] or _SIDE, keys["width"] or _SIDE))
        if not rest.any():
            raise SceneError(
                f"{label}: '{loose[0]['prompt']}' has a reference and no place, and boxes and masks leave none; give "
                "it a box, or make room."
            )
        files["outside.png"] = _png(_picture_of(rest))
        for entry in loose:
            entry["mask"] = "outside.png"
    return Scene.from_dict({**keys, "subjects": entries}, SceneMemory(files), label)


def _mask(mask: Any, label: str) -> Any:
    """A mask as a grey picture."""
    import numpy as np
    from PIL import Image

    if isinstance(mask, (str, Path)):
        return _opened(_bytes(mask, label), label).convert("L")
    if isinstance(mask, Image.Image):
        return mask.convert("L")
    from attnctrl.region import Region

    try:
        share = Region(mask=mask, name=label).mask
    except LayoutError as error:
        raise SceneError(str(error)) from error
    return Image.fromarray((np.asarray(share) * 255).round().astype(np.uint8))


def _array(mask: Any) -> Any:
    import numpy as np

    return np.asarray(mask) >= 128


def _picture_of(inside: Any) -> Any:
    import numpy as np
    from PIL import Image

    return Image.fromarray(inside.astype(np.uint8) * 255)


def _opened(data: bytes, label: str) -> Any:
    from attnctrl.scenefile import decode_picture

    try:
        return decode_picture(data)
    except FileRefused as error:
        raise AssetError(f"{label}: {error}; {error.remedy}.") from error


def _bytes(path: str | Path, label: str) -> bytes:
    try:
        return read_bounded(Path(path), MAX_PICTURE_BYTES)
    except FileRefused as error:
        raise AssetError(f"{label}: {error}; {error.remedy}.") from error


def _file(picture: Any, label: str) -> bytes:
    """A reference as the bytes of a picture file."""
    from attnctrl.pipelines.references import load_reference

    if isinstance(picture, (str, Path)):
        data = _bytes(picture, f"{label}.reference")
        _opened(data, f"{label}.reference")
        return data
    return _png(load_reference(picture, f"{label}.reference"))


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _controls(preset: str, regions: list[list[Region]], overlap: Overlap) -> list[Control]:
    from attnctrl.presets import preset as stack_of

    stack = stack_of(preset, regions, overlap=overlap)
    return stack if any(regions) else []


def _given(controls: Any, regions: list[list[Region]]) -> list[Control]:
    from attnctrl.attach import as_controls

    return list(as_controls(controls(regions) if callable(controls) else controls))


def _per_prompt(values: Sequence[Any], count: int, name: str, kind: type, single: bool) -> list[list[Any]]:
    nested = [list(one) for one in values if not isinstance(one, kind)]
    if single and not nested:
        return [list(values)]
    if len(nested) != len(values) or len(nested) != count:
        raise ControlError(f"{count} prompts need {count} lists of {name}; found {len(values)} entries.")
    return nested
