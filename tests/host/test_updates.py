"""Updates never stop a graph: what version 0.1.0 wrote still runs, is reused, and gives the same latents."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from wanquant.quant import open_gguf
from wanquant.quant.conversion.layer_encoder import revisions_today
from wanquant.quant.gguf.provenance import SOURCE_MTIME, encoder_revisions
from wanquant.quant.statistics.calibration_file import read_calibration
from wanquant.testing.server import HostServer
from wanquant.tests.host.kept_files import CALIBRATION, CONVERTED, GRAPH, LATENTS, PROMPT, SOURCE, write_source

# Of all names and float32 values, as 0.1.0 and the Python package `gguf` 0.19.0 dequantize them.
VALUES_SHA256 = {
    "plain": "f9d69da877844e86ba9d10a46d171c80db0ed81bda5c7a1c404d2ba0544d2598",
    "calibrated": "0f7322aaee3662e4c2aa9ca4ffaf14199eae592fe9b0bc1e865c94370638533c",
}
# Another CPU, a GPU or another PyTorch adds in another order: measured 3e-7 without AVX. TF32 in a GPU's convolution
# rounds by 5e-4. The calibration alone changes the latent by 2.4e-2, and dropping the quantization by 1.6e-2.
MAX_DIFFERENCE = 1e-3
OTHER_TIME = 10**18  # in nanoseconds since 1970; 0.1.0 read a source of another time


@dataclass(frozen=True)
class Result:
    """What one branch of the graph gave.

    Attributes:
        report: the text below the convert node.
        latent: float32, (1, 16, frames, height, width).
    """

    path: Path
    mtime_ns: int
    report: str
    latent: Tensor


@pytest.fixture(scope="module")
def results(server: HostServer) -> dict[str, Result]:
    """Return what the kept graph gives by branch, in a server that has the kept files and a copy of their source."""
    folder = server.models / "diffusion_models"
    write_source(folder / SOURCE)
    os.utime(folder / SOURCE, ns=(OTHER_TIME, OTHER_TIME))
    for file, kind in ((PROMPT, "conditioning"), (CALIBRATION, "importance")):
        (server.models / kind).mkdir(exist_ok=True)
        shutil.copy(file, server.models / kind)
    copies = {branch: Path(shutil.copy(kept, folder)) for branch, kept in CONVERTED.items()}
    times = {branch: path.stat().st_mtime_ns for branch, path in copies.items()}
    outputs = server.run(json.loads(GRAPH.read_text()))
    found = {}
    for branch, prefix in (("plain", ""), ("calibrated", "calibrated_")):
        (saved,) = outputs[f"{prefix}latent"]["latents"]
        latent = load_file(server.output / saved["subfolder"] / saved["filename"])["latent_tensor"]
        report = outputs[f"{prefix}convert"]["text"][0]
        assert outputs[f"{prefix}summary"]["text"] == [report]
        found[branch] = Result(copies[branch], times[branch], report, latent)
    return found


@pytest.mark.host
@pytest.mark.parametrize("branch", CONVERTED)
def test_kept_file_is_reused_for_a_source_of_the_same_content(results: dict[str, Result], branch: str):
    result, kept = results[branch], CONVERTED[branch]
    assert open_gguf(kept).metadata[SOURCE_MTIME] != OTHER_TIME, "the content decides"
    assert f"-> {kept.name}" in result.report and "is up to date already" in result.report
    assert result.path.stat().st_mtime_ns == result.mtime_ns
    assert result.path.read_bytes() == kept.read_bytes()


@pytest.mark.host
@pytest.mark.parametrize("branch", CONVERTED)
def test_report_names_the_types_whose_encoders_are_older(results: dict[str, Result], branch: str):
    kept = open_gguf(CONVERTED[branch])
    assert encoder_revisions(kept.metadata) == {}, "0.1.0 recorded none, which counts as 0"
    today = revisions_today(read_calibration(CALIBRATION) if branch == "calibrated" else None)
    older = sorted(name for name in {tensor.qtype.name for tensor in kept.tensors.values()} if today[name] > 0)
    assert ("older encoder" in results[branch].report) == bool(older)
    assert not older or f"made by an older encoder of {', '.join(older)};" in results[branch].report


@pytest.mark.host
@pytest.mark.parametrize("branch", CONVERTED)
def test_kept_graph_gives_the_same_latent(results: dict[str, Result], branch: str):
    kept, latent = load_file(LATENTS)[branch], results[branch].latent
    assert latent.shape == kept.shape and latent.dtype == kept.dtype == torch.float32
    assert (latent - kept).norm() < MAX_DIFFERENCE * kept.norm()


@pytest.mark.parametrize("branch", CONVERTED)
def test_kept_file_has_the_same_values(branch: str):
    digest = hashlib.sha256()
    for name, tensor in sorted(open_gguf(CONVERTED[branch]).tensors.items()):
        digest.update(name.encode() + tensor.dequantize().numpy().tobytes())
    assert digest.hexdigest() == VALUES_SHA256[branch]
