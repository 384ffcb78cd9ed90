"""Linear and Embedding on packed weights: the only layers that see GGUF blocks, all others get plain tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import comfy.ops
import torch
from torch import Tensor
from torch.nn.functional import linear

from ..quant import QTYPES
from .layout import dense, is_packed
from .matmul import WeightFunction, packed_linear

if TYPE_CHECKING:
    from typing_extensions import Self


class GGUFModule(torch.nn.Module):
    """Parameters that take the checkpoint's tensors as they are: no allocation before, no copy or cast at loading."""

    weight: Any
    """Packed blocks, or a plain tensor where the file has one."""
    weight_function: list[WeightFunction]
    """The host's: applied in turn to the decoded weight at every use."""
    weight_lowvram_function: object
    """The host's with dynamic VRAM: what it would round into the packed blocks."""

    _mapped: tuple[torch.nn.Parameter, ...] = ()
    """The packed weight as it was loaded, while another device has a copy; in a tuple, torch does not count it in."""

    def _declare(self, dtype: torch.dtype | None, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self._missing_dtype = dtype
        for name in ("weight", "bias"):
            self.register_parameter(name, None)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name, shape in self._shapes.items():
            value = state_dict.get(prefix + name)
            if value is None:
                missing_keys.append(prefix + name)
                value = torch.zeros(shape, dtype=self._missing_dtype)
            elif value.shape != shape:
                error_msgs.append(f"{prefix}{name}: shape {tuple(value.shape)} in the file, {shape} in the model")
            self.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
        known = {prefix + name for name in self._shapes}
        unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key not in known]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if is_packed(self.weight):
            self._keep_mapped(fn(torch.empty(0, device=self.weight.device)).device)
        # torch's own version swaps the data of a parameter in place, which a wrapper tensor does not support.
        comfy.ops._quantized_apply(self, fn, recurse)
        return self

    def _keep_mapped(self, target: torch.device) -> None:
        """Before a move: blocks do not change, so those that return to main memory are the mapped ones, not a copy."""
        if target.type != "cpu" and self.weight.device.type == "cpu":
            self._mapped = (self.weight,)
        elif target.type == "cpu" and self._mapped:
            (self.weight,), self._mapped = self._mapped, ()

    def cast(self, like: Tensor) -> tuple[Tensor, Tensor | None, list[WeightFunction], Any]:
        """The host's `cast_bias_weight`, which decodes the whole weight for a LoRA, without that.

        Returns:
            Weight, bias, and the weight functions still to be applied, on the device of `like`: there are some only
            for a weight that is still packed (`DecodedRows` applies them). A weight that is not has the dtype of
            `like`. Last, what `comfy.ops.uncast_bias_weight(self, weight, bias, stream)` wants after the last use.
        """
        functions = self.weight_function
        # A compiled graph has the weight whole anyway, and must not write to the module.
        if not functions or not is_packed(self.weight) or torch.compiler.is_compiling():
            weight, bias, stream = comfy.ops.cast_bias_weight(self, like, offloadable=True, compute_dtype=like.dtype)
            return weight, bias, [], stream
        self.weight_function = []
        try:
            weight, bias, stream = comfy.ops.cast_bias_weight(self, like, offloadable=True, compute_dtype=like.dtype)
        finally:
            self.weight_function = functions
        if is_packed(weight):
            return weight, bias, functions, stream
        for function in functions:
            weight = function(weight)
        return weight, bias, [], stream

    def convert_weight(self, weight: Tensor, inplace: bool = False, **_: object) -> Tensor:
        """The host calls this before it patches a weight; the result is dense and may be written to."""
        return dense(weight, weight.dtype)


class GGUFOps(comfy.ops.manual_cast):
    """The host's `operations` for a model from a GGUF file."""

    class Linear(GGUFModule, comfy.ops.manual_cast.Linear):
        multiply = staticmethod(packed_linear)

        def __init__(
            self,
            in_features: int,
            out_features: int,
            bias: bool = True,
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
        ) -> None:
            torch.nn.Module.__init__(self)
            self.in_features, self.out_features = in_features, out_features
            shapes: dict[str, tuple[int, ...]] = {"weight": (out_features, in_features)}
            self._declare(dtype, shapes | ({"bias": (out_features,)} if bias else {}))

        def forward_comfy_cast_weights(self, input: Tensor) -> Tensor:
            weight, bias, functions, stream = self.cast(input)
            packed = is_packed(weight)
            try:
                return self.multiply(input, weight, bias, functions) if packed else linear(input, weight, bias)
            finally:  # also when memory runs out, else the weight's page of video memory is held for ever
                comfy.ops.uncast_bias_weight(self, weight, bias, stream)

    class Embedding(GGUFModule, comfy.ops.manual_cast.Embedding):
        def __init__(
            self,
            num_embeddings: int,
            embedding_dim: int,
            padding_idx: int | None = None,
            max_norm: float | None = None,
            norm_type: float = 2.0,
            scale_grad_by_freq: bool = False,
            sparse: bool = False,
            device: torch.device | None = None,
            dtype: torch.dtype | None = None,
        ) -> None:
            torch.nn.Module.__init__(self)
            self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
            self.max_norm, self.norm_type = max_norm, norm_type
            self.scale_grad_by_freq, self.sparse = scale_grad_by_freq, sparse
            self._declare(dtype, {"weight": (num_embeddings, embedding_dim)})

        def forward_comfy_cast_weights(self, input: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
            """Gathers where the table lies, so that a table of gigabytes never crosses to the accelerator."""
            if self.weight_function or not is_packed(self.weight):
                plain: Tensor = super().forward_comfy_cast_weights(input, out_dtype)
                return plain
            packed, qtype = self.weight._qdata, QTYPES[self.weight.params.qtype]
            rows: Tensor = qtype.dequantize(packed[input.to(packed.device)], out_dtype or self.weight.dtype)
            return rows.to(input.device)


def computing_in(dtype: torch.dtype) -> type[GGUFOps]:
    """Operations whose matrix products are in `dtype`, whatever that of their input, which the result has again."""

    class Operations(GGUFOps):
        class Linear(GGUFOps.Linear):
            def forward_comfy_cast_weights(self, input: Tensor) -> Tensor:
                return super().forward_comfy_cast_weights(input.to(dtype)).to(input.dtype)

    return Operations


def gguf_modules(model: torch.nn.Module) -> Iterator[tuple[str, GGUFModule]]:
    """Every layer of ours, with the state-dict key of its weight."""
    for name, module in model.named_modules():
        if isinstance(module, GGUFModule):
            yield f"{name}.weight", module


def packed_modules(model: torch.nn.Module) -> Iterator[tuple[str, GGUFModule]]:
    """Those whose weight is packed now."""
    return ((key, module) for key, module in gguf_modules(model) if is_packed(module.weight))
