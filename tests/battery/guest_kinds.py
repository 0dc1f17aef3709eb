"""How guests are put on a model of the battery."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor
from guest_checks import Enter
from harness import Setting


def once(put: Callable[[Setting], Any]) -> Enter:
    """What is put on by one call and needs no taking off."""

    @contextmanager
    def enter(setting: Setting) -> Iterator[None]:
        put(setting)
        yield

    return enter


nothing = once(lambda setting: None)


def lora(setting: Setting) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=2, lora_alpha=1, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        setting.model.add_adapter(config)


def fused_lora(setting: Setting) -> None:
    lora(setting)
    setting.model.fuse_lora()


def checkpointing(setting: Setting) -> None:
    setting.model.enable_gradient_checkpointing()


def cpu_offload(setting: Setting) -> None:
    from accelerate import cpu_offload

    cpu_offload(setting.model, execution_device=torch.device("cpu"))


def group_offload(setting: Setting) -> None:
    options: dict[str, Any] = {"onload_device": torch.device("cpu"), "offload_type": "leaf_level"}
    apply_group_offloading(setting.model, **options)


def fp8(setting: Setting) -> None:
    setting.model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def slow_processors(setting: Setting) -> None:
    """Diffusers' bmm processor and its sliced one, by turns."""
    for number, module in enumerate(x for x in setting.model.modules() if hasattr(x, "processor")):
        module.processor = SlicedAttnProcessor(1) if number % 2 else AttnProcessor()


def user_hooks(setting: Setting) -> None:
    for module in setting.model.modules():
        if hasattr(module, "processor"):
            module.register_forward_hook(lambda _m, _a, out: out)
            module.register_forward_pre_hook(lambda _m, _a: None)


@contextmanager
def compiled_blocks(setting: Setting) -> Iterator[None]:
    torch._dynamo.reset()
    setting.model.compile_repeated_blocks(backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=32):
        yield


@contextmanager
def compiled(setting: Setting) -> Iterator[None]:
    torch._dynamo.reset()
    setting.model.compile(backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=32):
        yield


def residuals(setting: Setting) -> None:
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
def math_backend(setting: Setting) -> Iterator[None]:
    """For the processors that ask for a backend."""
    from diffusers.models.attention_dispatch import attention_backend

    if not any(hasattr(getattr(module, "processor", None), "_attention_backend") for module in setting.model.modules()):
        raise LookupError("no processor of this model asks for an attention backend")
    with attention_backend("_native_math"):
        yield


@contextmanager
def ip_adapter(setting: Setting) -> Iterator[None]:
    """Diffusers' own processors with small random weights, and pictures for them; each makes a kernel call of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        put, after = _IP_ADAPTERS[type(setting.model).__name__]
        put(setting)
    calls = list(setting.calls)
    setting.calls = [one for number, call in enumerate(calls) for one in ([call, None] if number in after else [call])]
    yield


def _ip_flux(setting: Setting) -> None:
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    for block in setting.model.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=32))
    setting.inputs["joint_attention_kwargs"] = {"ip_hidden_states": [torch.randn(1, 4, 32)]}


def _ip_sd3(setting: Setting) -> None:
    from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0

    sizes = {"hidden_size": 32, "ip_hidden_states_dim": 32, "head_dim": 16, "timesteps_emb_dim": 16}
    for block in setting.model.transformer_blocks:
        block.attn.set_processor(SD3IPAdapterJointAttnProcessor2_0(**sizes, scale=0.5).eval())
    setting.inputs["joint_attention_kwargs"] = {"ip_hidden_states": torch.randn(1, 4, 32), "temb": torch.randn(1, 16)}


def _ip_unet(setting: Setting) -> None:
    """Loaded as a checkpoint is."""
    model = setting.model
    weights: dict[str, torch.Tensor] = {}
    for number, (name, processor) in enumerate(model.attn_processors.items()):
        if name.endswith("attn2.processor"):
            width = model.get_submodule(name.removesuffix(".processor")).to_q.out_features
            for part in ("to_k_ip", "to_v_ip"):
                weights[f"{number}.{part}.weight"] = torch.randn(width, 12)
            assert processor is not None
    width = model.config.cross_attention_dim
    picture = {
        "proj.weight": torch.randn(4 * width, 6),
        "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    model._load_ip_adapter_weights([{"image_proj": picture, "ip_adapter": weights}], low_cpu_mem_usage=False)
    model.requires_grad_(False)
    setting.inputs["added_cond_kwargs"] = {"image_embeds": [torch.randn(1, 1, 6)]}


_IP_ADAPTERS: dict[str, tuple[Callable[[Setting], None], range | tuple[int, ...]]] = {
    "FluxTransformer2DModel": (_ip_flux, range(2)),
    "SD3Transformer2DModel": (_ip_sd3, (0, 2)),
    "UNet2DConditionModel": (_ip_unet, range(1, 14, 2)),
}
"""By model: how it is put on, and the numbers of the kernel calls that its own follow."""
