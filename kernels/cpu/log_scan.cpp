// log x of x_0 = b_0, x_t = a_t x_{t-1} + b_t, given log a and log b.
//
// log x_t = max(u, log b) + log(1 + e^-|u - log b|) with u = log a + log x_{t-1}: one exponential and one logarithm, of
// a number between 1 and 2, a step. log x carries its rounding errors along, since 10^5 of them would add up, and is
// fp32 (fp64) whatever the dtype of the inputs: rounded to 16 bits it would move x by a share of |log x|. A zero, log
// -inf, is -1e30 inside. Backward: x_t passes the share p = a x_{t-1} / x_t = sigmoid(log a + log x_{t-1} - log b) of
// its gradient to log a and to x_{t-1}, and 1 - p to log b. Blocks, threads and chunks of T as in carry.h.
// Source: Heinsen 2023, arXiv 2311.06281 (the recurrence); one pass instead of its cumulative sums.

#include <algorithm>
#include <cmath>

#include "carry.h"
#include "math.h"
#include "tensor.h"

namespace convrnn {
namespace {

constexpr float kZero = -1e30f;

template <class A>
CONVRNN_INLINE A finite(A x) {
  return x < A(kZero) ? A(kZero) : x;
}

// Knuth's two-sum: a + b and its rounding error.
template <class A>
CONVRNN_INLINE A two_sum(A a, A b, A& error) {
  const A sum = a + b;
  const A part = sum - a;
  error = (a - (sum - part)) + (b - part);
  return sum;
}

// The carry of the forward scan, by lane: log x, and the sum of log a since the walk began, each with its rounding
// error.
template <class A>
struct LogCarry {
  static constexpr int64_t kArrays = 4;
  A *value, *low;
  A *decay, *decay_low;

  LogCarry(A* base, int64_t stride)
      : value(base), low(base + stride), decay(base + 2 * stride), decay_low(base + 3 * stride) {}
  CONVRNN_INLINE LogCarry at(int64_t lane) const {
    return LogCarry(value + lane, low - value);
  }

  void begin(int64_t n) const {
    std::fill_n(low, n, A(0));
    std::fill_n(decay, n, A(0));
    std::fill_n(decay_low, n, A(0));
  }
  void begin_from_nothing(int64_t n) const {
    std::fill_n(value, n, A(kZero));
  }
  void copy(const LogCarry& from, int64_t n) const {
    std::copy_n(from.value, n, value);
    std::copy_n(from.decay, n, decay);
    std::copy_n(from.decay_low, n, decay_low);
  }

  CONVRNN_INLINE void track(int64_t i, A log_a) const {
    A error;
    decay[i] = two_sum(decay[i], log_a, error);
    decay_low[i] += error;
  }
  // No decay is so small that no x could make up for it.
  CONVRNN_INLINE bool forgotten(int64_t) const {
    return false;
  }
  CONVRNN_INLINE bool settled(const LogCarry& began, int64_t n) const {
    const A quarter = std::is_same_v<A, double> ? A(-38.2) : A(-18.1);  // log of a quarter of a unit in the last place
    int32_t pending = 0;
    CONVRNN_LANES
    for (int64_t i = 0; i < n; ++i) {
      const A left = decay[i] + began.value[i];
      pending |= !(left <= value[i] + quarter || left <= A(kZero / 2));
    }
    return pending == 0;
  }

  void combine(const LogCarry& before, int64_t n) const {
    for (int64_t i = 0; i < n; ++i) {
      const double carried = double(decay[i]) + decay_low[i] + before.value[i], local = value[i];
      const double distance = std::fabs(carried - local);
      const double more = distance >= 40 ? 0. : std::log1p(std::exp(-distance));  // NaN stays
      value[i] = static_cast<A>(std::max(carried, local) + more);
    }
  }
};

// Lanes are the elements behind (B, T); a block is `n` of them from `lane` on, in row b.
struct Block {
  int64_t b, lane, n, flat;

  Block(int64_t lanes, int64_t task) {
    const int64_t blocks = (lanes + kBlock - 1) / kBlock;
    b = task / blocks;
    lane = task % blocks * kBlock;
    n = std::min(kBlock, lanes - lane);
    flat = b * lanes + lane;
  }
  int64_t lanes() const {
    return n;
  }
};

int64_t tasks(int64_t batch, int64_t lanes) {
  return batch * ((lanes + kBlock - 1) / kBlock);
}

// A stream of elements: the walk's first, and the distance to the next step's.
template <class T>
struct Stream {
  T* first;
  int64_t step;

