// Gradients of GRU-RCN over a whole sequence (gru_rcn.cpp). A chunk of steps at a time: from step to step the data gradients
// of C and U, which carry dL/dh; then, over the frames of the whole chunk, those of x and of the weights.

#include "gru_rcn_backward.h"

#include "gru_cell.h"
#include "weight_gradient.h"

namespace convrnn {
namespace {

// One step of one sample, in frames of lanes, and its kept activations.
template <class T>
struct Step {
  acc_t<T> *da, *h, *rh, *x;  // da: gradients of the pre-activations of z, r and c, side by side
  T* kept;
};

// The gradient of one weight tensor, and which frames of a step it is of.
template <class T>
struct Target {
  using A = acc_t<T>;
  WeightGradient<A> gradient;
  A* Step<T>::*input;
  Tensor weight;
  Channels in;
  int64_t first_gate, gates;
};

// Adds what the steps give to the gradients of the weights.
template <class T>
void accumulate(const Problem& p, std::vector<Target<T>>& targets, const std::vector<Step<T>>& steps) {
  using A = acc_t<T>;
  using Factor = typename WeightGradient<A>::Factor;
  const auto frames = static_cast<int64_t>(steps.size());
  std::vector<std::vector<Factor>> inputs(targets.size(), std::vector<Factor>(frames)), gradients = inputs;
  const auto of_gates = sampled_pixels(p.frame, 3 * p.pitch);
  std::vector<std::array<int64_t, kSampled>> of_inputs;
  for (const auto& target : targets) {
    of_inputs.push_back(sampled_pixels(p.frame, target.in.pixel));
  }
  deal(frames, [&](int64_t, int64_t i) {
    std::array<Magnitudes<A>, 3> gates;
    for (int64_t gate = 0; gate < 3; ++gate) {
      gates[gate] = {p.frame, steps[i].da + gate * p.pitch, of_gates, 3 * p.pitch, p.channels};
    }
    for (size_t j = 0; j < targets.size(); ++j) {
      const Target<T>& target = targets[j];
      const A* input = steps[i].*target.input;
      inputs[j][i] = {input, {p.frame, input, of_inputs[j], target.in.pixel, target.in.count}};
      gradients[j][i] = {steps[i].da, gates[target.first_gate]};
      for (int64_t gate = 1; gate < target.gates; ++gate) {
        gradients[j][i].magnitudes.join(gates[target.first_gate + gate]);
      }
    }
  });
  int64_t tasks = 0, scratch_size = 0;
  for (const auto& target : targets) {
    tasks += target.gradient.tasks();
    scratch_size = std::max(scratch_size, target.gradient.scratch_size());
  }
  Buffer<A> scratch(slots() * scratch_size);
  deal(tasks, [&](int64_t slot, int64_t task) {
    int64_t j = 0;
    for (; task >= targets[j].gradient.tasks(); ++j) {
      task -= targets[j].gradient.tasks();
    }
    targets[j].gradient.add(task, inputs[j].data(), gradients[j].data(), frames, scratch.data() + slot * scratch_size);
  });
}

template <class T>
class Backward {
 public:
  using A = acc_t<T>;

