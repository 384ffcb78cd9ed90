"""GGUF files: header, metadata and tensors, read without trusting any number in them, and written atomically.

It imports `qtype` and `files`.
"""
