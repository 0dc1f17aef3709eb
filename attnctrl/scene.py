"""The scene: a user's document of prompt, subjects, boxes, masks, reference and controls (YAML, version 1).

    version: 1
    prompt: a red circle on the left and a blue square on the right, on a gray background
    subjects:
      - {prompt: a red circle, box: [0.05, 0.3, 0.45, 0.7]}
      - {prompt: a blue square, box: [0.55, 0.3, 0.95, 0.7]}
    controls:
      - {name: regions}

Boxes are [x0, y0, x1, y1] from the top left corner, in fractions of the picture, or in pixels with `units: pixels`.
Masks and references are named by paths inside the scene's folder. What a scene leaves open (size, steps, guidance)
comes from the model.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from attnctrl.errors import LayoutError, UnsupportedModelError
from attnctrl.scenecheck import build_controls, control_problems, control_schema, problems_of
from attnctrl.scenefile import (
    FileRefused,
    Problem,
    SceneFiles,
    SceneFolder,
    SceneMemory,
    decode_mask,
    decode_picture,
    read_document,
    scene_error,
    short,
)
from attnctrl.sceneplaces import box_problems, outside_of

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from attnctrl.controls import Control
    from attnctrl.region import Region

VERSION = 1
MAX_SIDE, SIDE_MULTIPLE = 4096, 8
MAX_STEPS, MAX_SUBJECTS, MAX_REFERENCES, MAX_CONTROLS, MAX_PROMPT = 500, 32, 8, 16, 4000
MAX_SEED = 2**63 - 1
_MODEL = re.compile(r"toy-[a-z0-9-]+|\./[^\0\\]+|[A-Za-z0-9][\w.-]*/[\w.-]+")
_CANVAS = 512  # rows and columns on which an outside-of-everything mask is drawn when the scene gives no size

Prompt = Annotated[str, Field(max_length=MAX_PROMPT)]
Side = Annotated[int, Field(ge=SIDE_MULTIPLE, le=MAX_SIDE, multiple_of=SIDE_MULTIPLE)]
Guidance = Annotated[float, Field(ge=0, le=100)]


def _four(value: Any) -> Any:
    if not isinstance(value, list | tuple) or len(value) != 4:
        raise _issue("a box is four numbers", short(value), "write it as [left, top, right, bottom]")
    return tuple(value)


def listed(value: Any) -> Any:
    """A list of a file as the tuple that documents hold."""
    return tuple(value) if isinstance(value, list) else value


def _issue(problem: str, found: object, remedy: str) -> PydanticCustomError:
    return PydanticCustomError("issue", "{problem}", {"problem": problem, "found": str(found)[:100], "remedy": remedy})


Box = Annotated[tuple[float, float, float, float], BeforeValidator(_four)]


class Document(BaseModel):
    """What is read from files: plain values, no unknown keys, never changed."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, validate_default=True)


class Subject(Document):
    """One thing in the picture: what it is, and where (box or mask) or what it looks like (reference)."""

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT, description="what it is, in words")]
    name: Annotated[str | None, Field(min_length=1, max_length=80, description="its name in reports and errors")] = None
    box: Annotated[Box | None, Field(description="[x0, y0, x1, y1] in the scene's units")] = None
    mask: Annotated[str | None, Field(max_length=500, description="picture of its place, white is inside")] = None
    reference: Annotated[str | None, Field(max_length=500, description="picture of what it looks like")] = None
    negative_prompt: Annotated[Prompt, Field(description="what guidance moves away from in its place")] = ""
    strength: Annotated[float, Field(ge=0, le=1, description="0 is not there, 1 is full")] = 1.0

    @model_validator(mode="after")
    def _is_somewhere(self) -> Subject:
        if self.box is not None and self.mask is not None:
            raise _issue("a subject has a box or a mask", "both", "keep one of them")
        if self.box is None and self.mask is None and self.reference is None:
            raise _issue("a subject needs a box, a mask or a reference", "none", "add 'box: [x0, y0, x1, y1]'")
        return self


