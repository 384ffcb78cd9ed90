"""ComfyUI's context windows: a forward gets some frames of a long video, and what the conditionings have for these.

Source: comfy/context_windows.py IndexListContextHandler, ComfyUI 0.24.0 to 0.30.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy.context_windows import IndexListContextWindow, slice_cond
from comfy.model_base import BaseModel
from torch import Tensor

_FRAMES = 2
"""The dimension of a latent that has its frames."""


def frames_in_a_window(options: Mapping[str, Any], frames: int) -> int | None:
    """Return the most latent frames that a forward gets, or None without context windows over the frames.

    Args:
        options: ComfyUI's model_options.
        frames: of the whole latent.
    """
    handler: Any = options.get("context_handler")
    if getattr(handler, "dim", None) != _FRAMES or frames <= handler.context_length:
        return None
    length: int = handler.context_length
    # A window that is not the first one gets a frame from before it as well, which it does not change.
    return min(frames, length + bool(getattr(handler, "causal_window_fix", False)))


def first_window(model: BaseModel, conds: Mapping[str, Any], latent: Tensor, frames: int) -> dict[str, Any]:
    """Return a conditioning, encoded for a whole latent, as the first `frames` frames get it.

    Args:
        conds: ComfyUI's conds by name, as `extra_conds` returns them.
        latent: the whole one, floating point, (batch, channels, frames, height, width).
    """
    window = IndexListContextWindow(list(range(frames)), dim=_FRAMES, total_frames=latent.shape[_FRAMES])
    where = window, latent, latent.device

    def cut(name: str, cond: Any) -> Any:  # noqa: ANN401
        own = model.resize_cond_for_context_window(name, cond, *where)
        return own or slice_cond(cond, *where, temporal_dim=_FRAMES) or cond

    return {name: cut(name, cond) for name, cond in conds.items()}
