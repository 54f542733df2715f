// GRU-RCN over a whole sequence, frames of any number of spatial dimensions:
//   z = sigmoid(W_z*x + U_z*h), r = sigmoid(W_r*x + U_r*h), c = tanh(W_c*x + C*(r.h)), h' = (1 - z).h + z.c
//
// The input convolution runs once over all B*T frames, the loop holds the two recurrent convolutions of a step and two
// elementwise kernels, and each weight gradient is one convolution over all B*T frames. Saved for backward: x, h and the
// activations [z, r, c], which are written over the input's projection. Convolutions are the library's, reached through
// the dispatcher; kernel sizes are odd and padded by half (the public function widens even ones).
// Source: Ballas et al., ICLR 2016, arXiv 1511.06432.

#include <cstring>

#include "gru_gates.h"
#include "tensor.h"

namespace convrnn {
namespace {

using torch::headeronly::HeaderOnlyArrayRef;

// Geometry of a 'same' convolution with this weight: stride, padding, dilation.
struct Same {
  Shape ones, zeros, padding;

  explicit Same(const Tensor& weight) {
    for (int64_t d = 2; d < weight.dim(); ++d) {
      STD_TORCH_CHECK(weight.size(d) % 2 == 1, "convrnn::gru_rcn: expected odd kernel sizes");
      padding.push_back(weight.size(d) / 2);
    }
    ones.assign(padding.size(), 1);
    zeros.assign(padding.size(), 0);
  }
};

Tensor convolve(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias = std::nullopt) {
  const Same same(weight);
  return torch::stable::contiguous(call("aten::convolution", x, weight, bias, same.ones, same.padding, same.ones, false,
                                        same.zeros, int64_t{1}));
}

struct ConvolutionGradients {
  Tensor dx, dweight, dbias;
};

// The wanted gradients of convolve(x, weight, bias); the others are undefined. x gives its shape where only dx is wanted.
ConvolutionGradients convolve_backward(const Tensor& up, const Tensor& x, const Tensor& weight, bool dx, bool dweight,
                                       bool dbias) {
  const Same same(weight);
  const bool mask[] = {dx, dweight, dbias};
  const std::optional<Shape> bias_sizes = Shape{weight.size(0)};
  std::array<StableIValue, 11> stack{
      torch::stable::detail::from(up),
      torch::stable::detail::from(x),
      torch::stable::detail::from(weight),
      torch::stable::detail::from(bias_sizes),
      torch::stable::detail::from(same.ones),
      torch::stable::detail::from(same.padding),
      torch::stable::detail::from(same.ones),
      torch::stable::detail::from(false),
      torch::stable::detail::from(same.zeros),
      torch::stable::detail::from(int64_t{1}),
      torch::stable::detail::from(HeaderOnlyArrayRef<bool>(mask, 3)),
  };
  call_dispatcher("aten::convolution_backward", stack);
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1]),
          torch::stable::detail::to<Tensor>(stack[2])};
}

Tensor data_gradient(const Tensor& up, const Tensor& x, const Tensor& weight) {
  return torch::stable::contiguous(convolve_backward(up, x, weight, true, false, false).dx);
}

Tensor weight_gradient(const Tensor& up, const Tensor& x, const Tensor& weight) {
  return dense(convolve_backward(up, x, weight, false, true, false).dweight);
}

// (B, T, ...) as B*T frames.
Tensor frames(const Tensor& x) {
  Shape sizes = shape(x);
  sizes[1] *= sizes[0];
  sizes.erase(sizes.begin());
  return torch::stable::view(torch::stable::contiguous(x), sizes);
}

// Channels [first, first + count) of step t of a sequence, no copy.
Tensor step_channels(const Tensor& x, int64_t t, int64_t first, int64_t count) {
  Tensor frame = torch::stable::select(x, 1, t);
  return torch::stable::narrow(frame, 1, first, count);
}

