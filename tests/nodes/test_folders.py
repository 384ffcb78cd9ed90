"""The folders that nodes read from and write to."""

from __future__ import annotations

import os
from types import SimpleNamespace

import folder_paths
import pytest

from wanquant.nodes import encoding
from wanquant.nodes.folders import (
    IMPORTANCE_SUFFIXES,
    check_names,
    destinations,
    model_path,
    output_path,
    read_path,
    register_folders,
    source_names,
    stat_token,
)
from wanquant.nodes.load_diffusion_model import WanQuantLoader
from wanquant.quant import QuantError


def test_gguf_files_are_listed_beside_the_hosts_own_models(models):
    (models / "diffusion_models" / "wan").mkdir()
    (models / "diffusion_models" / "wan" / "a.gguf").touch()
    (models / "diffusion_models" / "b.safetensors").touch()
    assert folder_paths.get_filename_list("unet_gguf") == [os.path.join("wan", "a.gguf")]
    assert source_names() == ["b.safetensors", os.path.join("wan", "a.gguf")]


def test_folders_of_other_packs_are_kept(models, tmp_path):
    other = str(tmp_path / "other")
    folder_paths.folder_names_and_paths["unet_gguf"] = ([other], {".ggml"})
    register_folders()
    paths, extensions = folder_paths.folder_names_and_paths["unet_gguf"]
    assert paths == [other, str(models / "diffusion_models")]
    assert extensions == {".ggml", ".gguf"}


def test_destination_labels_name_no_machine(models, tmp_path):
    elsewhere = str(tmp_path / "elsewhere")
    folder_paths.folder_names_and_paths["diffusion_models"][0].append(elsewhere)
    assert destinations() == {
        "output": str(tmp_path / "output" / "diffusion_models"),
        "diffusion_models": str(models / "diffusion_models"),
        elsewhere: elsewhere,
    }


def test_linked_models_folder_keeps_its_label(models, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (models / "linked").symlink_to(tmp_path / "elsewhere")
    folder_paths.folder_names_and_paths["diffusion_models"][0].append(str(models / "linked"))
    assert destinations()["linked"] == str(models / "linked")
    assert output_path(str(models / "linked"), "x.gguf", ".gguf") == str(models / "linked" / "x.gguf")


def test_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "out").symlink_to(tmp_path)
    with pytest.raises(QuantError, match="is outside"):
        output_path(str(tmp_path / "models"), "out/x.gguf", ".gguf")


@pytest.mark.parametrize("name", ["../x.gguf", "a/../../x.gguf", "/x.gguf", ".", ""])
def test_names_outside_the_folder_are_refused(tmp_path, name):
    folder = tmp_path / "models"
    with pytest.raises(QuantError, match="is outside"):
        output_path(str(folder), name, ".gguf")
    assert not folder.exists()


def test_other_suffix_is_refused(tmp_path):
    with pytest.raises(QuantError, match=r"does not end in \.gguf"):
        output_path(str(tmp_path), "model.safetensors", ".gguf")


def test_subfolder_is_made(tmp_path):
    assert output_path(str(tmp_path), "wan/model.gguf", ".gguf") == str(tmp_path / "wan" / "model.gguf")
    assert (tmp_path / "wan").is_dir()


def test_token_follows_the_file(models):
    path = models / "diffusion_models" / "a.gguf"
    tokens = [stat_token("unet_gguf", "a.gguf")]
    for content in (b"1", b"22"):
        path.write_bytes(content)
        tokens.append(stat_token("unet_gguf", "a.gguf"))
    assert len(set(tokens)) == 3


def test_token_follows_every_part_of_the_file(models):
    parts = [models / "diffusion_models" / f"a-0000{number}-of-00002.gguf" for number in (1, 2)]
    for part in parts:
        part.write_bytes(b"1234")
    token = stat_token("unet_gguf", parts[0].name)
    os.utime(parts[1], (1, 1))
    assert stat_token("unet_gguf", parts[0].name) != token


@pytest.fixture
def library(models):
    """A models folder with a file in a subfolder, a file with accents in its name, and circular links."""
    folder = models / "diffusion_models"
    (folder / "wan").mkdir()
    for name in ("wan/x-Q4_K_M.gguf", "\u00e9t\u00e9-\u6a21\u578b.gguf"):
        (folder / name).touch()
    (folder / "self.gguf").symlink_to(folder / "self.gguf")
    (folder / "loop").symlink_to(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("wan/x-Q4_K_M.gguf", "wan/x-Q4_K_M.gguf"),
        ("wan\\x-Q4_K_M.gguf", "wan/x-Q4_K_M.gguf"),
        ("loop/wan/x-Q4_K_M.gguf", "wan/x-Q4_K_M.gguf"),
        ("e\u0301te\u0301-\u6a21\u578b.gguf", "\u00e9t\u00e9-\u6a21\u578b.gguf"),
    ],
    ids=["own", "windows", "loop", "decomposed"],
)
def test_names_of_other_systems_resolve(library, name, file):
    assert check_names(("unet_gguf", name)) is True
    assert os.path.samefile(model_path("unet_gguf", name), library / file)
    assert stat_token("unet_gguf", name) != "missing"


