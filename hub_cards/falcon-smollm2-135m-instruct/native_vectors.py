"""The kernel of ``native_kernel.py`` in vectors: C++. Of AVX2, which every CPU that it serves has; float32 of AVX-512.

A weight's rows are read ahead of their use, and multiplied with up to six rows while they are in registers. bfloat16 is
in AVX2's alone: a CPU with AVX-512 has mostly instructions for it, and then this is not asked.
"""

VECTORS = r"""
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr long TILE = 24;     // outputs whose weights stay in the second-level cache while all rows pass
constexpr long AHEAD = 8192;  // bytes that are asked for before they are needed
constexpr int MOST = 6;       // rows multiplied at once: their sums fill the registers

typedef float narrow __attribute__((vector_size(32), aligned(4)));
typedef uint32_t bits __attribute__((vector_size(32), aligned(2)));
#ifdef __AVX512F__
typedef float wide __attribute__((vector_size(64), aligned(4)));
float total(wide v) { return _mm512_reduce_add_ps((__m512)v); }
#else
typedef narrow wide;
#endif

float total(narrow v) {
  const __m256 all = (__m256)v;
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

struct Single {
  typedef float stored;
  typedef wide vec;
  static constexpr int PARTS = 1;
  template <int PART> static vec load(const float* w) { return *(const vec*)w; }
  static float widened(float value) { return value; }
  static void store(float* y, float value) { *y = value; }
};

// Sixteen numbers are eight words; the upper half of a word is the odd number, which widens by a mask, the lower one
// widens by a shift. So the rows of x are laid out as the eight even and then the eight odd ones of each sixteen.
struct Brain {
  typedef uint16_t stored;
  typedef narrow vec;
  static constexpr int PARTS = 2;
  template <int PART> static vec load(const uint16_t* w) {
    const bits words = *(const bits*)w;
    return PART == 0 ? (vec)(words << 16) : (vec)(words & 0xffff0000u);
  }
  static float widened(uint16_t value) {
    const uint32_t u = uint32_t(value) << 16;
    float wide;
    std::memcpy(&wide, &u, 4);
    return wide;
  }
  static void store(uint16_t* y, float value) {  // to the nearest, ties to even
    uint32_t u;
    std::memcpy(&u, &value, 4);
    const bool is_nan = (u & 0x7fffffffu) > 0x7f800000u;
    *y = is_nan ? uint16_t((u >> 16) | 0x40) : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
};

template <class Kind>
constexpr long LANES = sizeof(typename Kind::vec) / sizeof(float);

template <class Kind, int PART, int O, int R>
inline __attribute__((always_inline)) void step(
    const typename Kind::stored* w, const float* x, long n, typename Kind::vec (&sums)[O][R]) {
  typedef typename Kind::vec vec;
  vec weights[O];
  for (int o = 0; o < O; o++) weights[o] = Kind::template load<PART>(w + o * n);
  for (int r = 0; r < R; r++) {
    const vec row = *(const vec*)(x + r * n + PART * LANES<Kind>);
    for (int o = 0; o < O; o++) sums[o][r] += weights[o] * row;
  }
}

// O outputs of R rows. With FIRST the weights come from memory, and those behind them are asked for.
template <class Kind, int O, int R, bool FIRST>
inline __attribute__((always_inline)) void block(
    const typename Kind::stored* w, const float* x, long n, typename Kind::stored* y, long outputs) {
  constexpr long WIDTH = LANES<Kind> * Kind::PARTS, BYTES = O * WIDTH * sizeof(typename Kind::stored);
  typename Kind::vec sums[O][R] = {};
  for (long i = 0; i < n; i += WIDTH) {
    if (FIRST)
      for (long byte = 0; byte < BYTES; byte += 64) __builtin_prefetch((const char*)(w + O * i) + AHEAD + byte);
    step<Kind, 0>(w + i, x + i, n, sums);
    if constexpr (Kind::PARTS == 2) step<Kind, 1>(w + i, x + i, n, sums);
  }
  for (int o = 0; o < O; o++)
    for (int r = 0; r < R; r++) Kind::store(y + r * outputs + o, total(sums[o][r]));
}

template <class Kind, int R, bool FIRST>
void strip(const typename Kind::stored* w, const float* x, long n, long count, typename Kind::stored* y, long outputs) {
  constexpr int O = sizeof(typename Kind::vec) == 64 ? 4 : R <= 4 ? 3 : 2;  // there are twice as many wide registers
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

// Where each weight's tiles of so many outputs end, when those of all weights are counted on.
std::vector<long> ends_of_tiles(const std::vector<Weight>& weights, long size) {
  std::vector<long> ends;
  for (const Weight& weight : weights)
    ends.push_back((ends.empty() ? 0 : ends.back()) + (weight.outputs + size - 1) / size);
  return ends;
}

// A place in the first 64 bytes of the room, from which on no vector lies across two cache lines.
template <class Number>
Number* aligned(std::vector<Number>& room) {
  Number* first = room.data();
  while (reinterpret_cast<uintptr_t>(first) % 64) first++;
  return first;
}

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
  const std::vector<long> ends = ends_of_tiles(weights, TILE);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long tile = 0; tile < ends.back(); tile++) {
    size_t which = 0;
    while (tile >= ends[which]) which++;
    multiply_tile<Kind>(weights[which], tile - (which ? ends[which - 1] : 0), x, n, rows, size);
  }
}

}  // namespace
"""
