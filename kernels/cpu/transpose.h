// Between rows of a dense tensor and lanes.
#pragma once

#include <type_traits>

#include "math.h"

namespace convrnn {

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define CONVRNN_SHUFFLE __builtin_shufflevector
#endif
#endif

#ifdef CONVRNN_SHUFFLE
// Four by four: of 16 bytes, which every target has in registers.
typedef float Quad __attribute__((vector_size(16), aligned(4), may_alias));

CONVRNN_INLINE void transpose(Quad (&m)[4]) {
  const Quad a = CONVRNN_SHUFFLE(m[0], m[1], 0, 4, 1, 5), b = CONVRNN_SHUFFLE(m[2], m[3], 0, 4, 1, 5);
  const Quad c = CONVRNN_SHUFFLE(m[0], m[1], 2, 6, 3, 7), d = CONVRNN_SHUFFLE(m[2], m[3], 2, 6, 3, 7);
  m[0] = CONVRNN_SHUFFLE(a, b, 0, 1, 4, 5);
  m[1] = CONVRNN_SHUFFLE(a, b, 2, 3, 6, 7);
  m[2] = CONVRNN_SHUFFLE(c, d, 0, 1, 4, 5);
  m[3] = CONVRNN_SHUFFLE(c, d, 2, 3, 6, 7);
}

// Four elements.
template <class T>
CONVRNN_INLINE Quad load_quad(const T* x) {
  alignas(16) float values[4];
  for (int i = 0; i < 4; ++i) {
    values[i] = load(x[i]);
  }
  return *reinterpret_cast<const Quad*>(values);
}
CONVRNN_INLINE Quad load_quad(const float* x) {
  return *reinterpret_cast<const Quad*>(x);
}
template <class T>
CONVRNN_INLINE void store_quad(T* x, Quad values) {
  for (int i = 0; i < 4; ++i) {
    store(x[i], values[i]);
  }
}
CONVRNN_INLINE void store_quad(float* x, Quad values) {
  *reinterpret_cast<Quad*>(x) = values;
}
#endif

// Between a frame's dense tensor, element (pixel, channel) at pixel * p + channel * c with p or c 1, and lanes.
enum class Move { in, add, out };

template <class T, Move move>
struct Transpose {
  using A = acc_t<T>;
  using Dense = std::conditional_t<move == Move::out, T, const T>;
  static CONVRNN_INLINE void one(Dense& x, A& lane) {
    if constexpr (move == Move::in) {
      lane = load(x);
    } else if constexpr (move == Move::add) {
      lane += load(x);
    } else {
      store(x, lane);
    }
  }

#ifdef CONVRNN_SHUFFLE
  // Four channels of four pixels.
  static CONVRNN_INLINE void square(Dense* x, int64_t c, A* lanes, int64_t pitch) {
    if constexpr (move == Move::out) {
      Quad m[4] = {load_quad(lanes), load_quad(lanes + pitch), load_quad(lanes + 2 * pitch), load_quad(lanes + 3 * pitch)};
      transpose(m);
      CONVRNN_UNROLL
      for (int i = 0; i < 4; ++i) {
        store_quad(x + i * c, m[i]);
      }
    } else {
      Quad m[4] = {load_quad(x), load_quad(x + c), load_quad(x + 2 * c), load_quad(x + 3 * c)};
      transpose(m);
      CONVRNN_UNROLL
      for (int j = 0; j < 4; ++j) {
        A* lane = lanes + j * pitch;
        store_quad(lane, move == Move::add ? load_quad(lane) + m[j] : m[j]);
      }
    }
  }
  // Four channels of pixels from `first` on, in squares; returns the first that is left.
  static CONVRNN_INLINE int64_t squares(Dense* x, int64_t c, A* lanes, int64_t pixels, int64_t pitch) {
    int64_t pixel = 0;
    for (; pixel + 4 <= pixels; pixel += 4) {
      square(x + pixel, c, lanes + pixel * pitch, pitch);
    }
    if (move != Move::add && pixels > 4 && pixel < pixels) {  // some once more: the same is written
      square(x + pixels - 4, c, lanes + (pixels - 4) * pitch, pitch);
      pixel = pixels;
    }
    return pixel;
  }
#endif

  static CONVRNN_INLINE void run(Dense* x, int64_t p, int64_t c, A* lanes, int64_t pixels, int64_t n, int64_t pitch) {
    if (c == 1) {
      for (int64_t pixel = 0; pixel < pixels; ++pixel) {
        CONVRNN_LANES
        for (int64_t i = 0; i < n; ++i) {
          one(x[pixel * p + i], lanes[pixel * pitch + i]);
        }
      }
      return;
    }
    int64_t done = 0;
#ifdef CONVRNN_SHUFFLE
    if constexpr (std::is_same_v<A, float>) {
      for (; done + 4 <= n; done += 4) {
        for (int64_t pixel = squares(x + done * c, c, lanes + done, pixels, pitch); pixel < pixels; ++pixel) {
          for (int64_t i = done; i < done + 4; ++i) {
            one(x[i * c + pixel], lanes[pixel * pitch + i]);
          }
        }
      }
    }
#endif
    for (int64_t i = done; i < n; ++i) {
      for (int64_t pixel = 0; pixel < pixels; ++pixel) {
        one(x[i * c + pixel * p], lanes[pixel * pitch + i]);
      }
    }
  }
};

}  // namespace convrnn
