"""The one seam to ComfyUI: every private or unstable name of it that this pack uses is used here and nowhere else.

Checked by running 0.24.0, 0.27.0, 0.30.0 and 0.33.0; by reading up to 0.39.1 and the main branch of 9 October 2026.
What only some of these versions have says so. `host_check` compares the calls at start.
"""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import comfy.ldm.modules.attention
import comfy.memory_management
import comfy.model_prefetch
import comfy.ops
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import LowVramPatch, ModelPatcher
from comfy.quant_ops import QuantizedTensor
from torch import Tensor

from ..quant import QuantError
from ..quant.device import allocate_within
from .host_version import host_version

try:
    import comfy_kitchen
    from comfy_kitchen.tensor import TensorWiseINT8Layout
except ImportError:  # before 0.27
    comfy_kitchen = None

Forwards = dict[torch.nn.Module, Callable[..., Any]]
"""What to call instead of a module's own forward."""

COMPILE_KEY = "torch.compile"
"""Of the wrapper that TorchCompileModel adds (comfy_api/torch_helpers/torch_compile.py)."""

# Quantized tensors.


def packed_bytes(tensor: QuantizedTensor) -> Tensor:
    """The stored bytes of a quantized tensor, without a copy."""
    qdata: Tensor = tensor._qdata
    return qdata


def layout_name(tensor: QuantizedTensor) -> str:
    name: str = tensor._layout_cls
    return name


def move_parameters(module: torch.nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool) -> None:
    """`torch.nn.Module._apply`, which swaps the data of a parameter in place, for wrapper tensors that cannot."""
    comfy.ops._quantized_apply(module, fn, recurse)


# The call of a Linear.


def begin_use() -> None:
    """What the host does before each use of a weight: an interruption of the prompt is raised here."""
    comfy.ops.run_every_op()


def cast(module: torch.nn.Module, like: Tensor) -> tuple[Tensor, Tensor | None, Any]:
    """Weight and bias on the device and in the dtype of `like`, and the handle that `uncast` wants."""
    weight, bias, handle = comfy.ops.cast_bias_weight(module, like, offloadable=True, compute_dtype=like.dtype)
    return weight, bias, handle


def uncast(module: torch.nn.Module, weight: Tensor, bias: Tensor | None, handle: object) -> None:
    """Give back, after the last use, what `cast` returned."""
    comfy.ops.uncast_bias_weight(module, weight, bias, handle)


def is_streamed(module: torch.nn.Module) -> bool:
    """Whether the host can cast the module's weights at each use, so that they need not stay on the device."""
    return hasattr(module, "comfy_cast_weights")


def is_lent(module: torch.nn.Module, handle: Any) -> bool:  # noqa: ANN401
    """Whether what `cast` returned lies in memory of the host's, which it gives to the next module."""
    return hasattr(module, "_v") or (handle is not None and handle[0] is not None)


def activated(x: Tensor, activation: str | None, weight: object = None, eps: float = 0.0) -> Tensor:
    """What a Linear multiplies when the host hands it an activation with its input.

    Source: comfy/ops.py _eager_input_act (by 0.39) and INPUT_ACT_EAGER (from 0.30).

    Args:
        weight: of the activation: a tensor, or a norm module.
    """
    if activation is None:
        return x
    eager = getattr(comfy.ops, "_eager_input_act", None)
    if eager is None:
        known = getattr(comfy.ops, "INPUT_ACT_EAGER", {})
        if activation not in known:
            raise unknown_call(f"an activation {activation!r}")
        out: Tensor = known[activation](x)
    else:
        takes = len(inspect.signature(eager).parameters)
        out = eager(*(x, activation, weight, eps)[:takes])
    return out


def multiplied(
    input: Tensor, input_act: str | None = None, act_weight: object = None, act_eps: float = 0.0, **_: object
) -> Tensor:
    """What a Linear that is called so multiplies with its weight."""
    return activated(input, input_act, act_weight, act_eps)


def unknown_call(what: str) -> QuantError:
    return QuantError(
        f"ComfyUI {host_version()} hands a Linear {what}, which this WanQuant does not know: update WanQuant"
    )


