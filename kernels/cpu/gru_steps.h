// What a step of the whole sequence (gru_rcn.cpp) does beside its convolutions, over a run of pixels, `n` lanes of each.
// T is the dtype of tensors, arithmetic and state are acc_t<T>. From pixel to pixel lie `pitch` lanes, `saved` lanes in
// what is kept for backward.
#pragma once

#include "lanes.h"

namespace convrnn {

// Where nothing lies between the lanes of neighbouring pixels they are one run.
CONVRNN_INLINE void merge(int64_t& pixels, int64_t& n, int64_t pitch, int64_t other) {
  if (n == pitch && n == other) {
    n *= pixels;
    pixels = 1;
  }
}

// z, r = sigmoid(xp + hp), rh = r h; in xp and hp the gates lie x_gate and h_gate apart.
template <class T>
struct StepGates {
  using A = acc_t<T>;
  static CONVRNN_INLINE void run(const A* xp, int64_t x_gate, const A* hp, int64_t h_gate, const A* h, A* rh, T* z, T* r,
                                 int64_t pixels, int64_t n, int64_t pitch, int64_t saved) {
    merge(pixels, n, pitch, saved);
    for (; pixels > 0; --pixels, xp += pitch, hp += pitch, h += pitch, rh += pitch, z += saved, r += saved) {
      each_lane(n, [=](int64_t i) __attribute__((always_inline)) {
        const A ri = sigmoid(xp[x_gate + i] + hp[h_gate + i]);
        store(z[i], sigmoid(xp[i] + hp[i]));
        store(r[i], ri);
        rh[i] = ri * h[i];
      });
    }
  }
};

// c = tanh(xc + hc).
template <class T>
struct StepCandidate {
  using A = acc_t<T>;
  static CONVRNN_INLINE void run(const A* xc, const A* hc, T* c, int64_t pixels, int64_t n, int64_t pitch,
                                 int64_t saved) {
    merge(pixels, n, pitch, saved);
    for (; pixels > 0; --pixels, xc += pitch, hc += pitch, c += saved) {
      each_lane(n, [=](int64_t i) __attribute__((always_inline)) {
        store(c[i], tanh_(xc[i] + hc[i]));
      });
    }
  }
};

// h += z (c - h).
template <class T>
struct StepUpdate {
  using A = acc_t<T>;
  static CONVRNN_INLINE void run(const T* z, const T* c, A* h, int64_t pixels, int64_t n, int64_t pitch, int64_t saved) {
    merge(pixels, n, pitch, saved);
    for (; pixels > 0; --pixels, z += saved, c += saved, h += pitch) {
      each_lane(n, [=](int64_t i) __attribute__((always_inline)) {
        h[i] += load(z[i]) * (load(c[i]) - h[i]);
      });
    }
  }
};

// rh = r h.
template <class T>
struct StepReset {
  using A = acc_t<T>;
  static CONVRNN_INLINE void run(const T* r, const A* h, A* rh, int64_t pixels, int64_t n, int64_t pitch, int64_t saved) {
    merge(pixels, n, pitch, saved);
    for (; pixels > 0; --pixels, r += saved, h += pitch, rh += pitch) {
      each_lane(n, [=](int64_t i) __attribute__((always_inline)) {
        rh[i] = load(r[i]) * h[i];
      });
    }
  }
};

// Gradients of the pre-activations of z and c from dh = dL/dh_t, of which dh keeps what reaches h_{t-1} past the gates.
template <class T>
struct StepUpdateBackward {
  using A = acc_t<T>;
  static CONVRNN_INLINE void run(const T* z, const T* c, const A* h, A* dh, A* daz, A* dac, int64_t pixels, int64_t n,
                                 int64_t pitch, int64_t saved, int64_t da_pitch) {
    for (; pixels > 0; --pixels, z += saved, c += saved, h += pitch, dh += pitch, daz += da_pitch, dac += da_pitch) {
      each_lane(n, [=](int64_t i) __attribute__((always_inline)) {
        const A up = dh[i], zi = load(z[i]), ci = load(c[i]);
        daz[i] = up * (ci - h[i]) * zi * (A(1) - zi);
        dac[i] = up * zi * (A(1) - ci * ci);
        dh[i] = up * (A(1) - zi);
      });
    }
  }
};

// Gradient of the pre-activation of r from drh = dL/d(r h), and what drh passes to h_{t-1}.
template <class T>
struct StepGatesBackward {
  using A = acc_t<T>;
  static CONVRNN_INLINE void run(const A* drh, const T* r, const A* h, A* dh, A* dar, int64_t pixels, int64_t n,
                                 int64_t pitch, int64_t saved, int64_t da_pitch) {
    for (; pixels > 0; --pixels, drh += pitch, r += saved, h += pitch, dh += pitch, dar += da_pitch) {
      each_lane(n, [=](int64_t i) __attribute__((always_inline)) {
        const A up = drh[i], ri = load(r[i]);
        dar[i] = up * h[i] * ri * (A(1) - ri);
        dh[i] += up * ri;
      });
    }
  }
};

// sum += x, or x of every pixel alike.
template <class A>
struct Add {
  static CONVRNN_INLINE void run(const A* x, int64_t x_pitch, A* sum, int64_t pixels, int64_t n, int64_t pitch) {
    merge(pixels, n, pitch, x_pitch);
    for (; pixels > 0; --pixels, x += x_pitch, sum += pitch) {
      each_lane(n, [=](int64_t i) __attribute__((always_inline)) {
        sum[i] += x[i];
      });
    }
  }
};

}  // namespace convrnn
