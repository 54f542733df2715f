// minGRU: z = sigmoid(gate), h_t = h_{t-1} + z (g(hidden) - h_{t-1}), over the packed projection [gate, hidden].
//
// A lane is one element of a state (C, *S). A block of lanes runs through all of T with its state in L1; threads share
// the blocks. Forward reads 2 and writes 1 element per output; backward reads 4 and writes 2: z and g are recomputed.
// Source: Feng et al. 2024, arXiv 2410.01201.

#include <algorithm>

#include "math.h"
#include "tensor.h"

namespace convrnn {
namespace {

constexpr int64_t kBlock = 256;  // lanes that advance together: their state fills at most 2 KiB

// Lanes of one frame. Channels first, gates and hidden values are two runs of C*S lanes; channels last, each pixel has
// a run of C gates and then C hidden values. Either way hidden = gate + run, and states are dense in lane order.
struct Frame {
  int64_t run;     // lanes before the hidden values begin
  int64_t lanes;   // lanes of a state
  int64_t groups;  // whole runs a block holds (1 where a run is longer than a block)

  Frame(const Shape& gate_hidden, bool channels_last) {
    lanes = numel(gate_hidden, 2) / 2;
    run = channels_last ? gate_hidden[2] / 2 : lanes;
    groups = run > 0 && run < kBlock ? std::max<int64_t>(1, std::min(kBlock / run, lanes / run)) : 1;
  }
  int64_t block() const {
    return run < kBlock ? run * groups : kBlock;
  }
  int64_t blocks_in_run() const {
    return run < kBlock ? 1 : (run + kBlock - 1) / kBlock;
  }
  int64_t blocks() const {
    if (lanes == 0) {
      return 0;
    }
    return run < kBlock ? (lanes / run + groups - 1) / groups : (lanes / run) * blocks_in_run();
  }
};

// One block: `groups` runs of `n` lanes at lane offset `lane`, gates at element offset `gate`.
struct Block {
  int64_t lane, gate, n, groups;

