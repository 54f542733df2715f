// Products of bfloat16 numbers, two at a time, with float32 sums: AVX512-BF16.
#include <algorithm>
#include <utility>

#include "isa.h"
#include "product.h"

#ifdef CONVRNN_X86
#include <immintrin.h>
#endif

namespace convrnn {

bool multiplies_pairs() {
  return isa() == Isa::avx512bf16;
}

#ifdef CONVRNN_X86
namespace {

// Rows [0, M) and N blocks, as `tile` of product_tile.h: five rows a pointer.
template <int M, int N>
CONVRNN_AVX512BF16 void tile(const PairFactors* factors, int64_t count, int64_t depth, const ProductStrides& strides,
                             float* c, bool accumulate) {
  __m512 sums[M][N];
  CONVRNN_UNROLL
  for (int m = 0; m < M; ++m) {
    CONVRNN_UNROLL
    for (int n = 0; n < N; ++n) {
      sums[m][n] = _mm512_setzero_ps();
    }
  }
  const int64_t row = strides.a_row, row3 = 3 * row, step = strides.a_k, b_k = strides.b_k;
  for (const PairFactors* f = factors; f < factors + count; ++f) {
    const uint32_t *a0 = f->a, *a5 = a0 + 5 * row, *a10 = a0 + 10 * row, *b = f->b;
    for (int64_t k = 0; k < depth; ++k, a0 += step, a5 += step, a10 += step, b += b_k) {
      __m512i right[N];
      CONVRNN_UNROLL
      for (int n = 0; n < N; ++n) {
        right[n] = _mm512_loadu_si512(b + n * kColumns);
      }
      CONVRNN_UNROLL
      for (int m = 0; m < M; ++m) {
        const uint32_t* a = m < 5 ? a0 : m < 10 ? a5 : a10;
        const int r = m % 5;
        const __m512i left = _mm512_set1_epi32(static_cast<int32_t>(a[r == 3 ? row3 : r * row]));
        CONVRNN_UNROLL
        for (int n = 0; n < N; ++n) {
          sums[m][n] = _mm512_dpbf16_ps(sums[m][n], (__m512bh)left, (__m512bh)right[n]);
        }
      }
    }
  }
  CONVRNN_UNROLL
  for (int m = 0; m < M; ++m) {
    CONVRNN_UNROLL
    for (int n = 0; n < N; ++n) {
      float* const out = c + m * strides.c_row + n * kColumns;
      _mm512_storeu_ps(out, accumulate ? _mm512_add_ps(_mm512_loadu_ps(out), sums[m][n]) : sums[m][n]);
    }
  }
}

constexpr int kMostRows = 14;
using Tile = void (*)(const PairFactors*, int64_t, int64_t, const ProductStrides&, float*, bool);

template <int N, int... kRows>
const Tile* tiles(std::integer_sequence<int, kRows...>) {
  static constexpr Tile found[] = {&tile<kRows + 1, N>...};
  return found;
}

}  // namespace
#endif

void multiply_pairs([[maybe_unused]] std::vector<PairFactors>& factors, [[maybe_unused]] int64_t depth,
                    [[maybe_unused]] int64_t rows, [[maybe_unused]] int64_t blocks,
                    [[maybe_unused]] const ProductStrides& strides, [[maybe_unused]] float* c,
                    [[maybe_unused]] bool accumulate) {
#ifdef CONVRNN_X86
  using Heights = std::make_integer_sequence<int, kMostRows>;
  const Tile* heights = blocks == 2 ? tiles<2>(Heights{}) : tiles<1>(Heights{});
  const int64_t parts = (rows + kMostRows - 1) / kMostRows;
  for (int64_t part = 0, first = 0; part < parts; ++part) {
    const int64_t height = (rows - first) / (parts - part);
    heights[height - 1](factors.data(), static_cast<int64_t>(factors.size()), depth, strides, c + first * strides.c_row,
                        accumulate);
    for (PairFactors& f : factors) {
      f.a += height * strides.a_row;
    }
    first += height;
  }
#endif
}

}  // namespace convrnn