class Scene(Document):
    """A whole picture as data. Load with `load_scene` or `Scene.from_dict`; both check everything, files included."""

    version: Annotated[Literal[1], Field(description="version of this format: 1")]
    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT, description="the whole picture, in words")]
    negative_prompt: Annotated[Prompt, Field(description="what the guidance moves away from")] = ""
    model: Annotated[str, Field(max_length=200, description="a toy model, a hub id, or ./folder beside the scene")] = (
        "toy-flux"
    )
    width: Annotated[Side | None, Field(description="pixels; the model's own size if left out")] = None
    height: Annotated[Side | None, Field(description="pixels; the model's own size if left out")] = None
    units: Annotated[Literal["normalised", "pixels"], Field(description="'normalised' or 'pixels', of the boxes")] = (
        "normalised"
    )
    steps: Annotated[int | None, Field(ge=1, le=MAX_STEPS, description="denoising steps")] = None
    guidance_scale: Annotated[
        Guidance | None,
        Field(description="classifier-free, or FLUX's distilled one"),
    ] = None
    true_cfg_scale: Annotated[Guidance | None, Field(description="FLUX's classifier-free guidance")] = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED, description="seed of the first picture; the next ones count up")] = 0
    subjects: Annotated[tuple[Subject, ...], BeforeValidator(listed)] = Field(
        default=(), max_length=MAX_SUBJECTS, description="what stands where"
    )
    background: Annotated[
        str | None, Field(min_length=1, max_length=MAX_PROMPT, description="what is outside all boxes and masks")
    ] = None
    text_encoding: Annotated[
        Literal["separate", "joint", "auto"],
        Field(description="texts of subjects: encoded each by itself, words of the prompt, or whichever is possible"),
    ] = "separate"
    reference_positions: Annotated[
        Literal["corner", "region", "apart"], Field(description="where the model finds references")
    ] = "corner"
    reference_pixels: Annotated[int | None, Field(ge=1, description="area to which larger references are shrunk")] = (
        None
    )
    controls: Annotated[
        Annotated[tuple[dict[str, Any], ...], Field(max_length=MAX_CONTROLS)] | None,
        BeforeValidator(listed),
        Field(description="a list of {name: ..., parameters}; left out: regions if anything has a place, [] for none"),
    ] = None

    _files: SceneFiles = PrivateAttr(default_factory=SceneMemory)
    _label: str = PrivateAttr(default="scene")

    @field_validator("version", mode="before")
    @classmethod
    def _version_is_known(cls, value: Any) -> Any:
        if type(value) is not int:
            raise _issue("the version is a whole number", short(value), f"write 'version: {VERSION}'")
        if value != VERSION:
            raise _issue(
                f"this attnctrl reads scenes of version {VERSION}", value, "install the attnctrl that wrote it"
            )
        return value

    @field_validator("model")
    @classmethod
    def _model_is_named(cls, value: str) -> str:
        if not is_model_name(value):
            remedy = "write toy-flux, a hub id such as owner/name, or ./folder beside the scene"
            raise _issue("not a model's name", value, remedy)
        return value

    @model_validator(mode="after")
    def _fits_the_canvas(self) -> Scene:
        pixels = self.units == "pixels"
        if pixels and (self.width is None or self.height is None):
            raise _issue("boxes in pixels need the picture's size", "no width or height", "add 'width' and 'height'")
        right, bottom = (float(self.width or 0), float(self.height or 0)) if pixels else (1.0, 1.0)
        problems = [
            Problem(f"subjects[{index}].box", problem, str(list(subject.box)), remedy)
            for index, subject in enumerate(self.subjects)
            if subject.box is not None
            for problem, remedy in box_problems(subject.box, right, bottom, self.units)
        ]
        names = [subject.name for subject in self.subjects if subject.name is not None]
        problems += [
            Problem("subjects", "names must differ", f"'{name}' more than once", "rename one of them")
            for name in sorted({name for name in names if names.count(name) > 1})
        ]
        references = [f"subjects[{i}].reference" for i, subject in enumerate(self.subjects) if subject.reference]
        if len(references) > MAX_REFERENCES:
            found, remedy = f"{len(references)} ({', '.join(references)})", "leave some of them out"
            problems.append(Problem("", f"a scene takes {MAX_REFERENCES} reference pictures at most", found, remedy))
        if problems:
            raise PydanticCustomError("problems", "see the list", {"problems": problems})
        return self

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], files: SceneFiles | None = None, label: str = "scene") -> Scene:
        """The scene in `data` (keys as in the YAML file), checked with the files it names.

        Args:
            data: Keys and values as they stand in a scene file.
            files: Where masks and references are read from; nowhere if left out.
            label: What messages call the scene.

        Raises:
            SceneError: Names every key at fault, what was found there and what to do.
        """
        try:
            scene = cls.model_validate(dict(data))
        except ValidationError as error:
            raise scene_error(label, problems_of(error, cls, {"subjects": Subject})) from None
        scene._files = files if files is not None else SceneMemory()
        scene._label = label
        problems = [*scene._file_problems(), *scene._control_problems()]
        if not problems and scene.background is not None and not scene._outside().any():
            found, remedy = f"'{scene.background}'", "make room for it or leave it out"
            problems.append(Problem("background", "nothing is outside the boxes and masks", found, remedy))
        if problems:
            raise scene_error(label, problems)
        return scene

    def to_dict(self) -> dict[str, Any]:
        """All keys and values as JSON data; `Scene.from_dict` gives the same scene back."""
        return self.model_dump(mode="json")

    def replace(self, **changes: Any) -> Scene:
        """The scene with some keys changed, checked again. Raises `SceneError`."""
        return Scene.from_dict({**self.to_dict(), **changes}, self._files, self._label)

    def files(self) -> dict[str, bytes]:
        """Contents of the masks and references that the scene names, by their paths as written. Raises `SceneError`."""
        named = (name for subject in self.subjects for name in (subject.mask, subject.reference) if name is not None)
        return {name: self.read_file(name) for name in named}

    def read_file(self, name: str) -> bytes:
        """Contents of a file that the scene names. Raises `SceneError`."""
        try:
            return self._files.read(name)
        except FileRefused as error:
            raise scene_error(self._label, [Problem("", str(error), f"'{name}'", error.remedy)]) from error

    @property
    def folder(self) -> Path | None:
        """The folder that the scene was loaded from, None if it was made in memory."""
        return self._files.root if isinstance(self._files, SceneFolder) else None

    def references(self) -> list[Image.Image]:
        """The reference pictures (RGB) in the order of their subjects."""
        names = [subject.reference for subject in self.subjects if subject.reference is not None]
        return [decode_picture(self.read_file(name)) for name in names]

    def regions(self) -> list[Region]:
        """The subjects that have a place, as regions with normalised boxes or bool masks [height, width].

        Region.reference counts `references()`. With `background`, one more region is everything outside the others; it
        comes last.
        """
        from attnctrl.region import Region

        numbers = itertools.count()
        bound = [None if subject.reference is None else next(numbers) for subject in self.subjects]
        regions = [
            Region(
                prompt=subject.prompt,
                box=self.normalised(subject.box),
                mask=self._mask(subject),
                name=subject.name,
                strength=subject.strength,
                reference=reference,
                negative_prompt=subject.negative_prompt,
            )
            for subject, reference in zip(self.subjects, bound, strict=True)
            if subject.box is not None or subject.mask is not None
        ]
        if self.background is not None:
            regions.append(Region(prompt=self.background, mask=self._outside(), name="background"))
        return regions

    @property
    def control_entries(self) -> tuple[dict[str, Any], ...]:
        """The entries that act: `controls`, or texts of regions when it is left out and anything has a place."""
        if self.controls is not None:
            return self.controls
        name = "regions" if self.text_encoding == "separate" else "group_isolation"
        return ({"name": name},) if self._anything_placed else ()

    @property
    def _anything_placed(self) -> bool:
        return self.background is not None or any(subject.box or subject.mask for subject in self.subjects)

    def regions_on(self, pipe: Any, max_sequence_length: int | None) -> list[Region]:
        """As `regions`, with texts bound to words of the prompt where `text_encoding` asks for it.

        Raises:
            SceneError: The prompt does not hold them, or where they stand is not known for this pipeline.
        """
        from attnctrl.phrases import in_prompt

        try:
            return in_prompt(
                pipe, self.prompt, self.regions(), self.text_encoding, max_sequence_length=max_sequence_length
            )
        except (LayoutError, UnsupportedModelError) as error:
            found, remedy = f"'{self.text_encoding}'", "take 'separate' or 'auto'"
            raise scene_error(self._label, [Problem("text_encoding", str(error), found, remedy)]) from error

    def build_controls(self, regions: Sequence[Region] | None = None) -> list[Control]:
        """The controls of the scene, for `attnctrl.attach`, on those of `regions_on` or, if left out, of `regions`.

        Raises:
            SceneError: An entry does not make a control.
        """
        return build_controls(self.control_entries, self.regions() if regions is None else regions, self._label)

    def normalised(self, box: tuple[float, float, float, float] | None) -> tuple[float, float, float, float] | None:
        """`box`, given in the scene's units, as fractions of the picture."""
        if box is None or self.units == "normalised":
            return box
        width, height = float(self.width or 1), float(self.height or 1)
        return box[0] / width, box[1] / height, box[2] / width, box[3] / height

    def _mask(self, subject: Subject) -> np.ndarray | None:
        return None if subject.mask is None else decode_mask(self.read_file(subject.mask))

    def _outside(self) -> np.ndarray:
        places = [self.normalised(subject.box) or self._mask(subject) for subject in self.subjects]
        return outside_of(places, (self.height or _CANVAS, self.width or _CANVAS))

    def _file_problems(self) -> list[Problem]:
        problems = []
        for index, subject in enumerate(self.subjects):
            for key in ("mask", "reference"):
                name, place = getattr(subject, key), f"subjects[{index}].{key}"
                if name is None:
                    continue
                try:
                    data = self._files.read(name)
                    if key == "mask":
                        problems += self._mask_problems(decode_mask(data), place)
                    else:
                        decode_picture(data)
                except FileRefused as error:
                    problems.append(Problem(place, str(error), f"'{name}'", error.remedy))
        return problems

    def _mask_problems(self, mask: np.ndarray, place: str) -> list[Problem]:
        if not mask.any():
            return [
                Problem(place, "the mask is empty", "no pixel lighter than half", "paint the subject's place white")
            ]
        rows, columns = mask.shape
        if self.width and self.height and abs(columns * self.height - rows * self.width) > max(self.width, self.height):
            remedy = f"give it the picture's proportions ({self.width} x {self.height})"
            return [Problem(place, "the mask has other proportions than the picture", f"{columns} x {rows}", remedy)]
        return []

    def _control_problems(self) -> list[Problem]:
        return control_problems(self.control_entries, self._anything_placed)


def load_scene(path: str | Path) -> Scene:
    """The scene in the YAML or JSON file `path`, checked with the masks and references it names.

    Paths in the file are relative to its folder and must stay inside it, also through links.

    Raises:
        SceneError: The file, a key in it or a file it names is not usable; the message says which, and the remedy.
    """
    path = Path(path)
    return Scene.from_dict(read_document(path), SceneFolder(path.parent), str(path))


def is_model_name(text: str) -> bool:
    """Whether a scene may name its model so: toy-..., owner/name, or ./folder."""
    return bool(_MODEL.fullmatch(text)) and ".." not in text.split("/")


def scene_schema() -> dict[str, Any]:
    """JSON Schema of a scene file, with the parameters of every registered control."""
    schema = Scene.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "attnctrl scene"
    schema["properties"]["controls"]["anyOf"][0]["items"] = control_schema()
    return json.loads(json.dumps(schema))