  Backward(const Problem& p, const Operands& operands, const Tensor& gates, Tensor& dh, Gradients& wanted)
      : p_(p),
        wanted_(wanted),
        has_h0_(operands.h0.has_value()),
        recompute_(gates.numel() == 0),
        projects_(operands.W.has_value()),
        width_(p.frame.size.width),
        x_pitch_(padded(p.inputs)),
        through_u_({p.frame, p.u, true, p.packed(2), p.state()}, flipped<T>(operands.U)),
        through_c_({p.frame, p.c, true, p.packed(1), p.state()}, flipped<T>(operands.C)),
        schedule_(p, through_u_.packed_bytes(), through_u_.panel_width(), operands.codes.any()),
        x_(operands.x),
        out_(operands.out),
        dout_(operands.dout.has_value() ? *operands.dout : operands.out),
        h0_(has_h0_ ? to_dtype(*operands.h0, state_dtype(x_)) : dh),
        xs_(sequence<T>(x_, 2)),
        outs_(sequence<T>(out_, 2)),
        douts_(sequence<T>(dout_, 2)),
        h0s_(sequence<A>(h0_, 1)),
        dhs_(dh, 1, false),
        has_dout_(operands.dout.has_value()),
        codes_(operands.codes),
        kept_(recompute_ ? nullptr : const_cast<T*>(data<T>(gates))),  // not written: it is kept
        dh_(p.batch * plane()) {
    step_size_ = padded(p.frame.pixels() * (5 * p.pitch + (projects_ ? p.inputs : 0)));
    // Bytes of the frames of a chunk of steps; large weights' gradients are read and written once a chunk.
    constexpr int64_t kChunk = 2 << 20;
    const int64_t recurrent = (wanted.dU.has_value() ? 2 * p.u.pixels() : 0) + (wanted.dC.has_value() ? p.c.pixels() : 0);
    const int64_t weights = (wanted.dW.has_value() ? 3 * p.w.pixels() * p.inputs : 0) + recurrent * p.channels;
    const int64_t bytes = std::max<int64_t>(kChunk, p.pitch * weights * sizeof(A) / 2);
    chunk_ = chunk_of(bytes, p.batch * step_size_ * sizeof(A), p.steps);
    const auto want = [&](const std::optional<Tensor>& weight, const Size& kernel, const Channels& in,
                          const Channels& out, int64_t lane, A* Step<T>::*input) {
      if (weight.has_value()) {
        targets_.push_back({WeightGradient<A>({p.frame, kernel, false, in, out}, lane, p.batch * chunk_,
                                              std::is_same_v<T, c10::BFloat16>),
                            input, *weight, in, lane / p.pitch, out.gates});
      }
    };
    want(wanted.dU, p.u, p.state(), p.packed(2), 0, &Step<T>::h);
    want(wanted.dC, p.c, p.state(), p.packed(1), 2 * p.pitch, &Step<T>::rh);
    want(wanted.dW, p.w, p.input(), p.packed(3), 0, &Step<T>::x);
    bias_sums_.resize(wanted.dbias.has_value() ? 3 * p.pitch : 0);

    const int64_t plane_size = schedule_.most_rows() * width_ * std::max(p.pitch, x_pitch_);
    int64_t scratch_size = std::max(through_u_.scratch_size(), through_c_.scratch_size());
    if (wanted.dx.has_value()) {
      dxs_.emplace(*wanted.dx, 2, false);
    }
    if (wanted.dx.has_value() && projects_) {
      through_w_.emplace(ConvShape{p.frame, p.w, true, p.packed(3), {1, p.inputs, x_pitch_, x_pitch_}},
                         flipped<T>(*operands.W));
      scratch_size = std::max(scratch_size, through_w_->scratch_size());
    }
    scratch_size += schedule_.together() * plane_size;
    plane_size_ = plane_size;
    if (recompute_) {
      cell_.emplace(p, operands.W, operands.U, operands.C, operands.bias, false);
      scratch_size = std::max(scratch_size, cell_->scratch_size(schedule_));
      xp_ = Buffer<A>(schedule_.workspaces() * cell_->xp_size());
    }
    scratch_size_ = padded(scratch_size);
    scratch_ = Buffer<A>(slots() * scratch_size_);

    work_ = Buffer<A>(p.batch * chunk_ * step_size_);
    spread(p.batch * chunk_, [&](int64_t, int64_t i) {
      const int64_t frame = p.frame.pixels() * p.pitch;
      A* const at = work_.data() + i * step_size_;
      clear(p.frame, p.channels == p.pitch ? 3 * p.pitch : 0, 3 * p.pitch, at);
      clear(p.frame, p.channels, p.pitch, at + 3 * frame);
      clear(p.frame, p.channels, p.pitch, at + 4 * frame);
      if (projects_) {
        clear(p.frame, p.inputs, p.inputs, at + 5 * frame);
      }
    });
    recomputed_ = Buffer<T>(recompute_ ? p.batch * chunk_ * kept_size() : 0);
  }

  void run_all() {
    for (int64_t end = p_.steps; end > 0; end = first_) {
      first_ = std::max<int64_t>(0, end - chunk_);
      schedule_.run(stages(end));
      std::vector<Step<T>> steps;
      for (int64_t b = 0; b < p_.batch; ++b) {
        for (int64_t t = first_; t < end; ++t) {
          if (!codes_.hold(b, t)) {
            steps.push_back(step(b, t));
          }
        }
      }
      if (steps.empty()) {
        continue;
      }
      accumulate<T>(p_, targets_, steps);
      deal(static_cast<int64_t>(bias_sums_.size()) / kColumns, [&](int64_t, int64_t block) {
        for (const Step<T>& step : steps) {
          add_pixels(p_.frame, step.da + block * kColumns, 3 * p_.pitch, &bias_sums_[block * kColumns]);
        }
      });
    }
    for (auto& target : targets_) {
      const Weights<const T> like = weights<T>(target.weight);
      target.gradient.template write<T>({mutable_data<T>(target.weight), like.n, like.k, like.tap});
    }
    if (wanted_.dbias.has_value()) {
      T* dbias = mutable_data<T>(*wanted_.dbias);
      for (int64_t i = 0; i < 3 * p_.channels; ++i) {
        dbias[i] = static_cast<T>(bias_sums_[i / p_.channels * p_.pitch + i % p_.channels]);
      }
    }
  }

