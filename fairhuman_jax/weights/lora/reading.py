"""LoRA files in, as the trees that our networks apply.

Torch holds `down` as (r, in) or (r, in, h, w) and `up` as (out, r) or (out, r, 1, 1); ours are [in, r] or
[h, w, in, r] and [r, out], stacked like the kernels they adapt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from fairhuman_jax.models.lora import concatenate_lora, scale_lora
from fairhuman_jax.weights.diffusers import expected_params
from fairhuman_jax.weights.keys import is_stacked, module_names
from fairhuman_jax.weights.lora.names import COMPONENTS, FACTORS, UNET, parse, refusal, spellings
from fairhuman_jax.weights.lora.strength import adapter_settings, strength
from fairhuman_jax.weights.recognition import FAMILIES
from fairhuman_jax.weights.tensors import Tensors, open_tensors

PyTree = Any
FILE_NAMES = tuple(
    f"{stem}.{suffix}" for suffix in ("safetensors", "bin") for stem in ("pytorch_lora_weights", "adapter_model")
)
LISTED = 4  # names an error spells out


class Layer(NamedTuple):
    """A layer with a kernel: its module, its place in a stack of `depth` (None: no stack), the kernel's shape."""

    module: tuple[str, ...]
    place: int | None
    depth: int
    kernel: tuple[int, ...]


class Source(NamedTuple):
    """One opened file and, by component and layer, the tensors it holds: down, up and perhaps alpha."""

    path: Path
    tensors: Tensors
    parts: dict[str, dict[str, dict[str, str]]]


def load_lora(path: str | Path, target: nn.Module | PyTree, component: str = UNET) -> PyTree:
    """The LoRA tree (float32 host arrays) for `target`, a network or its parameters, from file or folder.

    Reads diffusers' present and old naming, PEFT, and kohya in diffusers' and in the original block naming, on linear
    layers and convolutions; what the file holds for other components is left out. The file's strength (alpha / rank) is
    multiplied into `up`. A layer of a stack that the file does not adapt gets zeros; ranks within a stack are padded to
    the largest. Raises: ValueError, FileNotFoundError, one line each: a layout that is not read (by name), a LoRA for
    another base, layers that `target` does not have, a factor missing, wrong shapes.
    """
    if component not in COMPONENTS:
        raise ValueError(f"load_lora: unknown component {component!r}; known: {', '.join(COMPONENTS)}")
    params = expected_params(target) if isinstance(target, nn.Module) else target
    trees, others = _read(path, {component: params})
    if component not in trees:
        held = f"it adapts {', '.join(sorted(others))}" if others else "it holds no tensors"
        raise ValueError(f"{path} holds no LoRA for {component!r}; {held}")
    return trees[component]


def load_loras(entries: Iterable[tuple[str | Path, float]], params_by_component: Mapping[str, PyTree]) -> PyTree:
    """LoRA files, each with a weight, as one tree a component: {"unet": ..., "text_encoder": ...}.

    Updates are stacked along their rank, so the tree applies their weighted sum; `load_lora` says what is read.
    Entries of `params_by_component` that no LoRA adapts (an autoencoder) are passed over.
    Raises: FileNotFoundError, ValueError, as `load_lora`; a file that adapts a component which the model does not have.
    """
    known = {name: params_by_component[name] for name in COMPONENTS if name in params_by_component}
    loaded: dict[str, list[PyTree]] = {}
    for path, weight in entries:
        trees, others = _read(path, known)
        if others or not trees:
            held = f"adapts {', '.join(sorted(others))}" if others else "holds no tensors"
            raise ValueError(f"{path} {held}, but this model's components are {', '.join(known)}")
        for component, tree in trees.items():
            loaded.setdefault(component, []).append(scale_lora(tree, weight))
    return {component: concatenate_lora(trees) for component, trees in loaded.items()}


def _read(path: str | Path, params: Mapping[str, PyTree]) -> tuple[dict[str, PyTree], set[str]]:
    """Trees for those of `params` that the file adapts, and the other components it adapts."""
    file = _file(Path(path))
    tensors = open_tensors(file)
    if refused := refusal(tensors.names()):
        raise ValueError(f"{file} holds {refused}; only plain LoRA on linear layers and convolutions is read")
    layers = {component: _layers(tree) for component, tree in params.items()}
    if UNET in layers:
        _check_base(file, tensors, layers[UNET])
    source, others = _resolve(file, tensors, layers)
    trees = {component: _tree(source, component, layers[component]) for component in source.parts}
    return trees, others


def _file(path: Path) -> Path:
    """The LoRA file that `path` names, itself or the folder it is in."""
    if not path.is_dir():
        return path
    for name in FILE_NAMES:
        if (path / name).is_file():
            return path / name
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    found = f"{len(files)} other safetensors files: name one" if files else "no safetensors file"
    raise FileNotFoundError(f"{path} has no {FILE_NAMES[0]} and {found}")


def _layers(params: PyTree) -> dict[str, Layer]:
    """Torch name of every layer with a kernel -> where it is and what shape it has."""
    layers = {}
    flat: dict[tuple[str, ...], Any] = flatten_dict(params)
    for (*parts, leaf), array in flat.items():
        module = tuple(parts)
        if leaf != "kernel":
            continue
        depth = array.shape[0] if is_stacked(module) else None
        kernel = tuple(array.shape if depth is None else array.shape[1:])
        for i, name in enumerate(module_names(module, depth)):
            layers[name] = Layer(module, None if depth is None else i, depth or 1, kernel)
    return layers


