"""Pictures in one style: the first gives it, the others read it while they are drawn.

pipe = StylePipeline.from_pretrained("toy-sd")
for number, picture in enumerate(pipe(["a red circle", "a blue star", "a green heart"], "white background")):
    picture.save(f"{number}.png")
pipe(["a red circle"], picture="poster.jpg", picture_prompt="a poster of a harbour")

pipe.keep(bank := Bank("bfloat16", "cpu"), "a red circle, in ink").save("ink.safetensors")
pipe(["a blue star, in ink"], bank=Bank.load("ink.safetensors", pipe.pipe))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from attnctrl.pipelines.anchor import Anchor
from attnctrl.pipelines.base import Progress, ScenePicture, Wrapper
from attnctrl.pipelines.settings import entries_of, keys_of, per_text, seeds_of

from attnctrl.errors import ControlError
from attnctrl.scene import MAX_SEED, Scene

if TYPE_CHECKING:
    import torch

    from attnctrl.bank import Bank
    from attnctrl.controls import Control, Share

__all__ = ["StylePipeline"]

_RECORDED = ("prompts", "negative_prompts", "seeds")
_ANCHORS = frozenset({"picture", "bank"})
"""What a record tells of an anchor that is no picture of the set."""


class StylePipeline(Wrapper):
    """Draws sets of pictures on a pipeline, the user's own or one loaded by name. The pipeline stays what it is.

    The first picture is the anchor, drawn as without controls, and the others depend on it alone. More pictures than
    fit at once are drawn in batches, each of which draws the anchor again as its first row.

    With `picture` a real picture is the anchor: its row is held on that picture at every noise level, under noise that
    stays the same, and what the model draws there is dropped.

    With `bank` the anchor is a picture that `keep` has looked at before, in this process or in another one: it has no
    row, and costs nothing but what is read of it.
    """

    def __call__(
        self,
        prompts: Sequence[str],
        style: str = "",
        negative_prompt: str | Sequence[str] = "",
        *,
        picture: Any = None,
        picture_prompt: str = "",
        picture_seed: int | None = None,
        cleaner: float = 0.0,
        bank: Bank | None = None,
        preset: str | None = None,
        controls: Sequence[Control] | None = None,
        batch: int | None = None,
        width: int | None = None,
        height: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        true_cfg_scale: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seeds: int | Sequence[int] | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> list[ScenePicture]:
        """One picture for each prompt; the first is the anchor, if no picture is and no bank holds one.

        Args:
            prompts: what each picture shows; two or more, with a picture or a bank one or more.
            style: words that all have in common, added behind each prompt; with "{}" it is put around the prompt.
            negative_prompt: what guidance moves away from; one for all, or one for each (then none for `picture`).
            picture: whose style is taken, PIL picture or path; of other proportions the middle of it.
            picture_prompt: what it shows; words of the style are not added.
            picture_seed: of the noise under which the model meets it; if left out the last seed that there is, so
                that no picture of the set starts from that very noise.
            cleaner: how much less noisy than the run: mu >= 0 makes the odds of its noise e^(-2 mu) times as large
                (FreeCus, arXiv 2507.15249).
            bank: with the anchor that `keep` filled it with, for the same model, size, steps and guidance.
            preset: name of a stack of controls, see `attnctrl.presets`; if left out, what was measured best on the
                model's family.
            controls: instead of a preset, controls that act on each batch, whose first picture is the anchor; [] for
                none.
            batch: so many pictures are drawn at once, the anchor included where it has a row; all if left out.
            width, height, num_inference_steps, guidance_scale, true_cfg_scale: the model's own where left out.
            generator: gives the seeds of the pictures; a list gives one of each.
            seeds: of the pictures: the first, from which they count up (0 if left out), or all of them.
            progress: called after every step with (steps done, steps in all).
            options: of the preset, such as layers, window, weight or strength.

        Raises:
            ControlError: too few prompts, an unknown preset or option, or values that do not fit together.
            AssetError, LayoutError: a picture that cannot be read, or is too small or too large.
            UnsupportedModelError: a picture, for a pipeline that has no place for one.
            SelectionError: layers that the model does not have.
            SceneError: a prompt that the model would cut off, or settings that it does not have.
        """
        told = told_prompts(prompts, style, picture is None and bank is None)
        if picture is None and (picture_prompt or picture_seed is not None or cleaner):
            raise ControlError("picture_prompt, picture_seed and cleaner are of a picture; give picture=... with them.")
        if picture is not None and not picture_prompt.strip():
            raise ControlError("The model reads what the picture shows; give picture_prompt, such as 'a poster'.")
        if picture is not None and bank is not None:
            raise ControlError("Both a picture and a bank would give the style; give one of them.")
        if batch is not None and batch < (least := 2 if bank is None else 1):
            raise ControlError(f"batch must be {least} or more{', with the anchor' * (bank is None)}; found {batch}.")
        acting = self._acting(preset, controls, options)
        negatives = per_text(negative_prompt, len(told), "negative_prompt")
        common = {
            **keys_of(width, height, num_inference_steps, guidance_scale, true_cfg_scale),
            "controls": entries_of(acting),
        }
        scenes = [
            Scene.from_dict({**common, "prompt": text, "negative_prompt": negative}, None, f"prompt {i}")
            for i, (text, negative) in enumerate(zip(told, negatives, strict=True))
        ]
        self.check_texts(scenes, "prompt")
        drawn = seeds_of(seeds, generator, len(scenes), 1)
        if bank is not None:
            return self._recalling(scenes, drawn, acting, bank, batch, progress)
        if picture is None:
            return self._set(scenes, drawn, acting, batch, progress)
        avoided = negative_prompt if isinstance(negative_prompt, str) else ""
        shown = Scene.from_dict({**common, "prompt": picture_prompt, "negative_prompt": avoided}, None, "picture")
        self.check_texts([shown], "picture")
        settings = self.settings(shown)
        anchor = Anchor.read(picture, (settings.width, settings.height), self.pipe, cleaner)
        own = seeds_of([MAX_SEED if picture_seed is None else picture_seed], None, 1, 1)
        return self._set([shown, *scenes], [*own, *drawn], acting, batch, progress, anchor)

    def keep(
        self,
        bank: Bank,
        prompt: str,
        negative_prompt: str = "",
        *,
        picture: Any = None,
        cleaner: float = 0.0,
        preset: str | None = None,
        controls: Sequence[Control] | None = None,
        width: int | None = None,
        height: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        true_cfg_scale: float | None = None,
        seed: int | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> list[ScenePicture]:
        """Draw an anchor and keep its style in a bank, for sets that are drawn later with `bank`.

        Kept are image keys and values, and moments of queries, keys and values, in the layers, steps and branches in
        which the control that shares pictures acts; `Keep(...).predict` tells the size before.

        Args:
            bank: an empty one, which says in which dtype and where; `bank.save` writes it.
            prompt: what the anchor shows, all its words; of a picture what it shows.
            negative_prompt, width, height, num_inference_steps, guidance_scale, true_cfg_scale: as of the sets.
            picture, cleaner: a real picture as the anchor, as above.
            preset, controls, options: as of the sets.
            seed: of the anchor's noise; if left out 0, and of a picture the last one that there is.
            progress: called after every step with (steps done, steps in all).

        Returns:
            the anchor as it was drawn; [] for a real picture.

        Raises:
            ControlError: the bank holds something, or not exactly one control shares pictures; else as above.
        """
        from attnctrl.controls import Keep

        if bank.entries:
            raise ControlError(f"The bank is not empty ({bank!r}); give a new one, or clear() it.")
        acting = self._acting(preset, controls, options)
        sharing = _sharing(acting)
        others = [one for one in acting if one is not sharing]
        held = Keep(bank=bank, moments=True, layers=sharing.layers, window=sharing.window, branch=sharing.branch)
        told = {
            **keys_of(width, height, num_inference_steps, guidance_scale, true_cfg_scale),
            "controls": entries_of(acting),
        }
        (text,) = told_prompts([prompt], "", False)
        scene = Scene.from_dict({**told, "prompt": text, "negative_prompt": negative_prompt}, None, "anchor")
        self.check_texts([scene], "anchor")
        settings = self.settings(scene)
        anchor = (
            None if picture is None else Anchor.read(picture, (settings.width, settings.height), self.pipe, cleaner)
        )
        if anchor is None and cleaner:
            raise ControlError("cleaner is of a picture; give picture=... with it.")
        first = seed if seed is not None else MAX_SEED if anchor is not None else 0
        seeds = seeds_of([first], None, 1, 1)
        with nullcontext() if anchor is None else anchor.held(self.pipe, first):
            drawn = self.draw([scene], seeds, [*others, held], bool(others), progress)
        own = _recorded([scene], seeds)
        return [replace(one, record={**one.record, "set": own}) for one in drawn] if anchor is None else []

    def again(
        self,
        record: Mapping[str, Any],
        progress: Progress | None = None,
        files: Mapping[str, bytes] = MappingProxyType({}),
        bank: Bank | None = None,
    ) -> ScenePicture:
        """The picture of a record (`attnctrl.provenance.read`), drawn again with its whole batch: to the bit.

        Args:
            files: that belong to the record (`attnctrl.provenance.carried`); the anchor, if it is a picture.
            bank: that holds the anchor, if a bank did.

        Raises:
            ControlError: the record is not one of a set, or its anchor is missing.
        """
        from attnctrl.controls import Control

        told = record.get("set")
        if not isinstance(told, Mapping) or not set(_RECORDED) <= set(told) <= {*_RECORDED, *_ANCHORS}:
            raise ControlError("The record is not that of a picture of a set; draw it with ScenePipeline.")
        # rounding depends on the batch
        rows = record.get("batch", {**told, "row": len(told["seeds"]) - 1})
        pairs = zip(rows["prompts"], rows["negative_prompts"], strict=True)
        own = record["scene"]
        scenes = [Scene.from_dict({**own, "prompt": text, "negative_prompt": negative}) for text, negative in pairs]
        acting = [Control.from_dict(entry) for entry in own.get("controls", ())]
        if "bank" in told:
            from attnctrl.pipelines.castbank import same_bank

            return self._recalling(scenes, [told["seeds"]], acting, same_bank(told["bank"], bank), None, progress)[0]
        anchor = Anchor.recorded(told["picture"], files) if "picture" in told else None
        drawn = self._set(scenes, [[seed] for seed in rows["seeds"]], acting, None, progress, anchor)
        return drawn[rows["row"] - (anchor is not None)]

    def _acting(
        self, preset: str | None, controls: Sequence[Control] | None, options: Mapping[str, Any]
    ) -> list[Control]:
        """What acts on each batch. Raises `ControlError` where controls and a preset are given."""
        from attnctrl.attach import as_controls
        from attnctrl.presets import preset as stack_of
        from attnctrl.presets import style as measured

        if controls is not None and (preset is not None or options):
            raise ControlError("Give controls, or a preset and its options, not both.")
        if controls is not None:
            return list(as_controls(controls))
        return stack_of(preset, **options) if preset else measured(self.pipe, **options)

    def _recalling(
        self,
        scenes: Sequence[Scene],
        seeds: Sequence[Sequence[int]],
        acting: Sequence[Control],
        bank: Bank,
        batch: int | None,
        progress: Progress | None,
    ) -> list[ScenePicture]:
        """The pictures of scenes that read a bank, each by itself."""
        from attnctrl.bank.identity import digest_of

        sharing, digest = _sharing(acting), digest_of(bank)
        controls = [replace(sharing, bank=bank) if one is sharing else one for one in acting]
        each = batch or len(scenes)
        starts = range(0, len(scenes), each)
        pictures: list[ScenePicture] = []
        for done, start in enumerate(starts):
            part = slice(start, start + each)
            drawn = self.draw(scenes[part], seeds[part], controls, True, _counted(progress, done, len(starts)))
            made = [_recorded([scene], [own]) for scene, own in zip(scenes[part], seeds[part], strict=True)]
            pictures += [
                replace(one, record={**one.record, "set": {**told, "bank": digest}})
                for one, told in zip(drawn, made, strict=True)
            ]
        return pictures

    def _set(
        self,
        scenes: Sequence[Scene],
        seeds: Sequence[Sequence[int]],
        acting: Sequence[Control],
        batch: int | None,
        progress: Progress | None,
        anchor: Anchor | None = None,
    ) -> list[ScenePicture]:
        """The pictures of scenes that read the first; with an anchor that one is its row, and is left out."""
        numbers = range(1, len(scenes))
        each = len(scenes) if batch is None else batch - 1
        batches = [[0, *numbers[start : start + each]] for start in range(0, len(numbers), each)] or [[0]]
        pictures: list[ScenePicture] = []
        given = {} if anchor is None else {"picture": anchor.record()}
        files = {} if anchor is None else anchor.files()
        with nullcontext() if anchor is None else anchor.held(self.pipe, seeds[0][0]):
            for done, chosen in enumerate(batches):
                # a picture alone has nobody to read
                controls = acting if len(chosen) > 1 else ()
                drawn = self.draw(
                    [scenes[i] for i in chosen],
                    [seeds[i] for i in chosen],
                    controls,
                    bool(controls),
                    _counted(progress, done, len(batches)),
                )
                told = _recorded([scenes[i] for i in chosen], [seeds[i] for i in chosen])
                pictures += [
                    replace(
                        one,
                        record={
                            **one.record,
                            "set": {**_rows(told, sorted({0, row})), **given},
                            "batch": {**told, "row": row},
                        },
                        files={**one.files, **files},
                    )
                    for row, one in enumerate(drawn)
                ][bool(pictures or given) :]
        return pictures


def _sharing(acting: Sequence[Control]) -> Share:
    """The control by which pictures are shared. Raises `ControlError` where there is not exactly one."""
    from attnctrl.controls import Share

    found = [one for one in acting if isinstance(one, Share)]
    if len(found) != 1:
        raise ControlError(
            f"A bank keeps what one control shares, such as ShareStyle; found {len(found)} of them "
            f"({', '.join(one.name for one in acting) or 'no controls at all'}). Give controls with one."
        )
    return found[0]


def told_prompts(prompts: Sequence[str], style: str, alone: bool) -> list[str]:
    """The prompts with the words of the style; `alone`: their first picture gives it.

    Raises:
        ControlError: there are too few, or one is empty.
    """
    listed = [prompts] if isinstance(prompts, str) else list(prompts)
    if alone and len(listed) < 2:
        raise ControlError(
            f"A set has two prompts or more, the first of which gives the style (or one and more, and a picture=... "
            f"or a bank=... that does); found {len(listed)}."
        )
    if not listed:
        raise ControlError("There are no prompts; give one for each picture that is to have the style of `picture`.")
    if empty := [i for i, text in enumerate(listed) if not text.strip()]:
        raise ControlError(f"Prompt {empty[0]} is empty; say what that picture shows.")
    if "{}" in style:
        return [style.replace("{}", text) for text in listed]
    return [f"{text}, {style}" if style else text for text in listed]


def _recorded(scenes: Sequence[Scene], seeds: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What the pictures of a batch are made of beside their common scene: words and seeds, the anchor's first."""
    values = (
        [scene.prompt for scene in scenes],
        [scene.negative_prompt for scene in scenes],
        [seed for own in seeds for seed in own],
    )
    return dict(zip(_RECORDED, values, strict=True))


def _rows(told: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Of these pictures of a batch."""
    return {name: [values[row] for row in rows] for name, values in told.items()}


def _counted(progress: Progress | None, done: int, batches: int) -> Progress | None:
    """Steps of one batch of several as steps of all of them."""
    if progress is None:
        return None
    return lambda step, steps: progress(done * steps + step, batches * steps)
