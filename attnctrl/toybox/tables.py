"""The tables of measured figures in the pages, as data: whose figures stand in which row, and how they are written.

A cell is text, or (result, key, format): the stored result's name, the key within it, and a format of what stands there
(`attnctrl.toybox.pages.figures`). A row of which something was not measured is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .suites_guidance import CHOSEN

Cell = str | tuple[str, str, str]

PLAIN = "{vanilla:.3f}"
HELD = "{controlled:.3f} ({low:+.3f} .. {high:+.3f})"
CHANGE = "{vanilla:.3f} -> {controlled:.3f} ({low:+.3f} .. {high:+.3f})"
SHORT = "{vanilla:.2f} -> {controlled:.2f}"


@dataclass(frozen=True)
class Table:
    """Titles of the columns, and the cells of each row."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Each:
    """A table with a row for each row of one result: titles of the columns, and their formats."""

    head: Sequence[str]
    result: str
    formats: Sequence[str]


LAYOUT = {
    "inclusion_ratio": "colour inside its own box",
    "binding": "right shape and right colour",
    "placement": "and inside its box",
    "presence": "told colours that appear as a subject",
    "prompt_fidelity": "told attributes that are found",
    "background_similarity": "outside the boxes (the price)",
    "seam": "edges at region borders (the price, lower is better)",
}


def layout(model: str, result: str) -> Table:
    """Metrics down; without control, with it, and the difference."""
    forms = (PLAIN, "{controlled:.3f}", "{delta:+.3f} ({low:+.3f} .. {high:+.3f})")
    return Table(
        (model, "prompt alone", "with boxes", "difference, 95 % interval"),
        [(f"`{key}`: {what}", *((result, key, form) for form in forms)) for key, what in LAYOUT.items()],
    )


STACKS = {
    "prompt alone": ("", PLAIN),
    "with boxes": ("", "{controlled:.3f}"),
    "each text encoded by itself": ("separate.", "{controlled:.3f}"),
    "`Regions` alone": ("regions_only.", "{controlled:.3f}"),
    'parted throughout, `Isolate(background="isolated")`': ("parted_always.", "{controlled:.3f}"),
}


def stacks(models: Sequence[str], metrics: Sequence[str]) -> Table:
    """Stacks of the layout suite down; models and metrics across."""
    across = [(model, metric) for model in models for metric in metrics]
    return Table(
        ("controls", *(f"{model} `{metric}`" for model, metric in across)),
        [
            (label, *((f"layout-{model}", prefix + metric, form) for model, metric in across))
            for label, (prefix, form) in STACKS.items()
        ],
    )


def models(names: Sequence[str]) -> Table:
    """How often the models draw what they are told, by themselves."""
    metrics = {"single_subject": "one told subject is right", "two_subjects": "two", "three_subjects": "three"}
    return Table(
        ("model", *metrics.values(), "pictures of each"),
        [
            (
                f"[{name}](assets/{name}/README.md)",
                *((f"model-{name}", metric, "{vanilla:.1%}") for metric in metrics),
                (f"model-{name}", "all", "{n}"),
            )
            for name in names
        ],
    )


def references(model: str, most: int) -> Table:
    """Numbers of reference pictures down."""
    metrics = {"inclusion_ratio": SHORT, "identity_similarity": SHORT, "leak": "{vanilla:.3f} -> {controlled:.3f}"}
    metrics["background_similarity"] = "{controlled:.2f}"
    return Table(
        ("references", "`inclusion_ratio`", "`identity_similarity`", "`leak`", "`background_similarity` (the price)"),
        [
            (
                f"{number}",
                *(
                    (f"references-{model}", metric + (f"_{number}" if number > 1 else ""), form)
                    for metric, form in metrics.items()
                ),
            )
            for number in range(1, most + 1)
        ],
    )


def changes(first: str, columns: Mapping[str, str], rows: Sequence[tuple[str, str, str]]) -> Table:
    """What control changes, from -> to: metrics (title -> key) across, (label, result, prefix of the keys) down."""
    return Table(
        (first, *columns),
        [(label, *((result, prefix + key, CHANGE) for key in columns.values())) for label, result, prefix in rows],
    )


