"""Face-diffuser: a scene model and a subject model, fused per pixel."""
