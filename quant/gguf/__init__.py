"""GGUF: header, tensors and metadata, read without trust and written atomically.

It imports `qtype` and `files`.
"""
