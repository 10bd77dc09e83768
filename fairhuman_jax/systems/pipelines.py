"""From the name of a base model to a pipeline ready to run."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from fairhuman_jax.weights import Pipeline, load_pipeline

SHIPPED = {"people": "people-base"}


def open_pipeline(base: str, *, dtype: str = "float32", **runtime: Any) -> Pipeline:
    """The pipeline in the diffusers folder `base`, or one that ships with the package ("people").

    `dtype` is that of frozen parameters and computation; `runtime` goes to the networks (remat, attention, scan).
    """
    path = Path(base)
    if base in SHIPPED:
        path = Path(str(resources.files("fairhuman_jax") / "assets" / SHIPPED[base]))
    elif not path.is_dir():
        shipped = ", ".join(SHIPPED)
        raise FileNotFoundError(f"base model {base!r}: no such folder, and not one that ships ({shipped})")
    return load_pipeline(path, dtype=dtype, **runtime)