@pytest.mark.parametrize("listed", ["wan\\x.gguf"], ids=["windows"])
def test_names_saved_on_linux_resolve_where_the_list_has_backslashes(library, monkeypatch, listed):
    monkeypatch.setattr(folder_paths, "get_filename_list", lambda folder: [listed])
    assert check_names(("unet_gguf", "wan/y.gguf")) is not True
    monkeypatch.setattr(folder_paths, "get_full_path", lambda folder, name: f"C:\\models\\{name}")
    assert model_path("unet_gguf", "wan/x.gguf") == "C:\\models\\wan\\x.gguf"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("elsewhere/X-Q4_K_M.gguf", "the nearest name there is "),
        ("x-Q4_K_S.gguf", "the nearest name there is "),
        ("quite-different.safetensors", "no file there has a similar name"),
        ("self.gguf", "is a broken link"),
        ("n" * 300 + ".gguf", "no file there has a similar name"),
        ("", "no file there has a similar name"),
    ],
    ids=["other_folder", "similar", "nothing_similar", "link_to_itself", "long", "empty"],
)
def test_missing_file_names_the_nearest_and_the_folder(library, name, hint):
    answer = check_names(("unet_gguf", name))
    assert hint in answer
    assert str(library) in answer
    assert ("wan/x-Q4_K_M.gguf" in answer) == ("nearest" in hint)
    with pytest.raises(QuantError, match="choose"):
        model_path("unet_gguf", name)


def test_linked_name_is_not_checked_yet(library):
    assert check_names(("unet_gguf", None), ("unet_gguf", "wan/x-Q4_K_M.gguf")) is True


def test_path_that_the_system_refuses_is_reported(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(QuantError, match="cannot be written: File exists; choose another name or folder"):
        output_path(str(tmp_path), "file/x.gguf", ".gguf")
    with pytest.raises(QuantError, match="cannot be written: File name too long; choose another name"):
        output_path(str(tmp_path), f"{'n' * 300}/x.gguf", ".gguf")
    with pytest.raises(QuantError, match="cannot be written: File name too long; choose another name"):
        output_path(str(tmp_path), f"{'n' * 300}.gguf", ".gguf")


def test_output_name_typed_on_windows(tmp_path):
    assert output_path(str(tmp_path), "wan\\model.gguf", ".gguf") == str(tmp_path / "wan" / "model.gguf")


def register_as_comfyui_gguf_does():
    """Register the folder keys that both packs use as ComfyUI-GGUF does: the host's own list, with .gguf alone."""
    for key, host_key in (("unet_gguf", "diffusion_models"), ("clip_gguf", "text_encoders")):
        folder_paths.folder_names_and_paths[key] = (folder_paths.folder_names_and_paths[host_key][0], {".gguf"})


@pytest.mark.parametrize("other_first", [True, False])
def test_comfyui_gguf_beside_this_pack(models, monkeypatch, other_first):
    monkeypatch.delitem(folder_paths.folder_names_and_paths, "unet_gguf")
    steps = [register_as_comfyui_gguf_does, register_folders]
    for step in steps if other_first else reversed(steps):
        step()
    (models / "diffusion_models" / "a.gguf").touch()
    for key, host_key in (("unet_gguf", "diffusion_models"), ("clip_gguf", "text_encoders")):
        paths, extensions = folder_paths.folder_names_and_paths[key]
        assert paths is folder_paths.folder_names_and_paths[host_key][0], "one list, so that folders added later count"
        assert extensions == {".gguf"}
    assert folder_paths.get_filename_list("unet_gguf") == ["a.gguf"]
    assert ".gguf" not in folder_paths.folder_names_and_paths["diffusion_models"][1], (
        "the host's loaders cannot read it"
    )


def test_a_typed_path_is_opened_only_if_its_suffix_is_of_the_kind(tmp_path):
    secret = tmp_path / "passwd"
    secret.write_bytes(b"root:x:0:0")
    for suffixes in ((".gguf",), IMPORTANCE_SUFFIXES):
        with pytest.raises(QuantError, match=r"passwd: not a name that ends in \.gguf") as error:
            read_path(str(secret), *suffixes)
        assert "root:x" not in str(error.value)
    with pytest.raises(QuantError, match="not a name that ends in"):
        WanQuantLoader.execute("", "default", path=str(secret))


def test_progress_shows_the_tensor_and_the_time_left(monkeypatch):
    shown, now = [], [100.0]
    monkeypatch.setattr(encoding, "_show", lambda _, text: shown.append(text))
    monkeypatch.setattr(encoding, "time", SimpleNamespace(monotonic=lambda: now[0]))
    progress = encoding.progress_bar()
    for seconds, done in ((1, 10), (20, 100), (60, 300)):
        now[0] = 100.0 + seconds
        progress(done, 400, "blocks.0.ffn.0.weight")
    assert shown == [f"blocks.0.ffn.0.weight{left}" for left in ("", ", 01:00 left", ", 00:20 left")]


def test_text_on_the_node_is_neither_html_nor_control_characters(monkeypatch):
    shown = []
    server = SimpleNamespace(send_progress_text=lambda text, node_id: shown.append(text))
    monkeypatch.setattr(encoding, "PromptServer", SimpleNamespace(instance=server))
    encoding._show(SimpleNamespace(node_id="1"), "<img src=x onerror=alert(1)>&\x1b")
    assert shown == ["&lt;img src=x onerror=alert(1)&gt;&amp;\\x1b"]
