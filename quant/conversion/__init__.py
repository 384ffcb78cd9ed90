"""Conversion of checkpoints to GGUF or to ComfyUI's own formats, tensor by tensor, and back.

It imports every folder but `recovery`.
"""
