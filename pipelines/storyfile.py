"""The story: a user's document of a cast and shots (YAML, version 1).

version: 1
model: toy-sd
cast: {ball: a red circle, box: a blue square}
shots:
  - {prompt: "{ball} left, white background"}
  - {prompt: "{ball} right, {box} left, gray background", boxes: {ball: [0.5, 0, 1, 1]}}
preset: subjects
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from attnctrl.pipelines.cast import Character, Shot
from pydantic import BeforeValidator, Field, ValidationError

from attnctrl.scene import MAX_SEED, MAX_STEPS, Box, Document, Guidance, Prompt, Side, listed
from attnctrl.scenecheck import problems_of
from attnctrl.scenefile import read_document, scene_error

__all__ = ["StoryFile", "load_story"]

MAX_CAST, MAX_SHOTS = 16, 64
Text = Annotated[str, Field(min_length=1, max_length=4000)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]


class ShotEntry(Document):
    """One picture; see `attnctrl.pipelines.Shot`."""

    prompt: Text
    who: Annotated[tuple[str, ...] | None, BeforeValidator(listed)] = None
    boxes: dict[str, Box] = Field(default_factory=dict, max_length=MAX_CAST)
    seed: Seed | None = None


class StoryFile(Document):
    """A whole story as data. Load with `load_story` or `StoryFile.from_dict`."""

    version: Literal[1]
    model: Annotated[str, Field(min_length=1, max_length=200)] = "toy-sd"
    cast: Annotated[dict[str, Text], Field(min_length=1, max_length=MAX_CAST)]
    shots: Annotated[tuple[ShotEntry, ...], BeforeValidator(listed), Field(min_length=1, max_length=MAX_SHOTS)]
    preset: str = "subjects"
    options: dict[str, Any] = Field(default_factory=dict)
    negative_prompt: Prompt = ""
    width: Side | None = None
    height: Side | None = None
    steps: Annotated[int | None, Field(ge=1, le=MAX_STEPS)] = None
    guidance_scale: Guidance | None = None
    true_cfg_scale: Guidance | None = None
    seed: Seed = 0

    @classmethod
    def from_dict(cls, data: dict[str, Any], label: str = "story") -> StoryFile:
        """The story in `data`. Raises `SceneError` that names every key at fault, what was found and what to do."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise scene_error(label, problems_of(error, cls, {"shots": ShotEntry})) from None

    @property
    def characters(self) -> list[Character]:
        """The cast, as the pipeline takes it."""
        return [Character(name, description) for name, description in self.cast.items()]

    @property
    def pictures(self) -> list[Shot]:
        """The shots, as the pipeline takes them."""
        return [Shot(one.prompt, one.who, one.boxes, one.seed) for one in self.shots]

    @property
    def settings(self) -> dict[str, Any]:
        """Further arguments of the pipeline's call."""
        same = ("preset", "options", "negative_prompt", "width", "height", "guidance_scale", "true_cfg_scale", "seed")
        return {**{name: getattr(self, name) for name in same}, "num_inference_steps": self.steps}


def load_story(path: str | Path) -> StoryFile:
    """The story in a YAML or JSON file. Raises `SceneError`."""
    path = Path(path)
    return StoryFile.from_dict(read_document(path), str(path))
