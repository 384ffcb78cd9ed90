"""Sampling of real Wan models by ComfyUI's own loader, sampler and VAE, and what is shown of it."""