Shape state_sizes(const Tensor& x, const Tensor& C) {
  Shape sizes = shape(x);
  sizes.erase(sizes.begin() + 1);
  sizes[1] = C.size(0);
  return sizes;
}

Shape sequence_sizes(const Tensor& x, int64_t channels) {
  Shape sizes = shape(x);
  sizes[2] = channels;
  return sizes;
}

void check(const Tensor& x, const std::optional<Tensor>& h0, const Tensor& W, const Tensor& U, const Tensor& C) {
  STD_TORCH_CHECK(C.dim() >= 1, "convrnn::gru_rcn: expected C of shape (Oh, Oh, *k)");
  const int64_t channels = C.size(0);
  for (const Tensor& weight : {W, U, C}) {
    STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(),
                    "convrnn::gru_rcn: expected W, U and C in the dtype of x");
  }
  STD_TORCH_CHECK(x.dim() >= 4 && x.size(2) > 0 && W.dim() == x.dim() - 1 && U.dim() == W.dim() && C.dim() == W.dim() &&
                      W.size(0) == 3 * channels && W.size(1) == x.size(2) && U.size(0) == 2 * channels &&
                      U.size(1) == channels && C.size(1) == channels,
                  "convrnn::gru_rcn: expected x (B, T, Ox, *S), W (3*Oh, Ox, *k), U (2*Oh, Oh, *k), C (Oh, Oh, *k)");
  check_state("convrnn::gru_rcn", h0);
  STD_TORCH_CHECK(!h0.has_value() || shape(*h0) == state_sizes(x, C),
                  "convrnn::gru_rcn: expected h0 of shape (B, Oh, *S)");
}

// A state as a dense tensor of this dtype; zeros where there is none. Never h itself.
Tensor dense_state(const std::optional<Tensor>& h, const Tensor& x, const Tensor& C, ScalarType dtype) {
  Tensor state = empty(x, state_sizes(x, C), dtype);
  if (h.has_value()) {
    torch::stable::copy_(state, *h);
  } else {
    torch::stable::zero_(state);
  }
  return state;
}

// y = x in y's dtype.
template <class T>
struct Round {
  static CONVRNN_INLINE void run(const acc_t<T>* x, T* y, int64_t n) {
    CONVRNN_LANES
    for (int64_t i = 0; i < n; ++i) {
      y[i] = static_cast<T>(x[i]);
    }
  }
};

// y = r h.
template <class T>
struct Product {
  static CONVRNN_INLINE void run(const T* r, const T* h, T* y, int64_t n) {
    CONVRNN_LANES
    for (int64_t i = 0; i < n; ++i) {
      y[i] = static_cast<T>(acc_t<T>(r[i]) * acc_t<T>(h[i]));
    }
  }
};

