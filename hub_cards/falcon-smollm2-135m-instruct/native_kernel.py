"""A kernel for products of weights with few rows, ``x W^T``, and their norms, that a C++ compiler makes here.

A forward over the nodes of a tree, or over one token, reads every weight once and computes little with it. BLAS takes
up to three times as long as the reading does. The kernel reads each weight at the memory's speed, ahead of its use, and
multiplies it with all rows while it is in the cache: in the vectors of AVX2 or AVX-512 (``native_vectors.py``; bfloat16
is widened on the way into a register), or bfloat16 in the tiles of AMX where the CPU has them (``native_tiles.py``).

It needs Linux, a CPU with AVX2 and a C++ compiler (``CXX``, else ``g++``, ``c++`` or ``clang++``). It is compiled once,
in a second, at the first generation, and kept in ``HF_HOME/falcon_hf``. ``FALCON_HF_NATIVE=0`` in the environment does
without.

``tests/runtime/test_native_products.py`` holds the numbers against exact ones, and what happens without a compiler.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import logging
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME

from .native_norms import NORMS
from .native_tiles import TILES
from .native_vectors import VECTORS

logger = logging.getLogger(__name__)

SWITCH = "FALCON_HF_NATIVE"
MULTIPLE = 16
"""What the length of a weight's rows has to be a multiple of."""
TILE_MULTIPLE, TILE_OUTPUTS = 32, 16
"""What it has to be a multiple of for tiles, and the fewest rows that the weight then has."""
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""What is multiplied, and how the kernel is told."""
_VECTORS = {"AVX2": "-mavx2", "AVX512": "-mavx512f"}
"""The CPUs that the kernel serves, by torch's names, and what a compiler is told of them."""
_CAPABILITY = torch.backends.cpu.get_cpu_capability()
_FLAGS = ("-std=c++17", "-O3", _VECTORS.get(_CAPABILITY, ""), "-mfma", "-mtune=native", "-fopenmp", "-shared", "-fPIC")
_NO_TILES = "-DNO_TILES"
_COMPILING_SECONDS = 120

ENTRY = r"""
extern "C" int falcon_has_tiles() {
  static const bool has = ask_for_tiles();
  return has;
}

// For each of the weights [outputs, n]: y [rows, outputs] = x [rows, n] w^T. All are float32, or all are bfloat16; n is
// a multiple of 16, rows and weights are one at least.
extern "C" void falcon_few_rows(const void* const* values, void* const* ys, const long* outputs, int count,
                                const void* x, long n, int rows, int is_brain, int threads) {
  std::vector<Weight> weights;
  for (int i = 0; i < count; i++) weights.push_back({values[i], ys[i], outputs[i]});
  if (!is_brain) return multiply<Single>(weights, (const float*)x, n, rows, threads);
  if (falcon_has_tiles() && fit_tiles(weights, n, rows))
    return multiply_by_tiles(weights, (const uint16_t*)x, n, rows, threads);
  std::vector<float> room(rows * n + 16);
  float* const wide = aligned(room);
  const uint16_t* narrow = (const uint16_t*)x;
  for (long i = 0; i < rows * n; i += 16)
    for (int lane = 0; lane < 16; lane++) wide[i + (lane % 2) * 8 + lane / 2] = Brain::widened(narrow[i + lane]);
  multiply<Brain>(weights, wide, n, rows, threads);
}

extern "C" void falcon_one_weight(const void* values, void* y, long outputs, const void* x, long n, int rows,
                                  int is_brain, int threads) {
  falcon_few_rows(&values, &y, &outputs, 1, x, n, rows, is_brain, threads);
}

// y [rows, n] of x [rows, n] and a weight [n]; n is a multiple of 16.
extern "C" void falcon_rms_norm(const void* x, const void* weight, void* y, long n, long rows, float epsilon,
                                int is_brain) {
  typedef const uint16_t* narrow;
  typedef const float* wide;
  if (is_brain) return normalise<Brain>((narrow)x, (narrow)weight, (uint16_t*)y, n, rows, epsilon);
  normalise<Single>((wide)x, (wide)weight, (float*)y, n, rows, epsilon);
}
"""

SOURCE = f"{VECTORS}{TILES}{NORMS}{ENTRY}"
SOURCE_HASH = hashlib.sha256(f"{SOURCE}{_FLAGS}".encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)  # hashed by identity
class Kernel:
    """The compiled library.

    Args:
        few_rows: its function.
        one_weight: the same for one weight.
        rms_norm: norms of few rows.
        has_tiles: whether it multiplies bfloat16 in tiles here, where a weight's shape allows.
    """

    few_rows: Any
    one_weight: Any
    rms_norm: Any
    has_tiles: bool


