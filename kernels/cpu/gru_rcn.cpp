// GRU-RCN over a whole sequence, frames of one to three spatial dimensions:
//   z = sigmoid(W_z*x + U_z*h), r = sigmoid(W_r*x + U_r*h), c = tanh(W_c*x + C*(r.h)), h' = (1 - z).h + z.c
//
// Frames become channels-last in padded buffers (convolution.h); the weights are packed once a call. Forward: the input
// convolution of some steps, then step by step the convolutions of U and C with their gates. Backward: step by step the
// data gradients of C and U, then those of x and of the weights for all those steps. Saved for backward: x, h and the
// activations z, r, c, or with `keep_gates` off x and h alone, from which the activations are computed again. Without W, x is
// what the input convolution would give, read step by step; then it is not saved where the activations are.
//
// A frame whose code (codes.h) restarts the state follows a zero one, as the first does without h0: there is nothing to
// convolve. One that is held is not read, in either direction; its activations are kept as zeros.
//
// Where the batch serves all threads each takes whole samples through a chunk of steps, with the state in its cache, and of
// small frames some together; else they share every stage's rows and channels. Neither changes a bit of the result. With codes
// each sample comes by itself. All this but where PyTorch's convolutions are taken (gru_rcn_library.h).
// Source: Ballas et al., ICLR 2016, arXiv 1511.06432.

#include "gru_cell.h"
#include "gru_rcn_backward.h"
#include "gru_rcn_library.h"

