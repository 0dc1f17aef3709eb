"""Stacks of controls under the names of the methods they come from.

    with ac.attach(pipe, ac.preset("seg2any", regions)):
        ...

Regions are a list of `Region`, or one list per sample of the batch. What is not a table of the paper but a choice of
ours says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .attach import parts_of
from .controls import Control, GroupIsolation, Isolate, OpenTexts, RegionModulation, Regions, ShareStyle
from .controls.base import scenes_of
from .controls.lamic import GIA, Ground, Hubs
from .errors import ControlError
from .families import family_of
from .presets_sets import SETS, diffuhaul
from .region import Overlap, Region
from .schedule import Window

__all__ = [
    "PRESETS",
    "against",
    "alignedgen",
    "alternating",
    "default_preset",
    "emphasis",
    "freecus",
    "lamic",
    "lamic_fixed",
    "layout",
    "preset",
    "references",
    "regional_prompting",
    "seg2any",
    "style_aligned",
    "texts",
]


_TEXTS_OPEN = str(GIA.with_marks("1", "SS", "SR", "RS", "SU", "US"))
"""Words of regions see and are seen as in the plain model."""


def layout(
    regions: Any,
    *,
    overlap: Overlap = "union",
    window: Window = (0.0, 0.5),
    reference_weight: float = 1.0,
    ground: Ground = "open",
) -> list[Control]:
    """Ours: each region reads its own text; regions do not see each other in the first half, the background sees all.

    Isolation that never ends leaves seams (measured on the embedded models). Texts that are words of the prompt are not
    parted from the rest of it, as the text encoder wrote them knowing it.

    Args:
        ground: whether the background reads texts of regions that are words of the prompt, see `GroupIsolation`.
    """
    scenes = scenes_of(regions, "regions")
    appended = any(scene and not _is_worded(scene) for scene in scenes)
    isolate = Isolate(window=window, background="shared", text=appended)
    return [isolate, *texts(regions, overlap=overlap, reference_weight=reference_weight, ground=ground)]


def references(
    regions: Any, *, overlap: Overlap = "union", reference_weight: float = 4.0, window: Window = (0.0, 0.7)
) -> list[Control]:
    """Ours, for regions with reference pictures: regions stay apart for most of the run, in the branch of the negative
    prompt too, since a reference belongs to one region and regions that see each other mix them; each reads its
    reference with more weight, and then the model draws by itself. Both numbers were chosen on the embedded FLUX:
    regions that stay apart to the end keep the grounds of their references, and where they meet while references still
    count more, one tells on the others. In pictures where a text is encoded by itself, texts are read to
    the end: nothing else tells of it.
    """
    scenes = scenes_of(regions, "regions")
    ended = [scene if all(region.spans for region in scene) else () for scene in scenes]
    others = [() if alone else scene for scene, alone in zip(scenes, ended, strict=True)]
    told: dict[str, Any] = {"overlap": overlap, "reference_weight": reference_weight}
    stack: list[Control] = [Isolate(window=window, branch="all")]
    if any(ended):
        stack.append(GroupIsolation(ended, window=window, **told))
    return [*stack, *texts(others, **told)] if any(others) or not any(ended) else stack


def texts(
    regions: Any,
    *,
    overlap: Overlap = "union",
    window: Window = (0.0, 1.0),
    reference_weight: float = 1.0,
    ground: Ground = "parted",
) -> list[Control]:
    """Ours: each region reads its own text, and nothing else is parted.

    Where texts of a sample are words of the prompt (`in_prompt`), its regions read the rest of it as well
    (`GroupIsolation`), as the text encoder wrote these words knowing it. Texts that are all encoded by themselves are
    read alone (`Regions`).
    """
    told: dict[str, Any] = {"overlap": overlap, "window": window, "reference_weight": reference_weight}
    return _with_texts(regions, {"ground": ground}, told)


def emphasis(
    regions: Any, *, overlap: Overlap = "union", weight: float = 2.0, window: Window = (0.0, 1.0)
) -> list[Control]:
    """Ours, after the weighted attention of eDiff-I ("paint with words", arXiv 2211.01324) and DenseDiffusion (arXiv
    2308.12964): words of the prompt count more in the region that they tell of, and nothing is cut.

    Both papers add to the scores what grows with the noise and with their range; here it is log `weight`, all along,
    which leaves one softmax on the same keys. Texts that are encoded by themselves are not for everybody: they are read
    in their regions alone (`Regions`), with this weight.

    Args:
        weight: how often the words of a region count to its image tokens.
    """
    told: dict[str, Any] = {"overlap": overlap, "window": window, "text_weight": weight}
    return _with_texts(regions, {"table": _TEXTS_OPEN}, told)


def _with_texts(regions: Any, of_words: Mapping[str, Any], told: Mapping[str, Any]) -> list[Control]:
    """`GroupIsolation` where texts of a sample are words of the prompt, with fields `of_words`; `Regions` elsewhere."""
    scenes = scenes_of(regions, "regions")
    worded = [scene if _is_worded(scene) else () for scene in scenes]
    appended = [() if _is_worded(scene) else scene for scene in scenes]
    stack: list[Control] = [GroupIsolation(worded, **of_words, **told)] if any(worded) else []
    if any(appended):
        stack.append(Regions(appended, **told))
    return stack or [Regions()]


def _is_worded(scene: Sequence[Region]) -> bool:
    """Texts of regions are words of the prompt."""
    return any(region.spans for region in scene)


def lamic(regions: Any, *, overlap: Overlap = "union", words: Any = (), window: Window = (0.0, 0.05)) -> list[Control]:
    """LAMIC (arXiv 2508.00477) as published: phase A for one step of twenty, relaying hubs, phase B to the end.

    In the paper texts are words of one prompt (`Region.spans`), and a reference without a box has the whole canvas (a
    region without box and mask).

    Args:
        words: tokens of the prompt that are no padding, see `GroupIsolation`.
    """
    return [GroupIsolation(regions, overlap=overlap, words=words), RegionModulation(window=window)]


def lamic_fixed(
    regions: Any,
    *,
    overlap: Overlap = "union",
    words: Any = (),
    window: Window = (0.0, 0.5),
    hubs: Hubs = "source",
) -> list[Control]:
    """LAMIC with our choices: prompt and padding carry nothing from one entity to another (they read texts alone), and
    regions stay apart for half of the denoising progress; so do references and regions in the branch of the negative
    prompt, where they would otherwise mix.
    """
    return [
        GroupIsolation(regions, overlap=overlap, words=words, hubs=hubs),
        RegionModulation(window=window),
        # in the prompt's branch this adds nothing to phase A
        Isolate(branch="all", window=window, background="shared", text=False),
    ]


def regional_prompting(
    regions: Any,
    *,
    overlap: Overlap = "union",
    base_ratio: float = 0.2,
    window: Window = (0.0, 0.42),
    every: int = 1,
) -> list[Control]:
    """Training-free Regional Prompting (arXiv 2411.02395): M_reg mixed with the plain prompt, in the first steps.

    Args:
        base_ratio: share of the plain pass; published examples use 0.1 to 0.3.
        window: published examples inject in 10 of 24 steps.
        every: M_reg acts in every n-th block; the others read the texts of all regions, as in the authors' code.
    """
    masked: dict[str, Any] = {"window": window, "layers": None if every == 1 else f"all/{every}"}
    stack: list[Control] = [
        Regions(regions, overlap=overlap, global_text="none", base_ratio=base_ratio, **masked),
        Isolate(background="isolated", **masked),
    ]
    between = OpenTexts(base_ratio=base_ratio, global_text="none", window=window, layers=f"not all/{every}")
    return stack if every == 1 else [*stack, between]


def seg2any(
    regions: Any,
    *,
    overlap: Overlap = "union",
    window: Window = (0.0, 0.5),
    attributes: Window = (0.0, 0.35),
    layers: Any = None,
) -> list[Control]:
    """The two masks of Seg2Any (arXiv 2506.00596) without its training: semantic alignment and attribute isolation.

    The paper's model has both at all steps, attribute isolation in single blocks 0 to 18 of 38; the windows are ours,
    for models that have not learned to live with it.

    Args:
        layers: of attribute isolation; "single-early" on FLUX is the paper's. None takes all.
    """
    return [
        Regions(regions, overlap=overlap, global_text="open", window=window),
        Isolate(background="reads_all", prompt="background", window=attributes, layers=layers),
    ]


def alternating(regions: Any, *, overlap: Overlap = "union", window: Window = (0.0, 1.0)) -> list[Control]:
    """Every second block parts regions, the others read the texts of all, as InvokeAI does on FLUX."""
    masked: dict[str, Any] = {"window": window, "layers": "all/2"}
    return [
        Regions(regions, overlap=overlap, **masked),
        Isolate(background="shared", **masked),
        OpenTexts(window=window, layers="not all/2"),
    ]


def style_aligned(regions: Any = (), **fields: Any) -> list[Control]:
    """StyleAligned (arXiv 2312.02133): in every self-attention, queries and keys as those of the first picture, whose
    keys are read as well. Its score shift b is `weight` e^b, its score scale is `scale`.

    Args:
        fields: of `ShareStyle`.
    """
    return _styled("style-aligned", _without_regions(regions, fields))


def alignedgen(regions: Any = (), **fields: Any) -> list[Control]:
    """AlignedGen (arXiv 2509.17088): the same for transformers with rotary positions, in the family's layers called
    "style" (single blocks of FLUX), the first picture beside the others, its keys scaled by 1.1, texts reading it too.

    SD3 has no positions to move: give positions="keep" there. The paper shows it and does not tell its code.

    Args:
        fields: of `ShareStyle`.
    """
    own = {"layers": "style", "positions": "apart", "scale": 1.1, "texts": True}
    return _styled("alignedgen", {**own, **_without_regions(regions, fields)})


def freecus(regions: Any, *, overlap: Overlap = "union", scale: float = 1.1, **fields: Any) -> list[Control]:
    """FreeCus (arXiv 2507.15249): the subject of the first picture, read in the family's "vital" layers, its keys and
    those of texts scaled by 1.1, texts reading it too; nothing is matched, and nobody stands apart.

    The first picture is a reference: `attnctrl.pipelines.canvas.pinned_pictures` shows it at every level, with
    cleaner=odds_map(mu) of the run's own shift mu, which is the paper's, or a bank holds it (`bank=...`).

    Args:
        regions: one list per picture: where the subject is in the first, none in the others; with a bank none at all.
        scale: lambda, of both.
        fields: of `ShareStyle`.
    """
    own = {"tokens": "subject", "match": (), "layers": "vital", "texts": True, "scale": scale, "text_scale": scale}
    return _styled("freecus", {"regions": regions, "overlap": overlap, **own, **fields})


def _without_regions(regions: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    if any(regions):
        raise ControlError("Presets of styles share whole pictures and take no regions; leave them out.")
    return dict(fields)


PRESETS: Mapping[str, Callable[..., list[Control]]] = {
    "layout": layout,
    "lamic": lamic,
    "lamic-fixed": lamic_fixed,
    "regional-prompting": regional_prompting,
    "seg2any": seg2any,
    "alternating": alternating,
    "texts": texts,
    "emphasis": emphasis,
    "references": references,
    "style-aligned": style_aligned,
    "alignedgen": alignedgen,
    "freecus": freecus,
    **SETS,
    "diffuhaul": diffuhaul,
}


STYLES: Mapping[str, Mapping[str, Any]] = {
    "flux": {"positions": "apart", "weight": 0.8, "match": (), "window": (0.2, 1.0)},
    "sd3": {"match": ()},
    "unet": {"match": ()},
}
"""By family: what `ShareStyle` does where nobody says, as far as it was measured. On FLUX the anchor is copied where it
stands on the pictures' places, where texts read it, and where its keys are read from the first steps on. On SD3 and
UNets keys alone bring sets together, and AdaIN does not."""


def style(pipe: Any, **fields: Any) -> list[Control]:
    """Ours: `ShareStyle` as it was measured best on the embedded model of a pipeline's or model's family. On others the
    anchor stands apart from the pictures where positions are rotary, and everything else is StyleAligned's.

    Args:
        fields: of `ShareStyle`, instead of these.

    Raises:
        ControlError: for an unknown field.
    """
    family = family_of(parts_of(pipe)[0])
    plain = {} if family.rotary is None else {"positions": "apart"}
    return _styled("style", {**STYLES.get(family.name, plain), **fields})


def _styled(name: str, fields: Mapping[str, Any]) -> list[Control]:
    try:
        return [ShareStyle(**fields)]
    except TypeError as error:
        raise ControlError(f"'{name}': {error}. See attnctrl.ShareStyle.") from error


DEFAULTS: Mapping[str, str] = {"unet": "texts", "sd3": "emphasis"}
"""By family: the preset that was measured best on its embedded model, where that is not "layout". On the coarse levels
of a UNet a box covers one or two tokens, and isolation there costs subjects. SD3 takes its layout from the whole
prompt, whose padding it reads, and loses what is cut."""


def default_preset(pipe: Any) -> str:
    """The preset for a pipeline or model whose user names none."""
    return DEFAULTS.get(family_of(parts_of(pipe)[0]).name, "layout")


def against(scenes: Sequence[Sequence[Region]]) -> list[Control]:
    """What regions are to keep away from: their negative prompts are their texts in the branch of the negative prompt.

    Regions without one read the negative prompt of the whole picture there. Nothing is added where no region has one.

    Args:
        scenes: the regions of each sample, or of one for all.
    """
    texts = [
        [
            Region(one.negative_prompt, box=one.box, mask=one.mask, name=f"not in {one.label}", strength=one.strength)
            for one in scene
            if one.negative_prompt
        ]
        for scene in scenes
    ]
    return [Regions(texts, branch="uncond")] if any(texts) else []


def preset(name: str, regions: Any = (), **options: Any) -> list[Control]:
    """The stack called `name`.

    Raises:
        ControlError: for an unknown name or option.
    """
    if name not in PRESETS:
        raise ControlError(f"There is no preset named {name!r}. Known: {', '.join(PRESETS)}.")
    try:
        return PRESETS[name](regions, **options)
    except TypeError as error:
        raise ControlError(
            f"preset '{name}': {error}. See {PRESETS[name].__module__}.{PRESETS[name].__name__}."
        ) from error