def is_readable(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the library may read ``x`` and a module's ``weight``: whole in a CPU's memory, and of one dtype.

    Not where gradients, autocast or a compiler want to see an operation.
    """
    return (
        type(x) is torch.Tensor
        and type(weight) is torch.nn.Parameter  # a quantised one's memory is no weight
        and x.dtype is weight.dtype
        and x.is_cpu
        and weight.is_cpu
        and x.is_contiguous()
        and weight.is_contiguous()
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def call(kernel: Kernel, x: torch.Tensor, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Multiply ``x`` ``[R, I]`` with each weight ``[O, I]``: all of one dtype of ``DTYPES``, contiguous, on a CPU."""
    (rows, size), count = x.shape, len(weights)
    products = [x.new_empty(rows, weight.shape[0]) for weight in weights]
    if not (rows and count):
        return products
    pointers, sizes = ctypes.c_void_p * count, ctypes.c_long * count
    kernel.few_rows(
        pointers(*(weight.data_ptr() for weight in weights)),
        pointers(*(product.data_ptr() for product in products)),
        sizes(*(weight.shape[0] for weight in weights)),
        count, x.data_ptr(), size, rows, DTYPES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return products


@functools.cache
def compiled_kernel() -> Kernel | None:
    """The library, from the cache or compiled; None where there is none."""
    served = sys.platform == "linux" and _CAPABILITY in _VECTORS
    if not served or os.environ.get(SWITCH) == "0":
        return None
    kept = Path(HF_HOME) / "falcon_hf" / f"few_rows_{SOURCE_HASH}.so"
    with contextlib.suppress(OSError):
        if _is_ours(kept):
            return _loaded(kept)
    why: list[str] = []
    for compiler, option in itertools.product(_compilers(), ([], [_NO_TILES])):
        try:
            return _made([*compiler, *option], kept)
        except (OSError, subprocess.SubprocessError) as error:
            why.append(str(error))
    logger.warning(
        "No kernel for products with few rows could be made (%s), so torch's are used, which are slower. Falcon needs "
        "a C++ compiler for it; %s=0 in the environment does without and without this warning.",
        "; ".join(dict.fromkeys(why)) or "there is no C++ compiler",
        SWITCH,
    )
    return None


def _is_ours(library: Path) -> bool:
    """Whether nobody but this user could have written the library.

    Raises:
        OSError: if it is not there.
    """
    found = library.stat()
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _compilers() -> list[list[str]]:
    """Commands to try: the one in ``CXX``, or all that are known and there."""
    if os.environ.get("CXX"):
        return [shlex.split(os.environ["CXX"])]
    return [[found] for found in map(shutil.which, ("g++", "c++", "clang++")) if found]


def _made(compiler: list[str], kept: Path) -> Kernel:
    """Compile the library, and put it into the cache if that can be written: whole, whoever else does.

    Raises:
        OSError, subprocess.SubprocessError: if the compiler fails, or what it made does.
    """
    try:
        kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return _made_in(kept.parent, compiler, kept)
    except OSError:  # it cannot be written to, or nothing in it may be run
        return _made_in(None, compiler, None)


def _made_in(parent: Path | None, compiler: list[str], kept: Path | None) -> Kernel:
    """Compile the library below ``parent`` (None: where the system has temporary files), and move it to ``kept``."""
    with tempfile.TemporaryDirectory(dir=parent) as folder:  # what is loaded stays, though its file goes
        source, library = Path(folder, "few_rows.cpp"), Path(folder, "few_rows.so")
        source.write_text(SOURCE, encoding="utf-8")
        command = [*compiler, *_FLAGS, str(source), "-o", str(library)]
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_COMPILING_SECONDS, check=False
        )
        if done.returncode != 0:
            raise subprocess.SubprocessError(f"{compiler[0]} ended with {done.returncode}: {done.stderr[:500]}")
        library.chmod(0o700)
        kernel = _loaded(library)
        if kept is not None:
            with contextlib.suppress(OSError):
                library.replace(kept)
    return kernel


def _loaded(library: Path) -> Kernel:
    """The library, once it has multiplied right.

    Raises:
        OSError: if it cannot be loaded, or multiplies wrong.
    """
    try:
        opened = ctypes.CDLL(str(library))
        few_rows, one_weight, rms_norm = opened.falcon_few_rows, opened.falcon_one_weight, opened.falcon_rms_norm
        has_tiles = bool(opened.falcon_has_tiles())
    except AttributeError as error:
        raise OSError(f"{library} has no such function") from error
    few_rows.restype = one_weight.restype = rms_norm.restype = None
    pointer, number, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_long
    few_rows.argtypes = [pointer, pointer, pointer, number, pointer, long, number, number, number]
    one_weight.argtypes = [pointer, pointer, long, pointer, long, number, number, number]
    rms_norm.argtypes = [pointer, pointer, pointer, long, long, ctypes.c_float, number]
    kernel = Kernel(few_rows, one_weight, rms_norm, has_tiles)
    with torch.device("cpu"):  # whatever the user's default is
        for dtype, size, rows in itertools.product(DTYPES, (48, 64), (8, 25)):  # vectors, and tiles of all kinds
            weight = (torch.arange(57 * size) % 7 - 3.0).view(57, size).to(dtype)
            x = (torch.arange(rows * size) % 5 - 2.0).view(rows, size).to(dtype)  # whole numbers: their sums are exact
            (y,), exact = call(kernel, x, [weight]), x.double() @ weight.double().t()
            alone = torch.zeros_like(y)
            threads = torch.get_num_threads()
            one_weight(weight.data_ptr(), alone.data_ptr(), 57, x.data_ptr(), size, rows, DTYPES[dtype], threads)
            if not (torch.equal(y.double(), exact) and torch.equal(alone, y)):
                raise OSError(f"{library} multiplies wrong in {dtype}")
    return kernel
