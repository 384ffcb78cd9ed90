"""TinyWan: a Wan 2.1 T2V of 5 million parameters, trained on drawn clips. Importing it makes ComfyUI importable."""

from __future__ import annotations

import torch

from wanquant.bench.harness import import_comfyui

import_comfyui(cpu=not torch.cuda.is_available())

from comfy.cli_args import args  # noqa: E402

args.use_pytorch_cross_attention = True  # ComfyUI's default attention for CPUs has no backward pass