def _check_base(file: Path, tensors: Tensors, layers: Mapping[str, Layer]) -> None:
    """Cross-attention is as wide as the text a model was made for: the plainest sign of another base."""
    ours = next((layer.kernel[0] for name, layer in layers.items() if name.endswith("attn2.to_k")), None)
    for name in tensors.names():
        part = parse(name)
        if ours and part and part.kind == "down" and part.layer.endswith(("attn2_to_k", "attn2_to_v")):
            theirs = tensors.shape(name)[1:2]
            if theirs and theirs[0] != ours:
                base, this = (FAMILIES.get(width, "an unusual base") for width in (theirs[0], ours))
                raise ValueError(
                    f"{file} looks like a LoRA for {base}: its cross-attention takes text {theirs[0]} wide, "
                    f"this model's {ours} ({this})"
                )


def _resolve(file: Path, tensors: Tensors, layers: Mapping[str, Mapping[str, Layer]]) -> tuple[Source, set[str]]:
    """Which tensors adapt which layer, and the other components that the file adapts."""
    tables = {component: spellings(component, names) for component, names in layers.items()}
    parts: dict[str, dict[str, dict[str, str]]] = {}
    others: set[str] = set()
    unread, unknown = [], []
    for name in tensors.names():
        part = parse(name)
        if part is None:
            unread.append(name)
            continue
        if part.component is not None and part.component not in tables:
            others.add(part.component)
            continue
        named = tables if part.component is None else (part.component,)
        component = next((component for component in named if part.layer in tables[component]), None)
        if component is None:
            unknown.append(name)
            continue
        held = parts.setdefault(component, {}).setdefault(tables[component][part.layer], {})
        if part.kind in held:
            raise ValueError(f"{file} holds one factor twice: {held[part.kind]} and {name}")
        held[part.kind] = name
    if unread:
        raise ValueError(f"{file}: {_listed(unread)} in no layout that is read (diffusers, PEFT, kohya)")
    if unknown:
        whose = " and ".join(tables)
        raise ValueError(f"{file}: {_listed(unknown)} for layers that this model's {whose} does not have")
    return Source(file, tensors, parts), others


def _listed(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > LISTED else ""
    return f"{len(names)} tensor{'s' * (len(names) > 1)} ({', '.join(sorted(names)[:LISTED])}{more})"


def _tree(source: Source, component: str, layers: Mapping[str, Layer]) -> PyTree:
    """The arrays, filled one tensor of the file at a time."""
    parts, tensors = source.parts[component], source.tensors
    ranks: dict[tuple[str, ...], int] = {}
    for name, held in sorted(parts.items()):
        module = layers[name].module
        ranks[module] = max(ranks.get(module, 0), _checked_rank(source, name, held, layers[name].kernel))
    settings = adapter_settings(tensors, source.path, component)
    flat: dict[tuple[str, ...], np.ndarray] = {}
    for name, held in parts.items():
        module, place, depth, kernel = layers[name]
        for factor, shape in (("down", (*kernel[:-1], ranks[module])), ("up", (ranks[module], kernel[-1]))):
            if (*module, factor) not in flat:
                flat[(*module, factor)] = np.zeros(shape if place is None else (depth, *shape), np.float32)
        down, up = (flat[(*module, factor)] for factor in FACTORS)
        if place is not None:
            down, up = down[place], up[place]
        array = tensors.read(held["down"])
        rank = len(array)
        down[..., :rank] = _from_torch(array, kernel)
        np.multiply(
            tensors.read(held["up"]).reshape(kernel[-1], rank).T,
            np.float32(strength(settings, name, rank, _alpha(source, held))),
            out=up[:rank],
            dtype=np.float32,
        )
    return unflatten_dict(flat)


def _from_torch(down: np.ndarray, kernel: tuple[int, ...]) -> np.ndarray:
    if len(kernel) == 2:
        return down.reshape(len(down), kernel[0]).T
    height, width, width_in, _ = kernel
    return down.reshape(len(down), width_in, height, width).transpose(2, 3, 1, 0)


def _checked_rank(source: Source, name: str, held: Mapping[str, str], kernel: tuple[int, ...]) -> int:
    """The rank of a layer's pair. Raises: ValueError for a factor missing; shapes that are not those of the layer."""
    if missing := [factor for factor in FACTORS if factor not in held]:
        raise ValueError(f"{source.path}: {name} has no {' and no '.join(missing)} ({', '.join(held.values())})")
    shapes = {factor: source.tensors.shape(held[factor]) for factor in FACTORS}
    rank = shapes["down"][0] if shapes["down"] else 0
    *size, width_in, width_out = kernel
    taken = (width_in, *(size or ()))
    allowed = {
        "down": {(rank, *taken), (rank, int(np.prod(taken)))},
        "up": {(width_out, rank), (width_out, rank, 1, 1)},
    }
    if not size:
        allowed["down"].add((rank, width_in, 1, 1))
    if not rank or any(shapes[factor] not in allowed[factor] for factor in FACTORS):
        layer = f"{width_in} -> {width_out}" + (f", {size[0]}x{size[1]}" if size else "")
        found = " and ".join(f"{factor} {list(shape)}" for factor, shape in shapes.items())
        raise ValueError(f"{source.path}: {name} is {layer}, but its factors are {found}")
    return rank


def _alpha(source: Source, held: Mapping[str, str]) -> float | None:
    if "alpha" not in held:
        return None
    alpha = source.tensors.read(held["alpha"]).reshape(-1)
    if len(alpha) != 1:
        raise ValueError(f"{source.path}: {held['alpha']} should be one number and holds {len(alpha)}")
    return float(alpha[0])
