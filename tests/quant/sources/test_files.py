"""Files that are read slice by slice: their checksum, and how much is read."""

from __future__ import annotations

import hashlib

import pytest

from wanquant.quant.sources.checkpoint import open_checkpoint
from wanquant.quant.sources.files import HashedFile
from wanquant.testing.tiny_wan import write_tiny_wan


@pytest.mark.parametrize("order", ["in file order", "backwards", "every second", "none"])
def test_sha256_is_that_of_the_file_in_any_order_of_reading(tmp_path, order):
    path = write_tiny_wan(tmp_path / "a.safetensors", layers=1)
    with open_checkpoint(path) as checkpoint:
        tensors = list(checkpoint.tensors.values())
        step = {"in file order": 1, "backwards": -1, "every second": 2, "none": len(tensors)}[order]
        for tensor in tensors[::step]:
            half = tensor.shape[0] // 2
            tensor.read(0, half)
            tensor.read(half)
        assert checkpoint.files.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()


def test_without_hashing_only_the_requested_bytes_are_read(tmp_path, monkeypatch):
    path = write_tiny_wan(tmp_path / "a.safetensors", layers=1)
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    with open_checkpoint(path) as checkpoint:
        n_read = 0
        peek = HashedFile.peek

        def counting(self, offset, nbytes):
            nonlocal n_read
            n_read += nbytes
            return peek(self, offset, nbytes)

        monkeypatch.setattr(HashedFile, "peek", counting)
        last = list(checkpoint.tensors.values())[-1]
        with checkpoint.files.without_hashing():
            last.read()
        assert n_read == last.nbytes
        for tensor in checkpoint.tensors.values():
            tensor.read()
        assert checkpoint.files.sha256() == expected
        assert n_read <= last.nbytes + path.stat().st_size