 private:
  int64_t plane() const {
    return p_.pixels() * p_.pitch;
  }
  int64_t kept_size() const {
    return 3 * p_.pixels() * p_.channels;
  }
  // Whether any gradient but that of C is wanted: those need the first step's gradient of r.
  bool wants_r() const {
    return wanted_.dx.has_value() || wanted_.dh0 || wanted_.dW.has_value() || wanted_.dU.has_value() ||
           wanted_.dbias.has_value();
  }
  A* dh(int64_t b) {
    return dh_.data() + b * plane();
  }
  A* scratch(int64_t slot) {
    return scratch_.data() + slot * scratch_size_;
  }
  Step<T> step(int64_t b, int64_t t) {
    const int64_t i = b * chunk_ + t - first_, frame = p_.frame.pixels() * p_.pitch;
    A* at = work_.data() + i * step_size_;
    T* kept = recompute_ ? recomputed_.data() + i * kept_size() : kept_ + (b * p_.steps + t) * kept_size();
    return {at, at + 3 * frame, at + 4 * frame, at + 5 * frame, kept};
  }
  // Frames of `work_` of some samples at a step, and planes in scratch.
  Batch batch(const Samples& samples) const {
    return {samples.count, chunk_ * step_size_, plane_size_};
  }
  // f(pixel of a frame, offset in a plane, offset in the kept activations) for the start of every row.
  template <class F>
  void each_row(const Part& part, F f) const {
    for (int64_t row = part.row_begin; row < part.row_end; ++row) {
      f(p_.frame.pixel(row), row * width_ * p_.pitch + part.channel_begin,
        row * width_ * p_.channels + part.channel_begin);
    }
  }

  std::vector<Stage> stages(int64_t end) {
    std::vector<Stage> found;
    if (end == p_.steps) {
      found.push_back([this](int64_t, const Samples& samples, const Part& part) {
        for (int64_t b = samples.begin; b < samples.end(); ++b) {
          dhs_.template rows<Move::in>(b, 0, p_, part, dh(b), p_.pitch, false);
        }
      });
    }
    found.push_back([this, end](int64_t, const Samples& samples, const Part& part) {
      for (int64_t b = samples.begin; b < samples.end(); ++b) {
        for (int64_t t = first_; t < end; ++t) {
          load(b, t, part);
        }
        if (!recompute_) {
          update(b, end - 1, part);
        }
      }
    });
    for (int64_t t = first_; recompute_ && t < end; ++t) {
      const bool zero = t == 0 && !has_h0_;
      found.push_back([this, zero, t](int64_t slot, const Samples& samples, const Part& part) {
        if (codes_.hold(samples.begin, t)) {
          return;
        }
        const Step<T> first = step(samples.begin, t);
        A* xps = xp_.data() + schedule_.workspace(slot, samples) * cell_->xp_size();
        if (projects_) {
          cell_->project(first.x, xps, {samples.count, chunk_ * step_size_, cell_->xp_size()}, part, scratch(slot));
        }
        cell_->convolve_h(first.h, samples.count, chunk_ * step_size_, zero || codes_.restart(samples.begin, t), part,
                          scratch(slot));
        for (int64_t i = 0; i < samples.count; ++i) {
          const Step<T> s = step(samples.begin + i, t);
          A* xp = xps + i * cell_->xp_size();
          if (!projects_) {
            cell_->take(xs_, samples.begin + i, t, xp, part);
          }
          cell_->gates(xp, cell_->planes(scratch(slot), i, part), s.h, s.rh, s.kept, part);
        }
      });
      found.push_back([this, zero, t, end](int64_t slot, const Samples& samples, const Part& part) {
        const A* xps = xp_.data() + schedule_.workspace(slot, samples) * cell_->xp_size();
        const bool hold = codes_.hold(samples.begin, t);
        if (!hold) {
          cell_->convolve_rh(step(samples.begin, t).rh, samples.count, chunk_ * step_size_,
                             zero || codes_.restart(samples.begin, t), part, scratch(slot));
        }
        for (int64_t i = 0; i < samples.count; ++i) {
          if (!hold) {
            cell_->candidate(xps + i * cell_->xp_size(), cell_->planes(scratch(slot), i, part), nullptr,
                             step(samples.begin + i, t).kept, part);
          }
          if (t == end - 1) {
            update(samples.begin + i, t, part);
          }
        }
      });
    }
    for (int64_t t = end - 1; t >= first_; --t) {
      found.push_back([this, t](int64_t slot, const Samples& samples, const Part& part) { reset(slot, samples, t, part); });
      found.push_back([this, t](int64_t slot, const Samples& samples, const Part& part) {
        if (t > 0 || wanted_.dh0) {
          carry(slot, samples, t, part);
        }
        for (int64_t b = samples.begin; t > first_ && b < samples.end(); ++b) {
          update(b, t - 1, part);
        }
      });
    }
    found.push_back([this, end](int64_t slot, const Samples& samples, const Part& part) {
      for (int64_t b = samples.begin; first_ == 0 && wanted_.dh0 && b < samples.end(); ++b) {
        dhs_.template rows<Move::out>(b, 0, p_, part, dh(b), p_.pitch, false);
      }
      for (int64_t t = first_; dxs_.has_value() && t < end; ++t) {
        if (!projects_) {
          give(samples, t, part);
        } else if (const Part share = p_.inputs_of(part, through_w_->panel_width()); share.channels() > 0) {
          inputs(slot, samples, t, share);
        }
      }
    });
    return found;
  }

