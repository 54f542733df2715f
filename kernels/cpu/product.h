// Sums of small matrix products, the arithmetic of every convolution here: convolution.cpp says which matrices.
#pragma once

#include <cstdint>
#include <vector>

namespace convrnn {

constexpr int64_t kColumns = 16;  // of a block: one 64-byte vector of fp32

// One product of a sum: element (m, k) of the first matrix is a[m * a_row + k * a_k], (k, n) of the second b[k * b_k + n].
template <class A>
struct Factors {
  const A* a;
  const A* b;
};

struct ProductStrides {
  int64_t a_row, a_k;  // one of the two is 1
  int64_t b_k;
  int64_t c_row;
};

// c[m * c_row + n] = sum over all factors and k < depth of a(m, k) b(k, n), for m < rows and n < blocks * kColumns with
// blocks <= panel_blocks(); added to what c holds if `accumulate`. Each element is summed in the order of the factors and of
// k, whatever the rows beside it: how rows are shared among calls or threads changes no bit.
template <class A>
void multiply(const Factors<A>* factors, int64_t count, int64_t depth, int64_t rows, int64_t blocks,
              const ProductStrides& strides, A* c, bool accumulate);

// The same of bfloat16 numbers, where the machine multiplies them, with float32 sums: elements of both matrices are pairs, (m, 2k)
// and (m, 2k + 1) of the first, (2k, n) and (2k + 1, n) of the second. Moves the factors on.
struct PairFactors {
  const uint32_t* a;
  const uint32_t* b;
};
bool multiplies_pairs();
void multiply_pairs(std::vector<PairFactors>& factors, int64_t depth, int64_t rows, int64_t blocks,
                    const ProductStrides& strides, float* c, bool accumulate);

// The number of column blocks at which `multiply` is fastest, and the most it takes.
template <class A>
int64_t panel_blocks();

}  // namespace convrnn
