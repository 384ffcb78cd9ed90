"""Encoded prompts that are kept in a folder: found by key, never damaged, the least recently used deleted first."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from wanquant.ops.conditioning import load_conditioning, save_conditioning
from wanquant.ops.conditioning_cache import ConditioningCache
from wanquant.quant import QuantError
from wanquant.quant.files.atomic_file import AtomicFile
from wanquant.quant.files.disk_space import temporary_of
from wanquant.testing.hosts import ROOT


def conditioning(value=1.0, dtype=torch.float32):
    return [[torch.full((1, 4, 8), value, dtype=dtype), {"pooled_output": None, "strength": 0.5, "area": (1, 2)}]]


@pytest.fixture
def cache(tmp_path):
    return ConditioningCache(tmp_path / "below" / "prompts")


def keys(cache):
    return sorted(path.stem for path in cache.folder.iterdir())


def test_what_was_saved_is_loaded(cache):
    assert cache.load("a") is None
    cache.save("a", conditioning(dtype=torch.bfloat16))
    ((embedding, fields),) = cache.load("a")
    assert torch.equal(embedding, conditioning(dtype=torch.bfloat16)[0][0]) and embedding.dtype == torch.bfloat16
    assert fields == conditioning()[0][1]
    assert cache.load("b") is None


def test_entry_is_a_file_of_save_conditioning(cache, tmp_path):
    cache.save("a", conditioning())
    ((embedding, _),) = load_conditioning(str(cache.folder / "a.safetensors"))
    assert torch.equal(embedding, conditioning()[0][0])
    save_conditioning(conditioning(), str(tmp_path / "by hand.safetensors"))
    shutil.copy(tmp_path / "by hand.safetensors", cache.folder / "b.safetensors")
    assert cache.load("b") is None, "a file without a checksum is not trusted"


def test_every_damaged_byte_is_noticed(cache):
    cache.save("a", conditioning())
    path = cache.folder / "a.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    unnoticed = []
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        found = cache.load("a")
        if found is not None and not (position < header and torch.equal(found[0][0], conditioning()[0][0])):
            unnoticed.append(position)
    assert not unnoticed, "nothing but a field that says nothing, such as the format, may change"
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert cache.load("a") is None
    cache.save("a", conditioning(2.0))
    assert cache.load("a")[0][0].unique().tolist() == [2.0]


def test_the_least_recently_used_goes_first(cache):
    cache.save("a", conditioning())
    cache.max_bytes = 3 * (cache.folder / "a.safetensors").stat().st_size
    for number, key in enumerate("bc", start=1):
        cache.save(key, conditioning())
        os.utime(cache.folder / f"{key}.safetensors", (number, number))
    os.utime(cache.folder / "a.safetensors", (0, 0))
    cache.load("a")
    cache.save("d", conditioning())
    assert keys(cache) == ["a", "c", "d"], "a was the oldest until it was used"


def test_what_killed_processes_left_is_deleted_too(cache):
    cache.save("a", conditioning())
    left = temporary_of(cache.folder / "z.safetensors")
    left.write_bytes(bytes(1000))
    os.utime(left, (0, 0))
    (cache.folder / "note.txt").write_text("the user's")
    os.utime(cache.folder / "note.txt", (0, 0))
    cache.max_bytes = 2 * (cache.folder / "a.safetensors").stat().st_size
    cache.save("b", conditioning())
    assert sorted(path.name for path in cache.folder.iterdir()) == ["a.safetensors", "b.safetensors", "note.txt"]


def test_what_cannot_be_saved_leaves_the_rest(cache, tmp_path, monkeypatch):
    cache.save("a", conditioning())
    with pytest.raises(QuantError, match="object object cannot be saved"):
        cache.save("b", [[torch.zeros(1), {"control": object()}]])
    with AtomicFile(cache.folder / "b.safetensors", 8), pytest.raises(QuantError, match="another process is writing"):
        cache.save("b", conditioning())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(QuantError, match="free some space"):
        cache.save("b", conditioning())
    assert keys(cache) == ["a"] and cache.load("a")
    (tmp_path / "file").touch()
    with pytest.raises(QuantError, match="cannot be made"):
        ConditioningCache(tmp_path / "file" / "prompts").save("a", conditioning())


PROCESS = """
import sys, types, torch
root, folder, name = sys.argv[1:]
package = types.ModuleType("wanquant")
package.__path__ = [root]
sys.modules["wanquant"] = package
from pathlib import Path
from wanquant.ops.conditioning_cache import ConditioningCache
from wanquant.quant import QuantError
cache = ConditioningCache(Path(folder), 40_000)
for turn in range(60):
    key = f"k{turn % 12}"
    value = float(turn % 12)
    found = cache.load(key)
    assert found is None or found[0][0].unique().tolist() == [value], (name, turn)
    try:
        cache.save(key, [[torch.full((1, 16, 64), value), {}]])
    except QuantError as error:
        assert "another process is writing it" in str(error) or "cannot be written" in str(error), error
print("done")
"""


def test_two_processes_share_the_folder(tmp_path):
    command = [sys.executable, "-I", "-c", PROCESS, str(ROOT), str(tmp_path)]
    both = [subprocess.Popen([*command, name], stdout=-1, stderr=-1, text=True) for name in ("one", "two")]
    for process in both:
        out, error = process.communicate(timeout=120)
        assert out == "done\n", error
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 40_000
    cache = ConditioningCache(tmp_path)
    assert all(cache.load(key) for key in keys(cache))
