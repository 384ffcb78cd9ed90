"""ComfyUI's own quantized formats: float32 weights to the tensors of a layer, and back, without files.

It imports `device` and `errors`.
"""
