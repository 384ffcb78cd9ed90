"""Calling conventions of newer ComfyUI releases, added to ComfyUI 0.30 to test the pack with them.

They are written from descriptions of the behavior. Linears take the operations around their product in one of three
forms. In all of them attention takes containers and a preference of the checkpoint (from 0.38 on).
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import textwrap
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

WAN = ("model", "model_animate", "model_wandancer")
"""ComfyUI's modules below comfy.ldm.wan whose forwards call attention."""


class Container:
    """A container of a tensor that can be taken once; it has no shape."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor: Tensor | None = tensor

    def peek(self) -> Tensor:
        assert self._tensor is not None, "taken already"
        return self._tensor

    def take(self) -> Tensor:
        tensor, self._tensor = self.peek(), None
        return tensor


class ComfyAttention(torch.nn.Module):
    """The preference of an attention module in its checkpoint: `function` replaces ComfyUI's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.config: object = None
        self.function: Callable[..., Tensor] | None = None

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        text = state_dict.pop(f"{prefix}config", None)
        self.config = None if text is None else json.loads(text.numpy().tobytes())

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        if self.config is not None:
            destination[f"{prefix}config"] = torch.tensor(list(json.dumps(self.config).encode()), dtype=torch.uint8)


def install(form: str) -> None:
    """Change ComfyUI's modules permanently, before the pack is imported; `form` is a key of `FORMS`."""
    ops = importlib.import_module("comfy.ops")
    FORMS[form](ops)
    _prefer_and_contain()


def eager(x: Tensor, input_act: str | None, act_weight: Any = None, act_eps: float = 0.0) -> Tensor:
    if input_act is None:
        return x
    if input_act == "rms_norm":
        weight, eps = (act_weight.weight, act_weight.eps) if hasattr(act_weight, "weight") else (act_weight, act_eps)
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight.to(x), eps)
    if input_act == "swiglu":
        gate, up = x.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up
    assert input_act == "gelu_tanh"
    return torch.nn.functional.gelu(x, approximate="tanh")


def _joined(out: Tensor, residual: Tensor | None, residual_scale: Tensor | None) -> Tensor:
    return out if residual is None else torch.addcmul(residual, out, residual_scale)


def _fold_by_function(ops: ModuleType) -> None:
    """Add a function that calls a Linear only where it cannot fold, as in 0.31 to 0.40."""
    folded = getattr(ops, "linear_input_act", None)

    def linear_input_act(
        linear: torch.nn.Module,
        x: Tensor,
        input_act: str | None,
        act_weight: Any = None,
        act_eps: float = 0.0,
        residual: Tensor | None = None,
        residual_scale: Tensor | None = None,
    ) -> Tensor:
        if residual is None and input_act == "gelu_tanh" and folded:
            return folded(linear, x, input_act)
        return _joined(linear(eager(x, input_act, act_weight, act_eps)), residual, residual_scale)

    ops._eager_input_act, ops.linear_input_act = eager, linear_input_act
    _fold_ffn(lambda first, last, x: ops.linear_input_act(last, first(x), "gelu_tanh"))


def _fold_by_keywords(ops: ModuleType) -> None:
    """Make `Linear.forward` pass all keywords to `forward_comfy_cast_weights`, as the main branch did in October."""
    linear = ops.disable_weight_init.Linear
    cast, plain = linear.forward_comfy_cast_weights, torch.nn.Linear.forward

    def forward_comfy_cast_weights(
        self: Any,
        input: Tensor,
        input_act: str | None = None,
        act_weight: Any = None,
        act_eps: float = 0.0,
        residual: Tensor | None = None,
        residual_scale: Tensor | None = None,
    ) -> Tensor:
        return _joined(cast(self, eager(input, input_act, act_weight, act_eps)), residual, residual_scale)

    def forward(
        self: Any,
        input: Tensor,
        input_act: str | None = None,
        act_weight: Any = None,
        act_eps: float = 0.0,
        residual: Tensor | None = None,
        residual_scale: Tensor | None = None,
    ) -> Tensor:
        ops.run_every_op()
        more = {"act_weight": act_weight, "act_eps": act_eps, "residual": residual, "residual_scale": residual_scale}
        if self.comfy_cast_weights or self.weight_function or self.bias_function:
            return self.forward_comfy_cast_weights(input, input_act=input_act, **more)
        return _joined(plain(self, eager(input, input_act, act_weight, act_eps)), residual, residual_scale)

    ops._eager_input_act = eager
    linear.forward_comfy_cast_weights, linear.forward = forward_comfy_cast_weights, forward
    _fold_ffn(_called_with_keywords(linear))


