"""Loading a GGUF file as a ModelPatcher: layouts of other packs, refused files, and how the file is mapped."""

from __future__ import annotations

import json
import logging
import os
import threading

import comfy.memory_management
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import numpy as np
import pytest
import torch
from comfy_aimdo import control
from safetensors.torch import load_file

from wanquant.ops.loading.diffusion_model import load_diffusion_model
from wanquant.ops.packed.layout import is_packed
from wanquant.ops.packed.linear import GGUFModule, packed_modules
from wanquant.quant import QTYPES, QuantError
from wanquant.quant.conversion.convert import convert
from wanquant.quant.gguf.layout import TensorSpec
from wanquant.quant.gguf.provenance import carried_metadata
from wanquant.quant.gguf.writer import GGUFWriter
from wanquant.testing.tiny_wan import write_tiny_wan


def as_city96(name, tensor):
    return "Q8_0" if tensor.ndim == 2 and tensor.numel() > 1024 else "F32"


def forward(patcher):
    model = patcher.patch_model(torch.device("cpu"), lowvram_model_memory=0).diffusion_model
    generator = torch.Generator().manual_seed(1)
    x, text = (torch.randn(shape, generator=generator) for shape in [(1, 16, 2, 8, 8), (1, 7, 4096)])
    with torch.no_grad():
        return model(x, torch.tensor([500.0]), text)


@pytest.fixture(scope="module")
def state(t2v):
    return load_file(t2v[0])


@pytest.fixture(scope="module")
def dense(state):
    return comfy.sd.load_diffusion_model_state_dict(dict(state))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "module.dit._orig_mod."])
@pytest.mark.parametrize("five_d", [False, True], ids=["flattened", "five_d"])
@pytest.mark.parametrize("plain", ["F32", "F16", "BF16"])
def test_layouts_of_other_packs(prefix, five_d, plain, tmp_path, state, dense, sqnr, write_gguf):
    def types(name, tensor):
        return (
            "F32"
            if "patch_embedding" in name and five_d
            else plain
            if name.endswith("q.weight")
            else as_city96(name, tensor)
        )

    patcher = load_diffusion_model(write_gguf(tmp_path / "a.gguf", state, types, prefix=prefix, five_d=five_d))
    weights = patcher.model.diffusion_model.state_dict()
    assert weights.keys() == state.keys()
    assert weights["patch_embedding.weight"].shape == (256, 16, 1, 2, 2)
    assert is_packed(weights["blocks.0.ffn.0.weight"])
    assert not is_packed(weights["blocks.0.self_attn.q.weight"])
    assert sqnr(forward(dense), forward(patcher)) > 40


def test_anything_may_be_quantized(tmp_path, state, dense, sqnr, write_gguf):
    """Tensors outside of packed layers are dequantized: parameters, norms, biases, the 5-D patch embedding."""

    def types(name, tensor):
        return "Q8_0" if tensor.shape[-1] % 32 == 0 else "F32"

    blocks = {n: t.flatten(1) if t.ndim == 5 else t for n, t in state.items()}
    shape = np.array(state["patch_embedding.weight"].shape, np.int32)
    metadata = {"comfy.gguf.orig_shape.patch_embedding.weight": shape}
    patcher = load_diffusion_model(write_gguf(tmp_path / "a.gguf", blocks, types, metadata=metadata))
    for module in patcher.model.modules():
        assert isinstance(module, GGUFModule) or not any(map(is_packed, module.parameters(recurse=False)))
    assert not is_packed(patcher.model.diffusion_model.patch_embedding.weight)
    assert sqnr(forward(dense), forward(patcher)) > 35


def test_raw_two_dimensional_parameters_stay_plain(tmp_path, write_gguf):
    from wanquant.ops.loading.diffusion_model import host_tensor
    from wanquant.quant.gguf.reader import open_gguf

    state = {
        f"{name}.weight": torch.randn(64, 64) for name in ("motion_encoder.enc.fc.0", "trainable_cond_mask", "ffn")
    }
    file = open_gguf(write_gguf(tmp_path / "a.gguf", state, as_city96))
    packed = {name: is_packed(host_tensor(t, t.data, torch.bfloat16)) for name, t in file.tensors.items()}
    assert packed == {"motion_encoder.enc.fc.0.weight": False, "trainable_cond_mask.weight": False, "ffn.weight": True}


