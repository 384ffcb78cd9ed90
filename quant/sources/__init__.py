"""Where weights come from: files of any supported layout, as tensors under ComfyUI's names."""
