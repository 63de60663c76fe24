"""Checkpoints that are quantized: a module's tensors, read as the one matrix that they stand for.

A quantized matrix is stored as numbers of few bits and scales, in several tensors that may lie in
different files. Here they become one tensor ``X.weight`` with the part of safetensors' slices that
loading needs: a shape, a dtype, and reading a part. So nothing else has to know.

Sources of the layouts: compressed-tensors (``compressors`` and ``quantization/lifecycle``), the
FP8 checkpoints of DeepSeek and Qwen as transformers reads them, and AutoGPTQ and GPTQModel
(``nn_modules/qlinear``). Which one a checkpoint has is read in :mod:`dllmserve.models.schemes`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dllmserve.errors import WeightsError
from dllmserve.models.config import quantization
from dllmserve.models.dequantized import Dequantized, Grid, Matrix, MisfitError, Stored, TensorLike
from dllmserve.models.schemes import READ, NotReadError, Rectangle, Scheme, read_scheme

_log = logging.getLogger(__name__)

#: dtypes of scales, and of weights that are not quantized, as safetensors calls them
FLOATS = ("F32", "BF16", "F16")
#: dtypes of buffers that are no weights
_INDICES = ("I64", "BOOL")
#: scales of activations and of a quantized cache: both are kept in the dtype of the weights here
_UNUSED = (
    *("input_scale", "input_zero_point", "output_scale", "output_zero_point", "activation_scale"),
    *("q_scale", "k_scale", "v_scale"),
)
#: tensors of a quantized module in each layout; the first one is its matrix
_PARTS: Mapping[str, tuple[str, ...]] = {
    "plain": (
        *("weight", "weight_scale", "weight_scale_inv", "weight_zero_point", "weight_g_idx"),
    ),
    "packed": (
        *("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"),
    ),
    "gptq": ("qweight", "scales", "qzeros", "g_idx"),
}


class _Module:
    """The tensors of a quantized module X, by what follows "X."."""

    def __init__(self, name: str, main: str) -> None:
        self.name, self.main = name, main
        self.parts: dict[str, Stored] = {}

    def add(self, part: str, stored: Stored) -> None:
        """Take one in."""
        if part in self.parts:
            raise MisfitError(f"{stored.name} is in more than one file")
        self.parts[part] = stored

    def need(self, part: str, what: str) -> Stored:
        """One that must be there."""
        if part not in self.parts:
            other = next(iter(self.parts.values())).name
            raise MisfitError(f"{other} lacks {self.name}.{part}: expected {what}")
        return self.parts[part]

    def matrix(self, kinds: Iterable[str]) -> tuple[Stored, int, int]:
        """The one of the numbers, and its shape."""
        stored = self.need(self.main, "the numbers that it scales")
        stored.require(kinds)
        if len(stored.shape) != 2 or 0 in stored.shape:
            raise MisfitError(f"{stored.name} is {stored.shape}, expected two dimensions")
        return stored, *stored.shape

    def weight(self, scheme: Scheme) -> Dequantized:
        """What they stand for."""
        kinds = {"plain": self._plain, "packed": self._packed, "gptq": self._gptq}
        numbers, scales, zeros = kinds[scheme.layout](scheme)
        return Dequantized(f"{self.name}.weight", numbers, scales, zeros)

    def _plain(self, scheme: Scheme) -> tuple[Matrix, Grid, Grid | None]:
        stored, outputs, inputs = self.matrix(scheme.kinds)
        inverse = "weight_scale_inv" in self.parts  # of fp8, and just another name
        scale = self.need("weight_scale_inv" if inverse else "weight_scale", "its scales")
        order = self._order("weight_g_idx", scheme, inputs)
        scales = _grid(scale, FLOATS, (outputs, inputs), scheme.rectangles, order)
        zeros = None
        if not scheme.symmetric:
            zero = self.need("weight_zero_point", "its zero points")
            zero.require(["I8"], scale.shape)
            zeros = _grid(zero, ["I8"], (outputs, inputs), scheme.rectangles, order)
        return Matrix(stored, (outputs, inputs)), scales, zeros

    def _packed(self, scheme: Scheme) -> tuple[Matrix, Grid, Grid | None]:
        stored, outputs, words = self.matrix(["I32"])
        inputs = self._inputs(outputs)
        wide = {bits: -(-inputs * bits // 32) for bits in scheme.bits}
        bits = next((b for b, n in wide.items() if n == words), 0)
        if not bits:
            stored.require(["I32"], *((outputs, n) for n in wide.values()))
        scale = self.need("weight_scale", "its scales")
        order = self._order("weight_g_idx", scheme, inputs)
        scales = _grid(scale, FLOATS, (outputs, inputs), scheme.rectangles, order)
        half, zeros = 1 << bits - 1, None
        if not scheme.symmetric:
            zero = self.need("weight_zero_point", "its zero points")
            shape = scales.numbers.shape
            # older files have them unpacked
            zero.require(["I32", "I8"], (-(-shape[0] * bits // 32), shape[1]), shape)
            numbers = Matrix(zero, shape, *((bits, 0, False, half) if zero.kind == "I32" else ()))
            zero.require([zero.kind], _stored_shape(numbers))
            zeros = Grid(numbers, scales.height, scales.width, order)
        return Matrix(stored, (outputs, inputs), bits, less=half), scales, zeros

    def _order(self, part: str, scheme: Scheme, inputs: int) -> Stored | None:
        """The one that says which group each input is in, if there is one."""
        if scheme.ordered:
            self.need(part, f"the groups of its {inputs} inputs")
        order = self.parts.get(part)
        if order is not None:
            order.require(["I32", "I64"], (inputs,))
        return order

    def _inputs(self, outputs: int) -> int:
        """The inputs of a packed matrix, which its words may have room for more of."""
        shape = self.need("weight_shape", f"({outputs}, inputs)")
        shape.require(["I64", "I32"], (2,), (2, 1))
        rows, inputs = shape.read(range(2), range(1))[:, 0].tolist()
        if rows != outputs or inputs < 1:
            raise MisfitError(f"{shape.name} says {rows, inputs}, expected {outputs, 'inputs'}")
        return int(inputs)

    def _gptq(self, scheme: Scheme) -> tuple[Matrix, Grid, Grid | None]:
        stored, words, outputs = self.matrix(["I32"])
        scale, zero = self.need("scales", "its scales"), self.need("qzeros", "its zero points")
        count = scale.shape[0] if len(scale.shape) == 2 else 0
        scale.require(FLOATS, (count or 1, outputs))
        each = {bits: (count, -(-outputs * bits // 32)) for bits in scheme.bits}
        zero.require(["I32"], *each.values())
        bits = next(b for b, shape in each.items() if shape == zero.shape)
        inputs = words * 32 // bits
        sizes = [size if size > 0 else inputs for size in scheme.groups]
        size = next((size for size in sizes if -(-inputs // size) == count), 0)
        if not size:
            scale.require(FLOATS, *((-(-inputs // size), outputs) for size in sizes))
        order = self._order("g_idx", scheme, inputs)
        # GPTQModel takes one from each number and adds it again in whole words, so that what a 0
        # borrows from its neighbour comes back
        add = sum(1 << at for at in range(0, 32, bits)) if scheme.zeros_less_one else 0
        zeros = Matrix(zero, (outputs, count), bits, turned=True, add=add)
        numbers = Matrix(stored, (outputs, inputs), bits, packed=0, turned=True)
        scales = Matrix(scale, (outputs, count), turned=True)
        return numbers, Grid(scales, 1, size, order), Grid(zeros, 1, size, order)


def _stored_shape(numbers: Matrix) -> tuple[int, int]:
    """The shape of the tensor that zero points lie in: packed along their rows, or not packed."""
    rows, columns = numbers.shape
    return (-(-rows * numbers.bits // 32) if numbers.bits else rows, columns)


def _grid(
    stored: Stored,
    kinds: Iterable[str],
    shape: tuple[int, int],
    rectangles: Iterable[Rectangle],
    order: Stored | None,
) -> Grid:
    """Scales or zero points of a matrix, for the rectangles that their shape speaks of."""
    outputs, inputs = shape
    found: dict[tuple[int, ...], Rectangle] = {}
    uneven = 0
    for rows, columns in rectangles:
        height, width = rows or outputs, columns or inputs
        if rows == 1 and inputs % width:
            uneven = width
            continue
        count = (-(-outputs // height), -(-inputs // width))
        found[count] = height, width
        if not columns:  # one column may be stored with one dimension, and one number with none
            found[count[:1]] = height, width
            found |= {} if rows else {(): (height, width)}
    if uneven and stored.shape not in found:
        raise MisfitError(
            f"{stored.name} is {stored.shape}, for groups of {uneven}, which do not divide the "
            f"{inputs} inputs"
        )
    stored.require(kinds, *found)
    height, width = found[stored.shape]
    numbers = Matrix(stored, (-(-outputs // height), -(-inputs // width)))
    return Grid(numbers, height, width, order)


def tensors(config: Mapping[str, Any], files: Iterable[Path]) -> Iterator[tuple[str, TensorLike]]:
    """Name and content of every tensor; one that reads what is asked of it.

    Those of a quantized module are one, ``X.weight``, which is dequantised as it is read. A
    checkpoint in a format that is not read gives its tensors as they are.

    Args:
        config: of the checkpoint.
        files: its weights, all of them.

    Raises:
        WeightsError: a file cannot be read, or the tensors of a quantized module do not fit each
            other; the message names the tensor and what was expected.

    Example:
        ``for name, tensor in tensors(config, weight_files(directory)): rows = tensor[:4, :]``
        reads the first rows of each matrix.
    """
    count = 0
    for name, tensor in _pairs(config, files):
        count += isinstance(tensor, Dequantized)
        yield name, tensor
    if count:
        _log.info(
            "the checkpoint is quantized (%s): %d matrices were dequantised as they were read",
            quantization(config),
            count,
        )


def check(directory: Path, config: Mapping[str, Any], files: Iterable[Path]) -> None:
    """Raise WeightsError for quantized weights that are not read; no weight is looked at.

    Args:
        directory: for messages.
        config: of the checkpoint.
        files: its weights.

    Example:
        ``check(folder, read_config(folder), weight_files(folder))`` passes for what
        :func:`tensors` reads.
    """
    method = quantization(config)
    if method is None:
        return
    usual: tuple[str, ...] = (*FLOATS, *_INDICES)
    reason = "in this format no tensor of that name has that dtype"
    try:
        read_scheme(config)
    except NotReadError as error:
        reason, usual = str(error), FLOATS
    for name, tensor in _pairs(config, files):
        if (kind := tensor.get_dtype()) not in usual:
            raise WeightsError(
                f"{directory} is quantized ({method}; {name} is {kind}), which is not read: "
                f"{reason}. {READ}; else use the original checkpoint, with weights in F32, BF16 "
                "or F16"
            )


def _pairs(config: Mapping[str, Any], files: Iterable[Path]) -> Iterator[tuple[str, TensorLike]]:
    try:
        scheme = read_scheme(config)
    except NotReadError:
        scheme = None
    if scheme is None:
        for path in files:
            with ExitStack() as stack:
                for stored in _opened(path, stack):
                    yield stored.name, stored.slice
        return
    with ExitStack() as stack:  # one module's may lie in several
        found = [stored for path in files for stored in _opened(path, stack)]
        try:
            yield from _joined(found, scheme)
        except MisfitError as error:
            where = found[0].path.parent
            raise WeightsError(f"{where} is quantized ({quantization(config)}): {error}") from error


def _opened(path: Path, stack: ExitStack) -> Iterator[Stored]:
    """The tensors of a file, which stays open as long as the stack."""
    try:
        handle = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        for name in handle.keys():
            part = handle.get_slice(name)
            yield Stored(name, path, part, tuple(part.get_shape()), part.get_dtype())
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read (truncated or corrupt?): {error}") from error


def _joined(found: list[Stored], scheme: Scheme) -> Iterator[tuple[str, TensorLike]]:
    """Tensors, with those of each quantized module as one."""
    main, *others = _PARTS[scheme.layout]
    modules: dict[str, _Module] = {}
    for wanted in (others, [main]):
        for stored in found:
            name, _, part = stored.name.rpartition(".")
            # a matrix of floats is one that was left as it was, unless there are scales
            if part in wanted and (
                part != "weight" or stored.kind in scheme.kinds or name in modules
            ):
                modules.setdefault(name, _Module(name, main)).add(part, stored)
    for module in modules.values():
        matrix = module.weight(scheme)
        yield matrix.name, matrix
    for stored in found:
        name, _, part = stored.name.rpartition(".")
        if part not in _UNUSED and not (name in modules and part in modules[name].parts):
            yield stored.name, stored.slice
