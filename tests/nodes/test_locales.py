"""locales/ covers every node, input and output in every language, and its English texts are those of the schemas."""

from __future__ import annotations

import asyncio
import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from wanquant.nodes import WanQuantExtension
from wanquant.testing.hosts import ROOT

HOW = """
locales/en follows the schemas: `python3 dev.py test tests/nodes/test_locales.py --update` writes it.
For zh, ja and ko add what is missing to locales/<language>/nodeDefs.json by hand, in the words ComfyUI itself uses."""
# A language is recognized by its letters: Chinese characters, Japanese syllables, Korean syllables.
LETTERS = {"zh": "[\u4e00-\u9fff]", "ja": "[\u3040-\u30ff]", "ko": "[\uac00-\ud7a3]"}


@pytest.fixture
def schemas(models):
    # In a separate thread, because the event loop of the browser tests may still run in this one.
    with ThreadPoolExecutor(1) as pool:
        nodes = pool.submit(asyncio.run, WanQuantExtension().get_node_list()).result()
    return [node.GET_SCHEMA() for node in nodes]


@pytest.fixture
def english(schemas):
    """The content of locales/en/nodeDefs.json, generated from the schemas."""
    return {
        schema.node_id: {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {entry.id: words(entry.display_name or entry.id, entry.tooltip) for entry in schema.inputs},
            "outputs": {
                str(slot): words(entry.display_name or entry.io_type, entry.tooltip)
                for slot, entry in enumerate(schema.outputs)
            },
        }
        for schema in schemas
    }


# Texts that depend on the host. ComfyUI shows the schema's only if the English file has none.
OF_THE_HOST = ("WanQuantConvert.inputs.recipe.tooltip", "WanQuantSaveModel.inputs.recipe.tooltip")


def without_texts_of_the_host(tree):
    tree = json.loads(json.dumps(tree))
    for key in OF_THE_HOST:
        node, _, name, what = key.split(".")
        del tree[node]["inputs"][name][what]
    return tree


def words(name, tooltip):
    return {"name": name, "tooltip": tooltip} if tooltip else {"name": name}


def path(language):
    return ROOT / "locales" / language / "nodeDefs.json"


def read(language):
    return json.loads(path(language).read_text(encoding="utf-8"))


def flat(tree, prefix=""):
    """Yield ("WanQuantLoader.inputs.path.tooltip", "text") for every text."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_english_is_that_of_the_schemas(english, request):
    english = without_texts_of_the_host(english)
    if request.config.getoption("--update"):
        path("en").write_text(json.dumps(english, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    found, expected = dict(flat(read("en"))), dict(flat(english))
    assert found == expected, HOW


@pytest.mark.parametrize("language", LETTERS)
def test_every_text_is_translated(english, language):
    found, expected = dict(flat(read(language))), dict(flat(english))
    missing = {key: text for key, text in expected.items() if not found.get(key)}
    assert not missing, f"{json.dumps(missing, indent=2)}\nare not in {path(language)}{HOW}"
    assert not found.keys() - expected.keys(), f"{path(language)} has texts for what no node has{HOW}"
    # Names may be symbols that all languages share, such as MODEL and PSNR; sentences are not.
    sentences = [key for key in expected if not key.endswith(".name")]
    foreign = [key for key in sentences if not re.search(LETTERS[language], found[key])]
    assert not foreign, f"{foreign} in {path(language)} are not in {language}"


def test_every_input_is_explained_and_every_node_can_be_searched(schemas):
    mute = [f"{schema.node_id}.{entry.id}" for schema in schemas for entry in schema.inputs if not entry.tooltip]
    assert not mute
    assert all(schema.description and len(schema.search_aliases) > 1 for schema in schemas)
    assert {schema.category.partition("/")[0] for schema in schemas} == {"WanQuant"}
