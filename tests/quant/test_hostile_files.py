"""Files that are damaged on purpose: each is refused in one sentence, in little time and memory, or read."""

from __future__ import annotations

import itertools
import json
import os
import struct
from pathlib import Path

import pytest
import torch

from wanquant.quant import QTYPES, QuantError, convert, read_importance
from wanquant.quant import torch_op as op
from wanquant.quant.errors import MAX_CHARS, printable
from wanquant.quant.files.atomic_file import AtomicFile
from wanquant.quant.inspection import report_chart
from wanquant.quant.inspection.report import inspect
from wanquant.quant.sources.checkpoint import open_checkpoint
from wanquant.testing.hostile_files import Kind, kinds
from wanquant.tests.quant.gguf_bytes import STRING, U32, RawGGUF, RawTensor, name, pair

TRIES = 400


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    return {kind.name: kind for kind in kinds(tmp_path_factory.mktemp("seeds"))}


@pytest.mark.parametrize(
    "kind",
    [
        *("GGUF", "restored GGUF", "safetensors", "shard index", "importance matrix", "importance matrix (.dat)"),
        *("calibration", "conditioning"),
    ],
)
def test_mutated_files_are_refused_in_one_sentence_or_read(kind: str, every_kind: dict[str, Kind], tmp_path: Path):
    path = tmp_path / f"a{every_kind[kind].suffix}"
    refused = 0
    for content in itertools.islice(every_kind[kind].mutations(seed=1), TRIES):
        path.write_bytes(content)
        try:
            every_kind[kind].read(path)
        except QuantError as error:
            refused += 1
            assert len(str(error)) <= MAX_CHARS and str(error).isprintable()
    assert 0 < refused < TRIES


def test_every_seed_is_valid(every_kind: dict[str, Kind], tmp_path: Path):
    for kind in every_kind.values():
        for index, seed in enumerate(kind.seeds):
            path = tmp_path / f"{index}{kind.suffix}"
            path.write_bytes(seed)
            kind.read(path)


def test_text_of_messages_is_one_line_of_a_terminal():
    assert printable("a\nb\x1b[31m\ud800\u202e") == r"a\nb\x1b[31m\ud800\u202e"
    assert printable("a" * 9999).endswith("aaa") and len(printable("\0" * 9999)) <= MAX_CHARS
    assert printable("Größe 模型 é") == "Größe 模型 é"


def small(**tensor: object) -> RawGGUF:
    return RawGGUF(tensors=(RawTensor(**tensor),), data=bytes(96))  # type: ignore[arg-type]


@pytest.mark.parametrize("number", ["30000000", "2000000000", "9" * 60])
def test_chart_is_no_wider_than_the_blocks_of_the_file(tmp_path: Path, number: str):
    path = tmp_path / "a.gguf"
    path.write_bytes(small(name=f"blocks.{number}.ffn.0.weight").pack())
    assert report_chart.draw(inspect(path)).width == 540


def test_chart_shows_some_layers_and_blocks_of_very_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn = []
    monkeypatch.setattr(report_chart, "_draw_map", lambda _a, _s, layers, _t, _v: drawn.append(layers))
    raw = RawGGUF(
        tensors=[RawTensor(f"blocks.{n}.layer{n}.weight", (32, 1), 8, 0 if n == 0 else 64 * n) for n in range(500)],
        data=bytes(64 * 500),
    )
    path = tmp_path / "a.gguf"
    path.write_bytes(raw.pack())
    assert report_chart.draw(inspect(path)).height < 3000
    assert len(drawn[0]) == 60


@pytest.mark.parametrize("text", ["$_$", "$\\frac{1}{0}$", "a" * 300_000])
def test_text_from_a_file_is_drawn_as_text(tmp_path: Path, text: str):
    raw = RawGGUF(pairs=[pair("general.architecture", STRING, name(text))])
    path = tmp_path / "$_$.gguf"
    path.write_bytes(raw.pack())
    report = inspect(path)
    assert report_chart.draw(report).mode == "RGB"
    assert max(map(len, report.text().splitlines())) < 200


def test_a_number_in_place_of_a_tokenizer_is_not_a_size(tmp_path: Path):
    from wanquant.quant.files.sentencepiece import SPIECE_KEY, sentencepiece_model

    with pytest.raises(QuantError, match="1000000000, expected an array of at most"):
        sentencepiece_model({SPIECE_KEY: 1_000_000_000})
    path = tmp_path / "a.gguf"
    path.write_bytes(RawGGUF().with_pairs(pair("imatrix.chunk_count", U32, struct.pack("<I", 1))).pack())
    with pytest.raises(QuantError, match="not an importance matrix"):
        read_importance(path)


