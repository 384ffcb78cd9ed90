"""Linear and Embedding layers on packed weights; all other layers get plain tensors when a file is loaded.

A forward pass of `GGUFOps.Linear` has these steps:

1. ComfyUI calls `forward_comfy_cast_weights` with the input.
2. `GGUFModule.cast` lets the host bring the weight to the device of the input. The weight arrives packed.
3. `packed_linear` (`matmul.py`) dequantizes some rows of the weight into a tile of at most 64 MiB. The tile holds all
   rows only if a patch needs the whole weight.
4. The layer's patches, such as LoRAs, are added to the tile (`patches.py`).
5. The input is multiplied with the tile, which yields the output features of these rows.
6. Steps 3 to 5 repeat until all rows are done. Then `host.uncast` gives the weight back to the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import comfy.ops
import torch
from torch import Tensor
from torch.nn.functional import linear

from ...quant import QTYPES
from ...quant.sources.names import unwrapped
from .. import host
from .layout import dense, is_packed
from .matmul import WeightFunction, hold_dense, packed_linear

if TYPE_CHECKING:
    from typing_extensions import Self


class GGUFModule(torch.nn.Module):
    """A layer whose parameters are the tensors of the file: nothing is allocated before loading, or copied by it."""

    weight: Any
    """A packed tensor, or a plain one if the file has one."""
    weight_function: list[WeightFunction]
    """Functions in the host's list for this layer; each use of the weight applies them to it in turn."""

    _mapped: tuple[torch.nn.Parameter, ...] = ()
    """The mapped weight while a copy is on another device. The tuple hides it from torch's list of parameters."""

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
        # ComfyUI runs nodes in inference mode, but unloads models on request outside of it. There it would copy all
        # that is mapped, to copies that fail in the next run.
        with torch.inference_mode(self.weight is not None and self.weight.is_inference()):
            host.move_parameters(self, fn, recurse)
        return self

    def _keep_mapped(self, target: torch.device) -> None:
        """Prepare a move to `target`: a weight that returns to main memory becomes the mapped one again, not a copy."""
        if target.type != "cpu" and self.weight.device.type == "cpu":
            self._mapped = (self.weight,)
        elif target.type == "cpu" and self._mapped:
            (self.weight,), self._mapped = self._mapped, ()

    def cast(self, like: Tensor) -> tuple[Tensor, Tensor | None, list[WeightFunction], Any]:
        """Bring weight and bias to the device of `like`, and keep a packed weight packed.

        `host.cast` alone would dequantize the whole weight to apply its functions.

        Returns:
            The weight, (out_features, in_features): packed, or else of the dtype of `like`. The bias, of the dtype of
            `like`, (out_features,). The functions that are left to apply to a packed weight (`PatchedRows` does).
            The handle to pass to `host.uncast` after the last use.
        """
        functions = self.weight_function
        # A compiled graph dequantizes the whole weight anyway, and must not write to the module.
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
        """Return the dequantized weight, which the host then patches in place."""
        return dense(weight, weight.dtype)


class GGUFOps(comfy.ops.manual_cast):
    """The host's `operations` for a model from a GGUF file."""

    class Linear(GGUFModule, comfy.ops.manual_cast.Linear):
        multiply = staticmethod(packed_linear)
        hold = staticmethod(hold_dense)
        """Prepares rows of the packed weight for products with many chunks of the tokens; see `hold_dense`."""

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
            """Run the layer, with the activation before it and the sum after it where the host passes these."""
            _refuse_unknown(others)
            product = self.product(host.apply_activation(input, input_act, act_weight, act_eps))
            return _add_residual(product, residual, residual_scale)

        def product(self, x: Tensor) -> Tensor:
            """Multiply x, floating point, (..., in_features), and return (..., out_features) of the same dtype."""
            weight, bias, functions, handle = self.cast(x)
            packed = is_packed(weight)
            try:
                return self.multiply(x, weight, bias, functions) if packed else linear(x, weight, bias)
            finally:  # Also when memory runs out, so that the host can reuse the weight's page of video memory.
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
            """Look up rows on the device of the table, so that gigabytes do not move to the accelerator.

            Args:
                input: integers, any shape.

            Returns:
                (*input.shape, embedding_dim), of `out_dtype` or else the dtype of the weight.
            """
            _refuse_unknown(others)
            if self.weight_function or not is_packed(self.weight):
                plain: Tensor = super().forward_comfy_cast_weights(input, out_dtype)
                return plain
            packed, qtype = host.packed_bytes(self.weight), QTYPES[self.weight.params.qtype]
            rows: Tensor = qtype.dequantize(packed[input.to(packed.device)], out_dtype or self.weight.dtype)
            return rows.to(input.device)

        def host_rows(self, input: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
            """Look up rows; hosts from 0.39 call this method if the table is not on the accelerator."""
            return self.forward_comfy_cast_weights(input, out_dtype)


def computing_in(dtype: torch.dtype) -> type[GGUFOps]:
    """Return operations that multiply matrices in `dtype`; outputs have the dtype of the input."""

    class Operations(GGUFOps):
        class Linear(GGUFOps.Linear):
            def product(self, x: Tensor) -> Tensor:
                return super().product(x.to(dtype)).to(x.dtype)

    return Operations


def _add_residual(product: Tensor, residual: Tensor | None, scale: Tensor | None) -> Tensor:
    """Return `residual + scale * product`, with the host's rounding."""
    if residual is None:
        return product
    return residual + product if scale is None else torch.addcmul(residual, product, scale)


def _refuse_unknown(others: dict[str, object]) -> None:
    """Raise QuantError for arguments of a newer host, which this pack would ignore."""
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise host.unknown_call(", ".join(given))


def gguf_modules(model: torch.nn.Module) -> Iterator[tuple[str, GGUFModule]]:
    """Yield all layers of this pack in the model, each after the key of its weight without torch.compile."""
    for name, module in model.named_modules():
        if isinstance(module, GGUFModule):
            yield unwrapped(f"{name}.weight"), module


def packed_modules(model: torch.nn.Module) -> Iterator[tuple[str, GGUFModule]]:
    """Return the `gguf_modules` whose weight is packed at present."""
    return ((key, module) for key, module in gguf_modules(model) if is_packed(module.weight))
