"""Text and a picture below a node."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL.Image import Image


def picture_tensor(picture: Image) -> torch.Tensor:
    """Return the picture as the host's IMAGE: float32, (1, height, width, 3), in 0..1."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)[None]


def text_and_picture(text: str, picture: torch.Tensor, node: type[io.ComfyNode]) -> dict[str, Any]:
    return {**ui.PreviewText(text).as_dict(), **ui.PreviewImage(picture, cls=node).as_dict()}
