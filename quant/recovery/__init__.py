"""What quantization took from a file, as a LoRA.

It imports `sources`, `statistics` and `gguf`.
"""