  CONVRNN_INLINE T* at(int64_t t, int64_t lane) const {
    return first + t * step + lane;
  }
};

template <class T>
struct Forward {
  using A = acc_t<T>;

  struct Walk {
    int64_t steps, n, ahead;
    Stream<const T> log_a, log_b;
    Stream<A> log_x;
  };

  template <bool tracked>
  static CONVRNN_INLINE void step(const Walk& w, int64_t t, const LogCarry<A>& carry) {
    for_pieces(1, w.n, [&](int64_t, int64_t first, int64_t n) __attribute__((always_inline)) {
      const T *a = w.log_a.at(t, first), *b = w.log_b.at(t, first);
      A* x = w.log_x.at(t, first);
      const LogCarry<A> c = carry.at(first);
      prefetch(a + w.ahead * w.log_a.step, n);
      prefetch(b + w.ahead * w.log_b.step, n);
      prefetch(x + w.ahead * w.log_x.step, n);
      CONVRNN_LANES
      for (int64_t i = 0; i < n; ++i) {
        const A log_a = finite(load(a[i])), log_b = finite(load(b[i]));
        A error;
        const A carried = two_sum(c.value[i], log_a, error);
        error += c.low[i];
        const A distance = (carried - log_b) + error;
        const bool larger = distance >= A(0);
        const A more = log1p_(exp_minus_abs(distance)) + (larger ? error : A(0));
        const A top = larger ? carried : log_b;
        const A v = top + more;
        c.low[i] = more - (v - top);
        c.value[i] = v;
        if constexpr (tracked) {
          c.track(i, log_a);
        }
        x[i] = v < A(kZero / 2) ? -std::numeric_limits<A>::infinity() : v;
      }
    });
  }

  static CONVRNN_INLINE void run(Walk w, LogCarry<A> carry, Pass pass, LogCarry<A> began) {
    walk(w.steps, w.n, carry, pass, began, [&](auto carrying, int64_t t) __attribute__((always_inline)) {
      step<decltype(carrying)::value == Carrying::tracked>(w, t, carry);
    });
  }
};

template <class T>
struct Backward {
  using A = acc_t<T>;

  struct Walk {
    int64_t steps, n, ahead;
    Stream<const A> dlog_x, before;  // dL/dlog_x, and log x before the step
    Stream<const T> log_a, log_b;
    Stream<T> dlog_a, dlog_b;
  };

  template <Carrying carrying>
  static CONVRNN_INLINE void step(const Walk& w, int64_t t, const Carry<A>& carry) {
    for_pieces(1, w.n, [&](int64_t, int64_t first, int64_t n) __attribute__((always_inline)) {
      const A infinity = std::numeric_limits<A>::infinity();
      const A *up = w.dlog_x.at(t, first), *before = w.before.at(t, first);
      const T *a = w.log_a.at(t, first), *b = w.log_b.at(t, first);
      T *da = w.dlog_a.at(t, first), *db = w.dlog_b.at(t, first);
      const Carry<A> c = carry.at(first);
      prefetch(up + w.ahead * w.dlog_x.step, n);
      prefetch(before + w.ahead * w.before.step, n);
      prefetch(a + w.ahead * w.log_a.step, n);
      prefetch(b + w.ahead * w.log_b.step, n);
      prefetch(da + w.ahead * w.dlog_a.step, n);
      prefetch(db + w.ahead * w.dlog_b.step, n);
      CONVRNN_LANES
      for (int64_t i = 0; i < n; ++i) {
        const A carried = load(a[i]) + before[i], log_b = load(b[i]);
        const A distance = carried - log_b;
        const bool larger = distance >= A(0);
        const bool zero = carried == -infinity && log_b == -infinity;  // x_t = 0 + 0: nothing passes
        const A tail = zero ? A(0) : sigmoid_tail(distance);
        A more = up[i];
        if constexpr (carrying != Carrying::plain) {
          more += c.low[i];
        }
        const A total = c.value[i] + more;
        const A part = total * tail;
        const A rest = total - part;
        const A kept = larger ? rest : part;
        store(da[i], kept);
        store(db[i], larger || zero ? part : rest);
        if constexpr (carrying != Carrying::plain) {
          const A error = (more - (total - c.value[i])) + ((total - rest) - part);
          c.low[i] = larger ? error : A(0);
        }
        if constexpr (carrying == Carrying::tracked) {
          c.track(i, tail, !larger);
        }
        c.value[i] = kept;
      }
    });
  }

