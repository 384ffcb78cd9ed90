"""The seam to ComfyUI: private or unstable names of ComfyUI are used only here and in `host_products`.

Tests ran with 0.24.0, 0.27.0, 0.30.0 and 0.33.0. The sources up to 0.39.1 and the main branch of 9 October 2026 were
read. Comments name the versions that have what others lack. `host_check` compares the calls at start.
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
except ImportError:  # Before 0.27.
    comfy_kitchen = None

Forwards = dict[torch.nn.Module, Callable[..., Any]]
"""The function to call instead of `forward`, by module."""

Methods = dict[torch.nn.Module, dict[str, Callable[..., Any]]]
"""The functions to call instead of other methods, by module and name."""

COMPILE_KEY = "torch.compile"
"""The key of the wrapper that TorchCompileModel adds (comfy_api/torch_helpers/torch_compile.py)."""

# Quantized tensors.


def packed_bytes(tensor: QuantizedTensor) -> Tensor:
    """Return the stored bytes of a quantized tensor without a copy: uint8, (rows, bytes per row), for a GGUF tensor."""
    qdata: Tensor = tensor._qdata
    return qdata


def layout_name(tensor: QuantizedTensor) -> str:
    """Return the name under which the layout of the tensor is registered."""
    name: str = tensor._layout_cls
    return name


def move_parameters(module: torch.nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool) -> None:
    """Do what `torch.nn.Module._apply` does, for tensors of any shape and dtype, quantized ones included."""
    comfy.ops._quantized_apply(module, fn, recurse)


# The forward pass of a Linear.


def begin_use() -> None:
    """Do what the host does before each use of a weight, such as raising an interruption of the prompt."""
    comfy.ops.run_every_op()


def cast(module: torch.nn.Module, like: Tensor) -> tuple[Tensor, Tensor | None, Any]:
    """Return weight and bias in their shapes, on the device and in the dtype of `like`, and the handle for `uncast`."""
    weight, bias, handle = comfy.ops.cast_bias_weight(module, like, offloadable=True, compute_dtype=like.dtype)
    return weight, bias, handle


def uncast(module: torch.nn.Module, weight: Tensor, bias: Tensor | None, handle: object) -> None:
    """Give weight and bias back to the host after their last use, in the shape and dtype that `cast` returned."""
    comfy.ops.uncast_bias_weight(module, weight, bias, handle)


def is_streamed(module: torch.nn.Module) -> bool:
    """Return whether the host can cast the module's weights at each use instead of keeping them on the device."""
    return hasattr(module, "comfy_cast_weights")


def is_lent(module: torch.nn.Module, weight: Tensor, handle: Any) -> bool:  # noqa: ANN401
    """Return whether a weight of any shape that `cast` returned lies in memory that the host reuses, or is on meta.

    A conversion to a dtype makes a new tensor, but pages are in `_model_dtype`. A patch may write in place.
    """
    own: Any = module.weight
    streamed = own.is_meta or hasattr(module, "_v") or (handle is not None and handle[0] is not None)
    stored = own.dtype, getattr(own, "_model_dtype", own.dtype)
    same = isinstance(weight, QuantizedTensor) == isinstance(own, QuantizedTensor)
    return streamed and same and weight.dtype in stored


def apply_activation(x: Tensor, activation: str | None, weight: object = None, eps: float = 0.0) -> Tensor:
    """Apply the activation that the host passes to a Linear together with its input.

    Args:
        x: floating point, any shape.
        activation: the host's name of it, or None.
        weight: the parameter of the activation, a tensor or a norm module.
        eps: the epsilon of the activation.

    Returns:
        The dtype of x; the last dimension may be another one.

    Raises:
        QuantError: an activation that this host does not know.

    Source: comfy/ops.py _eager_input_act (by 0.39) and INPUT_ACT_EAGER (from 0.30).
    """
    if activation is None:
        return x
    eager = getattr(comfy.ops, "_eager_input_act", None)
    if eager is None:
        known = getattr(comfy.ops, "INPUT_ACT_EAGER", {})
        if activation not in known:
            raise unknown_call(f"the activation {activation!r}")
        out: Tensor = known[activation](x)
    else:
        n_parameters = len(inspect.signature(eager).parameters)
        out = eager(*(x, activation, weight, eps)[:n_parameters])
    return out


def linear_input(
    input: Tensor, input_act: str | None = None, act_weight: object = None, act_eps: float = 0.0, **_: object
) -> Tensor:
    """Return what a Linear multiplies with its weight if called so: (..., in_features), in the dtype of `input`."""
    return apply_activation(input, input_act, act_weight, act_eps)


def unknown_call(what: str) -> QuantError:
    """Return the error for an argument of a layer that this pack does not know."""
    return QuantError(
        f"ComfyUI {host_version()} passes {what} to a layer, which this WanQuant does not know; update WanQuant"
    )


