// One step of GRU-RCN on the CPU.
#pragma once

#include "sequence.h"

namespace convrnn {

// The convolutions and gates of a step, over the rows and channels of a part. Planes hold pre-activations as
// [gate][pixel][pitch], activations are kept as [z, r, c][pixel][channel], or [z, r, c][pixel][pitch] where no backward reads
// them: whole vectors are faster.
template <class T>
class Cell {
 public:
  using A = acc_t<T>;

  Cell(const Problem& p, const std::optional<Tensor>& W, const Tensor& U, const Tensor& C,
       const std::optional<Tensor>& bias, bool pads_kept)
      : p_(p),
        kept_pitch_(pads_kept ? p.pitch : p.channels),
        u_({p.frame, p.u, false, p.state(), p.planes(2)}, weights<T>(U)),
        c_({p.frame, p.c, false, p.state(), p.planes(1)}, weights<T>(C)),
        bias_(bias.has_value() ? 3 * p.channels : 0) {
    if (W.has_value()) {
      w_.emplace(ConvShape{p.frame, p.w, false, p.input(), p.planes(3)}, weights<T>(*W));
    }
    if (bias.has_value()) {
      std::copy_n(data<T>(*bias), 3 * p.channels, bias_.data());
    }
  }

  Schedule schedule(bool alone) const {
    return {p_, u_.packed_bytes(), u_.panel_width(), alone};
  }
  int64_t scratch_size(const Schedule& schedule) const {
    const int64_t project = w_.has_value() ? w_->scratch_size() : 0;
    return schedule.together() * planes_size(schedule.most_rows()) +
           std::max({project, u_.scratch_size(), c_.scratch_size()});
  }
  int64_t xp_size() const {
    return 3 * p_.pixels() * p_.pitch;
  }
  int64_t kept_size() const {
    return 3 * p_.pixels() * kept_pitch_;
  }

  bool projects() const {
    return w_.has_value();
  }
  // From the frames x to the planes xp of some samples.
  void project(const A* x, A* xp, const Batch& samples, const Part& part, A* scratch) const {
    const int64_t first = part.row_begin * p_.frame.size.width, last = part.row_end * p_.frame.size.width;
    (*w_)(x, samples, part, xp + first * p_.pitch, p_.pixels() * p_.pitch, scratch);
    for (int64_t i = 0; bias_.data() != nullptr && i < 3 * samples.frames; ++i) {
      const int64_t gate = i % 3;
      run<Add<A>>(bias_.data() + gate * p_.channels + part.channel_begin, int64_t{0},
                  xp + i / 3 * samples.out_step + (gate * p_.pixels() + first) * p_.pitch + part.channel_begin, last - first,
                  part.channels(), p_.pitch);
    }
  }

  // xp of a step from the projection given instead of x.
  void take(const Sequence<const T>& projection, int64_t b, int64_t t, A* xp, const Part& part) const {
    for (int64_t gate = 0; gate < 3; ++gate) {
      projection.from(gate * p_.channels)
          .template rows<Move::in>(b, t, p_, part, xp + gate * p_.pixels() * p_.pitch, p_.pitch, false);
    }
  }

  // What U makes of the frames h, C of the frames rh, of some samples `step` elements apart; `zero` where they are zero. The
  // planes lie at the start of scratch, those of sample i at planes(scratch, i, part).
  void convolve_h(const A* h, int64_t samples, int64_t step, bool zero, const Part& part, A* scratch) const {
    convolve(u_, h, samples, step, zero, 2, part, scratch);
  }
  void convolve_rh(const A* rh, int64_t samples, int64_t step, bool zero, const Part& part, A* scratch) const {
    convolve(c_, rh, samples, step, zero, 1, part, scratch);
  }
  A* planes(A* scratch, int64_t sample, const Part& part) const {
    return scratch + sample * 2 * plane_size(part);
  }

  // rh and the kept z and r from xp, the planes of U and the frame h.
  void gates(const A* xp, const A* planes, const A* h, A* rh, T* kept, const Part& part) const {
    rows(part, [&](int64_t frame, int64_t plane, int64_t local, int64_t kept_row) {
      run<StepGates<T>>(xp + plane, p_.pixels() * p_.pitch, planes + local, plane_size(part), h + frame, rh + frame,
                        kept + kept_row, kept + kept_row + kept_size() / 3, p_.frame.size.width, lanes(part), p_.pitch,
                        kept_pitch_);
    });
  }

  // Zeros for the kept z, r and c, of a step that is held.
  void keep_nothing(T* kept, const Part& part) const {
    rows(part, [&](int64_t, int64_t, int64_t, int64_t kept_row) {
      for (int64_t gate = 0; gate < 3; ++gate) {
        T* pixel = kept + gate * (kept_size() / 3) + kept_row;
        for (int64_t x = 0; x < p_.frame.size.width; ++x, pixel += kept_pitch_) {
          std::fill_n(pixel, part.channels(), T(0.f));
        }
      }
    });
  }

  // The kept c from xp and the plane of C, and, if h is given, h' from h.
  void candidate(const A* xp, const A* planes, A* h, T* kept, const Part& part) const {
    T* kept_c = kept + 2 * (kept_size() / 3);
    rows(part, [&](int64_t frame, int64_t plane, int64_t local, int64_t kept_row) {
      run<StepCandidate<T>>(xp + 2 * p_.pixels() * p_.pitch + plane, planes + local, kept_c + kept_row,
                            p_.frame.size.width, lanes(part), p_.pitch, kept_pitch_);
      if (h != nullptr) {
        run<StepUpdate<T>>(kept + kept_row, kept_c + kept_row, h + frame, p_.frame.size.width, lanes(part), p_.pitch,
                           kept_pitch_);
      }
    });
  }

 private:
  // Lanes of a pixel, with those that pad the last channels where the kept ones have them.
  int64_t lanes(const Part& part) const {
    return (part.channel_end == p_.channels ? kept_pitch_ : part.channel_end) - part.channel_begin;
  }
  int64_t planes_size(int64_t rows) const {
    return 2 * rows * p_.frame.size.width * p_.pitch;
  }
  int64_t plane_size(const Part& part) const {
    return (part.row_end - part.row_begin) * p_.frame.size.width * p_.pitch;
  }
  // Planes of the part at the start of scratch, what the convolution needs behind them.
  void convolve(const Convolution<A>& convolution, const A* frames, int64_t samples, int64_t step, bool zero, int64_t gates,
                const Part& part, A* scratch) const {
    if (!zero) {
      return convolution(frames, {samples, step, 2 * plane_size(part)}, part, scratch, plane_size(part),
                         planes(scratch, samples, part));
    }
    for (int64_t i = 0; i < samples; ++i) {
      std::fill_n(planes(scratch, i, part), gates * plane_size(part), A(0));
    }
  }
  // f(offset in a padded frame, in a plane, in the part's plane, in the kept activations) of every row.
  template <class F>
  void rows(const Part& part, F f) const {
    const int64_t width = p_.frame.size.width, channel = part.channel_begin;
    for (int64_t row = part.row_begin; row < part.row_end; ++row) {
      f(p_.frame.pixel(row) * p_.pitch + channel, row * width * p_.pitch + channel,
        (row - part.row_begin) * width * p_.pitch + channel, row * width * kept_pitch_ + channel);
    }
  }

  const Problem& p_;
  const int64_t kept_pitch_;
  std::optional<Convolution<A>> w_;
  Convolution<A> u_, c_;
  Buffer<A> bias_;
};

}  // namespace convrnn
