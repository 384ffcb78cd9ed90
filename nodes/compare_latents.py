"""The Compare Latents node."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..ops.latents.compare import compare_latents
from .pictures import picture_tensor, text_and_picture


class WanQuantCompareLatents(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQuantCompareLatents",
            display_name="Compare Latents",
            category="WanQuant/latent",
            description="Measures how far two latents of the same seed are apart: PSNR, cosine similarity, and"
            " where they differ.",
            search_aliases=["psnr", "quality", "difference", "quantization error"],
            is_output_node=True,
            inputs=[
                io.Latent.Input("reference", tooltip="The LATENT of the full-precision run."),
                io.Latent.Input("compared", tooltip="The LATENT of the quantized model with the same seed."),
            ],
            outputs=[
                io.Float.Output(display_name="psnr", tooltip="In dB. 6 dB more means half the error."),
                io.Float.Output(display_name="cosine", tooltip="Cosine similarity: 1 means the same direction."),
                io.Image.Output(display_name="plot"),
            ],
        )

    @classmethod
    def execute(cls, reference: dict[str, Any], compared: dict[str, Any]) -> io.NodeOutput:
        # Imported late, because matplotlib loads slowly and only pictures need it.
        from ..ops.latents.compare_chart import draw

        comparison = compare_latents(reference["samples"], compared["samples"])
        picture = picture_tensor(draw(comparison))
        shown = text_and_picture(f"{comparison.message()}\n{comparison.figures()}", picture, cls)
        return io.NodeOutput(comparison.psnr, comparison.cosine, picture, ui=shown)