  static CONVRNN_INLINE void run(Walk w, Carry<A> carry, Pass pass, Carry<A> began) {
    walk(w.steps, w.n, carry, pass, began, [&](auto carrying, int64_t t) __attribute__((always_inline)) {
      step<decltype(carrying)::value>(w, t, carry);
    });
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

Tensor log_scan(const Tensor& log_a, const Tensor& log_b) {
  check(log_a, log_b);
  const Tensor a = to_layout(log_a, 2, false), b = to_layout(log_b, 2, false);
  Tensor log_x = empty(b, shape(b), state_dtype(b));
  const int64_t batch = b.size(0), steps = a.size(1), lanes = numel(shape(b), 2);
  dispatch_dtype("convrnn::log_scan", b, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    using C = LogCarry<A>;
    const T *pa = data<T>(a), *pb = data<T>(b);
    A* px = mutable_data<A>(log_x);
    const int64_t a_batch = a.stride(0), a_step = a.stride(1), b_batch = b.stride(0), b_step = b.stride(1);
    scan<C, A>(
        tasks(batch, lanes), batch * lanes, steps, false, [&](int64_t task) { return Block(lanes, task); },
        [&](const Block& block, const C& carry) {
          const T* from = pb + block.b * b_batch + block.lane;
          A* x = px + block.b * (steps + 1) * lanes + block.lane;
          for (int64_t i = 0; i < block.n; ++i) {
            x[i] = load(from[i]);
            carry.value[i] = finite(x[i]);
          }
        },
        [&](const Block& block, Chunk chunk, const C& carry, Pass pass, const C& began) {
          const typename Forward<T>::Walk w = {
              chunk.steps,
              block.n,
              prefetch_steps(lanes),
              {pa + block.b * a_batch + chunk.begin * a_step + block.lane, a_step},
              {pb + block.b * b_batch + (chunk.begin + 1) * b_step + block.lane, b_step},
              {px + (block.b * (steps + 1) + chunk.begin + 1) * lanes + block.lane, lanes}};
          run<Forward<T>>(w, carry, pass, began);
        },
        [](const Block&, const C&) {});
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
  const int64_t batch = b.size(0), steps = a.size(1), lanes = numel(shape(b), 2);
  dispatch_dtype("convrnn::log_scan_backward", b, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    using C = Carry<A>;
    const T *pa = data<T>(a), *pb = data<T>(b);
    const A *pu = data<A>(up), *px = data<A>(x);
    T *pda = mutable_data<T>(da), *pdb = mutable_data<T>(db);
    const int64_t u_batch = up.stride(0), u_step = up.stride(1), a_batch = a.stride(0), a_step = a.stride(1);
    const int64_t b_batch = b.stride(0), b_step = b.stride(1), x_batch = x.stride(0), x_step = x.stride(1);
    scan<C, A>(
        tasks(batch, lanes), batch * lanes, steps, true, [&](int64_t task) { return Block(lanes, task); },
        [](const Block& block, const C& carry) { carry.begin_from_nothing(block.n); },
        [&](const Block& block, Chunk chunk, const C& carry, Pass pass, const C& began) {
          const int64_t row = block.b, lane = block.lane;
          const int64_t t = chunk.begin + chunk.steps - 1;  // begins at log_a[t], log_b[t + 1]
          const typename Backward<T>::Walk w = {chunk.steps,
                                                block.n,
                                                prefetch_steps(lanes),
                                                {pu + row * u_batch + (t + 1) * u_step + lane, -u_step},
                                                {px + row * x_batch + t * x_step + lane, -x_step},
                                                {pa + row * a_batch + t * a_step + lane, -a_step},
                                                {pb + row * b_batch + (t + 1) * b_step + lane, -b_step},
                                                {pda + (row * steps + t) * lanes + lane, -lanes},
                                                {pdb + (row * (steps + 1) + t + 1) * lanes + lane, -lanes}};
          run<Backward<T>>(w, carry, pass, began);
        },
        [&](const Block& block, const C& carry) {
          const A *du = pu + block.b * u_batch + block.lane, *first = px + block.b * x_batch + block.lane;
          T* d = pdb + block.b * (steps + 1) * lanes + block.lane;
          for (int64_t i = 0; i < block.n; ++i) {
            store(d[i], first[i] == -std::numeric_limits<A>::infinity() ? A(0) : carry.value[i] + du[i]);
          }
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
