// The transforms of Winograd's F(2x2, 3x3) and of its weight gradient F(3x3, 2x2), over lanes (channels) of tiles.
// With d a 4x4 patch of the input, w 3x3 weights, y 2x2 outputs and . the elementwise product,
//   y = A^T [(G w G^T) . (B^T d B)] A,    dw = G^T [(A dy A^T) . (B^T d B)] G.
// The 16 products of a tile lie `plane` elements apart.
#pragma once

#include <cstdint>

#include "isa.h"

namespace convrnn {
namespace winograd {

constexpr int64_t kProducts = 16;  // of a tile

constexpr int64_t tiles(int64_t pixels) {
  return (pixels + 1) / 2;
}

// Elements from one product of all tiles to the next. A cache line more than they take: at a power of two, all planes of
// a tile would share one set of the first-level cache.
constexpr int64_t plane_size(int64_t tiles, int64_t lanes) {
  return (tiles * lanes + 15) / 16 * 16 + 16;
}

template <class A>
struct Two {
  A x0, x1;
};
template <class A>
struct Three {
  A x0, x1, x2;
};
template <class A>
struct Four {
  A x0, x1, x2, x3;
};

template <class A>
CONVRNN_INLINE Four<A> input(A d0, A d1, A d2, A d3) {  // B^T d
  return {d0 - d2, d1 + d2, d2 - d1, d1 - d3};
}
template <class A>
CONVRNN_INLINE Four<A> weight(A w0, A w1, A w2) {  // G w
  const A even = (w0 + w2) * A(0.5), odd = w1 * A(0.5);
  return {w0, even + odd, even - odd, w2};
}
template <class A>
CONVRNN_INLINE Four<A> gradient(A y0, A y1) {  // A dy
  return {y0, y0 + y1, y0 - y1, -y1};
}

template <class A>
CONVRNN_INLINE Two<A> output(A m0, A m1, A m2, A m3) {  // A^T m
  return {m0 + m1 + m2, m1 - m2 - m3};
}
template <class A>
CONVRNN_INLINE Three<A> weight_gradient(A p0, A p1, A p2, A p3) {  // G^T p
  const A even = (p1 + p2) * A(0.5);
  return {p0 + even, (p1 - p2) * A(0.5), even + p3};
}

template <class A>
CONVRNN_INLINE void store(const Three<A>& x, A* out, int64_t plane) {
  out[0] = x.x0;
  out[plane] = x.x1;
  out[2 * plane] = x.x2;
}
template <class A>
CONVRNN_INLINE void store(const Four<A>& x, A* out, int64_t plane) {
  out[0] = x.x0;
  out[plane] = x.x1;
  out[2 * plane] = x.x2;
  out[3 * plane] = x.x3;
}

// B^T d B of a row of tiles; `in` is the first patch's first pixel.
template <class A>
struct Input {
  static CONVRNN_INLINE void run(const A* in, int64_t row, int64_t pixel, A* out, int64_t plane, int64_t tiles,
                                 int64_t lanes) {
    for (int64_t tile = 0; tile < tiles; ++tile, in += 2 * pixel, out += lanes) {
      const A *p0 = in, *p1 = in + pixel, *p2 = in + 2 * pixel, *p3 = in + 3 * pixel;
      CONVRNN_LANES
      for (int64_t i = 0; i < lanes; ++i) {
        const auto c0 = input(p0[i], p0[i + row], p0[i + 2 * row], p0[i + 3 * row]);
        const auto c1 = input(p1[i], p1[i + row], p1[i + 2 * row], p1[i + 3 * row]);
        const auto c2 = input(p2[i], p2[i + row], p2[i + 2 * row], p2[i + 3 * row]);
        const auto c3 = input(p3[i], p3[i + row], p3[i + 2 * row], p3[i + 3 * row]);
        store(input(c0.x0, c1.x0, c2.x0, c3.x0), out + i, plane);
        store(input(c0.x1, c1.x1, c2.x1, c3.x1), out + i + 4 * plane, plane);
        store(input(c0.x2, c1.x2, c2.x2, c3.x2), out + i + 8 * plane, plane);
        store(input(c0.x3, c1.x3, c2.x3, c3.x3), out + i + 12 * plane, plane);
      }
    }
  }
};

// A dy A^T of a row of tiles; `in` is the first tile's first pixel.
template <class A>
struct Gradient {
  static CONVRNN_INLINE void run(const A* in, int64_t row, int64_t pixel, A* out, int64_t plane, int64_t tiles,
                                 int64_t lanes) {
    for (int64_t tile = 0; tile < tiles; ++tile, in += 2 * pixel, out += lanes) {
      const A *p0 = in, *p1 = in + pixel;
      CONVRNN_LANES
      for (int64_t i = 0; i < lanes; ++i) {
        const auto c0 = gradient(p0[i], p0[i + row]);
        const auto c1 = gradient(p1[i], p1[i + row]);
        store(gradient(c0.x0, c1.x0), out + i, plane);
        store(gradient(c0.x1, c1.x1), out + i + 4 * plane, plane);
        store(gradient(c0.x2, c1.x2), out + i + 8 * plane, plane);
        store(gradient(c0.x3, c1.x3), out + i + 12 * plane, plane);
      }
    }
  }
};

// A^T m A of a row of tiles, to pixels at out + 2 * tile * pixel (and row, pixel beyond). A pixel outside the frame is
// not written: of the last tile if `narrow`, of the second row if `flat`.
template <class A>
struct Output {
  static CONVRNN_INLINE void run(const A* in, int64_t plane, A* out, int64_t row, int64_t pixel, int64_t tiles,
                                 int64_t lanes, bool narrow, bool flat) {
    for (int64_t tile = 0; tile < tiles; ++tile, in += lanes, out += 2 * pixel) {
      const bool last = narrow && tile == tiles - 1;
      // What is not wanted is written first, where a wanted pixel then goes.
      A *y00 = out, *y01 = last ? out : out + pixel, *y10 = flat ? out : out + row;
      A* y11 = flat ? y01 : last ? y10 : y10 + pixel;
      CONVRNN_LANES
      for (int64_t i = 0; i < lanes; ++i) {
        const A *k0 = in + i, *k1 = k0 + plane, *k2 = k1 + plane, *k3 = k2 + plane;
        const auto c0 = output(k0[0], k0[4 * plane], k0[8 * plane], k0[12 * plane]);
        const auto c1 = output(k1[0], k1[4 * plane], k1[8 * plane], k1[12 * plane]);
        const auto c2 = output(k2[0], k2[4 * plane], k2[8 * plane], k2[12 * plane]);
        const auto c3 = output(k3[0], k3[4 * plane], k3[8 * plane], k3[12 * plane]);
        const auto top = output(c0.x0, c1.x0, c2.x0, c3.x0), bottom = output(c0.x1, c1.x1, c2.x1, c3.x1);
        y11[i] = bottom.x1;
        y10[i] = bottom.x0;
        y01[i] = top.x1;
        y00[i] = top.x0;
      }
    }
  }
};

// G w G^T: taps[9][lanes] to 16 planes.
template <class A>
struct Weight {
  static CONVRNN_INLINE void run(const A* taps, A* out, int64_t plane, int64_t lanes) {
    CONVRNN_LANES
    for (int64_t i = 0; i < lanes; ++i) {
      const A* w = taps + i;
      const auto c0 = weight(w[0], w[3 * lanes], w[6 * lanes]);
      const auto c1 = weight(w[lanes], w[4 * lanes], w[7 * lanes]);
      const auto c2 = weight(w[2 * lanes], w[5 * lanes], w[8 * lanes]);
      store(weight(c0.x0, c1.x0, c2.x0), out + i, plane);
      store(weight(c0.x1, c1.x1, c2.x1), out + i + 4 * plane, plane);
      store(weight(c0.x2, c1.x2, c2.x2), out + i + 8 * plane, plane);
      store(weight(c0.x3, c1.x3, c2.x3), out + i + 12 * plane, plane);
    }
  }
};

// G^T p G: 16 planes to taps[9][lanes].
template <class A>
struct WeightGradient {
  static CONVRNN_INLINE void run(const A* in, int64_t plane, A* taps, int64_t lanes) {
    CONVRNN_LANES
    for (int64_t i = 0; i < lanes; ++i) {
      const A *k0 = in + i, *k1 = k0 + plane, *k2 = k1 + plane, *k3 = k2 + plane;
      const auto c0 = weight_gradient(k0[0], k0[4 * plane], k0[8 * plane], k0[12 * plane]);
      const auto c1 = weight_gradient(k1[0], k1[4 * plane], k1[8 * plane], k1[12 * plane]);
      const auto c2 = weight_gradient(k2[0], k2[4 * plane], k2[8 * plane], k2[12 * plane]);
      const auto c3 = weight_gradient(k3[0], k3[4 * plane], k3[8 * plane], k3[12 * plane]);
      store(weight_gradient(c0.x0, c1.x0, c2.x0, c3.x0), taps + i, lanes);
      store(weight_gradient(c0.x1, c1.x1, c2.x1, c3.x1), taps + i + 3 * lanes, lanes);
      store(weight_gradient(c0.x2, c1.x2, c2.x2, c3.x2), taps + i + 6 * lanes, lanes);
    }
  }
};

}  // namespace winograd
}  // namespace convrnn
