// log x of x_0 = b_0, x_t = a_t x_{t-1} + b_t, given log a and log b.
//
// x = s e^m with s >= 1: a step takes the larger of the two exponents as the new m and scales the other part by one
// exponential; the logarithm is taken on output alone. m is kept as an unevaluated sum of two floats, since rounding it
// at each of 10^5 steps would add up. log x is fp32 (fp64) whatever the dtype of the inputs: rounded to 16 bits it would
// move x by a share of |log x|. Backward: x_t passes the share p = a x_{t-1} / x_t = sigmoid(log a + log x_{t-1} - log b)
// of its gradient to log a and to x_{t-1}, and 1 - p to log b.
// Source: Heinsen 2023, arXiv 2311.06281 (the recurrence); one pass instead of its cumulative sums.

#include <algorithm>

#include "math.h"
#include "tensor.h"

namespace convrnn {
namespace {

constexpr int64_t kBlock = 256;

// One step of a lane's state (m + low, s).
template <class A>
CONVRNN_INLINE void step(A log_a, A log_b, A& m, A& low, A& s) {
  const A carried = m + log_a;  // and its rounding error, exactly (Knuth's two-sum)
  const A part = carried - m;
  A error = (m - (carried - part)) + (log_a - part) + low;
  error = carried - carried == A(0) ? error : A(0);  // infinite: nothing to compensate
  const A distance = (log_b - carried) - error;
  const A e = carried == log_b ? A(1) : exp_(distance < A(0) ? distance : -distance);
  const bool keep = carried >= log_b;
  const A smaller = distance - distance == A(0) || carried == log_b ? e : A(0);  // one of the two is a zero
  s = keep ? s + smaller : s * smaller + A(1);
  m = keep ? carried : log_b;
  low = keep ? error : A(0);
}

template <class T>
struct Forward {
  static CONVRNN_INLINE void run(const T* log_a, const T* log_b, acc_t<T>* log_x, acc_t<T>* m, acc_t<T>* low,
                                 acc_t<T>* s, int64_t steps, int64_t n, int64_t a_step, int64_t b_step, int64_t x_step) {
    using A = acc_t<T>;
    CONVRNN_LANES
    for (int64_t i = 0; i < n; ++i) {
      m[i] = A(log_b[i]);
      low[i] = A(0);
      s[i] = A(1);
      log_x[i] = A(log_b[i]);
    }
    for (int64_t t = 0; t < steps; ++t, log_a += a_step) {
      log_b += b_step;
      log_x += x_step;
      CONVRNN_LANES
      for (int64_t i = 0; i < n; ++i) {
        A mi = m[i], lowi = low[i], si = s[i];
        step(A(log_a[i]), A(log_b[i]), mi, lowi, si);
        log_x[i] = mi + (lowi + log_(si));
        m[i] = mi;
        low[i] = lowi;
        s[i] = si;
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
      acc_t<T> m[kBlock], low[kBlock], s[kBlock];
      run<Forward<T>>(pa + row * a_batch + first, pb + row * b_batch + first,
                      px + row * (steps + 1) * lanes.lanes + first, &m[0], &low[0], &s[0], steps, n, a_step, b_step,
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
