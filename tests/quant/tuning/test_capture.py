"""Captures: a bounded random choice of calls, and their file."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from wanquant.quant import QuantError
from wanquant.quant.tuning.capture import Capture, CapturedCalls

SIGNATURE = torch.arange(6.0).view(2, 3)
NBYTES = 2 * 4 * 8 * 2 + 4 * 4


def call(number: int) -> dict:
    return {
        "x": torch.full((2, 4, 8), float(number), dtype=torch.bfloat16),
        "freqs": torch.full((4,), float(number)),
        "context_img_len": None,
        "n": number,
    }


def captured(parent, count, room):
    capture = Capture(parent, room * NBYTES)
    for number in range(count):
        capture.add(call(number), SIGNATURE)
    return capture


def kept(path):
    calls = CapturedCalls.open(path)
    numbers = [int(calls.hidden(index)[0, 0, 0]) for index in range(len(calls))]
    calls.close()
    return numbers


def test_calls_are_read_as_they_were(tmp_path):
    path = captured(tmp_path, 3, 5).write(tmp_path / "a.blocks.safetensors")
    calls = CapturedCalls.open(path)
    assert len(calls) == 3 and calls.shape(1) == (2, 4, 8) and torch.equal(calls.signature, SIGNATURE)
    assert torch.equal(calls.hidden(2), torch.full((2, 4, 8), 2.0))
    others = calls.others(2, torch.device("cpu"))
    assert torch.equal(others.pop("freqs"), torch.full((4,), 2.0))
    assert others == {"context_img_len": None, "n": 2}
    calls.close()


def test_a_random_few_stay_within_the_bytes(tmp_path):
    capture = captured(tmp_path, 50, 4)
    folders = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(list(folders[0].iterdir())) == len(capture) == 4 and capture.seen == 50
    numbers = kept(capture.write(tmp_path / "a.safetensors"))
    assert numbers == sorted(numbers) and max(numbers) > 25
    again = captured(tmp_path, 50, 4).write(tmp_path / "b.safetensors")
    assert again.read_bytes() == (tmp_path / "a.safetensors").read_bytes(), "the same graph keeps the same ones"
    del capture
    assert not folders[0].exists()


@pytest.mark.parametrize(
    ("room", "arguments", "message"),
    [
        (0.5, call(0), "one evaluation has 0.00 GiB"),
        (1, {**call(0), "audio": [1]}, "get audio as list"),
    ],
)
def test_what_cannot_be_kept_is_refused(tmp_path, room, arguments, message):
    with pytest.raises(QuantError, match=message):
        Capture(tmp_path, int(room * NBYTES)).add(arguments, SIGNATURE)


def test_full_disk_is_refused_beforehand(tmp_path):
    with pytest.raises(QuantError, match="GiB free in the folder"):
        Capture(tmp_path, 1 << 60)


def test_nothing_captured_is_refused(tmp_path):
    with pytest.raises(QuantError, match="nothing captured yet"):
        Capture(tmp_path, NBYTES).write(tmp_path / "a.safetensors")


@pytest.mark.parametrize("key", ["[{}]", '{"a": 1}', "[]", "7", "nonsense"])
def test_other_files_are_refused(tmp_path, key):
    save_file({"signature": SIGNATURE}, tmp_path / "a.safetensors", {"wanquant.capture": key})
    with pytest.raises(QuantError, match="capture"):
        CapturedCalls.open(tmp_path / "a.safetensors")