SUBJECTS = {"`subjects`": "", "shared attention alone": "shared."}
OVER_SHARED = {
    "toy-sd, 64 casts": "subjects-toy-sd",
    "toy-sd3, 256 casts": "subjects-256-toy-sd3",
    "toy-flux, 256 casts": "subjects-256-toy-flux",
}
PUBLISHED = {"`consistory`": "consistory.", "`storydiffusion`": "storydiffusion."}
SETS = ("toy-flux", "toy-sd", "toy-sd3")
REPOSITION = {
    "`Reposition`: keys turned to their place": "",
    "shared attention alone": "shared.",
    "resampled, as published": "resample.",
    "canvas": "canvas.",
}
CANVAS = {
    "prompt alone": (PLAIN, "{vanilla:.0f}"),
    "canvas": (HELD, "{controlled:.2f}"),
}
STYLE = {
    "keys shared on the same places (`match=()`)": "naive.",
    'keys beside the picture (`match=()`, `positions="apart"`)': "apart.",
    "the same with `weight=0.8`, from a fifth of the run on: the default on FLUX": "",
    "AdaIN alone (`weight=0`)": "adain.",
    "`alignedgen` as published": "alignedgen.",
}


def canvas(model: str) -> Table:
    """The prompt alone and a canvas down; metrics and the time across."""
    metrics = {
        "`identity_similarity` to the first picture": "identity_similarity",
        "far away and smaller": "far_and_small",
        "`prompt_fidelity`": "prompt_fidelity",
    }
    return Table(
        (model, *metrics, "time"),
        [
            (
                label,
                *((f"reposition-{model}", metric, form) for metric in metrics.values()),
                (f"reposition-{model}", "time_ratio", time),
            )
            for label, (form, time) in CANVAS.items()
        ],
    )


def style(model: str, rows: Mapping[str, str], result: str = "") -> Table:
    """Ways of sharing a style (label -> prefix of the keys) down, below the prompt alone."""
    metrics = ("set_consistency", "same_style", "copied", "prompt_fidelity")
    ways = [("prompt alone", "", PLAIN), *((label, prefix, HELD) for label, prefix in rows.items())]
    name = result or f"style-{model}"
    return Table(
        (model, *(f"`{metric}`" for metric in metrics)),
        [(label, *((name, prefix + metric, form) for metric in metrics)) for label, prefix, form in ways],
    )


def guidance(families: Mapping[str, str]) -> Table:
    """Models (name -> family) with each way of guidance down."""
    metrics = {
        "binding": "`binding`",
        "prompt_fidelity": "`prompt_fidelity`",
        "saturation": "`saturation` off by",
        "style": "`style`",
        "frechet": "`frechet`",
        "diversity": "`diversity`",
    }
    rows: list[tuple[Cell, ...]] = []
    for model, family in families.items():
        told = CHOSEN[family]
        for label, prefix, form, time in (
            ("no guidance", "", PLAIN, "{vanilla:.0f}"),
            (f"{told['kind']}, `{told['layers']}`, w = {told['scale']:g}", "", HELD, "{controlled:.2f}"),
            ("the same, the first 30 %", "early.", HELD, "{controlled:.2f}"),
            ("the model's own guidance", "cfg.", HELD, "{controlled:.2f}"),
            ("both", "cfg_and_perturbed.", HELD, "{controlled:.2f}"),
        ):
            cells = [(f"guidance-{model}", prefix + metric, form) for metric in metrics]
            rows.append((f"{model}, {label}", *cells, (f"guidance-{model}", prefix + "time_ratio", time)))
    return Table(("pictures", *metrics.values(), "time"), rows)


def held_out(result: str) -> Each:
    """Sets of heads down, on pairs that their search did not see: the gain, and that over the layer that is best."""
    return Each(
        ("perturbed", "heads", "`binding`", "more than without", "more than the layer"),
        result,
        (
            "{name}",
            "{heads}",
            "{controlled:.3f}",
            "{delta:+.3f} ({low:+.3f} .. {high:+.3f})",
            "{over_delta:+.3f} ({over_low:+.3f} .. {over_high:+.3f})",
        ),
    )


def inversion(model: str, steps: Sequence[int]) -> Table:
    """Methods down, counts of steps across: median and least PSNR."""
    return Table(
        ("method", *(f"{count} steps" for count in steps)),
        [
            (
                f"`{method}`",
                *((f"inversion-{model}", f"{method}_{count}", "{psnr:.1f}, {least_psnr:.1f}") for count in steps),
            )
            for method in ("midpoint", "fireflow", "euler")
        ],
    )