  // The frames of h_{t-1}, x and, where r is at hand, r.h.
  void load(int64_t b, int64_t t, const Part& part) {
    if (codes_.hold(b, t)) {
      return;
    }
    const Step<T> s = step(b, t);
    if (codes_.restart(b, t)) {
      clear(p_, part, s.h, p_.pitch);
    } else if (t > 0) {
      outs_.template rows<Move::in>(b, t - 1, p_, part, s.h, p_.pitch, true);
    } else if (has_h0_) {
      h0s_.template rows<Move::in>(b, 0, p_, part, s.h, p_.pitch, true);
    } else {
      clear(p_, part, s.h, p_.pitch);
    }
    if (!recompute_) {
      each_row(part, [&](int64_t pixel, int64_t, int64_t kept) {
        const int64_t lane = pixel * p_.pitch + part.channel_begin;
        run<StepReset<T>>(s.kept + kept_size() / 3 + kept, s.h + lane, s.rh + lane, width_, part.channels(), p_.pitch,
                          p_.channels);
      });
    }
    if (projects_ && (recompute_ || wanted_.dW.has_value())) {
      xs_.template rows<Move::in>(b, t, p_, p_.inputs_of(part), s.x, p_.inputs, true);
    }
  }

  // Adds the gradient of out_t to dh; then the gradients of z and c.
  void update(int64_t b, int64_t t, const Part& part) {
    const Step<T> s = step(b, t);
    if (has_dout_) {
      douts_.template rows<Move::add>(b, t, p_, part, dh(b), p_.pitch, false);
    }
    if (codes_.hold(b, t)) {
      return;  // dh is that of the state before
    }
    each_row(part, [&](int64_t pixel, int64_t plane, int64_t kept) {
      A* da = s.da + pixel * 3 * p_.pitch + part.channel_begin;
      run<StepUpdateBackward<T>>(s.kept + kept, s.kept + 2 * (kept_size() / 3) + kept,
                                 s.h + pixel * p_.pitch + part.channel_begin, dh(b) + plane, da, da + 2 * p_.pitch,
                                 width_, part.channels(), p_.pitch, p_.channels, 3 * p_.pitch);
    });
  }

  // Through C to r.h: the gradient of r, and what reaches h_{t-1} by it.
  void reset(int64_t slot, const Samples& samples, int64_t t, const Part& part) {
    if (codes_.hold(samples.begin, t)) {
      return;
    }
    A* const planes = scratch(slot);
    if ((t == 0 && !(has_h0_ && wants_r())) || codes_.restart(samples.begin, t)) {
      std::fill_n(planes, samples.count * plane_size_, A(0));  // r acted on a zero state
    } else {
      through_c_(step(samples.begin, t).da + 2 * p_.pitch, batch(samples), part, planes, 0,
                 planes + samples.count * plane_size_);
    }
    for (int64_t b = samples.begin; b < samples.end(); ++b) {
      const Step<T> s = step(b, t);
      const A* drh = planes + (b - samples.begin) * plane_size_ - part.row_begin * width_ * p_.pitch;
      each_row(part, [&](int64_t pixel, int64_t plane, int64_t kept) {
        run<StepGatesBackward<T>>(drh + plane, s.kept + kept_size() / 3 + kept,
                                  s.h + pixel * p_.pitch + part.channel_begin, dh(b) + plane,
                                  s.da + (pixel * 3 + 1) * p_.pitch + part.channel_begin, width_, part.channels(),
                                  p_.pitch, p_.channels, 3 * p_.pitch);
      });
    }
  }

