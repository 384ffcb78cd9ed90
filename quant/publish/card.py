"""The card of a published model: a README.md in the form that model hubs read.

Source of the front matter: https://huggingface.co/docs/hub/model-cards, "Model card metadata".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import QuantError, escaped
from ..files.regular_file import open_regular
from ..native.registry import FIRST_HOST
from ..units import GIB
from .entry import Entry

CARD = "README.md"
# Source: comfy-kitchen 0.2.40, the capabilities that its CUDA and HIP backends register.
_GPUS = {
    "FP8": "RTX 40, H100 and newer multiply in it; others dequantize it",
    "MXFP8": "RTX 50, B200 and newer with PyTorch 2.10 multiply in it; others dequantize it",
    "NVFP4": "RTX 50, B200 and newer multiply in it; others dequantize it",
    "INT8": "RTX 20 and newer, RX 7000 and newer",
    "INT4": "RTX 20 to RTX 40 multiply in 4 bits; newer ones and RX 7000 in 8",
    "W4A8": "RTX 30 and newer, RX 7000 and newer",
    "W4A8_G32": "RTX 30 and newer, RX 7000 and newer",
    "W6A8": "RTX 30 and newer, RX 7000 and newer",
}
_RULE, _OF_GGUF = "---", "- gguf"
_MAX_BYTES = 1 << 20
_GGUF = ("0.24 with WanQuant", "any, and the CPU")
_IMAGE_CHANNELS = 36
"""The latent channels of a model that also takes an image; those of text-to-video models are fewer, or 48 for both."""


def front_matter_of(path: Path) -> list[str]:
    """Return the lines of the front matter of an existing card, or nothing."""
    with suppress(QuantError), open_regular(path) as file:
        lines = file.read(_MAX_BYTES).decode(errors="replace").splitlines()
        if lines[:1] == [_RULE] and _RULE in lines[1:]:
            return lines[: lines.index(_RULE, 1) + 1]
    return []


def card(model: str, entries: Sequence[Entry], before: Sequence[str] = ()) -> str:
    """Return the card of a model.

    Args:
        model: the name of its folder.
        entries: what the manifest says of its files; at least one.
        before: the front matter of its present card, which stays if it was edited.
    """
    front = list(_front_matter(entries))
    is_edited = before and (set(before) ^ set(front)) - {_OF_GGUF}
    lines = [*(before if is_edited else front), "", f"# {escaped(model)}", "", *_introduction(entries), ""]
    lines += [*_table(entries), ""]
    lines += [
        "SQNR is the ratio of signal to quantization noise, from the mean squared relative error of all quantized"
        " weights. More is better.",
        *_on_calibration(entries),
        "",
        "## Provenance",
        "",
        *_provenance(entries),
        "",
        "## Made by",
        "",
        "```",
        *dict.fromkeys(entry["command"] for entry in entries),
        "```",
        "",
    ]
    return "\n".join(lines)


def _front_matter(entries: Sequence[Entry]) -> Iterator[str]:
    """Yield the lines of the front matter; what only the publisher knows is left as a comment."""
    yield _RULE
    yield "# license: of the source"
    yield "# base_model: OWNER/NAME of the source"
    yield "base_model_relation: quantized"
    kind, channels = entries[0]["kind"], entries[0]["source"]["in_channels"]
    if kind.startswith("Wan"):
        yield f"pipeline_tag: {'image-to-video' if channels == _IMAGE_CHANNELS else 'text-to-video'}"
    yield "tags:"
    yield from ("- comfyui", "- wan", "- quantized")
    if any(entry["file"].endswith(".gguf") for entry in entries):
        yield _OF_GGUF
    yield _RULE


def _introduction(entries: Sequence[Entry]) -> Iterator[str]:
    kind, source = entries[0]["kind"], entries[0]["source"]
    yield (
        f"{kind[0].upper()}{kind[1:]}, quantized from {_code(source['name'])} ({source['dtype']},"
        f" {source['bytes'] / GIB:.2f} GiB) with [WanQuant](https://github.com/wanquant/ComfyUI-WanQuant). A `.gguf`"
        " opens in WanQuant's loaders, a `.safetensors` in ComfyUI's own."
    )


def _table(entries: Sequence[Entry]) -> Iterator[str]:
    yield "| file | bytes | GiB | bits per weight | SQNR dB | ComfyUI from | GPUs |"
    yield "|---|---|---|---|---|---|---|"
    for entry in entries:
        sqnr = "exact" if entry["sqnr_db"] is None else f"{entry['sqnr_db']:.2f}"
        host, gpus = _runs_on(entry)
        gpus += "; experimental" if entry["experimental"] else ""
        size = f"{entry['bytes']} | {entry['bytes'] / GIB:.3f} | {entry['bits_per_weight']:.2f}"
        yield f"| {_code(entry['file'])} | {size} | {sqnr} | {host} | {gpus} |"


def _on_calibration(entries: Sequence[Entry]) -> Iterator[str]:
    if any(entry["calibration_sha256"] for entry in entries):
        yield "A calibrated file has less error in what its layers compute, for more error of the weights themselves."


def _runs_on(entry: Entry) -> tuple[str, str]:
    """Return the first ComfyUI that loads a file, and the GPUs that it runs fast on."""
    if entry["file"].endswith(".gguf"):
        return _GGUF
    formats = [name for name in entry["types"] if name in FIRST_HOST]
    if not formats:
        return "any", "any, and the CPU"
    newest = max(formats, key=lambda name: FIRST_HOST[name])
    return ".".join(map(str, FIRST_HOST[newest])), "; ".join(dict.fromkeys(_GPUS[name] for name in formats))


def _provenance(entries: Sequence[Entry]) -> Iterator[str]:
    for source in {entry["source"]["sha256"]: entry["source"] for entry in entries}.values():
        yield f"- source: {_code(source['name'])}, {source['bytes']} bytes, SHA-256 `{source['sha256']}`"
    versions = sorted({entry["wanquant"] for entry in entries})
    efforts = sorted({entry["effort"] for entry in entries})
    yield f"- converter: WanQuant {', '.join(versions)}, effort {', '.join(efforts)}"
    for calibration in sorted({entry["calibration_sha256"] for entry in entries if entry["calibration_sha256"]}):
        yield f"- calibration of the layers' inputs: SHA-256 of its values `{calibration}`"
    for lora in dict.fromkeys(lora for entry in entries for lora in entry["loras"]):
        yield f"- LoRA in the weights: {_code(lora)}"
    yield "- the SHA-256 of each file is in `manifest.json` and `SHA256SUMS` of the publication, and in the file itself"
    yield "  that of its data"


def _code(name: str) -> str:
    """Return a name as code in Markdown, also within a table."""
    fence = "``" if "`" in name else "`"
    return f"{fence}{escaped(name)}{fence}".replace("|", r"\|")