@contextmanager
def in_place(forwards: Forwards, methods: Methods | None = None) -> Iterator[None]:
    """Replace `forward`, and other methods, of these module instances until the context ends.

    The host has no hook for this: its object patches work the same way, but stay until the model is unloaded. From 0.40
    on, `comfy_force_forward` keeps the host from merging a layer with its neighbors without a call of the layer.
    """
    methods = methods or {}
    names = {"forward", "comfy_force_forward"}.union(*methods.values())
    modules = {**forwards, **methods}
    before = [(vars(m), {name: vars(m)[name] for name in names if name in vars(m)}) for m in modules]
    try:
        for module, forward in forwards.items():
            vars(module).update(forward=forward, comfy_force_forward=True)
        for module, own in methods.items():
            vars(module).update(own)
        yield
    finally:
        for attributes, kept in before:
            for name in names:
                attributes.pop(name, None)
            attributes.update(kept)


def folds_activations(module: torch.nn.Module) -> bool:
    """Return whether the host's forward of a container may skip the call of one of its layers (0.31 to 0.39)."""
    return "linear_input_act" in _names_used_by(type(module).forward)


def _names_used_by(function: Any) -> tuple[str, ...]:  # noqa: ANN401
    code = getattr(function, "__code__", None)
    return (*code.co_names, *code.co_freevars) if code else ()


# Files.


def dynamic_vram() -> bool:
    """Return whether the host streams weights with its own allocator, and maps files itself."""
    return bool(comfy.memory_management.aimdo_enabled)


def map_file(path: Path) -> Any:  # noqa: ANN401
    """Map a file with the host's own class: `get()` is its address, `get_file_handle()` is for `annotate_slice`.

    Raises:
        QuantError: the file cannot be mapped.
    """
    # Imported late: the module needs a library that the host loads only for dynamic VRAM.
    from comfy_aimdo.model_mmap import ModelMMAP

    try:
        return ModelMMAP(os.fspath(path))
    except RuntimeError as error:
        raise QuantError(
            f"{path}: cannot be mapped into memory: {error}; restart ComfyUI and load the file again"
        ) from None


def annotate_slice(data: Tensor, handle: object, lock: threading.Lock, offset: int, keep: object) -> None:
    """Annotate a mapped tensor with its place in the file, so that dynamic VRAM reads it from disk to the device.

    Args:
        data: uint8 of any shape, a whole storage, because the host ignores slices of any other size.
        handle: what `map_file(...).get_file_handle()` returns.
        lock: held by the host while it reads the file.
        offset: bytes from the start of the file.
        keep: an object to keep alive as long as the tensor.
    """
    storage: Any = data.untyped_storage()
    storage._comfy_tensor_file_slice = comfy.memory_management.TensorFileSlice(handle, lock, offset, data.nbytes)
    storage._comfy_tensor_mmap_refs = keep


def annotate_source(tensor: Tensor, path: Path) -> Tensor:
    """Annotate a tensor of any shape and dtype with the file that it comes from, and return it.

    From 0.39 on, the host does not pin weights in main memory if all their files are on fast disks. One tensor without
    a file makes the whole model count as on a slow disk.

    Source: comfy/storage.py annotate_state_dict.
    """
    storage: Any = tensor.untyped_storage()
    storage._comfy_source_path = os.path.realpath(path)
    return tensor


# Dynamic VRAM.


def limit_resident(model: BaseModel, device: torch.device, nbytes: int) -> None:
    """Limit the bytes of weights that stay on the device; the host lifts the limit when the next prompt begins."""
    vbar = model.dynamic_vbars.get(device)
    if vbar is not None:
        vbar.set_watermark_limit(nbytes)


def prefetch_options(arguments: Iterable[object]) -> dict[str, Any]:
    """Return the transformer options among the arguments of a call, or {} if the call must not prefetch."""
    return next((a for a in arguments if isinstance(a, dict) and "prefetch_dynamic_vbars" in a), {})


def prefetch_queue(modules: list[torch.nn.Module], device: torch.device, options: dict[str, Any]) -> list[Any] | None:
    """Return the host's prefetch queue, or None if it has none: in another memory mode, or without streams."""
    queue: list[Any] | None = comfy.model_prefetch.make_prefetch_queue(modules, device, options)
    return queue


def advance(queue: list[Any], device: torch.device, module: torch.nn.Module | None) -> None:
    """Free the weights of the previous module, and start to copy those of the next; None after the last one."""
    comfy.model_prefetch.prefetch_queue_pop(queue, device, module)


def prefetches(model: torch.nn.Module) -> bool:
    """Return whether the host's own forward of this model prefetches its blocks."""
    forwards = (getattr(type(model), name, None) for name in ("forward", "_forward", "forward_orig"))
    return any("prefetch_queue_pop" in _names_used_by(forward) for forward in forwards)


