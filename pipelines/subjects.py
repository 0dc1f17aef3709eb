"""One cast in several pictures: a rehearsal tells where its members are, then the pictures are drawn together.

pipe = MultiSubjectPipeline.from_pretrained("toy-sd")
cast = [Character("ball", "a red circle"), Character("box", "a blue square")]
story = pipe(cast, [Shot("{ball} left, white background"), Shot("{ball} right, {box} left, gray background")])
story.sheet().save("story.png")
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from attnctrl.pipelines.base import Progress, ScenePicture, Wrapper
from attnctrl.pipelines.cast import Character, Shot, resolve, told_by
from attnctrl.pipelines.masks import READING, Attention, attention_keys, places
from attnctrl.pipelines.settings import keys_of
from attnctrl.pipelines.story import Rehearsal, Story, told_in

from attnctrl.controls.reposition import UnmovedWarning
from attnctrl.errors import ControlError
from attnctrl.scene import MAX_SEED, Scene
from attnctrl.schedule import Window, window_from_json, window_to_json

if TYPE_CHECKING:
    from PIL import Image

    from attnctrl.bank import Bank
    from attnctrl.controls import Control
    from attnctrl.region import Region
    from attnctrl.select import Selector

__all__ = ["Character", "MultiSubjectPipeline", "Rehearsal", "Shot", "Story"]
Segment = Callable[["Image.Image", Character], Any]
"""(picture, character) -> its mask [H, W], or None where it is not seen."""


class MultiSubjectPipeline(Wrapper):
    """Draws a cast in several scenes on a pipeline, the user's own or one loaded by name, which stays what it is.

    A run is `rehearse`, then `perform`; `more` goes on with new shots. `keep` puts into a bank what these read, for new
    ones that cost their own rows alone, in this process or in another one.
    """

    runs_on = ("FluxPipeline", "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline")

    def __call__(
        self,
        cast: Sequence[Character],
        shots: Sequence[Shot],
        *,
        preset: str = "subjects",
        options: Mapping[str, Any] | None = None,
        bank: Bank | None = None,
        seed: int = 0,
        progress: Progress | None = None,
        **how: Any,
    ) -> Story:
        """The shots with one cast: `rehearse`, then `perform`.

        Args:
            cast, shots, seed, how: see `rehearse`.
            preset, options, bank: see `perform`.
            progress: called after every step of both runs with (steps done, steps in all).
        """
        halves = _halves(progress)
        rehearsal = self.rehearse(cast, shots, seed=seed, progress=halves[0], **how)
        return self.perform(rehearsal, preset=preset, options=options, bank=bank, progress=halves[1])

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
        image tokens attend to its words (`attnctrl.maps.attended`).

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
        bank: Bank | None = None,
        progress: Progress | None = None,
    ) -> Story:
        """The shots once more from the same noise, together, with controls on the regions of the rehearsal.

        Args:
            preset: one of `attnctrl.presets_sets.SETS`.
            options: of the preset; the others are those chosen for the model's family.
            bank: an empty one, for what new shots will read, as of `keep`, which then need not draw it again.
            progress: called after every step.

        Raises:
            ControlError: an unknown preset or option; with a bank also as of `keep`.
        """
        from attnctrl.pipelines.castbank import keeps

        from attnctrl.presets import preset as stack_of
        from attnctrl.presets_sets import chosen_options

        names = [{region.name for region in own} for own in rehearsal.regions]
        chosen = chosen_options(preset, self.pipe, leading=names[0] >= set().union(*names))
        options = {**chosen, **(options or {})}
        acting = stack_of(preset, [list(own) for own in rehearsal.regions], **options) if _known(rehearsal) else []
        anchors = _read_by_others(acting, len(rehearsal.shots))
        watching = [] if bank is None else keeps(acting, rehearsal.regions, anchors, bank)
        pictures = self._drawn(rehearsal, acting, _made(preset, options, anchors), progress, watching)
        return Story(rehearsal, pictures, preset, options, anchors, rehearsal)

    def keep(self, story: Story, bank: Bank, progress: Progress | None = None) -> tuple[ScenePicture, ...]:
        """Draw the pictures of a story that new shots read once more, and keep in a bank what is read of them.

        Kept are keys and values of the tokens that the story's controls share, in their layers, steps and branches,
        with the names and places of the characters, and the outputs that `Harmonize` takes in; `need` tells the size.

        Args:
            bank: an empty one, which says in which dtype and where; `bank.save` writes it.
            progress: called after every step.

        Raises:
            ControlError: the bank holds something, the story's pictures read nobody, or its controls take more of them
                than a bank holds (`Reposition(mode="table")`).
        """
        from attnctrl.pipelines.castbank import keeps

        read = story.read
        acting = _going_on(story, read.regions)
        watching = keeps(acting, read.regions, story.anchors, bank)
        # a picture alone has nobody to read
        joint = acting if story.anchors > 1 else [one for one in acting if not (one.shares or one.follows)]
        return self._drawn(read, joint, _told(story), progress, watching)

    def need(self, story: Story, bank: Bank) -> int:
        """Bytes of what `keep` will put into a bank; nothing runs. Raises as `keep`."""
        from attnctrl.pipelines.castbank import keeps

        read, settings = story.read, self.settings(story.first.scenes[0])
        kept = keeps(_going_on(story, read.regions), read.regions, story.anchors, bank)
        run = {"width": settings.width, "height": settings.height, "steps": settings.steps}
        return sum(
            one.predict(self.pipe, **run, pictures=story.anchors, branches=1 + settings.guided).nbytes for one in kept
        )

    def more(
        self,
        story: Story,
        shots: Sequence[Shot],
        *,
        bank: Bank | None = None,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Story:
        """New shots with the cast of a story, in which it stays what it was.

        The pictures of the story that others read are drawn again in the batch: they read each other alone, so they
        stay what they are. With a bank they are not drawn, and new ones read what it holds of them.

        Args:
            shots: name any of the cast.
            bank: filled by `keep` or `perform` from this story, with the same model.
            seed: as for `rehearse`.

        Raises:
            SceneError: as for `rehearse`.
            ControlError: the story's pictures read nobody; the bank is of other pictures, or the story's controls need
                more than it holds.
            ScheduleError, UnsupportedModelError: the bank is of another run or model.
        """
        from attnctrl.pipelines.castbank import reading

        acting = _going_on(story, story.first.regions)
        # what is refused is refused before anything is drawn
        if bank is not None:
            reading(acting, bank, story.anchors)
        elif not story.first.shots:
            raise ControlError("This story is that of a record, which holds no pictures to read; give bank=... of it.")
        halves = _halves(progress)
        first = story.first
        resolved = resolve(first.cast, shots, seed, whole=False)
        keys = first.scenes[0].to_dict()
        layers, window = first.reading or (None, READING)
        new = self._rehearsed(resolved, first.cast, keys, None, layers, window, halves[0])
        if bank is not None:
            return replace(story, rehearsal=new, pictures=self._recalling(new, _told(story), bank, halves[1]))
        read = story.read
        both = {name: getattr(read, name) + getattr(new, name) for name in ("shots", "scenes", "pictures", "regions")}
        batch = replace(first, **both)
        pictures = self._drawn(batch, _going_on(story, batch.regions), _told(story), halves[1])
        return replace(story, rehearsal=new, pictures=pictures[story.anchors :])

    def again(
        self, record: Mapping[str, Any], progress: Progress | None = None, bank: Bank | None = None
    ) -> ScenePicture:
        """The picture of a record (`attnctrl.provenance.read`), drawn again with its whole story.

        Args:
            bank: that holds what it read, if a bank did.

        Raises:
            ControlError: the record is not one of a story, a segmenter found its characters, or its bank is missing.
        """
        from attnctrl.pipelines.castbank import same_bank

        told = told_in(record, "shots", "shot")
        if told["reading"] is None:
            raise ControlError(
                "A segmenter found the characters of this story, and no record holds it. Rehearse with segment=... and "
                "perform again."
            )
        held = same_bank(told["bank"], bank) if "bank" in told else None
        cast = tuple(Character(**one) for one in told["cast"])
        shots = resolve(cast, [Shot(**one) for one in told["shots"]], whole=False)
        halves, (layers, window) = _halves(progress), told["reading"]
        reading = layers, window_from_json(window)
        rehearsal = self._rehearsed(shots, cast, record["scene"], None, *reading, halves[0])
        if held is not None:
            return self._recalling(rehearsal, told, held, halves[1])[told["shot"]]
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

            def find(number: int, lost: Sequence[Character]) -> Mapping[str, Any]:
                return {one.name: segment(pictures[number].image, one) for one in lost} if segment else {}
        else:
            limit, keys = self.settings(scenes[0]).max_sequence_length, attention_keys(read)
            prompts = [shot.prompt for shot in shots]
            reading = record(self.pipe, keys, prompt=prompts, layers=layers, window=window, max_sequence_length=limit)
            with reading as found:
                pictures = self.draw(scenes, seeds, [], False, progress)
            find = Attention.of(found).find
        regions = tuple(
            tuple(places(cast, shot, label, partial(find, number)))
            for number, (shot, label) in enumerate(zip(shots, labels, strict=True))
        )
        how = (layers, window) if segment is None else None
        return Rehearsal(cast, shots, scenes, tuple(pictures), regions, how)

    def _recalling(
        self, rehearsal: Rehearsal, told: Mapping[str, Any], bank: Bank, progress: Progress | None
    ) -> tuple[ScenePicture, ...]:
        """The pictures of new shots that read a bank; `told` are preset and options of its story."""
        from attnctrl.pipelines.castbank import reading

        from attnctrl.bank.identity import digest_of
        from attnctrl.presets import preset as stack_of

        stack = stack_of(told["preset"], [list(own) for own in rehearsal.regions], **told["options"])
        acting = reading(stack, bank, told["anchors"])
        made = _made(told["preset"], told["options"], told["anchors"])
        return self._drawn(rehearsal, acting, {**made, "bank": digest_of(bank)}, progress)

    def _drawn(
        self,
        rehearsal: Rehearsal,
        acting: Sequence[Control],
        told: Mapping[str, Any],
        progress: Progress | None,
        watching: Sequence[Control] = (),
    ) -> tuple[ScenePicture, ...]:
        """The pictures, whose records hold the story; of how it was made what is `told`."""
        seeds = [[_seed(shot)] for shot in rehearsal.shots]
        with warnings.catch_warnings():
            # who is not in a picture is not read by it
            warnings.simplefilter("ignore", UnmovedWarning)
            pictures = self.draw(rehearsal.scenes, seeds, [*acting, *watching], bool(acting), progress)
        story = {
            "cast": [asdict(one) for one in rehearsal.cast],
            "shots": [
                {**asdict(shot), "boxes": {name: list(box) for name, box in shot.boxes.items()}}
                for shot in rehearsal.shots
            ],
            **told,
            "reading": rehearsal.reading and [rehearsal.reading[0], window_to_json(rehearsal.reading[1])],
        }  # fmt: skip
        return tuple(
            replace(picture, record={**picture.record, "story": {**story, "shot": number}})
            for number, picture in enumerate(pictures)
        )


def _seed(shot: Shot) -> int:
    return int(shot.seed or 0) % (MAX_SEED + 1)


def _made(preset: str, options: Mapping[str, Any], anchors: int) -> dict[str, Any]:
    """What records tell of how a story was made."""
    return {"preset": preset, "options": dict(options), "anchors": anchors}


def _told(story: Story) -> dict[str, Any]:
    """The same of a story that goes on: all new pictures read those that are read."""
    return _made(story.preset, {**story.options, "anchors": story.anchors}, story.anchors)


def _going_on(story: Story, regions: Sequence[Sequence[Region]]) -> list[Control]:
    """The controls with which pictures read those of a story. Raises `ControlError` where these read nobody."""
    from attnctrl.presets import preset as stack_of

    if not story.anchors:
        raise ControlError(
            "The story's pictures read nobody, so new ones have nobody to read. Draw it with shots that share a "
            "character."
        )
    return stack_of(story.preset, [list(own) for own in regions], **_told(story)["options"])


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
