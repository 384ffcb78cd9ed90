"""Saving and loading CONDITIONING, field by field."""

from __future__ import annotations

import json

import pytest
import torch
from comfy.clip_vision import Output as ClipVisionOutput
from safetensors.torch import save_file

from wanquant.ops.conditioning import load_conditioning, save_conditioning
from wanquant.quant import QuantError


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(a, tuple) == isinstance(b, tuple) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, ClipVisionOutput):
        return type(a) is type(b) and same(vars(a), vars(b))
    return type(a) is type(b) and a == b


def seen():
    """Return the output of CLIP Vision for image to video, in which some tensors share memory."""
    output = ClipVisionOutput()
    output["last_hidden_state"] = torch.randn(1, 5, 8)
    output["penultimate_hidden_states"] = output["last_hidden_state"][:, :-1]
    output["mm_projected"], output["image_sizes"] = None, [torch.Size((3, 224, 224))]
    return output


def test_round_trip_is_exact(tmp_path):
    conditioning = [
        [
            torch.randn(1, 7, 16, dtype=torch.bfloat16),
            {
                "pooled_output": None,
                "concat_latent_image": torch.randn(1, 16, 3, 4, 4),
                "concat_mask": torch.ones(1, 1, 1, 4, 4).expand(1, 1, 3, 4, 4),
                "vace_frames": [torch.randn(2, 3), torch.randn(2, 3, dtype=torch.float16)],
                "vace_strength": [1.0, 0.5],
                "clip_vision_output": seen(),
                "guidance": 5,
                "area": (64, 64, 0, 0),
                "strength": 1.0,
                "nested": {"flag": True, "text": "ein Ball ⚽"},
            },
        ],
        [torch.zeros(1, 0, 16), {}],
    ]
    path = str(tmp_path / "prompt.safetensors")
    save_conditioning(conditioning, path)
    assert same(load_conditioning(path), conditioning)
    assert [p.name for p in tmp_path.iterdir()] == ["prompt.safetensors"]


def test_object_is_refused_by_name_and_nothing_is_written(tmp_path):
    with pytest.raises(QuantError, match=r"conditioning\.0\.1\.control: a object object cannot be saved"):
        save_conditioning([[torch.zeros(1), {"control": object()}]], str(tmp_path / "x.safetensors"))
    assert not list(tmp_path.iterdir())


def test_other_files_are_refused(tmp_path):
    garbage, weights = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    garbage.write_bytes(b"no safetensors")
    save_file({"weight": torch.zeros(2)}, weights)
    with pytest.raises(QuantError, match="damaged or not safetensors"):
        load_conditioning(str(garbage))
    with pytest.raises(QuantError, match="no saved conditioning"):
        load_conditioning(str(weights))
    save_file({"weight": torch.zeros(2)}, weights, metadata={"wanquant.conditioning": "["})
    with pytest.raises(QuantError, match="conditioning is not JSON"):
        load_conditioning(str(weights))


PROMPT = {"list": [{"tensor": "x"}, {"dict": {}}]}


@pytest.mark.parametrize(
    "layout",
    [
        {"list": [{"list": [{"list": [{"tensor": "x"}] * 300_000}, {"dict": {}}]}]},
        {"list": [PROMPT, PROMPT]},
        {"list": [{"list": [5, 6]}]},
        {"list": [{"list": [{"tensor": "x"}, None]}]},
        {"list": [{"list": [{"tensor": None}, {"dict": {}}]}]},
    ],
    ids=["one tensor many times", "one tensor twice", "numbers", "without fields", "without a name"],
)
def test_layouts_that_are_never_written_are_refused(tmp_path, layout):
    path = str(tmp_path / "a.safetensors")
    save_file({"x": torch.zeros(1, 1, 4)}, path, metadata={"wanquant.conditioning": json.dumps(layout)})
    with pytest.raises(QuantError, match="save the conditioning again"):
        load_conditioning(path)
    save_file({"x": torch.ones(1, 1, 4)}, path, metadata={"wanquant.conditioning": json.dumps({"list": [PROMPT]})})
    assert same(load_conditioning(path), [[torch.ones(1, 1, 4), {}]])
