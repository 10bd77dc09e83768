"""HumanSD: a denoiser that reads a skeleton's latents beside its own."""
