"""TinyWan: a Wan 2.1 T2V of 5 million parameters, trained on drawn clips. This package makes the host importable."""

from __future__ import annotations

import sys

import torch

from wanquant.testing import host_shims
from wanquant.testing.hosts import checkout

host_shims.install()
sys.path.append(str(checkout()))

from comfy.cli_args import args  # noqa: E402

args.cpu = not torch.cuda.is_available()
args.use_pytorch_cross_attention = True  # the host's own attention for a CPU has no backward
