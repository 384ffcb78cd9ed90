"""Sound, faces and cameras a few frames at a time: the result of ComfyUI's own parts, with weights prepared once."""

from __future__ import annotations

import comfy.ldm.wan.model as wan
import pytest
import torch
from comfy.ldm.wan.model_animate import FaceBlock

from wanquant.ops.lean import MemoryPlan, apply_lean, edges, frames
from wanquant.tests.ops.lean.test_blocks import FINE, INPUTS, build, error, forward

# variant: (the part that attends, the Linears that it prepares once in one block)
PARTS = {
    "s2v": (wan.AudioInjector_WAN, 5),
    "wandancer": (wan.AudioInjector_WAN, 4),
    "animate": (FaceBlock, 3),
    "humo": (wan.AudioCrossAttentionWrapper, 4),
}


@pytest.fixture
def faces(monkeypatch):
    """Gives Animate faces; the other tests go without their encoder, which takes a second."""
    monkeypatch.setitem(INPUTS, "animate", INPUTS["animate"] | {"face_pixel_values": (1, 3, 1, 512, 512)})


def recorded(monkeypatch, cls):
    """Return the list of the numbers of tokens with which the class is called; it grows."""
    seen, run = [], cls.forward

    def record(self, *args, **kwargs):
        seen.append((args or (kwargs["x"],))[0].shape[1])
        return run(self, *args, **kwargs)

    monkeypatch.setattr(cls, "forward", record)
    return seen


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", PARTS)
def test_equals_the_hosts_forward_in_pieces(name, batch, faces, monkeypatch):
    cls, linears = PARTS[name]
    model = build(name)
    calls, prepared = recorded(monkeypatch, cls), []
    expected = forward(model, name, batch=batch)
    whole = list(calls)
    calls.clear()
    project = frames.projection
    monkeypatch.setattr(frames, "projection", lambda *args: prepared.append(args) or project(*args))
    assert error(forward(apply_lean(model, FINE), name, batch=batch), expected) < 1e-5
    assert max(calls) < max(whole), "in pieces"
    assert len(prepared) == linears * (2 if name == "humo" else 1), "once for all pieces"


@pytest.mark.parametrize("name", PARTS)
def test_without_sound_and_faces(name, monkeypatch):
    monkeypatch.setitem(INPUTS, name, {k: v for k, v in INPUTS[name].items() if k == "clip_fea"})
    model = build(name)
    assert error(forward(apply_lean(model, FINE), name), forward(model, name)) < 1e-5


def test_a_part_of_another_node_is_called_whole(faces, monkeypatch):
    model, calls = build("animate"), []
    (face,) = model.model.diffusion_model.face_adapter.fuser_blocks
    face.forward = lambda x, *_: calls.append(x.shape[1]) or torch.zeros_like(x)
    forward(apply_lean(model, FINE), "animate")
    assert calls == [2 * 16]


def test_tokens_that_are_not_frames_are_refused_as_by_the_host():
    (face,) = build("animate").model.diffusion_model.face_adapter.fuser_blocks
    lean = frames.frame_forwards(build("animate").model.diffusion_model, MemoryPlan(1, 4))
    x, motion = torch.randn(1, 33, 256), torch.randn(1, 2, 4, 256)
    for call in (face, *lean.values()):
        with pytest.raises(Exception, match="can't divide"):
            call(x, motion)


def test_another_nodes_replacement_of_a_humo_block_keeps_its_input():
    model, kept = build("humo"), []

    def replacement(args, extra):
        kept.append((args["img"], args["img"].clone()))
        return extra["original_block"](args)

    replace = {"dit": {("double_block", i): replacement for i in range(2)}}
    expected = forward(model, "humo", patches_replace=replace)
    kept.clear()
    assert error(forward(apply_lean(model, FINE), "humo", patches_replace=replace), expected) < 1e-5
    assert len(kept) == 2
    assert all(torch.equal(given, copy) for given, copy in kept)


def test_camera_in_pieces(monkeypatch):
    model = build("camera_2.2")
    calls = []
    run = wan.WanCamAdapter.forward
    monkeypatch.setattr(wan.WanCamAdapter, "forward", lambda self, x: calls.append(x.shape[2]) or run(self, x))
    expected = forward(model, "camera_2.2")
    monkeypatch.setattr(edges, "_TOKENS", 8)
    assert error(forward(apply_lean(model, FINE), "camera_2.2"), expected) < 1e-5
    assert calls == [2, 1, 1]
