"""Conversion of checkpoints to GGUF, tensor by tensor, and back.

It imports every folder but `recovery`.
"""
