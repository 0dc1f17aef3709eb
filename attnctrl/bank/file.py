"""Banks as files: one safetensors file, with a JSON header in its metadata. No pickles; whole or not at all.

Tensors are named "<layer>|<step>|<branch>|<picture>", with "|scale" for those of float8, "|moments", "|query" and
"|output" where these are kept (of float8 "|query_scale" and "|output_scale"), "place|<number>|tokens" and
"place|<number>|member" for the places that the header lists, and "sigmas" for the noise levels of the run.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import files
from ..errors import AssetError
from ..versions import version_of, versions
from .identity import differing, identity_of
from .packing import Packed
from .store import Bank, Entry, Held

__all__ = ["FORMAT", "load", "save"]

FORMAT = 1
_KEY = "attnctrl.bank"
_FURTHER = ("scale", "moments", "query", "query_scale", "output", "output_scale")
"""Of what is packed, beside the states."""
_SIGMAS = "sigmas"


def save(bank: Bank, path: str | Path) -> Path:
    """Write a bank. Raises `OSError` where the file cannot be written."""
    # as a tensor, since models that begin without signal have an infinite one, which JSON has not
    tensors = {_SIGMAS: torch.tensor(bank.sigmas, dtype=torch.float64)}
    for entry, packed in bank.entries.items():
        name = "|".join(map(str, entry))
        tensors[name] = packed.states
        tensors |= {f"{name}|{part}": one for part in _FURTHER if (one := getattr(packed, part)) is not None}
    places = []
    for number, ((frame, picture), held) in enumerate(bank.places.items()):
        places.append({"frame": frame, "picture": picture, "grid": held.grid, "names": held.names, "boxes": held.boxes})
        tensors |= {f"place|{number}|tokens": held.tokens, f"place|{number}|member": held.member}
    told = {
        "format": FORMAT,
        "model": bank.model,
        "every": bank.every,
        "tokens": bank.tokens,
        "queries": bank.queries,
        "texts": bank.texts,
        "dtype": bank.dtype,
        "layers": bank.layers,
        "places": places,
        "versions": versions(),
    }
    header = {_KEY: json.dumps(told, ensure_ascii=False, allow_nan=False)}
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return files.write_file(path, partial(save_file, ready, metadata=header))


def load(path: str | Path, pipe_or_model: Any = None, device: torch.device | str | None = None) -> Bank:
    """The bank in a file; see `Bank.load`."""
    path = Path(path)
    try:
        with safe_open(str(path), framework="pt", device=str(device or "cpu")) as file:
            told = json.loads((file.metadata() or {})[_KEY])
            if told["format"] != FORMAT:
                raise AssetError(
                    f"{path} is a bank of format {told['format']}, and this attnctrl ({version_of('attnctrl')}) reads "
                    f"format {FORMAT}; it was written by attnctrl {told.get('versions', {}).get('attnctrl', '?')}. Use "
                    "that version, or capture it anew."
                )
            names = file.keys()
            bank = _filled(Bank(told["dtype"], device), told, {name: file.get_tensor(name) for name in names})
    except AssetError:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, IndexError) as error:
        raise AssetError(
            f"{path} is no whole bank of attnctrl ({type(error).__name__}: {error}); name a file that Bank.save wrote, "
            "or capture it anew."
        ) from error
    if pipe_or_model is not None:
        _check_model(path, bank, pipe_or_model)
    return bank


def _filled(bank: Bank, told: dict[str, Any], tensors: dict[str, Tensor]) -> Bank:
    bank.model, bank.sigmas = told["model"], tuple(tensors.pop(_SIGMAS).tolist())
    bank.every, bank.tokens = told["every"], told["tokens"]
    bank.queries, bank.texts = bool(told.get("queries", False)), bool(told.get("texts", False))
    for number, place in enumerate(told["places"]):
        index, member = (tensors.pop(f"place|{number}|{part}").cpu() for part in ("tokens", "member"))
        boxes = tuple(map(tuple, place.get("boxes", ())))
        held = Held(tuple(place["grid"]), index, tuple(place["names"]), member, boxes)
        bank.places[place["frame"], place["picture"]] = held
    further = {name: tensors.pop(name) for name in list(tensors) if name.endswith(tuple(f"|{x}" for x in _FURTHER))}
    found: dict[Entry, Packed] = {}
    for name, states in tensors.items():
        layer, step, branch, picture = name.split("|")
        parts = (further.get(f"{name}|{part}") for part in _FURTHER)
        found[Entry(layer, int(step), branch, int(picture))] = Packed(states, *parts)
    order = {layer: number for number, layer in enumerate(told["layers"])}
    for entry in sorted(found, key=lambda entry: (entry.step, order[entry.layer], entry.branch, entry.picture)):
        bank.add(entry, found[entry])
    return bank


def _check_model(path: Path, bank: Bank, pipe_or_model: Any) -> None:
    from ..attach import parts_of

    model = parts_of(pipe_or_model)[0]
    here = identity_of(getattr(model, "_orig_mod", model))
    if found := differing(bank.model, here):
        told = ", ".join(f"{name} {bank.model[name]} in the file, {here[name]} here" for name in found)
        raise AssetError(
            f"{path} is a bank of another model ({told}): keys of one model mean nothing to another. Load that model, "
            "or capture the pictures anew."
        )
