"""Root mean square norms of few rows in the library of ``native_kernel.py``: C++.

As Llama's are spelled out: to float32, divided by the root of the mean square, rounded to the dtype, times the weight,
rounded again. Only the order of the mean's sum is another.
"""

NORMS = r"""
namespace {

template <class Kind>
void normalise(const typename Kind::stored* x, const typename Kind::stored* weight, typename Kind::stored* y, long n,
               long rows, float epsilon) {
  constexpr int SUMS = 16;
  for (long r = 0; r < rows; r++, x += n, y += n) {
    float sums[SUMS] = {};
    for (long i = 0; i < n; i += SUMS)
      for (int lane = 0; lane < SUMS; lane++) {
        const float value = Kind::widened(x[i + lane]);
        sums[lane] += value * value;
      }
    float sum = 0;
    for (float part : sums) sum += part;
    const float scale = 1 / std::sqrt(sum / n + epsilon);
    for (long i = 0; i < n; i++) {
      typename Kind::stored whole;
      Kind::store(&whole, Kind::widened(x[i]) * scale);
      Kind::store(y + i, Kind::widened(weight[i]) * Kind::widened(whole));
    }
  }
}

}  // namespace
"""
