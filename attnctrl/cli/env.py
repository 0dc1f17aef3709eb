"""`attnctrl env`: what a bug report needs to know."""

from __future__ import annotations

import os
import platform
from typing import Any

from attnctrl.cli.output import Format, FormatOption, emit

_BACKENDS = {"flash-attn": "flash", "xformers": "xformers", "sageattention": "sage", "kernels": "hub kernels"}


def env(form: FormatOption = Format.human) -> None:
    """Show versions, devices and attention backends: paste it into a bug report.

    Example:

      attnctrl env --format json
    """
    data = environment()
    emit(form, data, lambda: _text(data), [f"{key}\t{value}" for key, value in data["versions"].items()])


def environment() -> dict[str, Any]:
    """Versions, platform, devices and attention backends of this machine, as JSON data."""
    import torch

    from attnctrl.versions import version_of, versions

    names = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    found = {name: version_of(name) for name in _BACKENDS}
    return {
        "versions": {**versions(), **{name: version_of(name) for name in ("peft", "pydantic", "safetensors", "scipy")}},
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": ["cpu", *names],
        "attention": {
            "native": f"torch {torch.__version__}",
            "flex": "with torch",
            **{
                label: found[name] if found[name] == "not installed" else f"{name} {found[name]}"
                for name, label in _BACKENDS.items()
            },
        },
    }


def _text(data: dict[str, Any]) -> str:
    lines = [f"{name:<14} {version}" for name, version in data["versions"].items()]
    lines += [
        f"{'platform':<14} {data['platform']}",
        f"{'cores':<14} {data['cores']} ({data['threads']} threads in torch)",
    ]
    lines += [f"{'devices':<14} {', '.join(data['devices'])}"]
    lines += [f"{'attention':<14} {name}: {state}" for name, state in data["attention"].items()]
    return "\n".join(lines)
