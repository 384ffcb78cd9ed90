"""Linear and Embedding on packed weights: the only layers that see GGUF blocks, all others get plain tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import comfy.ops
import torch
from torch import Tensor
from torch.nn.functional import linear

from ...quant import QTYPES
from .. import host
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
        host.move_parameters(self, fn, recurse)
        return self

    def _keep_mapped(self, target: torch.device) -> None:
        """Before a move: blocks do not change, so those that return to main memory are the mapped ones, not a copy."""
        if target.type != "cpu" and self.weight.device.type == "cpu":
            self._mapped = (self.weight,)
        elif target.type == "cpu" and self._mapped:
            (self.weight,), self._mapped = self._mapped, ()

    def cast(self, like: Tensor) -> tuple[Tensor, Tensor | None, list[WeightFunction], Any]:
        """`host.cast`, which decodes the whole weight for a LoRA, without that.

        Returns:
            Weight, bias, and the weight functions still to be applied, on the device of `like`: there are some only
            for a weight that is still packed (`DecodedRows` applies them). A weight that is not has the dtype of
            `like`. Last, the handle that `host.uncast` wants after the last use.
        """
        functions = self.weight_function
        # A compiled graph has the weight whole anyway, and must not write to the module.
        if not functions or not is_packed(self.weight) or torch.compiler.is_compiling():
            weight, bias, handle = host.cast(self, like)
            return weight, bias, [], handle
        self.weight_function = []
        try:
            weight, bias, handle = host.cast(self, like)
        finally:
            self.weight_function = functions
        if is_packed(weight):
            return weight, bias, functions, handle
        for function in functions:
            weight = function(weight)
        return weight, bias, [], handle

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

        def forward_comfy_cast_weights(
            self,
            input: Tensor,
            input_act: str | None = None,
            act_weight: object = None,
            act_eps: float = 0.0,
            residual: Tensor | None = None,
            residual_scale: Tensor | None = None,
            **others: object,
        ) -> Tensor:
            """The host's call. Some versions hand over what surrounds the product, to be folded with it."""
            _refuse(others)
            product = self.product(host.activated(input, input_act, act_weight, act_eps))
            return _joined(product, residual, residual_scale)

        def product(self, x: Tensor) -> Tensor:
            """(..., in_features) -> (..., out_features)."""
            weight, bias, functions, handle = self.cast(x)
            packed = is_packed(weight)
            try:
                return self.multiply(x, weight, bias, functions) if packed else linear(x, weight, bias)
            finally:  # also when memory runs out, else the weight's page of video memory is held for ever
                host.uncast(self, weight, bias, handle)

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

        def forward_comfy_cast_weights(
            self, input: Tensor, out_dtype: torch.dtype | None = None, **others: object
        ) -> Tensor:
            """Gathers where the table lies, so that a table of gigabytes never crosses to the accelerator."""
            _refuse(others)
            if self.weight_function or not is_packed(self.weight):
                plain: Tensor = super().forward_comfy_cast_weights(input, out_dtype)
                return plain
            packed, qtype = host.packed_bytes(self.weight), QTYPES[self.weight.params.qtype]
            rows: Tensor = qtype.dequantize(packed[input.to(packed.device)], out_dtype or self.weight.dtype)
            return rows.to(input.device)

        def host_rows(self, input: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
            """What the host asks for instead (0.39 on) where the table is not on the accelerator."""
            return self.forward_comfy_cast_weights(input, out_dtype)


def computing_in(dtype: torch.dtype) -> type[GGUFOps]:
    """Operations whose matrix products are in `dtype`, whatever that of their input, which the result has again."""

    class Operations(GGUFOps):
        class Linear(GGUFOps.Linear):
            def product(self, x: Tensor) -> Tensor:
                return super().product(x.to(dtype)).to(x.dtype)

    return Operations


def _joined(product: Tensor, residual: Tensor | None, scale: Tensor | None) -> Tensor:
    """`residual + scale * product`, as the host computes it."""
    if residual is None:
        return product
    return residual + product if scale is None else torch.addcmul(residual, product, scale)


def _refuse(others: dict[str, object]) -> None:
    """Raise QuantError for what a newer host hands a layer, and this pack would leave out."""
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise host.unknown_call(", ".join(given))


def gguf_modules(model: torch.nn.Module) -> Iterator[tuple[str, GGUFModule]]:
    """Every layer of ours, with the state-dict key of its weight."""
    for name, module in model.named_modules():
        if isinstance(module, GGUFModule):
            yield f"{name}.weight", module


def packed_modules(model: torch.nn.Module) -> Iterator[tuple[str, GGUFModule]]:
    """Those whose weight is packed now."""
    return ((key, module) for key, module in gguf_modules(model) if is_packed(module.weight))
