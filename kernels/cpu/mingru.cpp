// minGRU: z = sigmoid(gate), h_t = h_{t-1} + z (g(hidden) - h_{t-1}), over the packed projection [gate, hidden].
//
// A lane is one element of a state (C, *S). A block of lanes runs through all of T, or through a chunk of it where
// lanes are few (carry.h), with its state in L1; threads share blocks and chunks. Forward reads 2 and writes 1 element
// per output; backward reads 4 and writes 2: z and g are recomputed.
//
// Codes, one for each frame of a sample and so for all lanes of a block, are looked at once a step: a restart sets the
// carry, a hold passes it on without reading the frame.
// Source: Feng et al. 2024, arXiv 2410.01201.

#include <algorithm>

#include "carry.h"
#include "codes.h"
#include "math.h"
#include "tensor.h"

namespace convrnn {
namespace {

constexpr double kStart = 0.5;  // g(0), from which a restart begins

// Lanes of one frame. Channels first, gates and hidden values are two runs of C*S lanes; channels last, each pixel has
// a run of C gates and then C hidden values. Either way hidden = gate + run, and states are dense in lane order.
struct Frame {
  int64_t run;     // lanes before the hidden values begin
  int64_t lanes;   // lanes of a state
  int64_t groups;  // whole runs a block holds (1 where a run is longer than a block)

  Frame(const Shape& gate_hidden, bool channels_last) {
    lanes = numel(gate_hidden, 2) / 2;
    run = channels_last ? gate_hidden[2] / 2 : lanes;
    groups = run > 0 && run < kBlock ? std::min(kBlock / run, lanes / run) : 1;
  }
  int64_t blocks_in_run() const {
    return (run + kBlock - 1) / kBlock;
  }
  int64_t blocks() const {
    if (lanes == 0) {
      return 0;
    }
    return run < kBlock ? (lanes / run + groups - 1) / groups : (lanes / run) * blocks_in_run();
  }
};

// A block of row b: `groups` runs of `n` lanes, the first at lane `lane` and with its gate at element `gate` of a
// frame.
struct Block {
  int64_t b, lane, gate, n, groups, flat;

  Block(const Frame& f, int64_t task) : b(task / f.blocks()) {
    const int64_t index = task % f.blocks();
    if (f.run < kBlock) {
      const int64_t first = index * f.groups;
      lane = first * f.run;
      gate = 2 * lane;
      n = f.run;
      groups = std::min(f.groups, f.lanes / f.run - first);
    } else {
      const int64_t in_run = index % f.blocks_in_run() * kBlock;
      const int64_t first = index / f.blocks_in_run() * f.run;
      lane = first + in_run;
      gate = 2 * first + in_run;
      n = std::min(kBlock, f.run - in_run);
      groups = 1;
    }
    flat = b * f.lanes + lane;
  }
  int64_t lanes() const {
    return groups * n;
  }
};

// A block's walk. Pointers stand at its first step, which backward in time is the last, and distances are negative
// then.
template <class T>
struct Walk {
  int64_t steps, n, groups, run;
  const T* gate;
  int64_t gate_step;
  int64_t ahead;         // steps to prefetch
  const uint8_t* codes;  // or null
  int64_t code_step;

  Walk(const Frame& f, const Block& block, int64_t steps, const T* gate, int64_t gate_step, const uint8_t* codes,
       int64_t code_step)
      : steps(steps), n(block.n), groups(block.groups), run(f.run), gate(gate + block.gate), gate_step(gate_step),
        ahead(prefetch_steps(f.lanes)), codes(codes), code_step(code_step) {}

  int64_t lanes() const {
    return n * groups;
  }
  CONVRNN_INLINE uint8_t code(int64_t t) const {
    return codes == nullptr ? 0 : codes[t * code_step];
  }
};

template <class T>
struct Forward {
  using A = acc_t<T>;