  // Through U to h_{t-1}, unless the step forgot it.
  void carry(int64_t slot, const Samples& samples, int64_t t, const Part& part) {
    if (codes_.restart(samples.begin, t)) {
      for (int64_t pixel = part.row_begin * width_; pixel < part.row_end * width_; ++pixel) {
        std::fill_n(dh(samples.begin) + pixel * p_.pitch + part.channel_begin, part.channels(), A(0));
      }
      return;
    }
    if (codes_.hold(samples.begin, t)) {
      return;
    }
    A* const through = scratch(slot);
    through_u_(step(samples.begin, t).da, batch(samples), part, through, 0, through + samples.count * plane_size_);
    for (int64_t b = samples.begin; b < samples.end(); ++b) {
      run<Add<A>>(through + (b - samples.begin) * plane_size_ + part.channel_begin, p_.pitch,
                  dh(b) + part.row_begin * width_ * p_.pitch + part.channel_begin,
                  (part.row_end - part.row_begin) * width_, part.channels(), p_.pitch);
    }
  }

  // Through W to x.
  void inputs(int64_t slot, const Samples& samples, int64_t t, const Part& part) {
    A* const through = scratch(slot);
    if (codes_.hold(samples.begin, t)) {
      std::fill_n(through, plane_size_, A(0));
    } else {
      (*through_w_)(step(samples.begin, t).da, batch(samples), part, through, 0, through + samples.count * plane_size_);
    }
    for (int64_t b = samples.begin; b < samples.end(); ++b) {
      A* dx = through + (b - samples.begin) * plane_size_ - part.row_begin * width_ * x_pitch_;
      dxs_->template rows<Move::out>(b, t, p_, part, dx, x_pitch_, false);
    }
  }

  // To the projection given instead of x.
  void give(const Samples& samples, int64_t t, const Part& part) {
    for (int64_t gate = 0; gate < 3; ++gate) {
      for (int64_t b = samples.begin; b < samples.end(); ++b) {
        if (codes_.hold(b, t)) {
          clear(p_, part, step(b, t).da + gate * p_.pitch, 3 * p_.pitch);
        }
        dxs_->from(gate * p_.channels)
            .template rows<Move::out>(b, t, p_, part, step(b, t).da + gate * p_.pitch, 3 * p_.pitch, true);
      }
    }
  }

  const Problem& p_;
  const Gradients& wanted_;
  bool has_h0_, recompute_, projects_;
  int64_t width_, x_pitch_;
  Convolution<A> through_u_, through_c_;
  std::optional<Convolution<A>> through_w_;
  std::optional<Cell<T>> cell_;
  Schedule schedule_;
  Tensor x_, out_, dout_, h0_;  // as given, or copies with dense frames
  Sequence<const T> xs_, outs_, douts_;
  Sequence<const A> h0s_;
  Sequence<A> dhs_;
  std::optional<Sequence<T>> dxs_;
  bool has_dout_;
  Codes codes_;
  T* kept_;
  std::vector<Target<T>> targets_;
  std::vector<double> bias_sums_;

  Buffer<A> dh_, work_, scratch_, xp_;
  Buffer<T> recomputed_;
  int64_t plane_size_, scratch_size_, step_size_, chunk_;
  int64_t first_ = 0;  // step of the chunk at work
};

}  // namespace

template <class T>
void backward(const Problem& problem, const Operands& operands, const Tensor& gates, Tensor& dh, Gradients& wanted) {
  Backward<T>(problem, operands, gates, dh, wanted).run_all();
}

#define CONVRNN_INSTANTIATE(T) \
  template void backward<T>(const Problem&, const Operands&, const Tensor&, Tensor&, Gradients&);
CONVRNN_INSTANTIATE(float)
CONVRNN_INSTANTIATE(double)
CONVRNN_INSTANTIATE(c10::BFloat16)
CONVRNN_INSTANTIATE(c10::Half)
#undef CONVRNN_INSTANTIATE

}  // namespace convrnn