def test_index_with_a_million_repeated_names_is_refused(tmp_path: Path):
    path = tmp_path / "a.safetensors.index.json"
    path.write_text('{"weight_map": {' + ", ".join(['"a": "b"'] * 200_000) + "}}")
    with pytest.raises(QuantError, match="the name a occurs twice"):
        open_checkpoint(path)


def test_sizes_of_thousands_of_digits_are_refused(tmp_path: Path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [10**4298] * 60, "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(QuantError, match="an integer of 4299 digits"):
        open_checkpoint(path)


def test_headers_of_more_than_16_mib_of_json_are_refused(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write((17 << 20).to_bytes(8, "little"))
        file.truncate(32 << 20)
    with pytest.raises(QuantError, match=r"header length 17825792 .*expected at most 16777216"):
        open_checkpoint(path)


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    (tmp_path / "victim").write_bytes(b"precious")
    return tmp_path / "a.gguf"


@pytest.mark.skipif(os.name == "nt", reason="links and pipes of POSIX")
@pytest.mark.parametrize("kind", ["symbolic link", "broken link", "hard link", "pipe", "folder"])
@pytest.mark.parametrize("name", [".a.gguf.tmp", "a.gguf"])
def test_nothing_is_written_through_links_and_pipes(source: Path, destination: Path, name: str, kind: str):
    taken, victim = destination.with_name(name), destination.with_name("victim")
    if kind == "symbolic link":
        taken.symlink_to(victim)
    elif kind == "broken link":
        taken.symlink_to(destination.with_name("absent"))
    elif kind == "hard link":
        os.link(victim, taken)
    elif kind == "pipe":
        os.mkfifo(taken)
    else:
        taken.mkdir()
    if kind == "hard link" and name == "a.gguf":  # replacing a name leaves the other one as it is
        convert(source, destination, "Q4_0", effort="fast", overwrite=True)
    else:
        with pytest.raises(QuantError):
            convert(source, destination, "Q4_0", effort="fast", overwrite=True)
    assert victim.read_bytes() == b"precious" and not destination.with_name("absent").exists()


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
def test_pipes_and_devices_are_not_opened(tmp_path: Path):
    for pipe in ("a.gguf", "a.safetensors", "a.dat"):
        os.mkfifo(tmp_path / pipe)
    for read in (inspect, open_checkpoint, read_importance):
        for path in (*tmp_path.iterdir(), Path("/dev/zero")):
            with pytest.raises(QuantError, match=r"is a pipe|is a device|expected a file|no such file|cannot be read"):
                read(path)


NAMES = {
    "NUL": "a\0b.gguf",
    "lone surrogate": "a\ud800.gguf",
    "2,000 folders": "a/" * 2000 + "a.gguf",
    "255 bytes": "n" * 250 + ".gguf",
    "253 bytes": "n" * 248 + ".gguf",
    "300 bytes": "n" * 295 + ".gguf",
    "loop of links": "loop/a.gguf",
}


@pytest.mark.skipif(os.name == "nt", reason="names of POSIX")
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_unusable_names_are_refused_before_any_work(source: Path, tmp_path: Path, name: str):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    calls: list[object] = []
    with pytest.raises(QuantError) as error:
        convert(source, tmp_path / name, "Q4_0", effort="fast", progress=lambda *call: calls.append(call))
    assert not calls and str(error.value).isprintable()
    for read in (inspect, open_checkpoint, read_importance):
        with pytest.raises(QuantError):
            read(tmp_path / name)


@pytest.mark.skipif(os.name == "nt", reason="names of POSIX")
def test_the_longest_name_that_leaves_room_for_an_unfinished_file_is_written(tmp_path: Path):
    with AtomicFile(tmp_path / ("n" * 245 + ".gguf"), 1) as file:
        file.write(b"1")
        assert file.commit().stat().st_size == 1


def test_tensors_of_two_devices_are_refused():
    packed = torch.zeros(34, dtype=torch.uint8)
    with pytest.raises(QuantError, match="packed data on cpu, output on meta"):
        op.dequantize_into(packed, QTYPES["Q8_0"].name, torch.empty(32, device="meta"))


def test_numbers_and_bytes_in_the_wrong_fields_of_a_tokenizer():
    from wanquant.quant.files import sentencepiece as model

    piece = model._message(1, model._message(1, b"a"))
    for content in (
        model._message(1, model._integer(1, 1 << 40)),
        model._integer(1, 1 << 40),
        model._integer(2, 5) + piece,
        piece + model._message(3, model._integer(2, 1 << 40)),
        model._message(1, model._message(1, b"a") + model._message(2, b"xx")),
    ):
        with pytest.raises(QuantError, match="expected a SentencePiece model"):
            model.parse_vocabulary(content, 4)
    huge = model._message(1, model._message(1, b"a") + model._integer(3, 1 << 62))
    assert model.parse_vocabulary(huge, 1)["tokenizer.ggml.token_type"].tolist() == [0]
