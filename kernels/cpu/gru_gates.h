// The elementwise half of a GRU-RCN step, forward and backward, over rows of `n` lanes (one sample's (C, *S)). T is the
// dtype of the convolutions and of what is saved, S the dtype of the state (T or fp32), arithmetic is fp32 (fp64).
// Every kernel may write over its own inputs lane for lane.
// Source: Ballas et al., ICLR 2016, arXiv 1511.06432; z is the share of the candidate: h' = (1 - z) h + z c.
#pragma once

#include "math.h"

namespace convrnn {

// [z, r] = sigmoid(xp + hp), rh = r h; xp and hp hold two runs of n.
template <class T, class S>
struct Gates {
  static CONVRNN_INLINE void run(const T* xp, const T* hp, const S* h, T* z, T* r, T* rh, int64_t n) {
    using A = acc_t<T>;
    CONVRNN_LANES
    for (int64_t i = 0; i < n; ++i) {
      const A zi = sigmoid(A(xp[i]) + A(hp[i]));
      const A ri = sigmoid(A(xp[n + i]) + A(hp[n + i]));
      const A rhi = ri * A(h[i]);
      z[i] = static_cast<T>(zi);
      r[i] = static_cast<T>(ri);
      rh[i] = static_cast<T>(rhi);
    }
  }
};

// c = tanh(xc + hc), h' = h + z (c - h).
template <class T, class S>
struct Update {
  static CONVRNN_INLINE void run(const T* xc, const T* hc, const T* z, const S* h, T* c, S* h_next, int64_t n) {
    using A = acc_t<T>;
    CONVRNN_LANES
    for (int64_t i = 0; i < n; ++i) {
      const A ci = tanh_(A(xc[i]) + A(hc[i]));
      const A hi = A(h[i]);
      c[i] = static_cast<T>(ci);
      h_next[i] = static_cast<S>(hi + A(z[i]) * (ci - hi));
    }
  }
};

// da: gradient of xp (and of hp), two runs of n.
template <class T, class S>
struct GatesBackward {
  static CONVRNN_INLINE void run(const T* dz, const T* dr, const T* drh, const T* z, const T* r, const S* h, T* da,
                                 S* dh, int64_t n) {
    using A = acc_t<T>;
    CONVRNN_LANES
    for (int64_t i = 0; i < n; ++i) {
      const A zi = A(z[i]), ri = A(r[i]), up = A(drh[i]);
      const A daz = A(dz[i]) * zi * (A(1) - zi);
      const A dar = (A(dr[i]) + up * A(h[i])) * ri * (A(1) - ri);
      da[i] = static_cast<T>(daz);
      da[n + i] = static_cast<T>(dar);
      dh[i] = static_cast<S>(up * ri);
    }
  }
};

// da: gradient of xc (and of hc).
template <class T, class S>
struct UpdateBackward {
  static CONVRNN_INLINE void run(const T* dc, const S* dh_next, const T* z, const T* c, const S* h, T* da, T* dz, S* dh,
                                 int64_t n) {
    using A = acc_t<T>;
    CONVRNN_LANES
    for (int64_t i = 0; i < n; ++i) {
      const A up = A(dh_next[i]), zi = A(z[i]), ci = A(c[i]), hi = A(h[i]);
      da[i] = static_cast<T>((A(dc[i]) + up * zi) * (A(1) - ci * ci));
      dz[i] = static_cast<T>(up * (ci - hi));
      dh[i] = static_cast<S>(up * (A(1) - zi));
    }
  }
};

}  // namespace convrnn
