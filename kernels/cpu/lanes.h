// Loops over the lanes of a pixel.
#pragma once

#include "math.h"
#include "product.h"

namespace convrnn {

// f(i) for i < n, in whole vectors: of the last lanes the compiler makes a vector under a mask, where the instruction set has
// one for the types of f. A plain loop would do them one by one: up to 15 lanes of each pixel.
template <class F>
CONVRNN_INLINE void each_lane(int64_t n, F f) {
  const int64_t whole = n / kColumns * kColumns;
  CONVRNN_LANES
  for (int64_t i = 0; i < whole; ++i) {
    f(i);
  }
  const auto left = static_cast<int32_t>(n - whole);
  if (left == 0) {
    return;
  }
  CONVRNN_LANES
  for (int32_t i = 0; i < kColumns; ++i) {
    if (i < left) {
      f(whole + i);
    }
  }
}

}  // namespace convrnn
