"""Replacements for nodes of ComfyUI-GGUF where it is not installed. The canvas offers them; /prompt applies them.

Source: city96/ComfyUI-GGUF nodes.py @ 795e451; app/node_replace_manager.py, ComfyUI 0.30.0.
"""

from __future__ import annotations

from comfy_api.latest import ComfyAPI, io


def _loader(old_id: str, *other_widgets: str) -> io.NodeReplace:
    # The other settings of its advanced loader have no counterpart. Weights are always dequantized in float32
    # arithmetic, and a LoRA is always added in the compute dtype, on the layer's device.
    return io.NodeReplace(
        new_node_id="WanQuantLoader",
        old_node_id=old_id,
        old_widget_ids=["unet_name", *other_widgets],
        input_mapping=[
            {"new_id": "model_name", "old_id": "unet_name"},
            {"new_id": "compute_dtype", "set_value": "default"},
        ],
        output_mapping=[{"new_idx": 0, "old_idx": 0}],
    )


REPLACEMENTS = (
    _loader("UnetLoaderGGUF"),
    _loader("UnetLoaderGGUFAdvanced", "dequant_dtype", "patch_dtype", "patch_on_device"),
    io.NodeReplace(
        new_node_id="WanQuantTextEncoderLoader",
        old_node_id="CLIPLoaderGGUF",
        old_widget_ids=["clip_name", "type"],
        input_mapping=[
            {"new_id": "encoder_name", "old_id": "clip_name"},
            {"new_id": "type", "old_id": "type"},
        ],
        output_mapping=[{"new_idx": 0, "old_idx": 0}],
    ),
)


async def register_replacements() -> None:
    """Register them with the host, which uses them for nodes that no installed pack defines."""
    for replacement in REPLACEMENTS:
        await ComfyAPI().node_replacement.register(replacement)
