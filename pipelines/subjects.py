"""One cast in several pictures: a rehearsal tells where its members are, then the pictures are drawn together.

pipe = MultiSubjectPipeline.from_pretrained("toy-sd")
cast = [Character("ball", "a red circle"), Character("box", "a blue square")]
story = pipe(cast, [Shot("{ball} left, white background"), Shot("{ball} right, {box} left, gray background")])
story.sheet().save("story.png")
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from attnctrl.pipelines.base import Progress, ScenePicture, Wrapper
from attnctrl.pipelines.cast import Character, Shot, resolve, told_by
from attnctrl.pipelines.settings import keys_of

from attnctrl.controls.reposition import UnmovedWarning
from attnctrl.errors import ControlError
from attnctrl.scene import MAX_SEED, Scene
from attnctrl.schedule import Window, window_from_json, window_to_json

if TYPE_CHECKING:
    from PIL import Image

    from attnctrl.controls import Control
    from attnctrl.region import Region
    from attnctrl.select import Selector

__all__ = ["Character", "MultiSubjectPipeline", "Rehearsal", "Shot", "Story"]

READING: Window = (0.3, 1.0)
"""When attention is read: the first steps know of no places yet."""
Segment = Callable[["Image.Image", Character], Any]
"""(picture, character) -> its mask [H, W], or None where it is not seen."""


@dataclass(frozen=True, eq=False)
class Rehearsal:
    """The plain pictures of shots, and where their characters are.

    Attributes:
        cast: all characters.
        shots: with the characters' descriptions in their prompts, who is there and their seeds filled in.
        scenes: the shots as documents.
        pictures: drawn without control.
        regions: of each shot, named by characters; those whose place is not known are not there.
        reading: the layers and the window in which attention was read; None with a segmenter.
    """

    cast: tuple[Character, ...]
    shots: tuple[Shot, ...]
    scenes: tuple[Scene, ...] = field(repr=False)
    pictures: tuple[ScenePicture, ...] = field(repr=False)
    regions: tuple[tuple[Region, ...], ...]
    reading: tuple[Selector, Window] | None = None

    def sheet(self, side: int = 256) -> Image.Image:
        """The pictures with the outlines of the regions."""
        return _sheet(self, [("rehearsal", self.pictures)], side)


@dataclass(frozen=True, eq=False)
class Story:
    """What was drawn.

    Attributes:
        rehearsal: of the same shots.
        pictures: of each shot.
        preset: name of the stack that acted, and its `options`.
        anchors: how many of the first pictures others read; new shots read these.
        first: the rehearsal of the shots that are read: this story's own, or those of the one that it goes on with.
    """

    rehearsal: Rehearsal
    pictures: tuple[ScenePicture, ...] = field(repr=False)
    preset: str
    options: Mapping[str, Any]
    anchors: int
    first: Rehearsal = field(repr=False)

    def sheet(self, side: int = 256) -> Image.Image:
        """The rehearsal with the regions, and the pictures."""
        return _sheet(self.rehearsal, [("rehearsal", self.rehearsal.pictures), ("story", self.pictures)], side)


class MultiSubjectPipeline(Wrapper):
    """Draws a cast in several scenes on a pipeline, the user's own or one loaded by name, which stays what it is.

    A run is `rehearse`, then `perform`; `more` goes on with new shots.
    """

    runs_on = ("FluxPipeline", "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline")

    def __call__(
        self,
        cast: Sequence[Character],
        shots: Sequence[Shot],
        *,
        preset: str = "subjects",
        options: Mapping[str, Any] | None = None,
        seed: int = 0,
        progress: Progress | None = None,
        **how: Any,
    ) -> Story:
        """The shots with one cast: `rehearse`, then `perform`.

        Args:
            cast, shots, seed, how: see `rehearse`.
            preset, options: see `perform`.
            progress: called after every step of both runs with (steps done, steps in all).
        """
        halves = _halves(progress)
        rehearsal = self.rehearse(cast, shots, seed=seed, progress=halves[0], **how)
        return self.perform(rehearsal, preset=preset, options=options, progress=halves[1])

    def rehearse(
        self,
        cast: Sequence[Character],
        shots: Sequence[Shot],
        *,
        negative_prompt: str = "",
        seed: int = 0,
        width: int | None = None,
        height: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        true_cfg_scale: float | None = None,
        segment: Segment | None = None,
        layers: Selector = None,
        window: Window = READING,
        progress: Progress | None = None,
    ) -> Rehearsal:
        """All shots by the plain model, and where each character is: in its box, where `segment` sees it, or where
        image tokens attend to its words (Otsu's threshold; a token in several belongs to the strongest).

        A character that is found nowhere is left out of that shot, one that fills the picture has all of it; both with
        a `MaskWarning`.

        Args:
            cast: each with a name of its own, and named by a shot at least.
            shots: at least one; they differ in prompts, places and seeds.
            negative_prompt: of all shots.
            seed: of the first shot without one; the next ones count up.
            width, height, num_inference_steps, guidance_scale, true_cfg_scale: the model's own where left out.
            segment: finds characters in pictures, instead of attention.
            layers, window: where and when attention is read.
            progress: called after every step.

        Raises:
            SceneError: shots and cast do not fit together, or the model cannot draw a shot.
        """
        keys = {
            **keys_of(width, height, num_inference_steps, guidance_scale, true_cfg_scale),
            "negative_prompt": negative_prompt,
        }
        return self._rehearsed(resolve(cast, shots, seed), tuple(cast), keys, segment, layers, window, progress)

    def perform(
        self,
        rehearsal: Rehearsal,
        *,
        preset: str = "subjects",
        options: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> Story:
        """The shots once more from the same noise, together, with controls on the regions of the rehearsal.

        Args:
            preset: one of `attnctrl.presets_sets.SETS`.
            options: of the preset; the others are those chosen for the model's family.
            progress: called after every step.

        Raises:
            ControlError: an unknown preset or option.
        """
        from attnctrl.presets import preset as stack_of
        from attnctrl.presets_sets import chosen_options

        names = [{region.name for region in own} for own in rehearsal.regions]
        chosen = chosen_options(preset, self.pipe, leading=names[0] >= set().union(*names))
        options = {**chosen, **(options or {})}
        acting = stack_of(preset, [list(own) for own in rehearsal.regions], **options) if _known(rehearsal) else []
        pictures = self._drawn(rehearsal, acting, preset, options, progress)
        anchors = _read_by_others(acting, len(rehearsal.shots))
        return Story(rehearsal, pictures, preset, options, anchors, rehearsal)

    def more(self, story: Story, shots: Sequence[Shot], *, seed: int = 0, progress: Progress | None = None) -> Story:
        """New shots with the cast of a story, in which it stays what it was.

        The pictures of the story that others read are drawn again in the batch: they read each other alone, so they
        stay what they are. This is where a bank of their keys and values would stand.

        Args:
            shots: name any of the cast.
            seed: as for `rehearse`.

        Raises:
            SceneError: as for `rehearse`.
        """
        from attnctrl.presets import preset as stack_of

        if not story.anchors:
            raise ControlError(
                "The story's pictures read nobody, so new ones have nobody to read. Draw it with shots that share a "
                "character."
            )
        halves = _halves(progress)
        first = story.first
        resolved = resolve(first.cast, shots, seed, whole=False)
        keys = first.scenes[0].to_dict()
        new = self._rehearsed(resolved, first.cast, keys, None, *(first.reading or (None, READING)), halves[0])
        read = slice(0, story.anchors)
        batch = Rehearsal(
            first.cast,
            first.shots[read] + new.shots,
            first.scenes[read] + new.scenes,
            first.pictures[read] + new.pictures,
            first.regions[read] + new.regions,
            first.reading,
        )
        options = {**story.options, "anchors": story.anchors}
        acting = stack_of(story.preset, [list(own) for own in batch.regions], **options)
        pictures = self._drawn(batch, acting, story.preset, options, halves[1])
        return replace(story, rehearsal=new, pictures=pictures[story.anchors :])

    def again(self, record: Mapping[str, Any], progress: Progress | None = None) -> ScenePicture:
        """The picture of a record (`attnctrl.provenance.read`), drawn again with its whole story.

        Raises:
            ControlError: the record is not one of a story, or a segmenter found its characters.
        """
        told = record.get("story")
        if not isinstance(told, Mapping) or not {"cast", "shots", "preset", "options", "reading", "shot"} <= set(told):
            raise ControlError("The record is not that of a picture of a story; draw it with ScenePipeline.")
        if told["reading"] is None:
            raise ControlError(
                "A segmenter found the characters of this story, and no record holds it. Rehearse with segment=... and "
                "perform again."
            )
        cast = tuple(Character(**one) for one in told["cast"])
        shots = resolve(cast, [Shot(**one) for one in told["shots"]], whole=False)
        halves, (layers, window) = _halves(progress), told["reading"]
        reading = layers, window_from_json(window)
        rehearsal = self._rehearsed(shots, cast, record["scene"], None, *reading, halves[0])
        story = self.perform(rehearsal, preset=told["preset"], options=told["options"], progress=halves[1])
        return story.pictures[told["shot"]]

    def _rehearsed(
        self,
        shots: tuple[Shot, ...],
        cast: tuple[Character, ...],
        keys: Mapping[str, Any],
        segment: Segment | None,
        layers: Selector,
        window: Window,
        progress: Progress | None,
    ) -> Rehearsal:
        from attnctrl.pipelines.masks import places

        from attnctrl.maps import record

        labels = [f"shot {number}" for number in range(len(shots))]
        scenes = tuple(
            Scene.from_dict({**keys, "prompt": shot.prompt}, label=label)
            for shot, label in zip(shots, labels, strict=True)
        )
        seeds = [[_seed(shot)] for shot in shots]
        read = {} if segment is not None else told_by(cast, shots)
        if not read:
            pictures = self.draw(scenes, seeds, [], False, progress)
            heats: dict[str, Any] = {}
        else:
            limit = self.settings(scenes[0]).max_sequence_length
            prompts = [shot.prompt for shot in shots]
            reading = record(self.pipe, read, prompt=prompts, layers=layers, window=window, max_sequence_length=limit)
            with reading as found:
                pictures = self.draw(scenes, seeds, [], False, progress)
            heats = {name: found[name] for name in read}
        regions = tuple(
            tuple(places(cast, shot, label, picture.image, segment, {name: heat[n] for name, heat in heats.items()}))
            for n, (shot, label, picture) in enumerate(zip(shots, labels, pictures, strict=True))
        )
        how = (layers, window) if segment is None else None
        return Rehearsal(cast, shots, scenes, tuple(pictures), regions, how)

    def _drawn(
        self,
        rehearsal: Rehearsal,
        acting: Sequence[Control],
        preset: str,
        options: Mapping[str, Any],
        progress: Progress | None,
    ) -> tuple[ScenePicture, ...]:
        """The pictures, whose records hold the story."""
        seeds = [[_seed(shot)] for shot in rehearsal.shots]
        with warnings.catch_warnings():
            # who is not in a picture is not read by it
            warnings.simplefilter("ignore", UnmovedWarning)
            pictures = self.draw(rehearsal.scenes, seeds, acting, bool(acting), progress)
        story = {
            "cast": [asdict(one) for one in rehearsal.cast],
            "shots": [
                {**asdict(shot), "boxes": {name: list(box) for name, box in shot.boxes.items()}}
                for shot in rehearsal.shots
            ],
            "preset": preset,
            "options": dict(options),
            "reading": rehearsal.reading and [rehearsal.reading[0], window_to_json(rehearsal.reading[1])],
        }  # fmt: skip
        return tuple(
            replace(picture, record={**picture.record, "story": {**story, "shot": number}})
            for number, picture in enumerate(pictures)
        )


def _seed(shot: Shot) -> int:
    return int(shot.seed or 0) % (MAX_SEED + 1)


def _known(rehearsal: Rehearsal) -> bool:
    """Somebody is somewhere, and there is more than one picture."""
    return len(rehearsal.shots) > 1 and any(rehearsal.regions)


def _read_by_others(acting: Sequence[Control], pictures: int) -> int:
    sharing = [one for one in acting if one.shares]
    return len({other for one in sharing for n in range(pictures) for other in one.reads(n, pictures)})


def _halves(progress: Progress | None) -> tuple[Progress | None, Progress | None]:
    """Progress of the first and of the second of two runs of equal length."""
    if progress is None:
        return None, None
    return (lambda done, total: progress(done, 2 * total)), (lambda done, total: progress(total + done, 2 * total))


def _sheet(rehearsal: Rehearsal, columns: Sequence[tuple[str, Sequence[ScenePicture]]], side: int) -> Image.Image:
    from attnctrl.pictures import draw_regions, enlarge, grid

    def shown(number: int, column: int) -> Image.Image:
        image = enlarge(columns[column][1][number].image, side)
        return draw_regions(image, rehearsal.regions[number]) if column == 0 else image

    rows = [[shown(number, column) for column in range(len(columns))] for number in range(len(rehearsal.shots))]
    return grid(rows, [shot.prompt for shot in rehearsal.shots], [name for name, _ in columns], side=side)