  template <Carrying carrying>
  static CONVRNN_INLINE void step(const Walk<T>& w, const T* gate, T* h, int64_t h_step, const Carry<A>& carry) {
    for_pieces(w.groups, w.n, [&](int64_t j, int64_t begin, int64_t n) __attribute__((always_inline)) {
      const T* z = gate + j * 2 * w.run + begin;
      const T* x = z + w.run;
      T* out = h + j * w.n + begin;
      const Carry<A> c = carry.at(j * w.n + begin);
      prefetch(z + w.ahead * w.gate_step, n);
      prefetch(x + w.ahead * w.gate_step, n);
      prefetch(out + w.ahead * h_step, n);
      CONVRNN_LANES
      for (int64_t i = 0; i < n; ++i) {
        // from the nearer end: z (g - h) where z is small, 1 - z times (h - g) where it is not
        const A gate = load(z[i]), candidate = g(load(x[i])), before = c.value[i];
        const bool large = gate >= A(0);
        const A tail = sigmoid_tail(gate);
        const A nearer = large ? candidate : before;
        A move = tail * ((large ? before : candidate) - nearer);
        if constexpr (carrying != Carrying::plain) {
          move += large ? A(0) : c.low[i];
        }
        const A v = nearer + move;
        if constexpr (carrying != Carrying::plain) {
          c.low[i] = large ? A(0) : move - (v - nearer);
        }
        if constexpr (carrying == Carrying::tracked) {
          c.track(i, tail, large);
        }
        c.value[i] = v;
        store(out[i], v);
      }
    });
  }

  static CONVRNN_INLINE void run(Walk<T> w, T* h, int64_t h_step, Carry<A> carry, Pass pass, Carry<A> began) {
    bool restarted = false;
    walk(w.steps, w.lanes(), carry, pass, began, [&](auto carrying, int64_t t) __attribute__((always_inline)) {
      const uint8_t code = w.code(t);
      if (code & kRestart) {
        carry.restart(w.lanes(), A(kStart));
        restarted = true;
      }
      if (code & kHold) {
        for (int64_t i = 0; i < w.lanes(); ++i) {
          store(h[t * h_step + i], carry.value[i]);
        }
      } else {
        step<decltype(carrying)::value>(w, w.gate + t * w.gate_step, h + t * h_step, h_step, carry);
      }
    });
    if (restarted && pass == Pass::local) {
      carry.cut(w.lanes());
    }
  }
};

// What backward reads and writes beside the gates.
template <class T>
struct Gradients {
  const T* before;        // h before the step
  const acc_t<T>* start;  // and before the last of the walk, where that is the first of the sequence
  const acc_t<T>* restart;  // and before a frame that restarts
  const T* up;            // dL/dh
  T* dgate;
  int64_t before_step, up_step, dgate_step;
};

// The carry is dL/dh_t on entry to each step, less dL/dout_t.
template <class T>
struct Backward {
  using A = acc_t<T>;

