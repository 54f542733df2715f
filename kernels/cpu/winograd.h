// The transforms of Winograd's F(MxM, 3x3) and of its weight gradient F(3x3, MxM), M = 2 or 4, over lanes (channels) of
// tiles. With d a patch of M + 2 x M + 2 pixels of the input, w 3x3 weights, y MxM outputs and . the elementwise product,
//   y = A^T [(G w G^T) . (B^T d B)] A,    dw = G^T [(A dy A^T) . (B^T d B)] G.
// The products of a tile lie `plane` elements apart.
//
// M = 2 interpolates at the points 0, 1, -1 and infinity; M = 4 at 0, +-1/sqrt(2), +-sqrt(2) and infinity, with a fourth of
// the error of 0, +-1, +-2 and infinity (kernels/README.md). Source: Lavin & Gray 2015, arXiv 1509.09308; of what points do
// to the error, Barabasz et al. 2018, arXiv 1803.10986.
#pragma once

#include <algorithm>
#include <cstdint>

#include "isa.h"

namespace convrnn {
namespace winograd {

constexpr int64_t products(int64_t tile) {  // of a tile
  return (tile + 2) * (tile + 2);
}

constexpr int64_t tiles(int64_t pixels, int64_t tile) {
  return (pixels + tile - 1) / tile;
}

// Tiles that are transformed at a time: their products, with 64 lanes of one block, stay in the second-level cache.
constexpr int64_t most_tiles(int64_t tile) {
  return tile == 2 ? 64 : 32;
}

// Elements from one product of all tiles to the next. A cache line more than they take: at a power of two, all planes of
// a tile would share one set of the first-level cache.
constexpr int64_t plane_size(int64_t tiles, int64_t lanes) {
  return (tiles * lanes + 15) / 16 * 16 + 16;
}

template <class A, int N>
struct Values {
  A x[N];
};

// Points of M = 4.
template <class A>
constexpr A kInner = A(0.70710678118654752440);
template <class A>
constexpr A kOuter = A(1.41421356237309504880);

template <int M>
struct InputRow {  // B^T d
  static constexpr int kIn = M + 2, kOut = M + 2;
  template <class A>
  static CONVRNN_INLINE Values<A, kOut> apply(const Values<A, kIn>& d) {
    const A* x = d.x;
    if constexpr (M == 2) {
      return {x[0] - x[2], x[1] + x[2], x[2] - x[1], x[1] - x[3]};
    } else {
      const A even1 = x[4] - A(2) * x[2], odd1 = kInner<A> * (x[3] - A(2) * x[1]);
      const A even2 = x[4] - A(0.5) * x[2], odd2 = kOuter<A> * (x[3] - A(0.5) * x[1]);
      return {x[0] - A(2.5) * x[2] + x[4], even1 + odd1, even1 - odd1, even2 + odd2, even2 - odd2,
              x[1] - A(2.5) * x[3] + x[5]};
    }
  }
};

template <int M>
struct WeightRow {  // G w
  static constexpr int kIn = 3, kOut = M + 2;
  template <class A>
  static CONVRNN_INLINE Values<A, kOut> apply(const Values<A, kIn>& w) {
    const A* x = w.x;
    if constexpr (M == 2) {
      const A even = (x[0] + x[2]) * A(0.5), odd = x[1] * A(0.5);
      return {x[0], even + odd, even - odd, x[2]};
    } else {
      const A even1 = (x[0] + A(0.5) * x[2]) * A(-2. / 3), odd1 = x[1] * (kInner<A> * A(-2. / 3));
      const A even2 = (x[0] + A(2) * x[2]) * A(1. / 6), odd2 = x[1] * (kOuter<A> * A(1. / 6));
      return {x[0], even1 + odd1, even1 - odd1, even2 + odd2, even2 - odd2, x[2]};
    }
  }
};

template <int M>
struct GradientRow {  // A dy
  static constexpr int kIn = M, kOut = M + 2;
  template <class A>
  static CONVRNN_INLINE Values<A, kOut> apply(const Values<A, kIn>& dy) {
    const A* x = dy.x;
    if constexpr (M == 2) {
      return {x[0], x[0] + x[1], x[0] - x[1], -x[1]};
    } else {
      const A even1 = x[0] + A(0.5) * x[2], odd1 = kInner<A> * (x[1] + A(0.5) * x[3]);
      const A even2 = x[0] + A(2) * x[2], odd2 = kOuter<A> * (x[1] + A(2) * x[3]);
      return {x[0], even1 + odd1, even1 - odd1, even2 + odd2, even2 - odd2, x[3]};
    }
  }
};

template <int M>
struct OutputRow {  // A^T m
  static constexpr int kIn = M + 2, kOut = M;
  template <class A>
  static CONVRNN_INLINE Values<A, kOut> apply(const Values<A, kIn>& m) {
    const A* x = m.x;
    if constexpr (M == 2) {
      return {x[0] + x[1] + x[2], x[1] - x[2] - x[3]};
    } else {
      const A even1 = x[1] + x[2], odd1 = kInner<A> * (x[1] - x[2]);
      const A even2 = x[3] + x[4], odd2 = kOuter<A> * (x[3] - x[4]);
      return {x[0] + even1 + even2, odd1 + odd2, A(0.5) * even1 + A(2) * even2, A(0.5) * odd1 + A(2) * odd2 + x[5]};
    }
  }
};

template <int M>
struct WeightGradientRow {  // G^T p
  static constexpr int kIn = M + 2, kOut = 3;
  template <class A>
  static CONVRNN_INLINE Values<A, kOut> apply(const Values<A, kIn>& p) {
    const A* x = p.x;
    if constexpr (M == 2) {
      const A even = (x[1] + x[2]) * A(0.5);
      return {x[0] + even, (x[1] - x[2]) * A(0.5), even + x[3]};
    } else {
      const A even1 = (x[1] + x[2]) * A(-2. / 3), even2 = (x[3] + x[4]) * A(1. / 6);
      const A odd1 = (x[1] - x[2]) * (kInner<A> * A(-2. / 3)), odd2 = (x[3] - x[4]) * (kOuter<A> * A(1. / 6));
      return {x[0] + even1 + even2, odd1 + odd2, A(0.5) * even1 + A(2) * even2 + x[5]};
    }
  }
};

// Row applied to the columns and then the rows of a matrix, for every lane. Of the result, `rows` x `columns` are wanted:
// what is not is written first, where something wanted then goes.
template <class Row, class A>
CONVRNN_INLINE void transform(const A* in, int64_t in_row, int64_t in_column, A* out, int64_t out_row, int64_t out_column,
                              int64_t lanes, int64_t rows = Row::kOut, int64_t columns = Row::kOut) {
  A* to[Row::kOut][Row::kOut];
  CONVRNN_UNROLL
  for (int r = 0; r < Row::kOut; ++r) {
    CONVRNN_UNROLL
    for (int c = 0; c < Row::kOut; ++c) {
      to[r][c] = out + std::min<int64_t>(r, rows - 1) * out_row + std::min<int64_t>(c, columns - 1) * out_column;
    }
  }
  CONVRNN_LANES
  for (int64_t i = 0; i < lanes; ++i) {
    Values<A, Row::kOut> half[Row::kIn];
    CONVRNN_UNROLL
    for (int c = 0; c < Row::kIn; ++c) {
      Values<A, Row::kIn> column;
      CONVRNN_UNROLL
      for (int r = 0; r < Row::kIn; ++r) {
        column.x[r] = in[r * in_row + c * in_column + i];
      }
      half[c] = Row::apply(column);
    }
    CONVRNN_UNROLL
    for (int r = Row::kOut - 1; r >= 0; --r) {
      Values<A, Row::kIn> row;
      CONVRNN_UNROLL
      for (int c = 0; c < Row::kIn; ++c) {
        row.x[c] = half[c].x[r];
      }
      const Values<A, Row::kOut> found = Row::apply(row);
      CONVRNN_UNROLL
      for (int c = Row::kOut - 1; c >= 0; --c) {
        to[r][c][i] = found.x[c];
      }
    }
  }
}

// B^T d B of a row of tiles, `pitch` elements apart; `in` is the first patch's first pixel.
template <class A, int M>
struct Input {
  static CONVRNN_INLINE void run(const A* in, int64_t row, int64_t pixel, A* out, int64_t plane, int64_t pitch, int64_t tiles,
                                 int64_t lanes) {
    for (int64_t tile = 0; tile < tiles; ++tile, in += M * pixel, out += pitch) {
      transform<InputRow<M>>(in, row, pixel, out, (M + 2) * plane, plane, lanes);
    }
  }
};

// A dy A^T of a row of tiles; `in` is the first tile's first pixel.
template <class A, int M>
struct Gradient {
  static CONVRNN_INLINE void run(const A* in, int64_t row, int64_t pixel, A* out, int64_t plane, int64_t tiles,
                                 int64_t lanes) {
    for (int64_t tile = 0; tile < tiles; ++tile, in += M * pixel, out += lanes) {
      transform<GradientRow<M>>(in, row, pixel, out, (M + 2) * plane, plane, lanes);
    }
  }
};

// A^T m A of a row of tiles, to the rows x columns pixels that begin at `out`; what lies outside them is not written.
template <class A, int M>
struct Output {
  static CONVRNN_INLINE void run(const A* in, int64_t plane, A* out, int64_t row, int64_t pixel, int64_t rows,
                                 int64_t columns, int64_t lanes) {
    for (; columns > 0; columns -= M, in += lanes, out += M * pixel) {
      transform<OutputRow<M>>(in, (M + 2) * plane, plane, out, row, pixel, lanes, rows, columns);
    }
  }
};

// G w G^T: taps[9][lanes] to planes.
template <class A, int M>
struct Weight {
  static CONVRNN_INLINE void run(const A* taps, A* out, int64_t plane, int64_t lanes) {
    transform<WeightRow<M>>(taps, 3 * lanes, lanes, out, (M + 2) * plane, plane, lanes);
  }
};

// G^T p G: planes to taps[9][lanes].
template <class A, int M>
struct WeightGradient {
  static CONVRNN_INLINE void run(const A* in, int64_t plane, A* taps, int64_t lanes) {
    transform<WeightGradientRow<M>>(in, (M + 2) * plane, plane, taps, 3 * lanes, lanes, lanes);
  }
};

}  // namespace winograd
}  // namespace convrnn
