"""Human-image generation in JAX: five published systems on shared models, losses, samplers, data and trainers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fairhuman_jax.systems.registry import open_pipeline

__version__ = "0.1.0"
__all__ = ["__version__", "open_pipeline"]


def __getattr__(name: str) -> Any:
    """Imports `open_pipeline` when it is first used, so that importing the package stays light."""
    if name == "open_pipeline":
        from fairhuman_jax.systems.registry import open_pipeline

        return open_pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