@contextmanager
def in_place(forwards: Forwards) -> Iterator[None]:
    """While open, these forwards take the place of the modules' own, for which the host has no hook.

    As the host's object patches do it, but these stay until the model is unloaded. From 0.40 on the host folds
    products with what surrounds them unless a layer asks to be called (`comfy_force_forward`).
    """
    names = ("forward", "comfy_force_forward")
    before = [(vars(m), {name: vars(m)[name] for name in names if name in vars(m)}) for m in forwards]
    try:
        for module, forward in forwards.items():
            vars(module).update(forward=forward, comfy_force_forward=True)
        yield
    finally:
        for attributes, own in before:
            for name in names:
                attributes.pop(name, None)
            attributes.update(own)


def folds_activations(module: torch.nn.Module) -> bool:
    """Whether the host's forward of a container may leave out a call of its layer (0.31 to 0.39)."""
    return "linear_input_act" in _names(type(module).forward)


def _names(function: Any) -> tuple[str, ...]:  # noqa: ANN401
    code = getattr(function, "__code__", None)
    return (*code.co_names, *code.co_freevars) if code else ()


# Files.


def dynamic_vram() -> bool:
    """Whether the host streams weights by its own allocator, and maps files itself."""
    return bool(comfy.memory_management.aimdo_enabled)


def map_file(path: Path) -> Any:  # noqa: ANN401
    """The host's own map of a file: its address by `get()`, and by `get_file_handle()` what `note_slice` wants.

    Raises:
        QuantError: the file cannot be mapped.
    """
    # Not at the top: the module takes its library as it is imported, and the host loads that only for dynamic VRAM.
    from comfy_aimdo.model_mmap import ModelMMAP

    try:
        return ModelMMAP(os.fspath(path))
    except RuntimeError as error:
        raise QuantError(f"{path}: cannot be mapped into memory: {error}") from None


def note_slice(data: Tensor, handle: object, lock: threading.Lock, offset: int, keep: object) -> None:
    """Say where in a file a mapped tensor lies, so that dynamic VRAM reads it from disk to the device.

    Args:
        data: uint8, one storage from its first byte to its last: the host ignores slices of any other size.
        keep: what must live as long as the tensor.
    """
    storage: Any = data.untyped_storage()
    storage._comfy_tensor_file_slice = comfy.memory_management.TensorFileSlice(handle, lock, offset, data.nbytes)
    storage._comfy_tensor_mmap_refs = keep


def note_source(tensor: Tensor, path: Path) -> Tensor:
    """Say which file a tensor comes from, and return it.

    From 0.39 on weights whose files all lie on fast disks are not pinned in main memory. One tensor without a file
    makes the whole model count as on a slow disk. Source: comfy/storage.py annotate_state_dict.
    """
    storage: Any = tensor.untyped_storage()
    storage._comfy_source_path = os.path.realpath(path)
    return tensor


# Dynamic VRAM.


def limit_resident(model: BaseModel, device: torch.device, nbytes: int) -> None:
    """Let so many bytes of the weights stay on the device, until the host lifts the limit as the next prompt begins."""
    vbar = model.dynamic_vbars.get(device)
    if vbar is not None:
        vbar.set_watermark_limit(nbytes)


def prefetch_options(arguments: Iterable[object]) -> dict[str, Any]:
    """The transformer options among a call's arguments, if the host lets this call prefetch."""
    return next((a for a in arguments if isinstance(a, dict) and "prefetch_dynamic_vbars" in a), {})


def prefetch_queue(modules: list[torch.nn.Module], device: torch.device, options: dict[str, Any]) -> list[Any] | None:
    """None where the host has none: another memory mode, or no streams."""
    queue: list[Any] | None = comfy.model_prefetch.make_prefetch_queue(modules, device, options)
    return queue


def advance(queue: list[Any], device: torch.device, module: torch.nn.Module | None) -> None:
    """Give back the weights of the module before, and send those of the next on their way; None after the last."""
    comfy.model_prefetch.prefetch_queue_pop(queue, device, module)


def prefetches(model: torch.nn.Module) -> bool:
    """Whether the host's own forward of this model prefetches its blocks."""
    forwards = (getattr(type(model), name, None) for name in ("forward", "_forward", "forward_orig"))
    return any("prefetch_queue_pop" in _names(forward) for forward in forwards)


