// log x of x_0 = b_0, x_t = a_t x_{t-1} + b_t, given log a and log b.
//
// x = s e^m. While log b <= m + log a + 1, m takes up log a and s gains e^(log b - m); beyond, m restarts at log b and s
// is scaled: one exponential a step either way, and a logarithm on output alone. The headroom of 1 keeps a = 1 - small out
// of the exponential, and both m and s carry their rounding errors along, since 10^5 of them would add up. log x is fp32
// (fp64) whatever the dtype of the inputs: rounded to 16 bits it would move x by a share of |log x|. A zero, log -inf, is
// -1e30 inside. Backward: x_t passes the share p = a x_{t-1} / x_t = sigmoid(log a + log x_{t-1} - log b) of its gradient
// to log a and to x_{t-1}, and 1 - p to log b.
// Source: Heinsen 2023, arXiv 2311.06281 (the recurrence); one pass instead of its cumulative sums.

#include <algorithm>

#include "math.h"
#include "tensor.h"

namespace convrnn {
namespace {

constexpr int64_t kBlock = 256;

constexpr float kHeadroom = 1.f, kZero = -1e30f;

// Knuth's two-sum: a + b and its rounding error.
template <class A>
CONVRNN_INLINE A two_sum(A a, A b, A& error) {
  const A sum = a + b;
  const A part = sum - a;
  error = (a - (sum - part)) + (b - part);
  return sum;
}

template <class A>
CONVRNN_INLINE A finite(A x) {
  return x < A(kZero) ? A(kZero) : x;
}

// x = (s + s_low) e^(m + m_low) of one lane.
template <class A>
struct State {
  A m, m_low, s, s_low;

  static CONVRNN_INLINE State from(A log_b) {
    return {finite(log_b), A(0), A(1), A(0)};
  }
  CONVRNN_INLINE void step(A log_a, A log_b) {
    log_b = finite(log_b);
    A error;
    const A moved = two_sum(m, finite(log_a), error);
    const A moved_low = m_low + error;
    const A distance = (moved - log_b) + moved_low;
    const bool restart = distance < A(-kHeadroom);
    const A e = exp_(restart ? distance : -distance);
    const A scale = restart ? e : A(1);
    s = two_sum(s * scale, restart ? A(1) : e, error);
    s_low = s_low * scale + error;
    m = restart ? log_b : moved;
    m_low = restart ? A(0) : moved_low;
  }
  CONVRNN_INLINE A log() const {
    const A log_x = m + (m_low + log_(s + s_low));
    return log_x < A(kZero / 2) ? -std::numeric_limits<A>::infinity() : log_x;
  }
};

template <class T>
struct Forward {
  static CONVRNN_INLINE void run(const T* log_a, const T* log_b, acc_t<T>* log_x, acc_t<T> (*state)[kBlock],
                                 int64_t steps, int64_t n, int64_t a_step, int64_t b_step, int64_t x_step) {
    using A = acc_t<T>;
    A *m = state[0], *m_low = state[1], *s = state[2], *s_low = state[3];
    CONVRNN_LANES
    for (int64_t i = 0; i < n; ++i) {
      const State<A> x = State<A>::from(A(log_b[i]));
      log_x[i] = x.log();
      m[i] = x.m;
      m_low[i] = x.m_low;
      s[i] = x.s;
      s_low[i] = x.s_low;
    }
    for (int64_t t = 0; t < steps; ++t, log_a += a_step) {
      log_b += b_step;
      log_x += x_step;
      CONVRNN_LANES
      for (int64_t i = 0; i < n; ++i) {
        State<A> x = {m[i], m_low[i], s[i], s_low[i]};
        x.step(A(log_a[i]), A(log_b[i]));
        log_x[i] = x.log();
        m[i] = x.m;
        m_low[i] = x.m_low;
        s[i] = x.s;
        s_low[i] = x.s_low;
      }
    }
  }
};

template <class T>
struct Backward {
  static CONVRNN_INLINE void run(const acc_t<T>* dlog_x, const T* log_a, const T* log_b, const acc_t<T>* log_x, T* dlog_a,
                                 T* dlog_b, acc_t<T>* carry, int64_t steps, int64_t n, int64_t dx_step, int64_t a_step,
                                 int64_t b_step, int64_t x_step, int64_t da_step, int64_t db_step) {
    using A = acc_t<T>;
    const A infinity = std::numeric_limits<A>::infinity();
    for (int64_t t = steps; t > 0; --t) {
      const A *before = log_x + (t - 1) * x_step, *up = dlog_x + t * dx_step;
      const T *a = log_a + (t - 1) * a_step, *b = log_b + t * b_step;
      T *da = dlog_a + (t - 1) * da_step, *db = dlog_b + t * db_step;
      CONVRNN_LANES
      for (int64_t i = 0; i < n; ++i) {
        const A total = carry[i] + up[i];
        const A carried = A(a[i]) + before[i];
        A q;
        const A p = sigmoid(carried - A(b[i]), q);
        const bool zero = carried == -infinity && A(b[i]) == -infinity;  // x_t = 0 + 0
        const A kept = zero ? A(0) : total * p;
        da[i] = static_cast<T>(kept);
        db[i] = static_cast<T>(zero ? A(0) : total * q);
        carry[i] = kept;
      }
    }
    CONVRNN_LANES
    for (int64_t i = 0; i < n; ++i) {
      dlog_b[i] = static_cast<T>(log_x[i] == -infinity ? A(0) : carry[i] + dlog_x[i]);
    }
  }
};

void check(const Tensor& log_a, const Tensor& log_b) {
  STD_TORCH_CHECK(log_a.dim() >= 2 && log_a.dim() == log_b.dim() && log_b.size(1) == log_a.size(1) + 1 &&
                      log_a.scalar_type() == log_b.scalar_type(),
                  "convrnn::log_scan: expected log_a (B, T, *) and log_b (B, T+1, *) of one dtype");
  for (int64_t d = 0; d < log_a.dim(); ++d) {
    STD_TORCH_CHECK(d == 1 || log_a.size(d) == log_b.size(d),
                    "convrnn::log_scan: log_a and log_b differ in dimension ", d);
  }
}

// Lanes are the elements behind (B, T); block k of batch row b is lanes [first, first + n).
struct Lanes {
  int64_t lanes, blocks;