TABLES: Mapping[str, Table | Each] = {
    "layout toy-sd": layout("toy-sd", "layout-1024-toy-sd"),
    "layout toy-flux": layout("toy-flux", "layout-toy-flux"),
    "layout toy-sd3": layout("toy-sd3", "layout-512-toy-sd3"),
    "stacks": stacks(("toy-flux", "toy-sd", "toy-sd3"), ("binding", "seam")),
    "models": models(("toy-sd", "toy-flux", "toy-sd3")),
    "references": references("toy-flux", 4),
    "subjects in short": changes(
        "subjects",
        {
            "`identity_similarity` in the cast": "identity_similarity",
            "`identity_margin` over other casts": "identity_margin",
            "`prompt_fidelity`": "prompt_fidelity",
        },
        [
            (f"{model}, {'preset ' if not prefix else ''}{label}", f"subjects-{model}", prefix)
            for model in SETS
            for label, prefix in SUBJECTS.items()
        ],
    ),
    "subjects": changes(
        "model, preset",
        {f"`{metric}`": metric for metric in ("identity_similarity", "identity_margin", "prompt_fidelity")},
        [
            (f"{model}, {label}", f"subjects-{model}", prefix)
            for model in SETS
            for label, prefix in {**SUBJECTS, **PUBLISHED}.items()
        ],
    ),
    "masks": changes(
        "model",
        {"one subject": "one_subject_iou", "two subjects": "two_subjects_iou"},
        [(model, f"masks-{model}", "") for model in SETS],
    ),
    "subjects over shared": changes(
        "shared attention alone -> `subjects`",
        {f"`{metric}`": metric for metric in ("identity_margin", "prompt_fidelity", "diversity")},
        [(label, result, "over_shared.") for label, result in OVER_SHARED.items()],
    ),
    "reposition": changes(
        "reposition, toy-flux",
        {
            "`identity_similarity` to the first picture": "identity_similarity",
            "`slope` over the distance": "slope",
            "`prompt_fidelity`": "prompt_fidelity",
        },
        [(label, "reposition-toy-flux", prefix) for label, prefix in REPOSITION.items()],
    ),
    "canvas": canvas("toy-sd3"),
    "execute": Each(
        ("case", "tokens", "density", "against the dense mask", "against no mask at all"),
        "execute-cpu",
        ("{case}", "{tokens}", "{density:.2f}", "{of_dense:.2f} x", "{of_unmasked:.2f} x"),
    ),
    "guidance steps": Each(
        ("model", "first perturbed", "guidance", "bound", "operations", "bound in seconds", "time", "without replay"),
        "guidance-bench-cpu",
        (
            *("{family}", "{layer}", "{cfg}", "{bound:.2f}", "{flop_ratio:.2f}"),
            *("{bound_s:.2f}", "{step_ratio:.2f}", "{full_ratio:.2f}"),
        ),
    ),
    "commands": Each(("file", "command"), "commands", ("`results/{file}`", "`{command}`")),
    "guidance": guidance({"toy-sd": "unet", "toy-sd3": "sd3", "toy-flux": "flux"}),
    "heads": Each(
        ("layer", *(f"head {number}" for number in range(5))),
        "heads-toy-sd3",
        ("`{layer}`", *(f"{{gains[{number}]:+.3f}}" for number in range(5))),
    ),
    "heads rounds": Each(
        ("round", "exhaustive", "gain", "halving", "gain there"),
        "heads-rounds-toy-sd3",
        (
            "{round}",
            "{exhaustive}",
            "{gain:+.3f} ({error:.3f})",
            "{halving}",
            "{halving_gain:+.3f} ({halving_error:.3f})",
        ),
    ),
    "held-out heads toy-flux": held_out("heads-toy-flux"),
    "held-out heads toy-sd3": held_out("heads-confirm-toy-sd3"),
    "style toy-flux": style("toy-flux", STYLE),
    "style toy-sd": style(
        "toy-sd",
        {
            "keys shared (`match=()`): the default on UNets": "",
            "AdaIN alone (`weight=0`)": "adain.",
            "`style-aligned` as published": "style_aligned.",
        },
    ),
    "style toy-sd, 256": style("toy-sd, 256 tasks", {"keys shared (`match=()`)": ""}, "style-256-toy-sd"),
    "style toy-sd3": style("toy-sd3", {"keys shared (`match=()`): the default on SD3": ""}),
    "inversion": inversion("toy-flux", (10, 20, 40, 160)),
}
"""Every table, by the name that its marker in a page says."""
