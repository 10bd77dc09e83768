"""Human-image generation in JAX: five published systems on shared models, losses, samplers, data and trainers."""

__version__ = "0.1.0"
