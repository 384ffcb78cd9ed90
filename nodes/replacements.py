"""Replacements for the GGUF loaders of other packs where these are not installed.

The canvas offers them; /prompt applies them. Loaders of several text encoders have none, because Wan has a single one.

Source: city96/ComfyUI-GGUF nodes.py @ 795e451 and the nodes.py of its fork molbal/ComfyUI-GGUF; calcuis/gguf pig.py
@ 452dfed; kijai/ComfyUI-KJNodes nodes/model_optimization_nodes.py @ 3f20054; pollockjj/ComfyUI-MultiGPU wrappers.py
@ a38cbda; app/node_replace_manager.py, ComfyUI 0.30.0.
"""

from __future__ import annotations

from comfy_api.latest import ComfyAPI, io

# Settings without a counterpart. Weights are always dequantized in float32 arithmetic, and a LoRA is always added in
# the compute dtype, on the layer's device. ComfyUI itself, or Wan Low VRAM, decides what lies on the accelerator.
_ADVANCED = ("dequant_dtype", "patch_dtype", "patch_on_device")
_KJ = (*_ADVANCED, "enable_fp16_accumulation", "attention_override")
_DISTORCH = ("device", "virtual_vram_gb", "use_other_vram", "expert_mode_allocations")
_DISTORCH_2 = ("virtual_vram_gb", "donor_device", "expert_mode_allocations", "eject_models")


def _model_loader(
    old_id: str, *other_widgets: str, name: str = "unet_name", add_on: str | None = None
) -> io.NodeReplace:
    """Replace a loader whose first widget is the file, and whose second one is an add-on if `add_on` is given."""
    mapped = [
        {"new_id": "model_name", "old_id": name},
        {"new_id": "compute_dtype", "set_value": "default"},
        *([{"new_id": "module_name", "old_id": add_on}] if add_on else []),
    ]
    return io.NodeReplace(
        new_node_id="WanQuantLoader",
        old_node_id=old_id,
        old_widget_ids=[name, *([add_on] if add_on else []), *other_widgets],
        input_mapping=mapped,
        output_mapping=[{"new_idx": 0, "old_idx": 0}],
    )


def _encoder_loader(old_id: str, *other_widgets: str) -> io.NodeReplace:
    return io.NodeReplace(
        new_node_id="WanQuantTextEncoderLoader",
        old_node_id=old_id,
        old_widget_ids=["clip_name", "type", *other_widgets],
        input_mapping=[
            {"new_id": "encoder_name", "old_id": "clip_name"},
            {"new_id": "type", "old_id": "type"},
        ],
        output_mapping=[{"new_idx": 0, "old_idx": 0}],
    )


REPLACEMENTS = (
    # ComfyUI-GGUF and its forks.
    _model_loader("UnetLoaderGGUF"),
    _model_loader("UnetLoaderGGUFAdvanced", *_ADVANCED),
    _model_loader("UnetLoaderGGUFDynamicVRAM"),
    _encoder_loader("CLIPLoaderGGUF"),
    _encoder_loader("CLIPLoaderGGUFDynamicVRAM"),
    # calcuis' gguf.
    _model_loader("LoaderGGUF", name="gguf_name"),
    _model_loader("LoaderGGUFAdvanced", *_ADVANCED, name="gguf_name"),
    _encoder_loader("ClipLoaderGGUF", "device"),
    # KJNodes.
    _model_loader("GGUFLoaderKJ", *_KJ, name="model_name", add_on="extra_model_name"),
    # ComfyUI-MultiGPU.
    _model_loader("UnetLoaderGGUFMultiGPU", "device"),
    _model_loader("UnetLoaderGGUFAdvancedMultiGPU", *_ADVANCED, "device"),
    _encoder_loader("CLIPLoaderGGUFMultiGPU", "device"),
    _model_loader("UnetLoaderGGUFDisTorchMultiGPU", *_DISTORCH),
    _model_loader("UnetLoaderGGUFAdvancedDisTorchMultiGPU", *_ADVANCED, *_DISTORCH),
    _encoder_loader("CLIPLoaderGGUFDisTorchMultiGPU", *_DISTORCH),
    _model_loader("UnetLoaderGGUFDisTorch2MultiGPU", "compute_device", *_DISTORCH_2),
    _model_loader("UnetLoaderGGUFAdvancedDisTorch2MultiGPU", *_ADVANCED, "compute_device", *_DISTORCH_2),
    _encoder_loader("CLIPLoaderGGUFDisTorch2MultiGPU", "device", *_DISTORCH_2),
)


async def register_replacements() -> None:
    """Register them with the host, which uses them for nodes that no installed pack defines."""
    for replacement in REPLACEMENTS:
        await ComfyAPI().node_replacement.register(replacement)
