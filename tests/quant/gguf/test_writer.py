"""Files that GGUFWriter writes are read back by `open_gguf` and by the gguf package."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from wanquant.quant import QTYPES, QuantError, open_gguf
from wanquant.quant.gguf.layout import TensorSpec
from wanquant.quant.gguf.writer import GGUFWriter

METADATA = {
    "general.architecture": "wan",
    "general.file_type": 15,
    "errors": np.zeros(2, np.float32),
    "sha256": "0" * 64,
}
SPECS = (
    TensorSpec("patch_embedding.weight", QTYPES["F32"], (4, 3, 1, 2, 2)),
    TensorSpec("blocks.0.weight", QTYPES["Q4_0"], (5, 64)),
    TensorSpec("bias", QTYPES["F16"], (5,)),
    TensorSpec("scale", QTYPES["F32"], ()),
)


def packed(spec: TensorSpec) -> Tensor:
    values = torch.randn(spec.shape or (1,), generator=torch.Generator().manual_seed(spec.nbytes))
    return spec.qtype.quantize(values, effort="fast")


def write(path: Path, *, five_d: bool = False, overwrite: bool = False, specs: tuple[TensorSpec, ...] = SPECS) -> Path:
    with GGUFWriter(path, METADATA, specs, five_d=five_d, overwrite=overwrite) as writer:
        for spec in specs:
            writer.write(spec.name, packed(spec))
        return writer.close({"errors": np.ones(2, np.float32), "sha256": "f" * 64})


@pytest.mark.parametrize("five_d", [False, True])
def test_open_gguf_reads_it_back(tmp_path: Path, five_d: bool):
    path = write(tmp_path / "a.gguf", five_d=five_d)
    file = open_gguf(path)
    assert [(tensor.name, tensor.qtype, tensor.shape) for tensor in file.tensors.values()] == [
        (spec.name, spec.qtype, spec.shape) for spec in SPECS
    ]
    for spec in SPECS:
        assert torch.equal(file.tensors[spec.name].data.flatten(), packed(spec).flatten())
    assert file.tensors["patch_embedding.weight"].stored_shape == ((4, 3, 1, 2, 2) if five_d else (12, 1, 2, 2))
    assert file.metadata["sha256"] == "f" * 64
    assert file.metadata["errors"].tolist() == [1, 1]


def test_the_gguf_package_reads_it_back(tmp_path: Path):
    reader = gguf.GGUFReader(write(tmp_path / "a.gguf"))
    for spec, tensor in zip(SPECS, reader.tensors, strict=True):
        assert (tensor.name, tensor.tensor_type) == (spec.name, spec.qtype.ggml_type)
        assert tensor.data.tobytes() == packed(spec).numpy().tobytes()
    assert reader.tensors[0].shape.tolist() == [2, 2, 1, 12]
    orig_shape = reader.fields["comfy.gguf.orig_shape.patch_embedding.weight"]
    # The loaders of existing packs accept only INT32.
    assert orig_shape.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32]
    assert orig_shape.contents() == [4, 3, 1, 2, 2]
    assert reader.fields["general.file_type"].types == [gguf.GGUFValueType.UINT32]


def test_reading_and_writing_again_gives_the_same_bytes(tmp_path: Path):
    first = write(tmp_path / "a.gguf")
    file = open_gguf(first)
    specs = [TensorSpec(tensor.name, tensor.qtype, tensor.shape) for tensor in file.tensors.values()]
    with GGUFWriter(tmp_path / "b.gguf", file.metadata, specs) as writer:
        for tensor in file.tensors.values():
            writer.write(tensor.name, tensor.data)
    assert (tmp_path / "b.gguf").read_bytes() == first.read_bytes()


def test_size_is_known_before_writing(tmp_path: Path):
    writer = GGUFWriter(tmp_path / "a.gguf", METADATA, SPECS)
    assert not (tmp_path / "a.gguf").exists()
    assert writer.nbytes == write(tmp_path / "a.gguf").stat().st_size


def test_alignment_in_the_metadata_is_used(tmp_path: Path):
    with GGUFWriter(tmp_path / "a.gguf", {"general.alignment": 256}, SPECS) as writer:
        for spec in SPECS:
            writer.write(spec.name, packed(spec))
    assert all(tensor.offset % 256 == 0 for tensor in open_gguf(tmp_path / "a.gguf").tensors.values())
    assert all(tensor.data_offset % 256 == 0 for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors)


@pytest.mark.parametrize(
    "final", [{"sha256": "short"}, {"new": "x"}, {"errors": np.ones(3, np.float32)}, {"general.file_type": True}]
)
def test_final_metadata_of_another_size_is_refused(tmp_path: Path, final: dict[str, object]):
    with (
        pytest.raises(QuantError, match="of the size that was declared"),
        GGUFWriter(tmp_path / "a.gguf", METADATA, ()) as writer,
    ):
        writer.close(final)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("bias", packed(SPECS[0]), "expected patch_embedding.weight"),
        ("patch_embedding.weight", packed(SPECS[0])[:-1], "expected 192 of torch.uint8"),
        ("patch_embedding.weight", torch.zeros(192), "torch.float32"),
    ],
)
def test_another_tensor_than_the_next_is_refused(tmp_path: Path, name: str, data: Tensor, message: str):
    with pytest.raises(QuantError, match=message), GGUFWriter(tmp_path / "a.gguf", METADATA, SPECS) as writer:
        writer.write(name, data)
    assert not any(tmp_path.iterdir())


def test_missing_and_surplus_tensors_are_refused(tmp_path: Path):
    with pytest.raises(QuantError, match="0 of 4 tensors"), GGUFWriter(tmp_path / "a.gguf", METADATA, SPECS):
        pass
    with pytest.raises(QuantError, match="expected no more"), GGUFWriter(tmp_path / "a.gguf", METADATA, ()) as writer:
        writer.write("bias", packed(SPECS[2]))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_interruption_leaves_nothing_and_keeps_the_old_file(tmp_path: Path, interruption: type[BaseException]):
    path = write(tmp_path / "a.gguf")
    before = path.read_bytes()
    with pytest.raises(interruption), GGUFWriter(path, METADATA, SPECS, overwrite=True) as writer:
        writer.write(SPECS[0].name, packed(SPECS[0]))
        raise interruption
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_failure_while_the_header_is_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("wanquant.quant.files.atomic_file.AtomicFile.write", interrupted)
    with pytest.raises(KeyboardInterrupt), GGUFWriter(tmp_path / "a.gguf", METADATA, SPECS):
        pass
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "specs",
    [
        (SPECS[2], SPECS[2]),
        (TensorSpec("", QTYPES["F32"], (1,)),),
        (TensorSpec("n" * 128, QTYPES["F32"], (1,)),),
        (TensorSpec("empty", QTYPES["F32"], (0, 4)),),
        (TensorSpec("row", QTYPES["Q4_0"], (4, 33)),),
    ],
    ids=["duplicate", "no name", "long name", "empty", "row"],
)
def test_tensors_that_cannot_be_stored_are_refused(tmp_path: Path, specs: tuple[TensorSpec, ...]):
    with pytest.raises(QuantError):
        GGUFWriter(tmp_path / "a.gguf", METADATA, specs)