namespace convrnn {
namespace {

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

void check(const Tensor& x, const std::optional<Tensor>& h0, const std::optional<Tensor>& W, const Tensor& U,
           const Tensor& C) {
  STD_TORCH_CHECK(C.dim() >= 1, "convrnn::gru_rcn: expected C of shape (Oh, Oh, *k)");
  const int64_t channels = C.size(0);
  for (const Tensor& weight : {W.value_or(C), U, C}) {
    STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(),
                    "convrnn::gru_rcn: expected W, U and C in the dtype of x");
    for (int64_t d = 2; d < weight.dim(); ++d) {
      STD_TORCH_CHECK(weight.size(d) > 0, "convrnn::gru_rcn: expected kernels of at least one tap");
    }
  }
  STD_TORCH_CHECK(x.dim() >= 4 && x.dim() <= 6 && x.size(2) > 0 && C.dim() == x.dim() - 1 && U.dim() == C.dim() &&
                      U.size(0) == 2 * channels && U.size(1) == channels && C.size(1) == channels,
                  "convrnn::gru_rcn: expected x (B, T, Ox, *S), U (2*Oh, Oh, *k), C (Oh, Oh, *k)");
  STD_TORCH_CHECK(!W.has_value() || (W->dim() == C.dim() && W->size(0) == 3 * channels && W->size(1) == x.size(2)),
                  "convrnn::gru_rcn: expected W (3*Oh, Ox, *k)");
  STD_TORCH_CHECK(W.has_value() || x.size(2) == 3 * channels, "convrnn::gru_rcn: expected x (B, T, 3*Oh, *S) without W");
  check_state("convrnn::gru_rcn", h0);
  STD_TORCH_CHECK(!h0.has_value() || shape(*h0) == state_sizes(x, C),
                  "convrnn::gru_rcn: expected h0 of shape (B, Oh, *S)");
}

template <class T>
void forward(const Problem& p, Tensor x, bool has_h0, const std::optional<Tensor>& W, const Tensor& U,
             const Tensor& C, const std::optional<Tensor>& bias, const Codes& codes, const Tensor& out, const Tensor& h_n,
             const Tensor& gates) {
  using A = acc_t<T>;
  const bool keep = gates.numel() > 0;
  const Cell<T> cell(p, W, U, C, bias, !keep);
  const Schedule schedule = cell.schedule(codes.any());
  const Sequence<const T> xs = sequence<T>(x, 2);
  const Sequence<T> outs(out, 2, false);
  const Sequence<A> states(h_n, 1, false);
  T* const kept = keep ? mutable_data<T>(gates) : nullptr;

  constexpr int64_t kProjected = 512 << 10;  // bytes: stay in the second-level cache
  const int64_t x_size = cell.projects() ? p.frame.pixels() * p.inputs : 0, h_size = p.frame.pixels() * p.pitch;
  const int64_t chunk =
      cell.projects() ? chunk_of(kProjected, schedule.together() * (cell.xp_size() + x_size) * sizeof(A), p.steps) : 1;
  const int64_t workspace = padded(chunk * (x_size + cell.xp_size()) + 2 * h_size);
  Buffer<A> work(schedule.workspaces() * workspace), scratch(slots() * padded(cell.scratch_size(schedule)));
  Buffer<T> unkept(keep ? 0 : schedule.workspaces() * cell.kept_size());
  struct Workspace {
    A *h, *rh, *x, *xp;
  };
  const auto of = [&](int64_t i) {
    A* h = work.data() + i * workspace;
    return Workspace{h, h + h_size, h + 2 * h_size, h + 2 * h_size + chunk * x_size};
  };
  const auto first = [&](int64_t slot, const Samples& samples) { return schedule.workspace(slot, samples); };
  const auto scratch_of = [&](int64_t slot) { return scratch.data() + slot * padded(cell.scratch_size(schedule)); };
  const auto kept_of = [&](int64_t slot, const Samples& samples, int64_t i, int64_t t) {
    return keep ? kept + ((samples.begin + i) * p.steps + t) * cell.kept_size()
                : unkept.data() + (first(slot, samples) + i) * cell.kept_size();
  };
  for (int64_t i = 0; i < schedule.workspaces(); ++i) {
    const Workspace w = of(i);
    clear(p.frame, p.channels, p.pitch, w.h);
    clear(p.frame, p.channels, p.pitch, w.rh);
    for (int64_t t = 0; cell.projects() && t < chunk; ++t) {
      clear(p.frame, p.inputs, p.inputs, w.x + t * x_size);
    }
    if (!cell.projects() && p.channels < p.pitch) {
      std::fill_n(w.xp, cell.xp_size(), A(0));
    }
  }

  std::vector<Stage> stages;
  stages.push_back([&](int64_t slot, const Samples& samples, const Part& part) {
    for (int64_t i = 0; i < samples.count; ++i) {
      states.template rows<Move::in>(samples.begin + i, 0, p, part, of(first(slot, samples) + i).h, p.pitch, true);
    }
  });
  for (int64_t begin = 0; begin < p.steps; begin += chunk) {
    const int64_t end = std::min(p.steps, begin + chunk);
    if (cell.projects()) {
      stages.push_back([&, begin, end](int64_t slot, const Samples& samples, const Part& part) {
        for (int64_t i = 0; i < samples.count; ++i) {
          for (int64_t t = begin; t < end; ++t) {
            if (!codes.hold(samples.begin + i, t)) {
              A* x = of(first(slot, samples) + i).x + (t - begin) * x_size;
              xs.template rows<Move::in>(samples.begin + i, t, p, p.inputs_of(part), x, p.inputs, true);
            }
          }
        }
      });
      stages.push_back([&, begin, end](int64_t slot, const Samples& samples, const Part& part) {
        const Workspace w = of(first(slot, samples));
        for (int64_t t = 0; t < end - begin; ++t) {
          if (!codes.hold(samples.begin, begin + t)) {
            cell.project(w.x + t * x_size, w.xp + t * cell.xp_size(), {samples.count, workspace, workspace}, part,
                         scratch_of(slot));
          }
        }
      });
    }
    for (int64_t t = begin; t < end; ++t) {
      const bool zero = t == 0 && !has_h0;
      const int64_t xp = (t - begin) * cell.xp_size();
      stages.push_back([&, zero, t, xp](int64_t slot, const Samples& samples, const Part& part) {
        A* scratch = scratch_of(slot);
        const bool restart = codes.restart(samples.begin, t);
        if (restart) {
          clear(p, part, of(first(slot, samples)).h, p.pitch);
        }
        if (codes.hold(samples.begin, t)) {
          if (keep) {
            cell.keep_nothing(kept_of(slot, samples, 0, t), part);
          }
          return;
        }
        cell.convolve_h(of(first(slot, samples)).h, samples.count, workspace, zero || restart, part, scratch);
        for (int64_t i = 0; i < samples.count; ++i) {
          const Workspace w = of(first(slot, samples) + i);
          if (!cell.projects()) {
            cell.take(xs, samples.begin + i, t, w.xp, part);
          }
          cell.gates(w.xp + xp, cell.planes(scratch, i, part), w.h, w.rh, kept_of(slot, samples, i, t), part);
        }
      });
      stages.push_back([&, zero, t, xp](int64_t slot, const Samples& samples, const Part& part) {
        A* scratch = scratch_of(slot);
        const bool hold = codes.hold(samples.begin, t);
        if (!hold) {
          cell.convolve_rh(of(first(slot, samples)).rh, samples.count, workspace,
                           zero || codes.restart(samples.begin, t), part, scratch);
        }
        for (int64_t i = 0; i < samples.count; ++i) {
          const Workspace w = of(first(slot, samples) + i);
          if (!hold) {
            cell.candidate(w.xp + xp, cell.planes(scratch, i, part), w.h, kept_of(slot, samples, i, t), part);
          }
          outs.template rows<Move::out>(samples.begin + i, t, p, part, w.h, p.pitch, true);
        }
      });
    }
  }
  stages.push_back([&](int64_t slot, const Samples& samples, const Part& part) {
    for (int64_t i = 0; i < samples.count; ++i) {
      states.template rows<Move::out>(samples.begin + i, 0, p, part, of(first(slot, samples) + i).h, p.pitch, true);
    }
  });
  schedule.run(stages);
}

void check_bias(const std::optional<Tensor>& bias, const Tensor& x, const std::optional<Tensor>& W) {
  STD_TORCH_CHECK(!bias.has_value() || W.has_value(), "convrnn::gru_rcn: expected no bias without W");
  STD_TORCH_CHECK(!bias.has_value() || (bias->scalar_type() == x.scalar_type() && shape(*bias) == Shape{W->size(0)}),
                  "convrnn::gru_rcn: expected bias of shape (3*Oh,) in the dtype of x");
}

std::optional<Tensor> dense_or_none(const std::optional<Tensor>& x) {
  return x.has_value() ? std::optional<Tensor>(dense(*x)) : std::nullopt;
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

std::tuple<Tensor, Tensor, Tensor> gru_rcn(const Tensor& x, const std::optional<Tensor>& h0,
                                           const std::optional<Tensor>& W_, const Tensor& U_, const Tensor& C_,
                                           const std::optional<Tensor>& bias_, bool keep_gates,
                                           const std::optional<Tensor>& codes_) {
  check(x, h0, W_, U_, C_);
  check_bias(bias_, x, W_);
  const Codes codes("convrnn::gru_rcn", codes_, x);
  const Tensor U = dense(U_), C = dense(C_);
  const std::optional<Tensor> W = dense_or_none(W_), bias = dense_or_none(bias_);
  const Tensor out = empty(x, sequence_sizes(x, C.size(0)));
  const Tensor gates = keep_gates ? empty(x, sequence_sizes(x, 3 * C.size(0))) : nothing(x);
  Tensor state = dense_state(h0, x, C, state_dtype(x));
  if (out.numel() > 0) {
    const Problem problem(x, W, U, C);
    dispatch_dtype("convrnn::gru_rcn", x, [&](auto zero) {
      using T = decltype(zero);
      if constexpr (kHasLibrary<T>) {
        if (takes_library(problem, x, W.has_value(), codes, false)) {
          return library_forward<T>(problem, x, h0.has_value(), W, U, C, bias, out, state, gates);
        }
      }
      forward<T>(problem, x, h0.has_value(), W, U, C, bias, codes, out, state, gates);
    });
  }
  return {out, to_dtype(state, h0.has_value() ? h0->scalar_type() : x.scalar_type()), gates};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gru_rcn_backward(
    const std::optional<Tensor>& dout, const std::optional<Tensor>& dh_n, const Tensor& x,
    const std::optional<Tensor>& h0, const std::optional<Tensor>& W_, const Tensor& U_, const Tensor& C_, const Tensor& out,
    const Tensor& gates, std::vector<bool> output_mask, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& codes_) {
  check(x, h0, W_, U_, C_);
  const Codes codes("convrnn::gru_rcn_backward", codes_, x);
  for (const auto& sequence : {dout, std::optional<Tensor>(out)}) {
    STD_TORCH_CHECK(!sequence.has_value() || (sequence->scalar_type() == x.scalar_type() &&
                                              shape(*sequence) == sequence_sizes(x, C_.size(0))),
                    "convrnn::gru_rcn_backward: expected dout and out as gru_rcn returns out");
  }
  check_state("convrnn::gru_rcn_backward", dh_n);
  check_bias(bias, x, W_);
  STD_TORCH_CHECK(gates.scalar_type() == x.scalar_type() &&
                      (gates.numel() == 0 || shape(gates) == sequence_sizes(x, 3 * C_.size(0))) &&
                      (!dh_n.has_value() || shape(*dh_n) == state_sizes(x, C_)) && output_mask.size() == 6,
                  "convrnn::gru_rcn_backward: expected gates and dh_n as gru_rcn returns them, and 6 flags");
  output_mask[1] = output_mask[1] && h0.has_value();
  output_mask[2] = output_mask[2] && W_.has_value();
  output_mask[5] = output_mask[5] && W_.has_value();
  const Tensor U = dense(U_), C = dense(C_);
  const std::optional<Tensor> W = dense_or_none(W_);
  Tensor dh = dense_state(dh_n, x, C, state_dtype(x));
  const auto wanted = [&](size_t i, const Tensor& like) {
    return output_mask[i] ? std::optional<Tensor>(empty(like, shape(like))) : std::nullopt;
  };
  Gradients gradients{wanted(0, x), wanted(2, W.value_or(x)), wanted(3, U), wanted(4, C), std::nullopt, output_mask[1]};
  if (output_mask[5]) {
    gradients.dbias = empty(x, {3 * C.size(0)});
  }
  if (out.numel() > 0) {
    const Problem problem(x, W, U, C);
    const Operands operands{x, h0, W, U, C, dense_or_none(bias), out, dout, codes};
    dispatch_dtype("convrnn::gru_rcn_backward", x, [&](auto zero) {
      using T = decltype(zero);
      if constexpr (kHasLibrary<T>) {
        if (gates.numel() > 0 && takes_library(problem, x, W.has_value(), codes, true)) {
          return library_backward<T>(problem, operands, torch::stable::contiguous(gates), dh, gradients);
        }
      }
      backward<T>(problem, operands, torch::stable::contiguous(gates), dh, gradients);
    });
  } else {
    for (auto* gradient : {&gradients.dx, &gradients.dW, &gradients.dU, &gradients.dC, &gradients.dbias}) {
      if (gradient->has_value()) {
        torch::stable::zero_(**gradient);
      }
    }
  }
  const auto result = [&](const std::optional<Tensor>& gradient) { return gradient.has_value() ? *gradient : nothing(x); };
  return {result(gradients.dx), output_mask[1] ? to_dtype(dh, h0->scalar_type()) : nothing(x), result(gradients.dW),
          result(gradients.dU), result(gradients.dC), result(gradients.dbias)};
}

}  // namespace
}  // namespace convrnn

STABLE_TORCH_LIBRARY_IMPL(convrnn, CPU, m) {
  m.impl("gru_rcn", TORCH_BOX(&convrnn::gru_rcn));
  m.impl("gru_rcn_backward", TORCH_BOX(&convrnn::gru_rcn_backward));
}
