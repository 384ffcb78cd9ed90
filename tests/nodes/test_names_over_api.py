"""Names that only a prompt over the API can hold are refused in one sentence, before any work."""

from __future__ import annotations

import shutil

import pytest

from wanquant.nodes.convert import WanQuantConvert
from wanquant.nodes.folders import check_names, destination, model_path, output_path, path_token, read_path, stat_token
from wanquant.nodes.load_diffusion_model import WanQuantLoader
from wanquant.nodes.save_model import WanQuantSaveModel
from wanquant.quant import QuantError

OTHER_TYPES = [5, 1.5, True, {"a": 1}, [1, 2, 3]]
NAMES = {
    "NUL": "a\0.gguf",
    "surrogate": "a\ud800.gguf",
    "escape": "a\x1b[31m.gguf",
    "newline": "a\n.gguf",
    "folders": "a/" * 3000 + "x.gguf",
    "some folders": "a/" * 21 + "x.gguf",
    "long": "n" * 1001 + ".gguf",
}


def is_sentence(text):
    return isinstance(text, str) and text.isprintable() and 20 < len(text) <= 500


@pytest.fixture
def folder(models, t2v):
    folder = models / "diffusion_models"
    shutil.copy(t2v[0], folder / "wan.safetensors")
    (folder / "loop").symlink_to(folder / "loop")
    return folder


def files(folder):
    return sorted(path.name for path in folder.rglob("*"))


def run(source="wan.safetensors", output_name="", folder="diffusion_models", **inputs):
    return WanQuantConvert.execute(source, "Q4_0", folder, output_name, False, "fast", "cpu", **inputs)


@pytest.mark.parametrize("kind", NAMES)
def test_output_names(folder, kind):
    before = files(folder)
    with pytest.raises(QuantError, match=r"output name .* expected up to 1000 printable") as error:
        run(output_name=NAMES[kind])
    assert is_sentence(str(error.value))
    assert files(folder) == before


def test_an_output_name_in_a_loop_of_links(folder):
    with pytest.raises(QuantError, match=r"Too many levels of symbolic links|File exists"):
        run(output_name="loop/x.gguf")


def test_an_output_name_of_other_letters(folder):
    assert output_path(str(folder), "模型/é x.gguf", ".gguf") == str(folder / "模型" / "é x.gguf")


@pytest.mark.parametrize("kind", NAMES)
def test_names_of_sources(folder, kind):
    assert is_sentence(WanQuantConvert.validate_inputs(source=NAMES[kind]))
    assert is_sentence(WanQuantLoader.validate_inputs(model_name=NAMES[kind]))
    with pytest.raises(QuantError) as error:
        run(NAMES[kind])
    assert is_sentence(str(error.value))
    assert stat_token("diffusion_models", NAMES[kind]) == "missing"


@pytest.mark.parametrize("value", OTHER_TYPES, ids=repr)
def test_other_types_in_place_of_a_name(folder, value):
    asked = (
        check_names(("diffusion_models", value)),
        WanQuantLoader.validate_inputs(model_name=value),
        *(WanQuantConvert.validate_inputs(**{name: value}) for name in ("source", "module")),
    )
    assert all(map(is_sentence, asked))
    calls = (
        lambda: run(value),
        lambda: run(module=value),
        lambda: run(output_name=value),
        lambda: run(importance=value),
        lambda: model_path("diffusion_models", value),
        lambda: stat_token("diffusion_models", value),
        lambda: read_path(value, ".gguf"),
        lambda: path_token(value),
        lambda: WanQuantSaveModel.fingerprint_inputs(value, "diffusion_models"),
    )
    for call in calls:
        with pytest.raises(QuantError, match="in place of the name of a file, expected text") as error:
            call()
        assert is_sentence(str(error.value))


@pytest.mark.parametrize("value", [5, True, "a", {"a": 1}])
def test_other_types_in_place_of_a_list(folder, value):
    assert WanQuantConvert.validate_inputs(more_modules=value) == f"{value!r} in place of a list of add-on files: " + (
        "choose them from the list"
    )
    with pytest.raises(QuantError, match="in place of a list of add-on files"):
        run(more_modules=value)
    assert is_sentence(WanQuantConvert.validate_inputs(more_modules=[value]))


@pytest.mark.parametrize("value", [*OTHER_TYPES, None, "elsewhere"], ids=repr)
def test_unknown_folders(folder, value):
    with pytest.raises(QuantError, match="is unknown, expected one of output, diffusion_models"):
        destination(value)


def test_null_is_a_link_while_it_is_validated_only(folder):
    assert WanQuantConvert.validate_inputs(source=None, module=None, more_modules=None) is True
    with pytest.raises(QuantError, match="None in place of the name of a file, expected text"):
        run(None)
