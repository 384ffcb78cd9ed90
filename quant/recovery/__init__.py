"""Recovery LoRAs, which undo a part of the quantization error of a GGUF.

It imports `sources`, `statistics` and `gguf`.
"""