def _fold_in_forward(ops: ModuleType) -> None:
    """Make `Linear.forward` take the keywords and apply them itself, as a branch did in October."""
    linear = ops.disable_weight_init.Linear
    plain = linear.forward

    def forward(
        self: Any,
        input: Tensor,
        input_act: str | None = None,
        act_weight: Any = None,
        act_eps: float = 0.0,
        residual: Tensor | None = None,
        residual_scale: Tensor | None = None,
        act_scale: Tensor | None = None,
        act_shift: Tensor | None = None,
        act_up: Tensor | None = None,
    ) -> Tensor:
        return _joined(plain(self, eager(input, input_act, act_weight, act_eps)), residual, residual_scale)

    linear.forward, ops._eager_input_act = forward, eager
    _fold_ffn(_called_with_keywords(linear))


FORMS = {"function": _fold_by_function, "keywords": _fold_by_keywords, "forward": _fold_in_forward}


def _called_with_keywords(linear: type) -> Callable[..., Tensor]:
    def forward(first: torch.nn.Module, last: torch.nn.Module, x: Tensor) -> Tensor:
        if isinstance(last, linear):
            return last(first(x), input_act="gelu_tanh")
        return last(eager(first(x), "gelu_tanh"))

    return forward


def _fold_ffn(linear_input_act: Callable[..., Tensor]) -> None:
    """Fold the GELU of Wan's FFN into the second product, but keep its module, so that states have the same names."""
    block = importlib.import_module("comfy.ldm.wan.model").WanAttentionBlock

    class WanFeedForward(torch.nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return linear_input_act(self[0], self[2], x)

    def fold(block: Any) -> None:
        block.ffn.__class__ = WanFeedForward

    _after_init(block, fold)


def _after_init(cls: type, change: Callable[[Any], None]) -> None:
    built = cls.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        built(self, *args, **kwargs)
        change(self)

    cls.__init__ = init


def _prefer_and_contain() -> None:
    attention = importlib.import_module("comfy.ldm.modules.attention")
    attention.ComfyAttention, attention.AttentionTensorContainer = ComfyAttention, Container
    model = importlib.import_module("comfy.ldm.wan.model")
    _after_init(model.WanSelfAttention, lambda module: setattr(module, "comfy_attention", ComfyAttention()))
    for name in WAN:
        module = importlib.import_module(f"comfy.ldm.wan.{name}")
        module.optimized_attention = _unwrapping(attention.optimized_attention)
        module.AttentionTensorContainer = Container
        for cls in _classes(module):
            cls.forward = _containing(cls, module, prefers=issubclass(cls, model.WanSelfAttention))


def _unwrapping(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def optimized_attention(
        q: Any, k: Any, v: Any, *args: Any, preferred_attention: Any = None, **kwargs: Any
    ) -> Tensor:
        q, k, v = (x.take() if isinstance(x, Container) else x for x in (q, k, v))
        overridden = "optimized_attention_override" in (kwargs.get("transformer_options") or {})
        if not overridden and preferred_attention is not None and preferred_attention.function is not None:
            return preferred_attention.function(q, k, v, *args, **kwargs)
        return attention(q, k, v, *args, **kwargs)

    return optimized_attention


def _classes(module: ModuleType) -> Iterator[type]:
    """Yield the classes whose own forward calls attention."""
    own = (c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__)
    return (c for c in own if "forward" in vars(c) and "optimized_attention" in c.forward.__code__.co_names)


class _Containing(ast.NodeTransformer):
    """A transformer that puts q, k and v into containers where attention is called."""

    def __init__(self, prefers: bool) -> None:
        self._prefers = prefers

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "optimized_attention":
            wrap = ast.Name("AttentionTensorContainer", ast.Load())
            node.args = [ast.Call(wrap, [part], []) for part in node.args[:3]] + node.args[3:]
            if self._prefers:
                preferred = ast.parse("self.comfy_attention", mode="eval").body
                node.keywords.append(ast.keyword("preferred_attention", preferred))
        return node


def _containing(cls: type, module: ModuleType, *, prefers: bool) -> Callable[..., Any]:
    """Return the forward of a class, as newer releases write it."""
    tree = _Containing(prefers).visit(ast.parse(textwrap.dedent(inspect.getsource(cls.forward))))
    names: dict[str, Any] = {}
    exec(compile(ast.fix_missing_locations(tree), inspect.getfile(cls), "exec"), vars(module), names)  # noqa: S102
    return names["forward"]
