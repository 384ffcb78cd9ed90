"""Weights of other packs: their values, or one sentence that names the tensor and its class."""

from __future__ import annotations

import pytest
import torch

from wanquant.ops.packed.foreign import foreign_class, understood
from wanquant.ops.packed.layout import dense
from wanquant.quant import QTYPES, QuantError
from wanquant.tests.ops.packed.foreign_tensors import (
    GGMLQuantizationType,
    StandInGGMLTensor,
    StandInGGUFParameter,
    StandInParams4bit,
    StandInScaled,
)

SHAPE = (8, 256)
NAME = "blocks.0.ffn.0.weight"


@pytest.fixture
def linear():
    return torch.nn.Linear(SHAPE[1], SHAPE[0])


@pytest.fixture
def weight():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_K", "Q6_K", "BF16", "F16", "F32"])
@pytest.mark.parametrize("kind", ["ggml", "name", "diffusers"])
def test_blocks_of_a_declared_type_are_dequantized(linear, weight, name, kind):
    packed = QTYPES[name].quantize(weight, effort="fast")
    if kind == "diffusers":
        foreign = StandInGGUFParameter(packed, GGMLQuantizationType[name])
    else:
        declared = GGMLQuantizationType[name] if kind == "ggml" else name
        foreign = StandInGGMLTensor(packed, tensor_type=declared, tensor_shape=SHAPE)
    values = dense(understood(linear, NAME, foreign), torch.float32)
    assert type(values) is torch.Tensor
    assert torch.equal(values.float(), QTYPES[name].dequantize(packed).view(SHAPE))


def test_plain_numbers_lose_their_class_only(linear, weight):
    foreign = StandInGGMLTensor(weight, tensor_type=GGMLQuantizationType.F32, tensor_shape=SHAPE)
    found = understood(linear, NAME, foreign)
    assert type(found) is torch.Tensor
    assert torch.equal(found, weight)


def test_tensors_that_dequantize_themselves_do_so(linear):
    codes = torch.arange(SHAPE[0] * SHAPE[1], dtype=torch.int32).view(SHAPE).remainder(127).to(torch.int8)
    assert torch.equal(understood(linear, NAME, StandInScaled(codes, 0.5)), codes.float() * 0.5)


def _foreign(kind):
    packed = torch.zeros(SHAPE[0], 136, dtype=torch.uint8)
    return {
        "a type without a name": StandInGGMLTensor(packed, tensor_type=None, tensor_shape=SHAPE),
        "an unknown type": StandInGGMLTensor(packed, tensor_type=GGMLQuantizationType.Q9_X, tensor_shape=SHAPE),
        "bytes of another size": StandInGGMLTensor(packed, tensor_type=GGMLQuantizationType.Q8_0, tensor_shape=SHAPE),
        "nibbles": StandInParams4bit(packed),
        "plain bytes": torch.nn.Parameter(torch.zeros(SHAPE, dtype=torch.uint8), requires_grad=False),
        "plain integers": torch.nn.Parameter(torch.zeros(SHAPE, dtype=torch.int8), requires_grad=False),
        "another shape": torch.nn.Parameter(torch.zeros(SHAPE[::-1])),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "a type without a name",
        "an unknown type",
        "bytes of another size",
        "nibbles",
        "plain bytes",
        "plain integers",
        "another shape",
    ],
)
def test_anything_else_is_refused_with_its_class(linear, kind):
    foreign = _foreign(kind)
    with pytest.raises(QuantError, match=rf"MODEL: tensor blocks\.0\.ffn\.0\.weight: .*{type(foreign).__name__}"):
        understood(linear, NAME, foreign)


def test_one_byte_numbers_with_a_separate_scale_are_refused(linear, weight):
    fp8 = torch.nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False)
    assert understood(linear, NAME, fp8) is fp8
    linear.register_buffer("scale_weight", torch.tensor(2.0))
    with pytest.raises(QuantError, match=r"float8_e4m3fn data is not understood"):
        understood(linear, NAME, fp8)


def test_class_is_found_in_a_model(linear):
    assert foreign_class(linear) is None
    packed = QTYPES["Q8_0"].quantize(torch.zeros(SHAPE), effort="fast")
    foreign = StandInGGMLTensor(packed, tensor_type=GGMLQuantizationType.Q8_0, tensor_shape=SHAPE)
    linear.weight = torch.nn.Parameter(foreign, requires_grad=False)
    assert foreign_class(linear).endswith("foreign_tensors.StandInGGMLTensor")
