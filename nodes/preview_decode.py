"""The Preview Decode (no VAE) node."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..ops.latents.preview import preview_frames


class WanQuantPreviewDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQuantPreviewDecode",
            display_name="Preview Decode (no VAE)",
            category="WanQuant/latent",
            description="Shows approximate colors of a Wan latent without a VAE, one picture per latent frame.",
            search_aliases=["latent preview", "latent to rgb", "decode without vae"],
            inputs=[io.Latent.Input("samples", tooltip="The LATENT of a Wan sampler (16 or 48 channels).")],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(cls, samples: dict[str, Any]) -> io.NodeOutput:
        return io.NodeOutput(preview_frames(samples["samples"]))
