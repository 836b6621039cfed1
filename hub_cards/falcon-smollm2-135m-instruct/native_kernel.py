"""A kernel for products of weights with few rows, ``x W^T``, that a C++ compiler makes on this machine.

A forward over the nodes of a tree, or over one token, reads every weight once and computes little with it. BLAS takes
up to three times as long as the reading does. The kernel here reads each weight at the memory's speed, ahead of its
use, and multiplies it with all rows while it is in the cache; bfloat16 is widened on the way into a register.

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
import logging
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME

logger = logging.getLogger(__name__)

SWITCH = "FALCON_HF_NATIVE"
MULTIPLE = 16
"""What the length of a weight's rows has to be a multiple of."""
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
"""What is multiplied, and how the kernel is told."""
_CAPABILITIES = ("AVX2", "AVX512")
_FLAGS = ("-std=c++17", "-O3", "-mavx2", "-mfma", "-mtune=native", "-fopenmp", "-shared", "-fPIC")
_COMPILING_SECONDS = 120

SOURCE = r"""
#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr long LANES = 8;     // floats in a vector
constexpr long TILE = 24;     // outputs whose weights stay in the second-level cache while all rows pass
constexpr long AHEAD = 8192;  // bytes that are asked for before they are needed
constexpr int MOST = 6;       // rows multiplied at once: their sums fill the registers

typedef float vec __attribute__((vector_size(32), aligned(4)));
typedef uint32_t bits __attribute__((vector_size(32), aligned(2)));

float total(vec v) {
  const __m256 all = (__m256)v;
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

struct Single {
  typedef float stored;
  static constexpr int PARTS = 1;
  template <int PART> static vec load(const float* w) { return *(const vec*)w; }
  static void store(float* y, float value) { *y = value; }
};

// Sixteen numbers are eight words; the upper half of a word is the odd number, which widens by a mask, the lower one
// widens by a shift. So the rows of x are laid out as the eight even and then the eight odd ones of each sixteen.
struct Brain {
  typedef uint16_t stored;
  static constexpr int PARTS = 2;
  template <int PART> static vec load(const uint16_t* w) {
    const bits words = *(const bits*)w;
    return PART == 0 ? (vec)(words << 16) : (vec)(words & 0xffff0000u);
  }
  static void store(uint16_t* y, float value) {  // to the nearest, ties to even
    uint32_t u;
    std::memcpy(&u, &value, 4);
    const bool is_nan = (u & 0x7fffffffu) > 0x7f800000u;
    *y = is_nan ? uint16_t((u >> 16) | 0x40) : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
};

template <class Kind, int PART, int O, int R>
inline __attribute__((always_inline)) void step(
    const typename Kind::stored* w, const float* x, long n, vec (&sums)[O][R]) {
  vec weights[O];
  for (int o = 0; o < O; o++) weights[o] = Kind::template load<PART>(w + o * n);
  for (int r = 0; r < R; r++) {
    const vec row = *(const vec*)(x + r * n + PART * LANES);
    for (int o = 0; o < O; o++) sums[o][r] += weights[o] * row;
  }
}

// O outputs of R rows. With FIRST the weights come from memory, and those behind them are asked for.
template <class Kind, int O, int R, bool FIRST>
inline __attribute__((always_inline)) void block(
    const typename Kind::stored* w, const float* x, long n, typename Kind::stored* y, long outputs) {
  constexpr long WIDTH = LANES * Kind::PARTS;
  vec sums[O][R] = {};
  for (long i = 0; i < n; i += WIDTH) {
    if (FIRST)
      for (long byte = 0; byte < O * 32; byte += 64) __builtin_prefetch((const char*)(w + O * i) + AHEAD + byte);
    step<Kind, 0>(w + i, x + i, n, sums);
    if constexpr (Kind::PARTS == 2) step<Kind, 1>(w + i, x + i, n, sums);
  }
  for (int o = 0; o < O; o++)
    for (int r = 0; r < R; r++) Kind::store(y + r * outputs + o, total(sums[o][r]));
}

template <class Kind, int R, bool FIRST>
void strip(const typename Kind::stored* w, const float* x, long n, long count, typename Kind::stored* y, long outputs) {
  constexpr int O = R <= 4 ? 3 : 2;
  long o = 0;
  for (; o + O <= count; o += O) block<Kind, O, R, FIRST>(w + o * n, x, n, y + o, outputs);
  for (; o < count; o++) block<Kind, 1, R, FIRST>(w + o * n, x, n, y + o, outputs);
}

template <class Kind, bool FIRST>
void group(int rows, const typename Kind::stored* w, const float* x, long n, long count, typename Kind::stored* y,
           long outputs) {
  switch (rows) {
    case 1: return strip<Kind, 1, FIRST>(w, x, n, count, y, outputs);
    case 2: return strip<Kind, 2, FIRST>(w, x, n, count, y, outputs);
    case 3: return strip<Kind, 3, FIRST>(w, x, n, count, y, outputs);
    case 4: return strip<Kind, 4, FIRST>(w, x, n, count, y, outputs);
    case 5: return strip<Kind, 5, FIRST>(w, x, n, count, y, outputs);
    case 6: return strip<Kind, 6, FIRST>(w, x, n, count, y, outputs);
  }
}

struct Weight {
  const void* values;  // [outputs, n]
  void* y;             // [rows, outputs]
  long outputs;
};

template <class Kind>
void multiply_tile(const Weight& weight, long tile, const float* x, long n, int rows, int size) {
  typedef typename Kind::stored stored;
  const long first = tile * TILE, left = weight.outputs - first, count = left < TILE ? left : TILE;
  const stored* w = (const stored*)weight.values + first * n;
  stored* y = (stored*)weight.y + first;
  group<Kind, true>(size, w, x, n, count, y, weight.outputs);
  for (int row = size; row < rows; row += size)
    group<Kind, false>(rows - row < size ? rows - row : size, w, x + row * n, n, count, y + row * weight.outputs,
                       weight.outputs);
}

template <class Kind>
void multiply(const std::vector<Weight>& weights, const float* x, long n, int rows, int threads) {
  const int groups = (rows + MOST - 1) / MOST, size = (rows + groups - 1) / groups;
  std::vector<long> ends;  // of each weight's tiles, when all are counted on
  for (const Weight& weight : weights)
    ends.push_back((ends.empty() ? 0 : ends.back()) + (weight.outputs + TILE - 1) / TILE);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long tile = 0; tile < ends.back(); tile++) {
    size_t which = 0;
    while (tile >= ends[which]) which++;
    multiply_tile<Kind>(weights[which], tile - (which ? ends[which - 1] : 0), x, n, rows, size);
  }
}

}  // namespace

// For each of the weights [outputs, n]: y [rows, outputs] = x [rows, n] w^T. All are float32, or all are bfloat16; n is
// a multiple of 16, rows and weights are one at least.
extern "C" void falcon_few_rows(const void* const* values, void* const* ys, const long* outputs, int count,
                                const void* x, long n, int rows, int is_brain, int threads) {
  std::vector<Weight> weights;
  for (int i = 0; i < count; i++) weights.push_back({values[i], ys[i], outputs[i]});
  if (!is_brain) return multiply<Single>(weights, (const float*)x, n, rows, threads);
  std::vector<float> room(rows * n + 16);
  float* wide = room.data();
  while (reinterpret_cast<uintptr_t>(wide) % 64) wide++;  // no vector of it lies across two cache lines
  const uint16_t* narrow = (const uint16_t*)x;
  for (long i = 0; i < rows * n; i += 16)
    for (int lane = 0; lane < 16; lane++) {
      const uint32_t u = uint32_t(narrow[i + lane]) << 16;
      std::memcpy(&wide[i + (lane % 2) * 8 + lane / 2], &u, 4);
    }
  multiply<Brain>(weights, wide, n, rows, threads);
}
"""

