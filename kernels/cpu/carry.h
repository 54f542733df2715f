// What a scan carries from step to step for a block of lanes, and T cut in chunks where lanes are few.
//
// Chunks run in parallel, in three passes. Local: every chunk but the first runs from nothing, writes its results, and
// keeps its end and its decay, the share of a carry that reaches its end. Then the carries, chunk by chunk: end + decay
// times carry. Replay: every chunk but the first runs again from its true carry until what is left of that no longer
// shows beside the state: some tens of steps with gates of ordinary size, the whole chunk with tiny ones. Whether and
// where T is cut follows from the shape alone, so that results do not depend on the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <type_traits>

#include "isa.h"

namespace convrnn {

constexpr int64_t kBlock = 1024;  // lanes that advance together: a page of each stream, their state in L1
// Between the arrays of a carry: to some processors a load looks like a store just before it that equals it in 12 bits.
constexpr int64_t kStride = kBlock + 336;
constexpr int64_t kPiece = 128;    // lanes between prefetches
constexpr int64_t kShort = 256;    // steps whose rounding errors need no compensation: 256 * 2^-25 < 1e-5
constexpr int64_t kChunk = 1024;   // steps of a chunk
constexpr int64_t kFewTasks = 4;   // fewer blocks than this, over the whole batch, have T cut
constexpr int64_t kGrain = 16384;  // lanes times steps worth a thread

enum class Pass { whole, local, replay };
enum class Carrying {
  plain,        // the state, over few steps
  compensated,  // with its rounding errors beside it
  tracked       // compensated, and with the decay of what the walk began with
};

// The carry of a linear recurrence, by lane.
template <class A>
struct Carry {
  static constexpr int64_t kArrays = 4;
  A *value, *low;        // the state and its rounding error
  A *decay, *decay_low;  // product of the shares kept at each step, and its rounding error

  Carry(A* base, int64_t stride)
      : value(base), low(base + stride), decay(base + 2 * stride), decay_low(base + 3 * stride) {}
  CONVRNN_INLINE Carry at(int64_t lane) const {
    return Carry(value + lane, low - value);
  }

  // The walk begins: no rounding errors yet, and nothing has decayed.
  void begin(int64_t n) const {
    std::fill_n(low, n, A(0));
    std::fill_n(decay, n, A(1));
    std::fill_n(decay_low, n, A(0));
  }
  void begin_from_nothing(int64_t n) const {
    std::fill_n(value, n, A(0));
  }
  void copy(const Carry& from, int64_t n) const {
    std::copy_n(from.value, n, value);
    std::copy_n(from.decay, n, decay);
    std::copy_n(from.decay_low, n, decay_low);
  }

  // All of the carry is `start` from here on, and nothing is left of what the walk began with.
  void restart(int64_t n, A start) const {
    std::fill_n(value, n, start);
    std::fill_n(low, n, A(0));
    std::fill_n(decay, n, A(0));
    std::fill_n(decay_low, n, A(0));
  }
  // Marks the end of a chunk that restarted: unlike a decay that vanished, this keeps out a carry of NaN too.
  void cut(int64_t n) const {
    std::fill_n(decay, n, A(-1));
  }

  // decay *= 1 - tail, or *= tail, without the rounding error of 1 - tail.
  CONVRNN_INLINE void track(int64_t i, A tail, bool keeps_tail) const {
    const A p = decay[i], p_low = decay_low[i];
    const A lost = tail * p + (tail * p_low - p_low);
    const A kept = p - lost;
    decay[i] = keeps_tail ? tail * p : kept;
    decay_low[i] = keeps_tail ? tail * p_low : (p - kept) - lost;
  }

  // Whether nothing is left of what the walk began with: every lane's decay below the normal numbers, and then 0.
  CONVRNN_INLINE bool forgotten(int64_t n) const {
    int32_t remembers = 0;
    CONVRNN_LANES
    for (int64_t i = 0; i < n; ++i) {
      remembers |= decay[i] >= std::numeric_limits<A>::min();
    }
    if (remembers != 0) {
      return false;
    }
    for (int64_t i = 0; i < n; ++i) {
      decay[i] = decay_low[i] = A(0);
    }
    return true;
  }

  // Whether what is left of `began` is below a quarter of a unit in the last place of every lane's state: never where
  // that is NaN.
  CONVRNN_INLINE bool settled(const Carry& began, int64_t n) const {
    int32_t pending = 0;
    CONVRNN_LANES
    for (int64_t i = 0; i < n; ++i) {
      const A left = decay[i] * began.value[i], limit = value[i] * (std::numeric_limits<A>::epsilon() / A(8));
      pending |= !((left < A(0) ? -left : left) <= (limit < A(0) ? -limit : limit));
    }
    return pending == 0;
  }

