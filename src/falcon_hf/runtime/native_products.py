"""Products of a weight with few rows, ``x W^T``, by a kernel of our own that a C++ compiler makes on this machine.

A forward over the nodes of a tree, or over one token, reads every weight once and computes little with it. BLAS and
torch take two to three times what the reading takes. The kernel here reads each weight at the memory's speed, ahead of
its use, and multiplies it with all rows while it is in the cache; bfloat16 is widened on the way into a register.

All products of SmolLM2-135M-Instruct in one forward, ms, 2 threads of an AMD EPYC of the third generation (AVX2):

| rows | 1 | 2 | 4 | 8 | 16 | 32 |
|---|---|---|---|---|---|---|
| float32, torch | 49 | 83 | 101 | 79 | 92 | 129 |
| float32, here | 23 | 25 | 23 | 31 | 45 | 75 |
| bfloat16, torch | 16 | 29 | 56 | 109 | 219 | |
| bfloat16, here | 11 | 12 | 13 | 25 | 43 | 90 |

The kernel needs a CPU with AVX2 and a C++ compiler (``CXX``, else ``c++``, ``g++`` or ``clang++``). It is compiled
once, in a second, at the first generation, and kept in ``HF_HOME/falcon_hf``. Without it, or with
``FALCON_HF_NATIVE=0`` in the environment, ``few_rows.py`` makes do with torch's products.

``tests/runtime/test_native_products.py`` holds the numbers against exact ones.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
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
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_CAPABILITIES = ("AVX2", "AVX512")
_FLAGS = ("-std=c++17", "-O3", "-mavx2", "-mfma", "-mtune=native", "-fopenmp", "-shared", "-fPIC")
_COMPILING_SECONDS = 120

SOURCE = r"""
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
typedef float half_vec __attribute__((vector_size(16)));

float total(vec v) {
  half_vec s = __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
  s += __builtin_shufflevector(s, s, 2, 3, 0, 1);
  s += __builtin_shufflevector(s, s, 1, 0, 3, 2);
  return s[0];
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


def takes_natively(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel multiplies ``x [..., I]`` with ``weight [O, I]``; it is compiled when first asked for."""
    return (
        weight.dtype in _DTYPES
        and x.dtype == weight.dtype
        and weight.device.type == "cpu"
        and weight.shape[-1] % MULTIPLE == 0
        and weight.is_contiguous()
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and has_native_products()
    )


def native_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``[R, I]`` rows and a weight ``[O, I]``, for which [`takes_natively`] is true -> ``[R, O]``."""
    return native_products(x, [weight])[0]


def native_products(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The products of ``x`` ``[R, I]`` with several weights, one ``[R, O]`` each; see [`native_product`]."""
    return _multiply(_kernel(), x, weights)


def _multiply(kernel: Any, x: torch.Tensor, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    x, (rows, size), count = x.contiguous(), x.shape, len(weights)
    products = [x.new_empty(rows, weight.shape[0]) for weight in weights]
    pointers, sizes = ctypes.c_void_p * count, ctypes.c_long * count
    kernel(
        pointers(*(weight.data_ptr() for weight in weights)),
        pointers(*(product.data_ptr() for product in products)),
        sizes(*(weight.shape[0] for weight in weights)),
        count, x.data_ptr(), size, rows, _DTYPES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return products


def has_native_products() -> bool:
    """Whether this machine has the kernel; compiles it, once."""
    return _kernel() is not None


@functools.cache
def _kernel() -> Any:
    """The library's function, from the cache or compiled; None where there is none."""
    if os.environ.get(SWITCH) == "0" or torch.backends.cpu.get_cpu_capability() not in _CAPABILITIES:
        return None
    kept = _folder() / f"few_rows_{SOURCE_HASH}.so"
    with contextlib.suppress(OSError):
        return _loaded(kept)
    try:
        with tempfile.TemporaryDirectory() as scratch:  # what is loaded stays, though its file goes
            made = _compiled(Path(scratch))
            function = _loaded(made)
            _keep(made, kept)
            return function
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning(
            "No kernel for products with few rows could be made (%s), so torch's are used, which are slower. Falcon "
            "needs a C++ compiler for it; %s=0 in the environment does without and without this warning.",
            error,
            SWITCH,
        )
        return None


def _folder() -> Path:
    return Path(HF_HOME) / "falcon_hf"


def _compiled(folder: Path) -> Path:
    """The kernel's library, compiled into ``folder``.

    Raises:
        OSError, subprocess.SubprocessError: if there is no compiler, or it fails.
    """
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        raise FileNotFoundError("there is no C++ compiler")
    source, library = folder / "few_rows.cpp", folder / "few_rows.so"
    source.write_text(SOURCE, encoding="utf-8")
    command = [compiler, *_FLAGS, str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILING_SECONDS, check=False)
    if done.returncode != 0:
        raise subprocess.SubprocessError(f"{compiler} ended with {done.returncode}: {done.stderr[:500]}")
    return library


def _keep(made: Path, kept: Path) -> None:
    """Put the library into the cache, whole, whoever else does; a cache that cannot be written is no cache."""
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}.part")
        shutil.copyfile(made, part)
        part.replace(kept)


def _loaded(library: Path) -> Any:
    """The library's function, once it has multiplied right.

    Raises:
        OSError: if it cannot be loaded, or multiplies wrong.
    """
    function = ctypes.CDLL(str(library)).falcon_few_rows
    function.restype = None
    pointer, number = ctypes.c_void_p, ctypes.c_int
    function.argtypes = [pointer, pointer, pointer, number, pointer, ctypes.c_long, number, number, number]
    for dtype in _DTYPES:
        weight = (torch.arange(25 * 48) % 7 - 3.0).view(25, 48).to(dtype)
        x = (torch.arange(8 * 48) % 5 - 2.0).view(8, 48).to(dtype)  # whole numbers: their sums are exact
        (y,) = _multiply(function, x, [weight])
        if not torch.equal(y.double(), x.double() @ weight.double().t()):
            raise OSError(f"{library} multiplies wrong in {dtype}")
    return function