SOURCE_HASH = hashlib.sha256(f"{SOURCE}{_FLAGS}".encode()).hexdigest()[:16]


def call(kernel: Any, x: torch.Tensor, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Multiply ``x`` ``[R, I]`` with each weight ``[O, I]``: all of one dtype of ``DTYPES``, contiguous, on a CPU."""
    (rows, size), count = x.shape, len(weights)
    products = [x.new_empty(rows, weight.shape[0]) for weight in weights]
    if not (rows and count):
        return products
    pointers, sizes = ctypes.c_void_p * count, ctypes.c_long * count
    kernel(
        pointers(*(weight.data_ptr() for weight in weights)),
        pointers(*(product.data_ptr() for product in products)),
        sizes(*(weight.shape[0] for weight in weights)),
        count, x.data_ptr(), size, rows, DTYPES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return products


@functools.cache
def compiled_kernel() -> Any:
    """The library's function, from the cache or compiled; None where there is none."""
    served = sys.platform == "linux" and torch.backends.cpu.get_cpu_capability() in _CAPABILITIES
    if not served or os.environ.get(SWITCH) == "0":
        return None
    kept = Path(HF_HOME) / "falcon_hf" / f"few_rows_{SOURCE_HASH}.so"
    with contextlib.suppress(OSError):
        if _is_ours(kept):
            return _loaded(kept)
    why: list[str] = []
    for compiler in _compilers():
        try:
            return _made(compiler, kept)
        except (OSError, subprocess.SubprocessError) as error:
            why.append(str(error))
    logger.warning(
        "No kernel for products with few rows could be made (%s), so torch's are used, which are slower. Falcon needs "
        "a C++ compiler for it; %s=0 in the environment does without and without this warning.",
        "; ".join(why) or "there is no C++ compiler",
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


def _made(compiler: list[str], kept: Path) -> Any:
    """Compile the library, and put it into the cache if that can be written: whole, whoever else does.

    Raises:
        OSError, subprocess.SubprocessError: if the compiler fails, or what it made does.
    """
    parent: Path | None = kept.parent
    try:
        kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=parent)
    except OSError:
        parent, scratch = None, tempfile.TemporaryDirectory()
    with scratch as folder:  # what is loaded stays, though its file goes
        source, library = Path(folder, "few_rows.cpp"), Path(folder, "few_rows.so")
        source.write_text(SOURCE, encoding="utf-8")
        command = [*compiler, *_FLAGS, str(source), "-o", str(library)]
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_COMPILING_SECONDS, check=False
        )
        if done.returncode != 0:
            raise subprocess.SubprocessError(f"{compiler[0]} ended with {done.returncode}: {done.stderr[:500]}")
        library.chmod(0o700)
        function = _loaded(library)
        if parent is not None:
            with contextlib.suppress(OSError):
                library.replace(kept)
    return function


def _loaded(library: Path) -> Any:
    """The library's function, once it has multiplied right.

    Raises:
        OSError: if it cannot be loaded, or multiplies wrong.
    """
    try:
        function = ctypes.CDLL(str(library)).falcon_few_rows
    except AttributeError as error:
        raise OSError(f"{library} has no such function") from error
    function.restype = None
    pointer, number = ctypes.c_void_p, ctypes.c_int
    function.argtypes = [pointer, pointer, pointer, number, pointer, ctypes.c_long, number, number, number]
    with torch.device("cpu"):  # whatever the user's default is
        for dtype in DTYPES:
            weight = (torch.arange(25 * 48) % 7 - 3.0).view(25, 48).to(dtype)
            x = (torch.arange(8 * 48) % 5 - 2.0).view(8, 48).to(dtype)  # whole numbers: their sums are exact
            (y,) = call(function, x, [weight])
            if not torch.equal(y.double(), x.double() @ weight.double().t()):
                raise OSError(f"{library} multiplies wrong in {dtype}")
    return function