  // Makes a chunk's local end, this, its true end.
  void combine(const Carry& before, int64_t n) const {
    for (int64_t i = 0; i < n; ++i) {
      const A carry = before.value[i], lost = (A(1) - decay[i]) - decay_low[i];
      const A end = decay[i] >= A(0.5) ? carry + (value[i] - lost * carry)
                                       : value[i] + (decay[i] + decay_low[i]) * carry;
      value[i] = decay[i] < A(0) ? value[i] : end;
    }
  }
};

// All steps of a pass: step(std::integral_constant<Carrying>, t).
template <class C, class Step>
CONVRNN_INLINE void walk(int64_t steps, int64_t lanes, const C& carry, Pass pass, const C& began, Step step) {
  int64_t t = 0;
  carry.begin(lanes);
  if (pass == Pass::whole && steps <= kShort) {
    for (; t < steps; ++t) {
      step(std::integral_constant<Carrying, Carrying::plain>(), t);
    }
    return;
  }
  for (bool tracked = pass != Pass::whole; tracked && t < steps; ++t) {
    step(std::integral_constant<Carrying, Carrying::tracked>(), t);
    if (t % 8 == 7) {
      if (pass == Pass::local) {
        tracked = !carry.forgotten(lanes);
      } else if (carry.settled(began, lanes)) {
        return;
      }
    }
  }
  for (; t < steps; ++t) {
    step(std::integral_constant<Carrying, Carrying::compensated>(), t);
  }
}

// f(run, first lane in it, lanes) for runs of n lanes in pieces.
template <class F>
CONVRNN_INLINE void for_pieces(int64_t runs, int64_t n, F f) {
  for (int64_t j = 0; j < runs; ++j) {
    for (int64_t first = 0; first < n; first += kPiece) {
      f(j, first, std::min(kPiece, n - first));
    }
  }
}

// Steps to prefetch ahead: the next one, or as many as make a piece where rows are narrower.
inline int64_t prefetch_steps(int64_t row) {
  return (kPiece + row - 1) / row;
}

// Into L2: the next steps of six streams at once would push one another out of L1.
template <class T>
CONVRNN_INLINE void prefetch(const T* begin, int64_t n) {
#if defined(__GNUC__) || defined(__clang__)
  const auto* bytes = reinterpret_cast<const char*>(begin);
  for (int64_t i = 0; i < n * static_cast<int64_t>(sizeof(T)); i += 64) {
    __builtin_prefetch(bytes + i, 0, 2);
  }
#endif
}

struct Chunk {
  int64_t begin, steps;
};

// f(task) for every task, shared among threads; `work` is the lanes times steps of one.
template <class F>
void share(int64_t tasks, int64_t work, F f) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work));
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      f(task);
    }
  });
}

// Runs all tasks, blocks of the `lanes` of all batch rows, through time. make(task) gives its block: `flat` is its
// first lane among all, lanes() their number. first(block, carry) sets what it begins with, last(block, carry) takes
// its end, and run(block, chunk, carry, pass, began) goes through the steps of a chunk.
template <class C, class A, class Make, class First, class Run, class Last>
void scan(int64_t tasks, int64_t lanes, int64_t steps, bool backward, Make make, First first, Run run, Last last) {
  const int64_t chunks = tasks < kFewTasks && steps > kChunk ? (steps + kChunk - 1) / kChunk : 1;
  const auto chunk = [&](int64_t k) {
    const int64_t begin = (backward ? chunks - 1 - k : k) * kChunk;
    return chunks == 1 ? Chunk{0, steps} : Chunk{begin, std::min(kChunk, steps - begin)};
  };
  const int64_t width = tasks > 0 ? std::max<int64_t>(1, lanes / tasks) : 1;
  std::unique_ptr<A[]> storage(chunks > 1 ? new A[static_cast<size_t>(chunks * C::kArrays * lanes)] : nullptr);
  const auto end_of = [&](int64_t k, int64_t lane) { return C(&storage[k * C::kArrays * lanes + lane], lanes); };

  share(tasks * chunks, chunk(0).steps * width, [&](int64_t index) {
    const auto block = make(index / chunks);
    const int64_t k = index % chunks;
    alignas(64) A arrays[C::kArrays * kStride];
    const C carry(arrays, kStride);
    if (k == 0) {
      first(block, carry);
    } else {
      carry.begin_from_nothing(block.lanes());
    }
    if (steps > 0) {
      run(block, chunk(k), carry, k == 0 ? Pass::whole : Pass::local, carry);
    }
    if (chunks == 1) {
      last(block, carry);
    } else {
      end_of(k, block.flat).copy(carry, block.lanes());
    }
  });
  if (chunks == 1) {
    return;
  }
  share(tasks, chunks * width, [&](int64_t task) {
    const auto block = make(task);
    for (int64_t k = 1; k < chunks; ++k) {
      end_of(k, block.flat).combine(end_of(k - 1, block.flat), block.lanes());
    }
    last(block, end_of(chunks - 1, block.flat));
  });
  share(tasks * (chunks - 1), kChunk * width, [&](int64_t index) {
    const auto block = make(index / (chunks - 1));
    const int64_t k = index % (chunks - 1) + 1;
    const C began = end_of(k - 1, block.flat);
    alignas(64) A arrays[C::kArrays * kStride];
    const C carry(arrays, kStride);
    carry.copy(began, block.lanes());
    run(block, chunk(k), carry, Pass::replay, began);
  });
}

}  // namespace convrnn