def test_weights_are_mapped_not_copied(t2v):
    patcher = load_diffusion_model(t2v[1])
    pointers = {module.weight._qdata.untyped_storage().data_ptr() for _, module in packed_modules(patcher.model)}
    assert len(pointers) == 1
    nbytes = sum(module.weight.nbytes for _, module in packed_modules(patcher.model))
    assert nbytes < patcher.model_size() == comfy.model_management.module_size(patcher.model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_compute_dtype(dtype, t2v):
    patcher = load_diffusion_model(t2v[1], dtype=dtype)
    assert patcher.model.get_dtype_inference() == patcher.model.manual_cast_dtype == dtype
    assert {module.weight.dtype for _, module in packed_modules(patcher.model)} == {dtype}


def test_memory_plan_counts_the_decoded_weight(t2v):
    """The host's offload cost of a module is the packed bytes and the memory for one dequantized weight."""
    patcher = load_diffusion_model(t2v[1])
    costs = {entry[-3]: (entry[0], entry[1]) for entry in patcher._load_list()}
    offload, size = costs["diffusion_model.blocks.0.ffn.0"]
    assert size == 512 * 256 // 32 * 34 + 512 * 4
    assert offload == size + 512 * 256 * 4


def test_source_metadata_reaches_detection(tmp_path, state, write_gguf):
    config = {"config": json.dumps({"transformer": {"causal_ar": True}})}
    patcher = load_diffusion_model(write_gguf(tmp_path / "a.gguf", state, as_city96, metadata=carried_metadata(config)))
    assert type(patcher.model.model_config).__name__ == "WAN21_CausalAR_T2V"


def test_legacy_copy_for_torch_compile_and_hooks(t2v):
    patcher = load_diffusion_model(t2v[1], dtype=torch.float32)
    load, arguments = patcher.cached_patcher_init
    other = load(*arguments, disable_dynamic=True)
    assert not other.is_dynamic()
    assert other.model is not patcher.model
    assert other.model.manual_cast_dtype == torch.float32
    copy = patcher.clone(force_deepcopy=True)
    assert copy.model is not patcher.model
    assert type(copy) is type(patcher)


def test_uses_whichever_patcher_the_host_has_now(t2v, monkeypatch):
    class OtherPatcher(comfy.model_patcher.ModelPatcher):
        pass

    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", OtherPatcher)
    assert isinstance(load_diffusion_model(t2v[1]), OtherPatcher)
    assert not isinstance(load_diffusion_model(t2v[1], disable_dynamic=True), OtherPatcher)


@pytest.fixture
def loaded(tmp_path, state, write_gguf):
    """Return a patcher and the file that it was loaded from."""
    path = write_gguf(tmp_path / "a.gguf", state, as_city96)
    return load_diffusion_model(path), path


def test_file_deleted_or_replaced_serves_on(loaded, state, write_gguf, caplog):
    patcher, path = loaded[0].clone(), loaded[1]
    expected = forward(patcher)
    patcher.pre_run()
    path.unlink()
    for _ in range(2):
        patcher.pre_run()
    (message,) = (record.getMessage() for record in caplog.records if "a.gguf" in record.getMessage())
    assert "was deleted since it was loaded; the weights of the old file stay in use" in message
    write_gguf(path, {name: 2 * tensor for name, tensor in state.items()}, as_city96)
    patcher.pre_run()
    assert torch.equal(forward(patcher), expected)
    assert not torch.equal(forward(load_diffusion_model(path)), expected)


def test_fewer_blocks_than_published_are_told(tmp_path, caplog):
    source = write_tiny_wan(tmp_path / "a.safetensors", layers=1, dim=1536, ffn_dim=256)
    load_diffusion_model(convert(source, tmp_path / "a.gguf", "Q8_0", effort="fast").path)
    assert f"{tmp_path / 'a.gguf'}: 1 block, expected 30" in caplog.text


def test_replaced_file_is_told(loaded, caplog):
    patcher, path = loaded
    other = path.with_name("new.gguf")
    other.write_bytes(path.read_bytes())
    os.replace(other, path)
    patcher.pre_run()
    assert "a.gguf was replaced by another since it was loaded; the weights of the old file" in caplog.text


def test_file_that_was_written_to_is_refused_before_a_run(loaded):
    patcher, path = loaded
    os.utime(path, ns=(1, 1))
    with pytest.raises(QuantError, match=r"a\.gguf: the file was changed or replaced since it was loaded"):
        patcher.pre_run()


@pytest.mark.parametrize(
    ("metadata", "names", "what"),
    [
        ({"general.architecture": "llama"}, ["token_embd.weight", "blk.0.attn_q.weight"], "a language model"),
        ({"general.architecture": "t5encoder"}, ["token_embd.weight", "enc.blk.0.attn_q.weight"], "a T5 text encoder"),
        ({"general.architecture": "clip"}, ["v.blk.0.attn_q.weight", "mm.0.weight"], "a vision projector"),
        ({"general.type": "imatrix"}, ["blk.0.attn_q.weight.in_sum2"], "an importance matrix"),
        ({"general.type": "adapter"}, ["blk.0.attn_q.weight.lora_a"], "a LoRA"),
        ({"general.architecture": "vae"}, ["encoder.conv1.weight", "decoder.upsamples.0.weight"], "a VAE"),
        (
            {"general.architecture": "wan"},
            ["strange.weight"],
            "not a diffusion model that this version of ComfyUI knows",
        ),
        ({}, [], "not a diffusion model"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_other_models_are_refused_by_name(metadata, names, what, tmp_path):
    path = tmp_path / "other.gguf"
    specs = [TensorSpec(name, QTYPES["F32"], (32, 32)) for name in names]
    with GGUFWriter(path, metadata, specs) as writer:
        for spec in specs:
            writer.write(spec.name, torch.zeros(32 * 32 * 4, dtype=torch.uint8))
    with pytest.raises(QuantError) as refusal:
        load_diffusion_model(path)
    message = str(refusal.value)
    assert message.startswith(f"{path}: {what}")
    assert f"general.architecture {metadata.get('general.architecture', 'not given')}" in message
    assert "\n" not in message


def test_only_other_diffusion_models_get_a_warning(tmp_path, t2v, caplog, write_gguf):
    load_diffusion_model(t2v[1])
    assert "tested with Wan" not in caplog.text
    from comfy.ldm.lumina.model import NextDiT

    arguments = {"patch_size": 2, "in_channels": 16, "dim": 2304, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 24}
    model = NextDiT(
        **arguments,
        n_kv_heads=8,
        cap_feat_dim=2304,
        axes_dims=[32, 32, 32],
        axes_lens=[4, 4, 4],
        qk_norm=True,
        operations=torch.nn,
        device="meta",
    )
    state = {name: torch.zeros(tensor.shape) for name, tensor in model.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        patcher = load_diffusion_model(
            write_gguf(tmp_path / "lumina.gguf", state, as_city96, metadata={"general.architecture": "lumina2"})
        )
    assert type(patcher.model.model_config).__name__ == "Lumina2"
    assert caplog.text.count("WanQuant is tested with Wan models only") == 1


@pytest.fixture
def dynamic_vram(monkeypatch):
    """Make the host map files as with dynamic VRAM, which works without an accelerator."""
    if control.lib is None:
        control.init()
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)


def test_dynamic_vram_gets_file_slices(dynamic_vram, t2v, state, sqnr, dense):
    patcher = load_diffusion_model(t2v[1])
    for _, module in packed_modules(patcher.model):
        storage = module.weight._qdata.untyped_storage()
        file_slice = storage._comfy_tensor_file_slice
        assert file_slice.size == storage.nbytes() == module.weight.nbytes
        assert module.weight._qdata.storage_offset() == 0
        assert isinstance(file_slice.lock, type(threading.Lock()))
        assert hasattr(storage, "_comfy_tensor_mmap_refs")
        with open(t2v[1], "rb") as file:
            file.seek(file_slice.offset)
            assert file.read(file_slice.size) == module.weight._qdata.numpy().tobytes()
    assert sqnr(forward(dense), forward(patcher)) > 40


def test_legacy_copy_beside_dynamic_vram_can_be_pinned(dynamic_vram, t2v):
    """CUDA cannot pin the host's read-only map, and the legacy mode does not read slices of the file."""
    patcher = load_diffusion_model(t2v[1], disable_dynamic=True)
    for _, module in packed_modules(patcher.model):
        assert not hasattr(module.weight._qdata.untyped_storage(), "_comfy_tensor_file_slice")
        module.weight._qdata[:1].zero_()  # In a read-only map this would crash the process.


def test_a_file_that_the_host_cannot_map_is_named(dynamic_vram, t2v, tmp_path, monkeypatch):
    monkeypatch.setattr("comfy_aimdo.model_mmap.lib", None)
    with pytest.raises(QuantError, match=f"{t2v[1].name}: cannot be mapped into memory: comfy-aimdo is not init"):
        load_diffusion_model(t2v[1])