  Block(const Frame& f, int64_t index) {
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
  }
};

template <class T>
struct Forward {
  static CONVRNN_INLINE void run(const T* gate, T* h, acc_t<T>* state, int64_t steps, int64_t groups, int64_t n,
                                 int64_t run, int64_t gate_step, int64_t h_step) {
    using A = acc_t<T>;
    for (int64_t t = 0; t < steps; ++t, gate += gate_step, h += h_step) {
      for (int64_t j = 0; j < groups; ++j) {
        const T* z = gate + j * 2 * run;
        const T* x = z + run;
        T* out = h + j * n;
        A* s = state + j * n;
        CONVRNN_LANES
        for (int64_t i = 0; i < n; ++i) {
          // from the nearer end: z (g - h) where z is small, 1 - z times (h - g) where it is not
          const A gate = A(z[i]), candidate = g(A(x[i]));
          const A nearer = gate >= A(0) ? candidate : s[i];
          const A other = gate >= A(0) ? s[i] : candidate;
          const A v = nearer + sigmoid_tail(gate) * (other - nearer);
          s[i] = v;
          out[i] = static_cast<T>(v);
        }
      }
    }
  }
};

// Pointers stand at the last step and move back. `carry` is dL/dh_t on entry to each step, less dL/dout_t.
template <class T>
struct Backward {
  static CONVRNN_INLINE void run(const T* gate, const T* h, const acc_t<T>* first, const T* dh, T* dgate,
                                 acc_t<T>* carry, int64_t steps, int64_t groups, int64_t n, int64_t run,
                                 int64_t gate_step, int64_t h_step, int64_t dh_step, int64_t dgate_step) {
    using A = acc_t<T>;
    for (int64_t t = steps - 1; t >= 0; --t, gate -= gate_step, h -= h_step, dh -= dh_step, dgate -= dgate_step) {
      for (int64_t j = 0; j < groups; ++j) {
        const T* z = gate + j * 2 * run;
        const T* x = z + run;
        const T* before = h - h_step + j * n;
        const A* start = first + j * n;
        const T* up = dh + j * n;
        T* dz = dgate + j * 2 * run;
        T* dx = dz + run;
        A* c = carry + j * n;
        const auto lane = [&](int64_t i, A h_before) __attribute__((always_inline)) {
          A complement, slope;
          const A update = sigmoid(A(z[i]), complement);
          const A candidate = g(A(x[i]), slope);
          const A total = c[i] + A(up[i]);
          const A through = total * update;
          dz[i] = static_cast<T>(through * complement * (candidate - h_before));
          dx[i] = static_cast<T>(through * slope);
          c[i] = total * complement;
        };
        if (t > 0) {
          CONVRNN_LANES
          for (int64_t i = 0; i < n; ++i) {
            lane(i, A(before[i]));
          }
        } else {
          CONVRNN_LANES
          for (int64_t i = 0; i < n; ++i) {
            lane(i, start[i]);
          }
        }
      }
    }
  }
};

// A state (B, C, *S) as fp32 (fp64) values in lane order; `fill` everywhere where there is none.
Tensor lane_state(const std::optional<Tensor>& h, const Tensor& like, const Shape& sizes, bool channels_last,
                  double fill) {
  const ScalarType dtype = state_dtype(like);
  Tensor state = empty(like, sizes, dtype, 1, channels_last);
  if (h.has_value()) {
    torch::stable::copy_(state, *h);
  } else {
    torch::stable::fill_(state, fill);
  }
  return state;
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

std::tuple<Tensor, Tensor> mingru(const Tensor& gate_hidden, const std::optional<Tensor>& h0) {
  check(gate_hidden, h0);
  const bool channels_last = is_channels_last(gate_hidden, 2);
  const Tensor packed = to_layout(gate_hidden, 2, channels_last);
  const Shape sizes = shape(packed);
  const Frame frame(sizes, channels_last);
  const int64_t steps = sizes[1];
  Tensor h = empty(packed, sequence_sizes(packed), packed.scalar_type(), 2, channels_last);
  Tensor state = lane_state(h0, packed, state_sizes(packed), channels_last, 0.5);

  dispatch_dtype("convrnn::mingru", packed, [&](auto zero) {
    using T = decltype(zero);
    const T* gate = data<T>(packed);
    T* out = mutable_data<T>(h);
    auto* s = mutable_data<acc_t<T>>(state);
    const int64_t batch_step = packed.stride(0), gate_step = packed.stride(1);
    torch::stable::parallel_for(0, sizes[0] * frame.blocks(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        const int64_t b = index / frame.blocks();
        const Block block(frame, index % frame.blocks());
        run<Forward<T>>(gate + b * batch_step + block.gate, out + b * steps * frame.lanes + block.lane,
                        s + b * frame.lanes + block.lane, steps, block.groups, block.n, frame.run, gate_step,
                        frame.lanes);
      }
    });
  });
  return {h, to_dtype(state, h0.has_value() ? h0->scalar_type() : packed.scalar_type())};
}

std::tuple<Tensor, Tensor> mingru_backward(const std::optional<Tensor>& dh, const std::optional<Tensor>& dh_n,
                                           const Tensor& gate_hidden, const std::optional<Tensor>& h0,
                                           const Tensor& h) {
  check(gate_hidden, h0);
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
  const Shape sizes = shape(packed);
  const Frame frame(sizes, channels_last);
  const int64_t steps = sizes[1];
  Tensor dpacked = empty(packed, sizes, packed.scalar_type(), 2, channels_last);
  const Tensor first = lane_state(h0, packed, state_sizes(packed), channels_last, 0.5);
  Tensor carry = lane_state(dh_n, packed, state_sizes(packed), channels_last, 0.);
  // No gradient of h: one frame of zeros that every step reads.
  const Tensor up = dh.has_value() ? to_layout(*dh, 2, channels_last)
                                   : torch::stable::new_zeros(packed, Shape{1, 1, frame.lanes});
  const int64_t up_batch = dh.has_value() ? up.stride(0) : 0;
  const int64_t up_step = dh.has_value() ? up.stride(1) : 0;

  dispatch_dtype("convrnn::mingru_backward", packed, [&](auto zero) {
    using T = decltype(zero);
    const T *gate = data<T>(packed), *out = data<T>(states), *du = data<T>(up);
    const auto* start = data<acc_t<T>>(first);
    T* dgate = mutable_data<T>(dpacked);
    auto* c = mutable_data<acc_t<T>>(carry);
    const int64_t gate_batch = packed.stride(0), gate_step = packed.stride(1);
    const int64_t h_batch = states.stride(0), h_step = states.stride(1);
    const int64_t last = steps - 1, lanes = frame.lanes;
    torch::stable::parallel_for(0, sizes[0] * frame.blocks(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        const int64_t b = index / frame.blocks();
        const Block block(frame, index % frame.blocks());
        run<Backward<T>>(gate + b * gate_batch + last * gate_step + block.gate,
                         out + b * h_batch + last * h_step + block.lane, start + b * lanes + block.lane,
                         du + b * up_batch + last * up_step + block.lane,
                         dgate + (b * steps + last) * 2 * lanes + block.gate, c + b * lanes + block.lane, steps,
                         block.groups, block.n, frame.run, gate_step, h_step, up_step, 2 * lanes);
      }
    });
  });
  return {dpacked, h0.has_value() ? to_dtype(carry, h0->scalar_type()) : nothing(packed)};
}

}  // namespace
}  // namespace convrnn

STABLE_TORCH_LIBRARY_IMPL(convrnn, CPU, m) {
  m.impl("mingru", TORCH_BOX(&convrnn::mingru));
  m.impl("mingru_backward", TORCH_BOX(&convrnn::mingru_backward));
}