def without_prefetch(options: dict[str, Any]) -> dict[str, Any]:
    """Return options for a call that runs all Python code.

    Without them the host may replay a prefetched block as a CUDA graph (0.33 on).
    """
    return options | {"prefetch_dynamic_vbars": False}


def outside_graphs() -> AbstractContextManager[Any]:
    """Return a context in which allocations may outlive the block that makes them.

    Within the host's allocation graphs (by 0.38) they must not.

    Source: comfy/model_prefetch.py pause_malloc_graph.
    """
    pause = getattr(comfy.model_prefetch, "pause_malloc_graph", nullcontext)
    context: AbstractContextManager[Any] = pause()
    return context


allocate_within(outside_graphs)


# The model and its patcher.


def loaded_patches_uuid(model: BaseModel) -> object:
    """Return the `patches_uuid` of the patcher whose weights are loaded, or None while none are."""
    return model.current_weight_patches_uuid


def resident_bytes(model: BaseModel) -> int:
    """Return the bytes that the host counts for the model on the device, including its buffer for streaming."""
    nbytes: int = model.model_loaded_weight_memory + model.model_offload_buffer_memory
    return nbytes


def add_resident_bytes(model: BaseModel, nbytes: int) -> None:
    """Make the host count `nbytes` more for the model on the device."""
    model.model_loaded_weight_memory += nbytes


def compute_dtype(model: BaseModel) -> torch.dtype | None:
    """Return the dtype that the model computes in, if it differs from that of its weights."""
    dtype: torch.dtype | None = model.manual_cast_dtype
    return dtype


def set_compute_dtype(model: BaseModel, dtype: torch.dtype) -> None:
    """Make the model compute in `dtype`; the host then also counts the dequantized weights in its estimates."""
    model.manual_cast_dtype = dtype


def remember_loader(patcher: ModelPatcher, load: Callable[..., ModelPatcher]) -> None:
    """Register the function with which the host loads the model again in its legacy memory mode."""
    patcher.cached_patcher_init = (load, ())


def unpatched_weights(patcher: ModelPatcher) -> dict[str, Tensor]:
    """Return the weights that the host patched in place, in the shapes and dtypes as they were loaded, by key."""
    return {key: backup.weight for key, backup in patcher.backup.items()}


def is_host_patch(function: object) -> bool:
    """Return whether a weight function is the host's own, for the patches of a streamed weight."""
    return isinstance(function, LowVramPatch)


def keep_from_rounding(module: torch.nn.Module) -> None:
    """Remove the patches that dynamic VRAM would round into the packed blocks."""
    if hasattr(module, "weight_lowvram_function"):
        module.weight_lowvram_function = None  # type: ignore[assignment]


# Attention.


def attention_options(attention: torch.nn.Module) -> dict[str, Any]:
    """Return the arguments that select the attention function that the checkpoint prefers here (0.38 on)."""
    preferred = getattr(attention, "comfy_attention", None)
    return {} if preferred is None else {"preferred_attention": preferred}


def prefers_attention(attention: torch.nn.Module) -> bool:
    """Return whether the checkpoint prefers another attention function in this module."""
    return getattr(getattr(attention, "comfy_attention", None), "function", None) is not None


def attention_preferences(model: torch.nn.Module) -> dict[str, object]:
    """Return the attention preferences of a loaded model's checkpoint, by module name."""
    named = ((name, getattr(module, "comfy_attention", None)) for name, module in model.named_modules())
    configs = ((name, getattr(attention, "config", None)) for name, attention in named)
    return {name: config for name, config in configs if config is not None}


def knows_preferences() -> bool:
    """Return whether the host reads attention preferences from a checkpoint (0.38 on)."""
    return hasattr(comfy.ldm.modules.attention, "ComfyAttention")


def is_preference(name: str) -> bool:
    """Return whether a tensor of a state dict holds the text of an attention preference."""
    return name.endswith(".comfy_attention.config")


def uncontained(*tensors: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
    """Return the tensors, of any shape and dtype, each taken out of its container if it is in one (0.38 on)."""
    return tuple(tensor.take() if hasattr(tensor, "take") and hasattr(tensor, "peek") else tensor for tensor in tensors)


# Products in 8-bit integers (0.27 on).


def has_int8() -> bool:
    """Return whether the host can multiply 8-bit integers."""
    return comfy_kitchen is not None


def int8_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, group: int) -> Tensor:
    """Return the product of x with rotated rows of 8-bit integers; x is rotated and quantized token by token.

    Args:
        x: floating point, (..., columns).
        codes: int8, (rows, columns).
        scales: float32, (rows, 1).
        bias: the dtype of x, (rows,).
        group: the number of columns that are rotated together.

    Returns:
        The dtype of x, (..., rows).
    """
    kind = TensorWiseINT8Layout
    params = kind.Params(scales, x.dtype, tuple(codes.shape), convrot=True, convrot_groupsize=group)
    return torch.nn.functional.linear(x, QuantizedTensor(codes, kind.__name__, params), bias)