std::tuple<Tensor, Tensor, Tensor> gru_rcn(const Tensor& x, const std::optional<Tensor>& h0, const Tensor& W,
                                           const Tensor& U, const Tensor& C, const std::optional<Tensor>& bias) {
  check(x, h0, W, U, C);
  STD_TORCH_CHECK(!bias.has_value() || (bias->scalar_type() == x.scalar_type() && shape(*bias) == Shape{W.size(0)}),
                  "convrnn::gru_rcn: expected bias of shape (3*Oh,) in the dtype of x");
  const int64_t batch = x.size(0), steps = x.size(1), channels = C.size(0);
  Tensor out_ = empty(x, sequence_sizes(x, channels));
  Tensor state = dense_state(h0, x, C, state_dtype(x));
  const ScalarType state_out = h0.has_value() ? h0->scalar_type() : x.scalar_type();
  if (out_.numel() == 0) {
    return {out_, to_dtype(state, state_out), empty(x, sequence_sizes(x, 3 * channels))};
  }
  const Tensor gates = dense(torch::stable::view(convolve(frames(x), W, bias), sequence_sizes(x, 3 * channels)));
  const Shape sizes = state_sizes(x, C);
  const int64_t n = numel(sizes, 1);
  Shape packed = sizes;
  packed[1] *= 2;
  Tensor rh = empty(x, sizes);
  const bool rounded = state.scalar_type() != x.scalar_type();
  Tensor h = rounded ? to_dtype(state, x.scalar_type()) : state;  // what the convolutions see
  // No state yet: its convolutions are zero.
  const std::optional<Tensor> zeros =
      h0.has_value() ? std::nullopt : std::optional<Tensor>(torch::stable::new_zeros(x, packed));

  dispatch_dtype("convrnn::gru_rcn", x, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const Rows<T> pg = out<T>(gates), po = out<T>(out_), prh = out<T>(rh), ph = out<T>(h);
    const Rows<A> ps = out<A>(state);
    for (int64_t t = 0; t < steps; ++t) {
      const bool first = t == 0 && zeros.has_value();
      const Tensor hp = first ? *zeros : convolve(h, U);
      const auto php = in<T>(hp);
      for_rows(batch, [&](int64_t b) {
        T* g = pg[b] + t * 3 * n;
        run<Gates<T, A>>(g, php[b], ps[b], g, g + n, prh[b], n);
      });
      const Tensor hc = first ? *zeros : convolve(rh, C);
      const auto phc = in<T>(hc);
      for_rows(batch, [&](int64_t b) {
        T *g = pg[b] + t * 3 * n, *o = po[b] + t * n;
        run<Update<T, A>>(g + 2 * n, phc[b], g,
                          ps[b], g + 2 * n, ps[b], n);
        run<Round<T>>(ps[b], o, n);
        if (rounded) {
          std::memcpy(ph[b], o, n * sizeof(T));
        }
      });
    }
  });
  return {out_, to_dtype(state, state_out), gates};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gru_rcn_backward(
    const std::optional<Tensor>& dout, const std::optional<Tensor>& dh_n, const Tensor& x,
    const std::optional<Tensor>& h0, const Tensor& W, const Tensor& U, const Tensor& C, const Tensor& out_sequence,
    const Tensor& gates_, std::vector<bool> output_mask) {
  check(x, h0, W, U, C);
  const int64_t batch = x.size(0), steps = x.size(1), channels = C.size(0);
  for (const auto& sequence : {dout, std::optional<Tensor>(out_sequence)}) {
    STD_TORCH_CHECK(!sequence.has_value() || (sequence->scalar_type() == x.scalar_type() &&
                                              shape(*sequence) == sequence_sizes(x, channels)),
                    "convrnn::gru_rcn_backward: expected dout and out as gru_rcn returns out");
  }
  check_state("convrnn::gru_rcn_backward", dh_n);
  STD_TORCH_CHECK(gates_.scalar_type() == x.scalar_type() && shape(gates_) == sequence_sizes(x, 3 * channels) &&
                      (!dh_n.has_value() || shape(*dh_n) == state_sizes(x, C)) && output_mask.size() == 6,
                  "convrnn::gru_rcn_backward: expected gates and dh_n as gru_rcn returns them, and 6 flags");
  const ScalarType state_out = h0.has_value() ? h0->scalar_type() : x.scalar_type();
  output_mask[1] = output_mask[1] && h0.has_value();
  Tensor dh = dense_state(dh_n, x, C, state_dtype(x));
  const auto wanted = [&](size_t i, auto gradient) { return output_mask[i] ? gradient() : nothing(x); };
  if (out_sequence.numel() == 0) {
    const auto zeros = [&](const Tensor& like) { return torch::stable::new_zeros(like, shape(like)); };
    return {wanted(0, [&] { return zeros(x); }), wanted(1, [&] { return to_dtype(dh, state_out); }),
            wanted(2, [&] { return zeros(W); }), wanted(3, [&] { return zeros(U); }),
            wanted(4, [&] { return zeros(C); }), wanted(5, [&] { return torch::stable::new_zeros(x, {W.size(0)}); })};
  }
  const Tensor gates = torch::stable::contiguous(gates_);
  const std::optional<Tensor> up =
      dout.has_value() ? std::optional<Tensor>(torch::stable::contiguous(*dout)) : std::nullopt;
  const int64_t n = numel(state_sizes(x, C), 1);
  // Gradients of the pre-activations, [z, r, c], of all steps; and the state every step started from.
  Tensor da = empty(x, sequence_sizes(x, 3 * channels));
  Tensor before = empty(x, sequence_sizes(x, channels));
  Tensor start = torch::stable::select(before, 1, 0);
  if (h0.has_value()) {
    torch::stable::copy_(start, *h0);
  } else {
    torch::stable::zero_(start);
  }
  if (steps > 1) {
    Tensor rest = torch::stable::narrow(before, 1, 1, steps - 1);
    Tensor states = out_sequence;
    torch::stable::copy_(rest, torch::stable::narrow(states, 1, 0, steps - 1));
  }
  Tensor rh = empty(x, sequence_sizes(x, channels));

  dispatch_dtype("convrnn::gru_rcn_backward", x, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const auto pg = in<T>(gates), pb = in<T>(before);
    const Rows<const T> pu = up.has_value() ? in<T>(*up) : Rows<const T>{nullptr, 0};
    const Rows<T> pa = out<T>(da), prh = out<T>(rh);
    const Rows<A> pdh = out<A>(dh);
    for_rows(batch, [&](int64_t b) {
      for (int64_t t = 0; t < steps; ++t) {
        run<Product<T>>(pg[b] + (3 * t + 1) * n, pb[b] + t * n, prh[b] + t * n, n);
      }
    });
    for (int64_t t = steps - 1; t >= 0; --t) {
      for_rows(batch, [&](int64_t b) {
        const T* g = pg[b] + t * 3 * n;
        T* a = pa[b] + t * 3 * n;
        if (pu.base != nullptr) {
          run<Accumulate<T>>(pdh[b], pu[b] + t * n, n);
        }
        run<StepUpdateBackward<T>>(pdh[b], g, g + 2 * n, pb[b] + t * n, a, a + 2 * n, n);
      });
      const Tensor drh = data_gradient(step_channels(da, t, 2 * channels, channels), step_channels(rh, t, 0, channels), C);
      const auto pdrh = in<T>(drh);
      for_rows(batch, [&](int64_t b) {
        run<StepGatesBackward<T>>(pdh[b], pdrh[b], pg[b] + (3 * t + 1) * n, pb[b] + t * n, pa[b] + (3 * t + 1) * n, n);
      });
      if (t > 0 || output_mask[1]) {
        const Tensor through =
            data_gradient(step_channels(da, t, 0, 2 * channels), step_channels(before, t, 0, channels), U);
        const auto pt = in<T>(through);
        for_rows(batch, [&](int64_t b) { run<Accumulate<T>>(pdh[b], pt[b], n); });
      }
    }
  });

  Tensor da_frames = frames(da);
  const auto input = convolve_backward(da_frames, frames(x), W, output_mask[0], output_mask[2], output_mask[5]);
  return {wanted(0, [&] { return dense(torch::stable::view(torch::stable::contiguous(input.dx), shape(x))); }),
          wanted(1, [&] { return to_dtype(dh, state_out); }),
          wanted(2, [&] { return dense(input.dweight); }),
          wanted(3, [&] { return weight_gradient(torch::stable::narrow(da_frames, 1, 0, 2 * channels), frames(before), U); }),
          wanted(4, [&] {
            return weight_gradient(torch::stable::narrow(da_frames, 1, 2 * channels, channels), frames(rh), C);
          }),
          wanted(5, [&] { return input.dbias; })};
}

}  // namespace
}  // namespace convrnn

STABLE_TORCH_LIBRARY_IMPL(convrnn, CPU, m) {
  m.impl("gru_rcn", TORCH_BOX(&convrnn::gru_rcn));
  m.impl("gru_rcn_backward", TORCH_BOX(&convrnn::gru_rcn_backward));
}