  explicit Lanes(const Tensor& x) : lanes(numel(shape(x), 2)), blocks((lanes + kBlock - 1) / kBlock) {}

  template <class F>
  void parallel(int64_t batch, F f) const {
    torch::stable::parallel_for(0, batch * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        const int64_t first = index % blocks * kBlock;
        f(index / blocks, first, std::min(kBlock, lanes - first));
      }
    });
  }
};

Tensor log_scan(const Tensor& log_a, const Tensor& log_b) {
  check(log_a, log_b);
  const Tensor a = to_layout(log_a, 2, false), b = to_layout(log_b, 2, false);
  Tensor log_x = empty(b, shape(b), state_dtype(b));
  const Lanes lanes(b);
  dispatch_dtype("convrnn::log_scan", b, [&](auto zero) {
    using T = decltype(zero);
    const T *pa = data<T>(a), *pb = data<T>(b);
    auto* px = mutable_data<acc_t<T>>(log_x);
    const int64_t a_batch = a.stride(0), a_step = a.stride(1), b_batch = b.stride(0), b_step = b.stride(1);
    const int64_t steps = a.size(1);
    lanes.parallel(b.size(0), [&](int64_t row, int64_t first, int64_t n) {
      acc_t<T> state[4][kBlock];
      run<Forward<T>>(pa + row * a_batch + first, pb + row * b_batch + first,
                      px + row * (steps + 1) * lanes.lanes + first, &state[0], steps, n, a_step, b_step,
                      lanes.lanes);
    });
  });
  return log_x;
}

std::tuple<Tensor, Tensor> log_scan_backward(const Tensor& dlog_x, const Tensor& log_a, const Tensor& log_b,
                                             const Tensor& log_x) {
  check(log_a, log_b);
  STD_TORCH_CHECK(shape(dlog_x) == shape(log_b) && shape(log_x) == shape(log_b) &&
                      dlog_x.scalar_type() == state_dtype(log_b) && log_x.scalar_type() == state_dtype(log_b),
                  "convrnn::log_scan_backward: expected dlog_x and log_x as log_scan returns them");
  const Tensor up = to_layout(dlog_x, 2, false), a = to_layout(log_a, 2, false), b = to_layout(log_b, 2, false);
  const Tensor x = to_layout(log_x, 2, false);
  Tensor da = empty(a, shape(a)), db = empty(b, shape(b));
  const Lanes lanes(b);
  dispatch_dtype("convrnn::log_scan_backward", b, [&](auto zero) {
    using T = decltype(zero);
    const T *pa = data<T>(a), *pb = data<T>(b);
    const auto *pu = data<acc_t<T>>(up), *px = data<acc_t<T>>(x);
    T *pda = mutable_data<T>(da), *pdb = mutable_data<T>(db);
    const int64_t u_batch = up.stride(0), u_step = up.stride(1), a_batch = a.stride(0), a_step = a.stride(1);
    const int64_t b_batch = b.stride(0), b_step = b.stride(1), x_batch = x.stride(0), x_step = x.stride(1);
    const int64_t steps = a.size(1), n_lanes = lanes.lanes;
    lanes.parallel(b.size(0), [&](int64_t row, int64_t first, int64_t n) {
      acc_t<T> carry[kBlock] = {};
      run<Backward<T>>(pu + row * u_batch + first, pa + row * a_batch + first, pb + row * b_batch + first,
                       px + row * x_batch + first, pda + row * steps * n_lanes + first,
                       pdb + row * (steps + 1) * n_lanes + first, &carry[0], steps, n, u_step, a_step, b_step, x_step,
                       n_lanes, n_lanes);
    });
  });
  return {da, db};
}

}  // namespace
}  // namespace convrnn

STABLE_TORCH_LIBRARY_IMPL(convrnn, CPU, m) {
  m.impl("log_scan", TORCH_BOX(&convrnn::log_scan));
  m.impl("log_scan_backward", TORCH_BOX(&convrnn::log_scan_backward));
}
