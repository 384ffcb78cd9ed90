"""The Wan Low VRAM node."""

from __future__ import annotations

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..ops.budget.automatic import AUTOMATIC, automatic_budget, beyond_device
from ..ops.budget.choose_plan import budget_bytes, choose_plan
from ..ops.budget.experts import simulator_for
from ..ops.budget.memory_notes import stock_notes
from ..ops.budget.row_room import row_room, spendable
from ..ops.budget.sampling import expected_job, is_wan, job_of_latent, with_budget
from ..ops.budget.step_time import measured_step, step_key
from ..ops.budget.vae_tiles import HOST_TILES, tiles_within
from ..quant import QuantError
from ..quant.errors import PrintableLog
from ..quant.units import GIB

logger = PrintableLog(__name__)


class WanQuantLowVRAM(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQuantLowVRAM",
            display_name="Wan Low VRAM",
            category="WanQuant/memory",
            description="Samples a Wan model within a budget of video memory, as fast as the budget allows.",
            search_aliases=["vram", "out of memory", "OOM", "block swap", "offload", "low memory", "budget"],
            inputs=[
                io.Model.Input("model", tooltip="A Wan model with its LoRAs."),
                io.Float.Input(
                    "budget_gib",
                    default=3.5,
                    min=0.0,
                    max=1024.0,
                    step=0.01,
                    tooltip="Video memory for everything, in GiB. CUDA itself needs 0.5 to 0.8 GiB of it. 0 takes what"
                    " is there when sampling starts.",
                ),
                io.Int.Input("width", default=832, min=16, max=8192, step=16, tooltip="Only for the prediction."),
                io.Int.Input("height", default=480, min=16, max=8192, step=16, tooltip="Only for the prediction."),
                io.Int.Input("frames", default=81, min=1, max=4097, step=4, tooltip="Only for the prediction."),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="The latent to sample. Its size replaces width, height and frames.",
                ),
            ],
            outputs=[
                io.Model.Output(),
                io.String.Output(display_name="predicted_peak"),
                io.Int.Output(
                    display_name="tile_size", tooltip="The largest tile size within the budget, for VAE Decode (Tiled)."
                ),
                io.Int.Output(display_name="tile_overlap", tooltip="The overlap of the tiles, for VAE Decode (Tiled)."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, budget_gib: float | None = None, **_: object) -> float:
        # What is there changes from run to run. A linked budget is still None here, and may be 0. The host compares
        # by identity first, so each answer is a new object: `math.nan` would equal itself.
        return 0.0 if budget_gib else float("nan")

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        budget_gib: float,
        width: int,
        height: int,
        frames: int,
        latent: dict[str, Tensor] | None = None,
    ) -> io.NodeOutput:
        budget = budget_bytes(budget_gib)
        if not is_wan(model):
            text = f"{type(model.model).__name__} is not a Wan model, so it passes through unchanged"
            logger.warning("Wan Low VRAM: %s", text)
            return io.NodeOutput(model, text, *HOST_TILES)
        if latent is None:
            job, budgeted = expected_job(model, width, height, frames), with_budget(model, budget)
        else:
            job = job_of_latent(model, latent)
            budgeted = with_budget(model, budget, job.latent)
        now = budget or automatic_budget(model.load_device)
        try:
            choice = choose_plan(simulator_for(model), job, now, is_all=budget == AUTOMATIC)
            automatic = "" if budget else f"budget {now / GIB:.2f} GiB: "
            text = automatic + str(choice) + measured_step(step_key(model, job.latent, choice.plan))
            if room := row_room(model, job, choice.peak, spendable(model, now)):
                text += f"; {room}"
        except QuantError as refusal:
            # This is a preview only. The latent that reaches the sampler may be smaller and fit.
            text = str(refusal)
            logger.warning("Wan Low VRAM: %s", text)
        tiles = tiles_within(job, now)
        text = "; ".join([text, str(tiles), *stock_notes(model), *beyond_device(budget, model.load_device)])
        return io.NodeOutput(budgeted, text, tiles.size, tiles.overlap, ui={"text": (text,)})
