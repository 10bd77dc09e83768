"""Recipes: what a picture was made from, as JSON in the PNG's text chunk `parameters`, and back again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from fairhuman_jax import __version__
from fairhuman_jax.contract import Job
from fairhuman_jax.drawing.options import Options
from fairhuman_jax.fields import OptionError, fields_of

CHUNK = "parameters"


def recipe_of(system: str, job: Job, size: tuple[int, int], **more: Any) -> dict[str, Any]:
    """JSON values: the system, every recorded option, and the picture's prompt, seed, height, width and `more`."""
    recorded = [field.name for field in fields_of(job.options) if field.recorded]
    options = {name: _plain(getattr(job.options, name)) for name in recorded}
    options.pop("size", None)
    height, width = size
    own = {"prompt": job.prompt, "seed": job.seed, "height": height, "width": width}
    if job.name:  # a plan gives each job its own references
        own["reference"] = _plain(job.references)
    return {"system": system, **options, **own, **more, "version": __version__}


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe in a PNG. Raises: OptionError when there is no such file, no picture in it, or no recipe."""
    try:
        with Image.open(path) as picture:
            text = picture.info.get(CHUNK)
        recipe = json.loads(text) if text else None
    except FileNotFoundError:
        raise OptionError("like", f"{{like}} {path}: no such file") from None
    except (OSError, SyntaxError, ValueError):
        raise OptionError("like", f"{{like}} {path}: no picture with a readable recipe") from None
    if not isinstance(recipe, dict) or "prompt" not in recipe or "seed" not in recipe:
        raise OptionError("like", f"{{like}} {path}: the picture holds no recipe of this program")
    return recipe


def options_in(recipe: dict[str, Any], cls: type[Options]) -> dict[str, Any]:
    """The values of a recipe by the fields of a record, for `make_options`; what the record lacks is left out."""
    values: dict[str, Any] = {}
    for field in fields_of(cls):
        value = recipe.get(field.name)
        if value is None:
            continue
        if isinstance(value, list):
            values[field.name] = tuple(field.item(item) if callable(field.item) else item for item in value)
        else:
            values[field.name] = (value,) if field.repeated else value
    if "height" in recipe and "width" in recipe:
        values["size"] = (int(recipe["height"]), int(recipe["width"]))
    return values


def _plain(value: Any) -> Any:
    """A JSON value: paths as text, pictures in memory as a mark that cannot be read again."""
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    return str(value) if isinstance(value, Path) else "<picture in memory>"