def without_prefetch(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a call in which all Python code runs: a prefetched block may be replayed as a CUDA graph (0.33 on)."""
    return options | {"prefetch_dynamic_vbars": False}


def outside_graphs() -> AbstractContextManager[Any]:
    """While open, allocations may outlive the block that makes them.

    Within the host's allocation graphs (by 0.38) they must not. Source: comfy/model_prefetch.py pause_malloc_graph.
    """
    pause = getattr(comfy.model_prefetch, "pause_malloc_graph", nullcontext)
    context: AbstractContextManager[Any] = pause()
    return context


allocate_within(outside_graphs)


# The model and its patcher.


def loaded_patches(model: BaseModel) -> object:
    """What tells the patches that the loaded weights have; None while no weights are loaded."""
    return model.current_weight_patches_uuid


def resident_bytes(model: BaseModel) -> int:
    """Bytes that the host reckons the model to take on the device, its buffer for streaming among them."""
    nbytes: int = model.model_loaded_weight_memory + model.model_offload_buffer_memory
    return nbytes


def add_resident_bytes(model: BaseModel, nbytes: int) -> None:
    model.model_loaded_weight_memory += nbytes


def compute_dtype(model: BaseModel) -> torch.dtype | None:
    dtype: torch.dtype | None = model.manual_cast_dtype
    return dtype


def set_compute_dtype(model: BaseModel, dtype: torch.dtype) -> None:
    """Make the model compute in `dtype`; the host then also reckons the decoded weights in its memory plan."""
    model.manual_cast_dtype = dtype


def remember_loader(patcher: ModelPatcher, load: Callable[..., ModelPatcher]) -> None:
    """Tell the host how to load the model again in its legacy memory mode."""
    patcher.cached_patcher_init = (load, ())


def loaded_weight(patcher: ModelPatcher, key: str, weight: Tensor) -> Tensor:
    """A weight as it was loaded: where the host has patched it in place, it keeps that."""
    backup = patcher.backup.get(key)
    return weight if backup is None else backup.weight


def is_host_patch(function: object) -> bool:
    """Whether a weight function is the host's own for patches of a streamed weight."""
    return isinstance(function, LowVramPatch)


def keep_from_rounding(module: torch.nn.Module) -> None:
    """Take away what dynamic VRAM would round into the packed blocks."""
    if hasattr(module, "weight_lowvram_function"):
        module.weight_lowvram_function = None  # type: ignore[assignment]


# Attention.


def attention_options(attention: torch.nn.Module) -> dict[str, Any]:
    """What the host hands its attention function for this module: the kind that the checkpoint prefers (0.38 on)."""
    preferred = getattr(attention, "comfy_attention", None)
    return {} if preferred is None else {"preferred_attention": preferred}


def prefers_attention(attention: torch.nn.Module) -> bool:
    """Whether the host runs another attention here than elsewhere, as the checkpoint prefers."""
    return getattr(getattr(attention, "comfy_attention", None), "function", None) is not None


def attention_preferences(model: torch.nn.Module) -> dict[str, object]:
    """What the checkpoint of a loaded model prefers, by the names of the modules."""
    named = ((name, getattr(module, "comfy_attention", None)) for name, module in model.named_modules())
    configs = ((name, getattr(attention, "config", None)) for name, attention in named)
    return {name: config for name, config in configs if config is not None}


def knows_preferences() -> bool:
    return hasattr(comfy.ldm.modules.attention, "ComfyAttention")


def is_preference(name: str) -> bool:
    """Whether a state dict's tensor is text that its module reads as it is loaded."""
    return name.endswith(".comfy_attention.config")


def uncontained(*tensors: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    """Tensors as they are, and those out of the containers that attention functions consume (0.38 on)."""
    return tuple(tensor.take() if hasattr(tensor, "take") and hasattr(tensor, "peek") else tensor for tensor in tensors)


# Products in 8-bit integers (0.27 on).


def has_int8() -> bool:
    return comfy_kitchen is not None


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes like `weight`, and float32 scales (rows, 1), the columns rotated in groups of 256."""
    codes, params = TensorWiseINT8Layout.quantize(weight, per_channel=True, convrot=True)
    return codes, params.scale.view(-1, 1)


def int8_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, group: int) -> Tensor:
    """The product with rows of `quantize_rows`; x is rotated and quantized token by token."""
    out: Tensor = comfy_kitchen.int8_linear(x, codes, scales, bias, x.dtype, convrot=True, convrot_groupsize=group)
    return out
