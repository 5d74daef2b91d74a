"""CPLearn's passes over a dictionary of Hadamard blocks by fast transforms: no F x K matrix is ever made.

    W = [W_1 .. W_n],   W_b = diag(signs_b) H    (F, F): -1 and +1      H H^T = F I, signs_b random, the last block cut
    h W_b   = (h * signs_b) H                    a transform: about log2(F) additions per logit in place of F
    W_b a   = signs_b * (H a)                    the transposed transform

H, made in dictionary.py, is a Kronecker product of a matrix of order 1, 12, 20 or 28 with Sylvester's of a power of
two; its first row is ones.

The transforms are hadamard.cpp, for CPUs and float32, compiled at their first use. Elsewhere, and without a compiler,
the blocks are written out tile by tile and multiplied as any other dictionary.

    G views of B images to weigh, R rows of any images      F head width, K codes, n blocks
"""

import ctypes
import functools
import os
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

from dictionary import base_order, hadamard_matrix
from fused_loss.tiles import Slope, Tiles

COMPILE = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC")


# ---- the two passes of the loss --------------------------------------------------------------------------------------


class HadamardTransforms(Tiles):
    """`Tiles`, whose shares of the codes are whole blocks and go to hadamard.cpp at once; float32 on a CPU."""

    def __init__(self, codes, num_rows):
        super().__init__(codes, torch.float32, num_rows, tile=codes.shape[0])  # so that shares are whole blocks

    @staticmethod
    def can_run(codes, dtype):
        return dtype == torch.float32 and codes.device.type == "cpu" and _library() is not None

    def _blocks(self, starts):
        """(signs, number of codes) of a share."""
        dim, num_codes = self.codes.shape
        return self.codes.data[starts[0] // dim : starts[-1] // dim + 1], min(starts[-1] + dim, num_codes) - starts[0]

    def _statistics_of_share(self, starts, rows):
        top, total, centers, best = statistics(rows, *self._blocks(starts))
        return top, total, centers, starts[0] + best

    def _gradient_of_share(self, starts, rows, top, total, offset, slope, agreement):
        signs, num_codes = self._blocks(starts)
        if torch.is_tensor(slope):
            slope = slope[:, starts[0] : starts[0] + num_codes]
        per_row = (x.squeeze(2) for x in (top, total, offset))
        means, product, mass = gradient(rows, signs, num_codes, *per_row, slope, agreement)
        return means, None if slope is None else product.flatten(0, 1).T, mass


def statistics(rows, signs, num_codes):
    """`Tiles.statistics` of these blocks. rows: (R, F).  signs: (n, F).  num_codes <= n F; the last may be cut."""
    top, total, centers = rows.new_empty(len(rows)), rows.new_empty(len(rows)), rows.new_empty(rows.shape)
    best = torch.empty(len(rows), dtype=torch.int32)
    _library().statistics(_Dictionary(signs, num_codes), _floats(rows), len(rows), top, total, centers, best)
    return top, total, centers, best.long()


def gradient(rows, signs, num_codes, top, total, offset, slope, agreement):
    """`Tiles.gradient` of these blocks. rows: (G, B, F), or one view more, the sum of the local ones."""
    views, batch_size = top.shape
    means = rows.new_empty(views, num_codes)
    product = mass = None
    if slope is not None:
        product, mass = rows.new_empty(views, *rows.shape[1:]), rows.new_empty(views, batch_size)
    arguments = [_Dictionary(signs, num_codes), _Slope(slope), views, len(rows), batch_size]
    arguments += [_floats(x) for x in (rows, top, total, offset)]
    _library().gradient(*arguments, agreement, means, product, mass)
    return means, product, mass


# ---- compiled --------------------------------------------------------------------------------------------------------


class _Dictionary(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("dim", "num_codes", "base_order")]
    _fields_ += [(name, ctypes.c_void_p) for name in ("base", "base_transposed", "signs")]

    def __init__(self, signs, num_codes):
        order = base_order(signs.shape[1])
        base = hadamard_matrix(order)
        self.arrays = [_floats(x) for x in (base, base.T, signs)]  # alive as long as what points to them
        super().__init__(signs.shape[1], num_codes, order, *(x.data_ptr() for x in self.arrays))


class _Slope(ctypes.Structure):
    _fields_ = [("given", ctypes.c_void_p), ("scale", ctypes.c_float), ("all_codes", ctypes.c_float)]
    _fields_ += [("is_ce", ctypes.c_int32)]

    def __init__(self, slope):
        if isinstance(slope, Slope):
            super().__init__(None, slope.scale, slope.num_codes, slope.prior == "ce")
        elif slope is not None:
            self.array = _floats(slope)
            super().__init__(self.array.data_ptr())


class _Array:
    """A tensor as a C function's argument; None is a null pointer."""

    @staticmethod
    def from_param(x):
        if x is not None and not (x.is_contiguous() and x.dtype in (torch.float32, torch.int32)):
            raise TypeError(f"{x.dtype} of shape {tuple(x.shape)} and strides {x.stride()}; expected rows of 32 bits")
        return ctypes.c_void_p(None if x is None else x.data_ptr())


def _floats(x):
    return x.detach().to(torch.float32).contiguous()


@functools.cache
def _library():
    """hadamard.cpp compiled for this machine, in two seconds once a process; None and a warning where that fails."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "hadamard.so"
        command = [
            os.environ.get("CXX", "g++"),
            *COMPILE,
            str(Path(__file__).with_name("hadamard.cpp")),
            "-o",
            str(output),
        ]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or error
            warnings.warn(f"Hadamard transforms run several times slower: {command[0]} failed: {reason}", stacklevel=2)
            return None
        library = ctypes.CDLL(str(output))
    size, real = ctypes.c_int64, ctypes.c_float
    library.statistics.argtypes = [ctypes.POINTER(_Dictionary), _Array, size] + [_Array] * 4
    library.gradient.argtypes = [ctypes.POINTER(_Dictionary), ctypes.POINTER(_Slope)] + [size] * 3
    library.gradient.argtypes += [_Array] * 4 + [real] + [_Array] * 3
    library.statistics.restype = library.gradient.restype = None
    return library
