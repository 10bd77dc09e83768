"""What a program costs, read off the program: multiply-adds of its jaxpr, collectives of its compiled text.

The compiler's own cost analysis counts the body of a loop once and a TPU kernel not at all; here a body counts as often
as it runs.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr

# Products of queries with keys, or of the like, in cuDNN's attention: pulled back, it forms the scores anew.
CUDNN_ATTENTION = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_SHAPE = re.compile(r"\b(pred|bf16|[fsuc]\d+)\w*\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CALLED = re.compile(r"\b(?:calls|to_apply|branch_computations|called_computations)=\{?([%\w.\-, ]+)\}?")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(")
_LOOP = re.compile(r" while\(.*\bcondition=%?([\w.\-]+), body=%?([\w.\-]+)")
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BOUND = re.compile(r" = s32\[\]\S* constant\((\d+)\)")


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind: how often one runs in a step and the bytes of their results on one chip."""

    count: int
    bytes: int


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def flops(jaxpr: Any) -> int:
    """Floating-point operations of all matrix products and convolutions in a closed jaxpr, two for a multiply-add.

    A scanned body counts as often as it runs, a kernel once a grid point, of branches the dearest, and inside a
    `shard_map` one device's part. A `while` loop counts once. Convolutions count no product with an inserted zero.
    """
    return sum(_equation_flops(equation) for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _equation_flops(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        return _convolution_flops(equation)
    if name in CUDNN_ATTENTION:
        query, key = (var.aval.shape for var in equation.invars[:2])
        return CUDNN_ATTENTION[name] * 2 * math.prod(query) * key[1]
    if name == "cond":
        return max(flops(branch) for branch in params["branches"])
    inner = sum(flops(jaxpr) for jaxpr in _inner(params))
    if name == "scan":
        return params["length"] * inner
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid) * inner
    return inner


def _convolution_flops(equation: Any) -> int:
    params, numbers = equation.params, equation.params["dimension_numbers"]
    out, kernel = equation.outvars[0].aval.shape, equation.invars[1].aval.shape
    products = math.prod(kernel[axis] for axis in numbers.rhs_spec[1:])
    zeros = math.prod(params["lhs_dilation"])
    return 2 * math.prod(out) * products // zeros


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (Jaxpr, ClosedJaxpr)):
                yield item


# ---- communication ---------------------------------------------------------------------------------------------------


def collectives(text: str) -> dict[str, Traffic]:
    """Collectives of a compiled program by kind, from its text; those inside loops count as often as they run.

    Bytes are those of the results on one chip: an all-gather's whole array, a reduce-scatter's part.
    """
    bodies, entry = _computations(text)
    counts: dict[str, int] = defaultdict(int)
    sizes: dict[str, int] = defaultdict(int)
    for name, times in _runs(bodies, entry).items():
        for line in bodies[name]:
            if found := _COLLECTIVE.search(line):
                result, kind, started = found.groups()
                counts[kind] += times
                sizes[kind] += times * _result_bytes(result, started is not None and kind != "all-reduce")
    return {kind: Traffic(counts[kind], sizes[kind]) for kind in COLLECTIVES if counts[kind]}


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by name, and the name of the one that a program starts with."""
    bodies: dict[str, list[str]] = {}
    lines: list[str] = []
    entry = ""
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            lines = bodies.setdefault(found[1], [])
            entry = found[1] if line.startswith("ENTRY") else entry
        else:
            lines.append(line)
    return bodies, entry


def _runs(bodies: dict[str, list[str]], entry: str) -> dict[str, int]:
    """How often each computation runs in one run of `entry`; callees stand before their callers in the text."""
    runs: dict[str, int] = defaultdict(int, {entry: 1})
    for name in reversed(bodies):
        for line in bodies[name] if runs[name] else ():
            if loop := _LOOP.search(line):
                runs[loop[2]] += runs[name] * _trips(line, bodies[loop[1]])
            for callee in re.findall(r"[\w.\-]+", " ".join(_CALLED.findall(line))):
                if callee in bodies:
                    runs[callee] += runs[name]
    return {name: times for name, times in runs.items() if times}


def _trips(loop: str, condition: list[str]) -> int:
    """Trip count of a `while`: as noted, else the bound that its condition compares with, else 1."""
    if noted := _KNOWN_TRIPS.search(loop):
        return int(noted[1])
    bounds = [int(found[1]) for line in condition if (found := _BOUND.search(line))]
    return max(bounds, default=1)


def _result_bytes(result: str, with_operands: bool) -> int:
    """Bytes of a result as printed; what starts an asynchronous collective lists its operands first."""
    sizes = [_bytes(kind, dims) for kind, dims in _SHAPE.findall(result) if dims or not with_operands]
    return sum(sizes[len(sizes) // 2 :] if with_operands else sizes)


def _bytes(kind: str, dims: str) -> int:
    bits = 8 if kind == "pred" else int(re.sub(r"\D", "", kind))
    return math.prod(int(dim) for dim in dims.split(",") if dim) * bits // 8
