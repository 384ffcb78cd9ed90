"""Loads the diffusion model in a GGUF file as a ModelPatcher of the host."""

from __future__ import annotations

import os
from functools import partial
from math import prod

import comfy.sd
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor

from ...quant import QuantError
from ...quant.errors import PrintableLog
from ...quant.gguf.header import Header, TensorRecord, read_header
from ...quant.gguf.provenance import source_metadata
from ...quant.sources.add_ons import find_without_layers
from ...quant.sources.attention import preference_tensors
from ...quant.sources.completeness import check_complete, few_blocks, refuse_missing
from ...quant.sources.names import WAN, Naming, find_naming, known_naming
from .. import host
from ..host_check import check_host
from ..packed.layout import pack, with_dtype
from ..packed.linear import packed_modules
from ..packed.patcher import with_packed_patches
from ..packed.precision import EXACT, packed_ops
from .add_on import check_effect, warn_of_unused, with_add_on
from .by_host import built_by_host
from .dtypes import LOSSLESS, compute_dtype, flagged_model_dtype
from .file_mapping import change_warning, map_files
from .main_memory import check_memory
from .prefetch import prefetch_blocks
from .wan_header import copied_bytes, wan_header, with_copies

logger = PrintableLog(__name__)

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Two-dimensional parameters named `.weight` that the host's models use directly, not in a Linear.
# Source: comfy/ldm/wan/model_animate.py EqualLinear, comfy/ldm/wan/model.py WanModel_S2V, ComfyUI 0.30.0.
_NOT_LINEAR = ("motion_encoder.", "trainable_cond_mask.")

# How the tensor names start, what the file is, and what to do with it.
_OTHER_FILES = (
    (("enc.blk.", "encoder.block."), "a T5 text encoder", "load it with Load Text Encoder (GGUF)"),
    (("v.blk.", "mm.", "v.patch_embd"), "a vision projector (mmproj)", "choose another file"),
    (("blk.", "token_embd."), "a language model or text encoder", "choose another file"),
    (("encoder.downsamples.", "decoder.upsamples.", "decoder.up."), "a VAE", "load its .safetensors with Load VAE"),
)


def load_diffusion_model(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    add_on: str | os.PathLike[str] | None = None,
    precision: str = EXACT,
    disable_dynamic: bool = False,
) -> ModelPatcher:
    """Load a GGUF diffusion model for the host; its weights stay packed until they are used.

    Args:
        path: a GGUF file; of a split one, any part.
        dtype: the dtype to compute in; if None, the host chooses it for the device.
        add_on: a GGUF or safetensors file of an add-on (VACE and the like) for the Wan transformer in `path`.
        precision: of products with many tokens: exact, int8 (`int8_linear`), or auto (`packed_ops`).
        disable_dynamic: load for the host's legacy memory mode, which it needs for torch.compile and hooks.

    Raises:
        QuantError: an incompatible host, a malformed GGUF, a model that this host does not know, an add-on for another
            model or without effect, too little main memory, or `int8` in a host without it.
    """
    check_host()
    base = read_header(path)
    # Wan was trained in bfloat16. The host chooses the final dtype below.
    provisional = dtype or torch.bfloat16
    naming = _find_naming(base, needed=add_on is not None)
    _refuse_other_files(base, naming)
    if naming is not None:
        base = wan_header(base, naming)
    header = base if add_on is None else with_add_on(base, add_on, provisional)
    if naming is not None:
        # The host's detection reads some of the tensors, and would fail without them.
        check_complete(header.path, header.tensors, WAN)
        for warning in filter(None, (naming.warning, *few_blocks(header.path, header.tensors, WAN))):
            logger.warning(warning)
    check_memory(header, dequantized_bytes(header, provisional) + copied_bytes(header))
    data = with_copies(header, map_files(header.parts, dynamic=not disable_dynamic))
    metadata = source_metadata(header.metadata)
    state_dict = {r.name: annotated_tensor(r, data(r), provisional) for r in header.tensors.values()}
    if host.knows_preferences():
        preferences = preference_tensors(metadata)
        state_dict |= {name: host.annotate_source(tensor, header.path) for name, tensor in preferences.items()}
    flagged = None if dtype else flagged_model_dtype()
    stored = LOSSLESS if flagged else dtype
    options = {"custom_operations": packed_ops(precision)} | ({"dtype": stored} if stored else {})
    with built_by_host(header.path):
        patcher = comfy.sd.load_diffusion_model_state_dict(
            state_dict, options, metadata=metadata, disable_dynamic=disable_dynamic
        )
    if patcher is None:
        raise _not_a_model(header, "not a diffusion model that this version of ComfyUI knows")
    if _is_wan(patcher):
        refuse_missing(header.path, _absent(patcher.model.diffusion_model, header))
    if add_on is not None:
        check_effect(patcher.model.diffusion_model, base, header, add_on)
    _set_dtype(patcher.model, dtype or compute_dtype(patcher, flagged))
    host.remember_loader(patcher, partial(load_diffusion_model, path, dtype=dtype, add_on=add_on, precision=precision))
    patcher.add_callback_with_key(CallbacksMP.ON_PRE_RUN, __name__, change_warning(header))
    patcher.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, __name__, prefetch_blocks)
    if _is_wan(patcher):
        warn_of_unused(patcher.model.diffusion_model, base)
    else:
        logger.warning("%s: loaded, but not a Wan model; WanQuant is tested with Wan models only", header.path)
    return with_packed_patches(patcher)