  template <Carrying carrying, class Before>
  static CONVRNN_INLINE void step(const Walk<T>& w, const Gradients<T>& d, int64_t t, const Before* before,
                                  const Carry<A>& carry) {
    for_pieces(w.groups, w.n, [&](int64_t j, int64_t begin, int64_t n) __attribute__((always_inline)) {
      const int64_t first = j * w.n + begin;
      const T* z = w.gate + t * w.gate_step + j * 2 * w.run + begin;
      const T* x = z + w.run;
      const Before* h = before + first;
      const T* up = d.up + t * d.up_step + first;
      T* dz = d.dgate + t * d.dgate_step + j * 2 * w.run + begin;
      T* dx = dz + w.run;
      const Carry<A> c = carry.at(first);
      prefetch(z + w.ahead * w.gate_step, n);
      prefetch(x + w.ahead * w.gate_step, n);
      prefetch(h + w.ahead * d.before_step, n);
      prefetch(up + w.ahead * d.up_step, n);
      prefetch(dz + w.ahead * d.dgate_step, n);
      prefetch(dx + w.ahead * d.dgate_step, n);
      CONVRNN_LANES
      for (int64_t i = 0; i < n; ++i) {
        const A gate = load(z[i]);
        const bool large = gate >= A(0);
        const A tail = sigmoid_tail(gate);
        A slope;
        const A candidate = g(load(x[i]), slope);
        A more = load(up[i]);
        if constexpr (carrying != Carrying::plain) {
          more += c.low[i];
        }
        const A total = c.value[i] + more;
        const A part = total * tail;
        const A rest = total - part;
        store(dz[i], (part - part * tail) * (candidate - load(h[i])));
        store(dx[i], (large ? rest : part) * slope);
        if constexpr (carrying != Carrying::plain) {
          const A error = (more - (total - c.value[i])) + ((total - rest) - part);
          c.low[i] = large ? A(0) : error;
        }
        if constexpr (carrying == Carrying::tracked) {
          c.track(i, tail, large);
        }
        c.value[i] = large ? part : rest;
      }
    });
  }

  // No gradient of the frame; that of the state takes what comes from above.
  template <Carrying carrying>
  static CONVRNN_INLINE void hold(const Walk<T>& w, const Gradients<T>& d, int64_t t, const Carry<A>& c) {
    for (int64_t j = 0; j < w.groups; ++j) {
      std::fill_n(d.dgate + t * d.dgate_step + j * 2 * w.run, w.n, T(0.f));
      std::fill_n(d.dgate + t * d.dgate_step + j * 2 * w.run + w.run, w.n, T(0.f));
    }
    const T* up = d.up + t * d.up_step;
    for (int64_t i = 0; i < w.lanes(); ++i) {
      A more = load(up[i]);
      if constexpr (carrying != Carrying::plain) {
        more += c.low[i];
      }
      const A total = c.value[i] + more;
      if constexpr (carrying != Carrying::plain) {
        c.low[i] = more - (total - c.value[i]);
      }
      c.value[i] = total;
    }
  }

  static CONVRNN_INLINE void run(Walk<T> w, Gradients<T> d, Carry<A> carry, Pass pass, Carry<A> began) {
    bool restarted = false;
    walk(w.steps, w.lanes(), carry, pass, began, [&](auto carrying, int64_t t) __attribute__((always_inline)) {
      constexpr Carrying how = decltype(carrying)::value;
      const uint8_t code = w.code(t);
      const A* known = t == w.steps - 1 ? d.start : nullptr;
      known = code & kRestart ? d.restart : known;
      if (code & kHold) {
        hold<how>(w, d, t, carry);
      } else if (known != nullptr) {
        step<how>(w, d, t, known, carry);
      } else {
        step<how>(w, d, t, d.before + t * d.before_step, carry);
      }
      if (code & kRestart) {
        carry.restart(w.lanes(), A(0));
        restarted = true;
      }
    });
    if (restarted && pass == Pass::local) {
      carry.cut(w.lanes());
    }
  }
};

// A state (B, C, *S) of any dtype, read in lane order; `otherwise` everywhere where there is none.
class LaneState {
 public:
  LaneState(const std::optional<Tensor>& h, bool channels_last, double otherwise) : otherwise_(otherwise) {
    if (h.has_value()) {
      h_ = to_layout(*h, 1, channels_last);
    }
  }
  template <class A>
  void read(const Block& block, A* to) const {
    if (!h_.has_value()) {
      std::fill_n(to, block.lanes(), static_cast<A>(otherwise_));
      return;
    }
    dispatch_dtype("convrnn::mingru", *h_, [&](auto zero) {
      const auto* from = data<decltype(zero)>(*h_) + block.b * h_->stride(0) + block.lane;
      for (int64_t i = 0; i < block.lanes(); ++i) {
        to[i] = static_cast<A>(load(from[i]));
      }
    });
  }

