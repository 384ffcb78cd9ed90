"""Where nodes read and write."""

from __future__ import annotations

import os

import folder_paths
import pytest

from wanquant.nodes.folders import destinations, output_path, register_folders, source_names, stat_token
from wanquant.quant import QuantError


def test_gguf_files_are_listed_beside_the_hosts_own_models(models):
    (models / "diffusion_models" / "wan").mkdir()
    (models / "diffusion_models" / "wan" / "a.gguf").touch()
    (models / "diffusion_models" / "b.safetensors").touch()
    assert folder_paths.get_filename_list("unet_gguf") == [os.path.join("wan", "a.gguf")]
    assert source_names() == ["b.safetensors"]


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


def test_link_that_leads_out_is_refused(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "out").symlink_to(tmp_path)
    with pytest.raises(QuantError, match="leads out of"):
        output_path(str(tmp_path / "models"), "out/x.gguf", ".gguf")


@pytest.mark.parametrize("name", ["../x.gguf", "a/../../x.gguf", "/x.gguf", ".", ""])
def test_names_that_lead_out_are_refused(tmp_path, name):
    folder = tmp_path / "models"
    with pytest.raises(QuantError, match="leads out of"):
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
