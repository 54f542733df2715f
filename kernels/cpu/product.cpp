#include "product.h"

#include <algorithm>
#include <array>
#include <utility>

#include "isa.h"

namespace convrnn {
namespace {

constexpr int64_t kMostFactors = 64;  // of one call of a tile; longer sums take several

namespace plain {
#define CONVRNN_TARGET
#define CONVRNN_VECTOR 16
#ifdef __aarch64__
#define CONVRNN_REGISTERS 32
#else
#define CONVRNN_REGISTERS 16
#endif
#include "product_tile.h"
#undef CONVRNN_TARGET
#undef CONVRNN_VECTOR
#undef CONVRNN_REGISTERS
}  // namespace plain

#ifdef CONVRNN_X86
namespace avx2 {
#define CONVRNN_TARGET CONVRNN_AVX2
#define CONVRNN_VECTOR 32
#define CONVRNN_REGISTERS 16
#include "product_tile.h"
#undef CONVRNN_TARGET
#undef CONVRNN_VECTOR
#undef CONVRNN_REGISTERS
}  // namespace avx2

namespace avx512 {
#define CONVRNN_TARGET CONVRNN_AVX512
#define CONVRNN_VECTOR 64
#define CONVRNN_REGISTERS 32
#include "product_tile.h"
#undef CONVRNN_TARGET
#undef CONVRNN_VECTOR
#undef CONVRNN_REGISTERS
}  // namespace avx512
#endif

template <class A>
void multiply_some(const Factors<A>* factors, int64_t count, int64_t depth, int64_t rows, int64_t blocks,
                   const ProductStrides& strides, A* c, bool accumulate) {
#ifdef CONVRNN_X86
  switch (isa()) {
    case Isa::avx512bf16:
    case Isa::avx512:
      return blocks == 2 ? avx512::multiply<A, 2>(factors, count, depth, rows, strides, c, accumulate)
                         : avx512::multiply<A, 1>(factors, count, depth, rows, strides, c, accumulate);
    case Isa::avx2:
      return avx2::multiply<A, 1>(factors, count, depth, rows, strides, c, accumulate);
    case Isa::plain:
      break;
  }
#endif
  plain::multiply<A, 1>(factors, count, depth, rows, strides, c, accumulate);
}

}  // namespace

template <class A>
void multiply(const Factors<A>* factors, int64_t count, int64_t depth, int64_t rows, int64_t blocks,
              const ProductStrides& strides, A* c, bool accumulate) {
  for (int64_t first = 0; first < count || first == 0; first += kMostFactors) {
    multiply_some(factors + first, std::min(count - first, kMostFactors), depth, rows, blocks, strides, c,
                  accumulate || first > 0);
  }
}

template <class A>
int64_t panel_blocks() {
#ifdef CONVRNN_X86
  return isa() >= Isa::avx512 && sizeof(A) == 4 ? 2 : 1;
#else
  return 1;
#endif
}

template void multiply(const Factors<float>*, int64_t, int64_t, int64_t, int64_t, const ProductStrides&, float*, bool);
template void multiply(const Factors<double>*, int64_t, int64_t, int64_t, int64_t, const ProductStrides&, double*, bool);
template int64_t panel_blocks<float>();
template int64_t panel_blocks<double>();

}  // namespace convrnn