 private:
  std::optional<Tensor> h_;
  double otherwise_;
};

// Writes a block of a dense state of any dtype.
template <class A>
void write(const Tensor& h, const Block& block, const A* from) {
  dispatch_dtype("convrnn::mingru", h, [&](auto zero) {
    using T = decltype(zero);
    T* to = mutable_data<T>(h) + block.flat;
    for (int64_t i = 0; i < block.lanes(); ++i) {
      store(to[i], static_cast<acc_t<T>>(from[i]));
    }
  });
}

Shape state_sizes(const Tensor& gate_hidden) {
  Shape sizes = shape(gate_hidden);
  sizes.erase(sizes.begin() + 1);
  sizes[1] /= 2;
  return sizes;
}

Shape sequence_sizes(const Tensor& gate_hidden) {
  Shape sizes = shape(gate_hidden);
  sizes[2] /= 2;
  return sizes;
}

void check(const Tensor& gate_hidden, const std::optional<Tensor>& h0) {
  STD_TORCH_CHECK(gate_hidden.dim() >= 3 && gate_hidden.size(2) % 2 == 0,
                  "convrnn::mingru: expected gate_hidden of shape (B, T, 2*C, *S)");
  check_state("convrnn::mingru", h0);
  if (h0.has_value()) {
    STD_TORCH_CHECK(shape(*h0) == state_sizes(gate_hidden), "convrnn::mingru: expected h0 of shape (B, C, *S)");
  }
}

std::tuple<Tensor, Tensor> mingru(const Tensor& gate_hidden, const std::optional<Tensor>& h0,
                                  const std::optional<Tensor>& codes) {
  check(gate_hidden, h0);
  const Codes rows("convrnn::mingru", codes, gate_hidden);
  const bool channels_last = is_channels_last(gate_hidden, 2);
  const Tensor packed = to_layout(gate_hidden, 2, channels_last);
  const Shape sizes = shape(packed);
  const Frame frame(sizes, channels_last);
  const int64_t steps = sizes[1], lanes = frame.lanes;
  const LaneState first(h0, channels_last, kStart);
  Tensor h = empty(packed, sequence_sizes(packed), packed.scalar_type(), 2, channels_last);
  Tensor h_n = empty(packed, state_sizes(packed), h0.has_value() ? h0->scalar_type() : packed.scalar_type(), 1,
                     channels_last);

  dispatch_dtype("convrnn::mingru", packed, [&](auto zero) {
    using T = decltype(zero);
    using C = Carry<acc_t<T>>;
    const T* gate = data<T>(packed);
    T* out = mutable_data<T>(h);
    const int64_t gate_batch = packed.stride(0), gate_step = packed.stride(1);
    scan<C, acc_t<T>>(
        sizes[0] * frame.blocks(), sizes[0] * lanes, steps, false, [&](int64_t task) { return Block(frame, task); },
        [&](const Block& block, const C& carry) { first.read(block, carry.value); },
        [&](const Block& block, Chunk chunk, const C& carry, Pass pass, const C& began) {
          const Walk<T> w(frame, block, chunk.steps, gate + block.b * gate_batch + chunk.begin * gate_step, gate_step,
                          rows.row(block.b, chunk.begin), 1);
          run<Forward<T>>(w, out + (block.b * steps + chunk.begin) * lanes + block.lane, lanes, carry, pass, began);
        },
        [&](const Block& block, const C& carry) { write(h_n, block, carry.value); });
  });
  return {h, h_n};
}

std::tuple<Tensor, Tensor> mingru_backward(const std::optional<Tensor>& dh, const std::optional<Tensor>& dh_n,
                                           const Tensor& gate_hidden, const std::optional<Tensor>& h0,
                                           const Tensor& h, const std::optional<Tensor>& codes) {
  check(gate_hidden, h0);
  const Codes rows("convrnn::mingru", codes, gate_hidden);
  for (const auto& sequence : {dh, std::optional<Tensor>(h)}) {
    STD_TORCH_CHECK(!sequence.has_value() || (sequence->scalar_type() == gate_hidden.scalar_type() &&
                                              shape(*sequence) == sequence_sizes(gate_hidden)),
                    "convrnn::mingru_backward: expected dh and h in the shape and dtype of h");
  }
  check_state("convrnn::mingru_backward", dh_n);
  STD_TORCH_CHECK(!dh_n.has_value() || shape(*dh_n) == state_sizes(gate_hidden),
                  "convrnn::mingru_backward: expected dh_n of shape (B, C, *S)");
  const bool channels_last = is_channels_last(gate_hidden, 2);
  const Tensor packed = to_layout(gate_hidden, 2, channels_last);
  const Tensor states = to_layout(h, 2, channels_last);
  const std::optional<Tensor> up = dh.has_value() ? to_layout(*dh, 2, channels_last) : dh;
  const Shape sizes = shape(packed);
  const Frame frame(sizes, channels_last);
  const int64_t steps = sizes[1], lanes = frame.lanes;
  const LaneState first(h0, channels_last, kStart), last(dh_n, channels_last, 0.);
  Tensor dpacked = empty(packed, sizes, packed.scalar_type(), 2, channels_last);
  Tensor dh0 = h0.has_value() ? empty(packed, state_sizes(packed), h0->scalar_type(), 1, channels_last)
                              : nothing(packed);

  dispatch_dtype("convrnn::mingru_backward", packed, [&](auto zero) {
    using T = decltype(zero);
    using C = Carry<acc_t<T>>;
    const T *gate = data<T>(packed), *out = data<T>(states), *du = up.has_value() ? data<T>(*up) : nullptr;
    T* dgate = mutable_data<T>(dpacked);
    const int64_t gate_batch = packed.stride(0), gate_step = packed.stride(1);
    const int64_t h_batch = states.stride(0), h_step = states.stride(1);
    const int64_t up_batch = up.has_value() ? up->stride(0) : 0, up_step = up.has_value() ? up->stride(1) : 0;
    const T zeros[kBlock] = {};  // no gradient of h: every step reads these
    acc_t<T> restart[kBlock];
    std::fill_n(restart, kBlock, static_cast<acc_t<T>>(kStart));
    scan<C, acc_t<T>>(
        sizes[0] * frame.blocks(), sizes[0] * lanes, steps, true, [&](int64_t task) { return Block(frame, task); },
        [&](const Block& block, const C& carry) { last.read(block, carry.value); },
        [&](const Block& block, Chunk chunk, const C& carry, Pass pass, const C& began) {
          acc_t<T> start[kBlock];
          if (chunk.begin == 0) {
            first.read(block, start);
          }
          const int64_t t = chunk.begin + chunk.steps - 1;
          const Walk<T> w(frame, block, chunk.steps, gate + block.b * gate_batch + t * gate_step, -gate_step,
                          rows.row(block.b, t), -1);
          const Gradients<T> d = {out + block.b * h_batch + (t - 1) * h_step + block.lane,
                                  chunk.begin == 0 ? start : nullptr,
                                  restart,
                                  du == nullptr ? zeros : du + block.b * up_batch + t * up_step + block.lane,
                                  dgate + (block.b * steps + t) * 2 * lanes + block.gate,
                                  -h_step,
                                  -up_step,
                                  -2 * lanes};
          run<Backward<T>>(w, d, carry, pass, began);
        },
        [&](const Block& block, const C& carry) {
          if (h0.has_value()) {
            write(dh0, block, carry.value);
          }
        });
  });
  return {dpacked, dh0};
}

}  // namespace
}  // namespace convrnn

STABLE_TORCH_LIBRARY_IMPL(convrnn, CPU, m) {
  m.impl("mingru", TORCH_BOX(&convrnn::mingru));
  m.impl("mingru_backward", TORCH_BOX(&convrnn::mingru_backward));
}
