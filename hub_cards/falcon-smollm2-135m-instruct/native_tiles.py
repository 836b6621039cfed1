"""The kernel of ``native_kernel.py`` for bfloat16 in the tiles of a CPU that has AMX: C++.

A tile is sixteen times 64 bytes. Sixteen outputs of a weight lie in memory as a tile wants them, so y^T = W x^T is made
of the weight as it stands, and x^T, which is small, is laid out anew. One instruction multiplies sixteen outputs with
sixteen rows over 32 of their numbers, so that sixteen rows cost what reading the weights does. Torch's own products lay
out the weight, which is large, at each call.

Its sums are in float32 and rounded once, as those of torch's products there are.
"""

TILES = r"""
// Earlier compilers do not know tiles; a later one's assembler may not, and NO_TILES is for that.
#if !defined(NO_TILES) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define WITH_TILES __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512bf16")))

namespace {

constexpr long SIDE = 16;   // outputs of a weight's tile, and rows of x's
constexpr long DEPTH = 32;  // numbers of each that a tile holds
constexpr long PAIR = 2 * SIDE;

// What the tiles are like: the operand of an instruction, whose layout this is.
struct alignas(64) Shapes {
  uint8_t palette, start, unused[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

bool ask_for_tiles() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw")) return false;
  if (!__builtin_cpu_supports("avx512bf16")) return false;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;  // AMX for bfloat16
  constexpr long ASK = 0x1023, TILES = 18;  // Linux gives a process tiles if it asks
  return syscall(SYS_arch_prctl, ASK, TILES) == 0;
}

WITH_TILES __m512i counted(int factor) {
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_mullo_epi32(lanes, _mm512_set1_epi32(factor));
}

// x^T for each sixteen of its rows: two numbers of the first row, of the second, ..., then the next two of each; zeros
// for rows that are not there.
WITH_TILES void lay_out(const uint16_t* x, uint32_t* laid, long n, int rows) {
  const __m512i at = counted(n / 2);
  for (int r = 0; r < rows; r += SIDE) {
    const __mmask16 there = rows - r < SIDE ? (1u << (rows - r)) - 1 : 0xffff;
    const int* words = (const int*)(x + r * n);
    for (long i = 0; i < n / 2; i++, laid += SIDE)
      _mm512_storeu_si512(laid, _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there, at, words + i, 4));
  }
}

// A tile of sums is [outputs, rows], y is [rows, outputs].
WITH_TILES void store(const float* sums, uint16_t* y, long outputs, int rows) {
  const __m512i at = counted(SIDE);
  for (int r = 0; r < rows && r < SIDE; r++) {
    const __m512 row = _mm512_i32gather_ps(at, sums + r, 4);
    _mm256_storeu_si256((__m256i*)(y + r * outputs), (__m256i)_mm512_cvtneps_pbh(row));
  }
}

// Sixteen outputs, or a pair of sixteen, of sixteen rows or a pair of sixteen. The next outputs' weights are asked for
// meanwhile.
template <bool OUTPUTS, bool ROWS>
WITH_TILES void tiles(const uint16_t* w, const uint32_t* laid, long n, uint16_t* y, long outputs, int rows) {
  constexpr long COUNT = OUTPUTS ? PAIR : SIDE;
  const char* next = (const char*)(w + COUNT * n);
  _tile_zero(0);
  if (ROWS) _tile_zero(1);
  if (OUTPUTS) _tile_zero(2);
  if (OUTPUTS && ROWS) _tile_zero(3);
  for (long i = 0; i < n; i += DEPTH) {
    for (long line = 0; line < COUNT; line++, next += 64) _mm_prefetch(next, _MM_HINT_T0);
    _tile_loadd(4, laid + i / 2 * SIDE, 64);
    if (ROWS) _tile_loadd(5, laid + (n + i) / 2 * SIDE, 64);
    _tile_loadd(6, w + i, n * 2);
    _tile_dpbf16ps(0, 6, 4);
    if (ROWS) _tile_dpbf16ps(1, 6, 5);
    if (OUTPUTS) {
      _tile_loadd(7, w + SIDE * n + i, n * 2);
      _tile_dpbf16ps(2, 7, 4);
      if (ROWS) _tile_dpbf16ps(3, 7, 5);
    }
  }
  alignas(64) float sums[SIDE * SIDE];
  uint16_t* const second = y + SIDE * outputs;
  _tile_stored(0, sums, 64);
  store(sums, y, outputs, rows);
  if (ROWS) {
    _tile_stored(1, sums, 64);
    store(sums, second, outputs, rows - SIDE);
  }
  if (OUTPUTS) {
    _tile_stored(2, sums, 64);
    store(sums, y + SIDE, outputs, rows);
  }
  if (OUTPUTS && ROWS) {
    _tile_stored(3, sums, 64);
    store(sums, second + SIDE, outputs, rows - SIDE);
  }
}

template <bool OUTPUTS>
WITH_TILES void all_rows(const uint16_t* w, const uint32_t* laid, long n, uint16_t* y, long outputs, int rows) {
  if (rows > SIDE) return tiles<OUTPUTS, true>(w, laid, n, y, outputs, rows);
  tiles<OUTPUTS, false>(w, laid, n, y, outputs, rows);
}

// Pairs of sixteen outputs, those of all weights counted on, from one to before another. Other libraries may have set
// tiles and count on that. By assembler, because some compilers' functions for it declare 8 of the 64 bytes they read.
WITH_TILES void some_pairs(const std::vector<Weight>& weights, const std::vector<long>& ends, long from, long to,
                           const uint32_t* laid, long n, int rows) {
  Shapes before{}, whole{1};
  for (int tile = 0; tile < 8; tile++) {
    whole.bytes[tile] = 64;
    whole.rows[tile] = SIDE;
  }
  asm volatile("sttilecfg %0" : "=m"(before));
  asm volatile("ldtilecfg %0" : : "m"(whole));
  size_t which = 0;
  for (long pair = from; pair < to; pair++) {
    while (pair >= ends[which]) which++;
    const long outputs = weights[which].outputs, first = (pair - (which ? ends[which - 1] : 0)) * PAIR;
    const uint16_t* w = (const uint16_t*)weights[which].values;
    uint16_t* y = (uint16_t*)weights[which].y;
    if (first + PAIR <= outputs) {
      all_rows<true>(w + first * n, laid, n, y + first, outputs, rows);
      continue;
    }
    for (long o = first; o < outputs; o += SIDE) {  // the last sixteen may have some that are made twice, and alike
      const long at = o + SIDE <= outputs ? o : outputs - SIDE;
      all_rows<false>(w + at * n, laid, n, y + at, outputs, rows);
    }
  }
  if (before.palette) asm volatile("ldtilecfg %0" : : "m"(before));
  else _tile_release();
}

void multiply_by_tiles(const std::vector<Weight>& weights, const uint16_t* x, long n, int rows, int threads) {
  const std::vector<long> ends = ends_of_tiles(weights, PAIR);
  std::vector<uint32_t> room((rows + SIDE - 1) / SIDE * SIDE * n / 2 + SIDE);
  uint32_t* const laid = aligned(room);
  lay_out(x, laid, n, rows);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int thread = 0; thread < threads; thread++)
    some_pairs(weights, ends, ends.back() * thread / threads, ends.back() * (thread + 1) / threads, laid, n, rows);
}

bool fit_tiles(const std::vector<Weight>& weights, long n, int rows) {
  for (const Weight& weight : weights)
    if (weight.outputs < SIDE) return false;
  return n % DEPTH == 0 && rows <= PAIR;
}

}  // namespace
#else
namespace {

bool ask_for_tiles() { return false; }
bool fit_tiles(const std::vector<Weight>&, long, int) { return false; }
void multiply_by_tiles(const std::vector<Weight>&, const uint16_t*, long, int, int) {}

}  // namespace
#endif
"""
