"""The table of guests: what else may be on a model while controls are, and how it is put there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from harness import Setting

Enter = Callable[[Setting], AbstractContextManager[None]]


@dataclass(frozen=True)
class Guest:
    """One guest.

    Attributes:
        enter: puts it on the setting's model for the length of a `with`.
        refused: by family (or "all"), the error that controls end in, as a regular expression.
        absent: by family, why there is no such thing.
        tolerance: of the kernel's output against the dense formula on the same query, key and value.
        backend: the attention backend that is called.
    """

    enter: Enter
    refused: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    tolerance: float = 1e-5
    backend: str = "native"

    def outcome(self, family: str) -> str:
        """What the table of the documentation says."""
        if family in self.absent:
            return f"none ({self.absent[family]})"
        return "refused" if self.refused.get(family, self.refused.get("all")) else "acts"


def _once(put: Callable[[Setting], Any]) -> Enter:
    @contextmanager
    def enter(setting: Setting) -> Iterator[None]:
        put(setting)
        yield

    return enter


def _lora(setting: Setting) -> None:
    from peft import LoraConfig

    setting.model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))


def _fused_lora(setting: Setting) -> None:
    _lora(setting)
    setting.model.fuse_lora()


@contextmanager
def _checkpointing(setting: Setting) -> Iterator[None]:
    setting.model.enable_gradient_checkpointing()
    with torch.no_grad():
        yield


def _cpu_offload(setting: Setting) -> None:
    from accelerate import cpu_offload

    cpu_offload(setting.model, execution_device=torch.device("cpu"))


def _group_offload(setting: Setting) -> None:
    options: dict[str, Any] = {"onload_device": torch.device("cpu"), "offload_type": "leaf_level"}
    apply_group_offloading(setting.model, **options)


def _fp8(setting: Setting) -> None:
    apply_layerwise_casting(setting.model, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def _user_hooks(setting: Setting) -> None:
    for name, module in setting.model.named_modules():
        if hasattr(module, "processor"):
            module.register_forward_hook(lambda _m, _a, out: out)
            module.register_forward_pre_hook(lambda _m, _a: None)
            assert name


@contextmanager
def _compiled_blocks(setting: Setting) -> Iterator[None]:
    torch._dynamo.reset()
    setting.model.compile_repeated_blocks(backend="eager", fullgraph=True)
    # what the test itself changes, such as the gradient mode, is compiled anew as well
    with torch._dynamo.config.patch(recompile_limit=32):
        yield


@contextmanager
def _compiled(setting: Setting) -> Iterator[None]:
    torch._dynamo.reset()
    setting.model.compile(backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=32):
        yield


def _residuals(setting: Setting) -> None:
    generator = torch.Generator().manual_seed(3)

    def like(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=generator)

    kind, inputs = type(setting.model).__name__, setting.inputs
    if kind == "FluxTransformer2DModel":
        count = inputs["hidden_states"].shape[1]
        inputs["controlnet_block_samples"] = [like(1, count, 32)]
        inputs["controlnet_single_block_samples"] = [like(1, count, 32)]
    elif kind == "SD3Transformer2DModel":
        inputs["block_controlnet_hidden_states"] = [like(1, 24, 32)]
    else:
        inputs["down_block_additional_residuals"] = [
            like(1, channels, *size) for channels, size in ((16, (8, 12)), (16, (8, 12)), (16, (4, 6)), (32, (4, 6)))
        ]
        inputs["mid_block_additional_residual"] = like(1, 32, 4, 6)


@contextmanager
def _math_backend(setting: Setting) -> Iterator[None]:
    from diffusers.models.attention_dispatch import attention_backend

    with attention_backend("_native_math"):
        yield


GUESTS: dict[str, Guest] = {
    "LoRA loaded": Guest(_once(_lora)),
    "LoRA fused": Guest(_once(_fused_lora)),
    "fused qkv projections": Guest(
        _once(lambda setting: setting.model.fuse_qkv_projections()),
        absent={"sd3": "diffusers' own fused processor fails on the dual layers of SD3.5"},
    ),
    "ControlNet residuals": Guest(_once(_residuals)),
    "group offload": Guest(_once(_group_offload)),
    "CPU offload (accelerate)": Guest(_once(_cpu_offload)),
    "fp8 layerwise casting": Guest(_once(_fp8)),
    "another attention backend": Guest(
        _math_backend,
        backend="_native_math",
        absent=dict.fromkeys(("sd3", "unet"), "its processors call PyTorch's kernel themselves"),
    ),
    "the user's forward hooks": Guest(_once(_user_hooks)),
    "gradient checkpointing, no gradients": Guest(_checkpointing),
    "gradient checkpointing, with gradients": Guest(
        _once(lambda setting: setting.model.enable_gradient_checkpointing()), refused={"all": "checkpointing"}
    ),
    "torch.compile of repeated blocks": Guest(
        _compiled_blocks, absent={"sd3": "diffusers names no repeated blocks for it"}
    ),
    "torch.compile of the whole model": Guest(_compiled),
}