def annotated_tensor(record: TensorRecord, data: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `host_tensor`, in its shape and dtype, annotated with its file for the host."""
    return host.annotate_source(host_tensor(record, data, dtype), record.path)


def host_tensor(record: TensorRecord, data: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor of `record.shape` for the host's state dict.

    It is packed if it belongs to a Linear, and mapped if its type is plain. Any other tensor is dequantized.

    Args:
        record: the tensor in the header.
        data: uint8, (*stored_shape[:-1], row_bytes).
        dtype: what a packed tensor dequantizes to, and a quantized one is dequantized to.
    """
    plain = _PLAIN.get(record.qtype.name)
    if plain is not None:
        aligned = data if data.storage_offset() % plain.itemsize == 0 else data.clone()
        return aligned.view(plain).view(record.shape)
    if _is_linear(record):
        packed: Tensor = pack(data, record.qtype.name, record.shape, dtype)
        return packed
    # Numbers beside the weights, such as F64, have no blocks and keep as many of their bits as possible.
    return record.qtype.dequantize(data, torch.float32 if record.qtype.block_size == 1 else dtype).view(record.shape)


def dequantized_bytes(header: Header, dtype: torch.dtype) -> int:
    """Return the bytes of the tensors that `host_tensor` dequantizes; all others stay mapped."""
    records = (r for r in header.tensors.values() if r.qtype.name not in _PLAIN and not _is_linear(r))
    return sum(prod(record.shape) for record in records) * dtype.itemsize


def _is_linear(record: TensorRecord) -> bool:
    matrix = len(record.shape) == 2 and record.shape == record.stored_shape
    return matrix and record.name.endswith(".weight") and not any(part in record.name for part in _NOT_LINEAR)


def _is_wan(patcher: ModelPatcher) -> bool:
    image_model: str | None = patcher.model.model_config.unet_config.get("image_model")
    return image_model == "wan2.1"


def _absent(model: torch.nn.Module, header: Header) -> list[str]:
    """Return the parameters of the host's model that the file lacks; the host computes the model's buffers itself."""
    return [name for name, _ in model.named_parameters() if name not in header.tensors]


def _set_dtype(model: BaseModel, dtype: torch.dtype) -> None:
    """Make the model compute in `dtype`, and its packed weights dequantize to it."""
    host.set_compute_dtype(model, dtype)
    for _, module in packed_modules(model):
        module.weight = torch.nn.Parameter(with_dtype(module.weight, dtype), requires_grad=False)


def _find_naming(header: Header, *, needed: bool) -> Naming | None:
    """Return the naming of a Wan transformer or add-on; None for another model, unless it is needed."""
    naming = (find_naming if needed else known_naming)(header.path, header.tensors)
    return naming if naming is not None and naming.architecture == WAN else None


def _refuse_other_files(header: Header, naming: Naming | None) -> None:
    kind, architecture = (str(header.metadata.get(f"general.{key}")) for key in ("type", "architecture"))
    if "imatrix" in (kind, architecture):
        raise _not_a_model(header, "an importance matrix")
    if kind == "adapter":
        raise _not_a_model(header, "a LoRA")
    if naming is not None and naming.is_add_on:
        useless = find_without_layers([name.removeprefix(naming.prefix) for name in header.tensors])
        if useless:
            raise QuantError(f"{header.path}: an add-on for a Wan model, with {useless}")
        remedy = "choose it as add_on_name, with the model that it is for"
        raise _not_a_model(header, "an add-on for a Wan model", remedy)
    for prefixes, what, remedy in _OTHER_FILES:
        if any(name.startswith(prefixes) for name in header.tensors):
            raise _not_a_model(header, what, remedy)


def _not_a_model(header: Header, what: str, remedy: str = "choose another file") -> QuantError:
    architecture = header.metadata.get("general.architecture", "not given")
    names = ", ".join(list(header.tensors)[:3]) or "none"
    return QuantError(
        f"{header.path}: {what} (general.architecture {architecture}; tensors {names}, ...);"
        f" expected a diffusion model such as Wan; {remedy}"
    )
