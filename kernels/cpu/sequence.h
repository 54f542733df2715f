// How the whole-sequence op goes over its work: sizes, which thread does what, and frames of tensors as rows of lanes.
#pragma once

#include <atomic>
#include <functional>
#include <vector>

#include "convolution.h"
#include "gru_steps.h"
#include "tensor.h"
#include "transpose.h"
#include "winograd.h"

namespace convrnn {

inline Size frame_size(const Tensor& x, int64_t first) {
  Size size{1, 1, 1};
  int64_t* const sizes[] = {&size.width, &size.height, &size.depth};
  for (int64_t d = x.dim() - 1, i = 0; d >= first; --d, ++i) {
    *sizes[i] = x.size(d);
  }
  return size;
}

// Zeros for a padded frame of `pitch` lanes a pixel, of which `channels` are written elsewhere.
template <class A>
void clear(const Frame& frame, int64_t channels, int64_t pitch, A* lanes) {
  const int64_t row = frame.width * pitch, inside = channels == pitch ? frame.size.width : 0;
  for (int64_t y = 0; y < frame.size.depth * frame.height; ++y, lanes += row) {
    const int64_t of_plane = y % frame.height - frame.top;
    if (of_plane < 0 || of_plane >= frame.size.height || inside == 0) {
      std::fill_n(lanes, row, A(0));
    } else {
      std::fill_n(lanes, frame.left * pitch, A(0));
      std::fill_n(lanes + (frame.left + inside) * pitch, (frame.width - frame.left - inside) * pitch, A(0));
    }
  }
}

// What follows from the shapes.
struct Problem {
  int64_t batch, steps, inputs, channels, pitch;  // pitch: channels, padded to the convolutions' blocks
  Size w, u, c;  // kernel sizes
  Frame frame;

  // Without W, x is the projection, as if a kernel of one pixel had nothing to add to the frame's zeros.
  Problem(const Tensor& x, const std::optional<Tensor>& W, const Tensor& U, const Tensor& C)
      : batch(x.size(0)),
        steps(x.size(1)),
        inputs(x.size(2)),
        channels(C.size(0)),
        pitch(padded(channels)),
        w(W.has_value() ? frame_size(*W, 2) : Size{1, 1, 1}),
        u(frame_size(U, 2)),
        c(frame_size(C, 2)),
        frame(frame_size(x, 3), batch * steps, {w, u, c}) {}

  int64_t pixels() const {
    return frame.size.pixels();
  }
  // The part's share of the input's channels, which begins at a multiple of `panel`.
  Part inputs_of(const Part& part, int64_t panel = 1) const {
    const int64_t panels = (inputs + panel - 1) / panel;
    const auto share = [&](int64_t channel) { return std::min(inputs, channel * panels / channels * panel); };
    return {part.row_begin, part.row_end, share(part.channel_begin), share(part.channel_end)};
  }
  Channels input() const {
    return {1, inputs, inputs, inputs};
  }
  Channels state() const {
    return {1, channels, pitch, pitch};
  }
  // Gates side by side in planes of their own, or in every pixel.
  Channels planes(int64_t gates) const {
    return {gates, channels, pitch, pitch};
  }
  Channels packed(int64_t gates) const {
    return {gates, channels, pitch, 3 * pitch};
  }
};

template <class T>
Weights<const T> weights(const Tensor& w) {
  const int64_t taps = frame_size(w, 2).pixels();
  return {data<T>(w), w.size(1) * taps, taps, 1};
}

// Input and output channels exchanged, taps in reverse: the weights of a data gradient.
template <class T>
Weights<const T> flipped(const Tensor& w) {
  const int64_t taps = frame_size(w, 2).pixels();
  return {data<T>(w) + taps - 1, taps, w.size(1) * taps, -1};
}

// How many calls may run at once.
inline int64_t slots() {
  return torch::stable::get_num_threads();
}

// f(slot, i) for i < count, in runs of neighbours; calls with one slot never overlap.
template <class F>
void spread(int64_t count, F f) {
  const int64_t n = std::min(count, slots());
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      for (int64_t i = slot * count / n; i < (slot + 1) * count / n; ++i) {
        f(slot, i);
      }
    }
  });
}

// f(slot, i) for i < count, each taken by whoever is free: the costly ones should come first.
template <class F>
void deal(int64_t count, F f) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(count, slots()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      for (int64_t i = next++; i < count; i = next++) {
        f(slot, i);
      }
    }
  });
}

// Neighbours in the batch.
struct Samples {
  int64_t begin, count;
  int64_t end() const {
    return begin + count;
  }
};

// A stage of the work on some samples; stages of a sample follow one another, parts of a stage are independent.
using Stage = std::function<void(int64_t slot, const Samples& samples, const Part& part)>;

// A frame in parts: of `height` rows of tiles, and, where these are fewer than the threads, of panels of channels.
struct Split {
  int64_t rows, tile, panels, height;

  int64_t row_parts() const {
    return (rows + height * tile - 1) / (height * tile);
  }
  int64_t width(int64_t batch, int64_t threads) const {  // panels of a part
    const int64_t wanted = (threads + batch * row_parts() - 1) / (batch * row_parts());
    return (panels + wanted - 1) / wanted;
  }
  // Rows times panels of the thread that gets most, as `spread` gives them out.
  int64_t share(int64_t batch, int64_t threads) const {
    const int64_t wide = width(batch, threads), across = (panels + wide - 1) / wide, count = batch * row_parts() * across;
    const int64_t n = std::min(count, threads);
    int64_t most = 0;
    for (int64_t slot = 0; slot < n; ++slot) {
      int64_t sum = 0;
      for (int64_t i = slot * count / n; i < (slot + 1) * count / n; ++i) {
        const int64_t row = i / across % row_parts() * height * tile, first = i % across * wide;
        sum += std::min(height * tile, rows - row) * std::min(wide, panels - first);
      }
      most = std::max(most, sum);
    }
    return most;
  }
};

class Schedule {
 public:
  // `alone`: each stage is given one sample.
  Schedule(const Problem& p, int64_t weight_bytes, int64_t panel, bool alone) : batch_(p.batch) {
    constexpr int64_t kLarge = 1 << 20;  // weights that no second-level cache holds: read them once for many pixels
    const int64_t tile = p.frame.tile, rows = p.frame.size.rows(), across = (p.frame.size.width + tile - 1) / tile;
    const int64_t threads = slots();
    whole_samples_ = batch_ >= threads && (batch_ % threads == 0 || batch_ >= 4 * threads);
    const int64_t tile_rows = (rows + tile - 1) / tile, tiles = weight_bytes > kLarge ? 224 : 28;  // of a part
    const int64_t most = std::min(tile_rows, std::max<int64_t>(1, (tiles + across - 1) / across));
    Split split{rows, tile, (p.pitch + panel - 1) / panel, most};
    if (!whole_samples_ && weight_bytes <= kLarge) {
      while (split.height > 1 && batch_ * split.row_parts() < 2 * threads) {
        split.height = (split.height + 1) / 2;
      }
    } else if (!whole_samples_) {
      // Channels are shared; rows only where that leaves a thread less to do, for each part reads the weights of its channels.
      for (int64_t n = 1; n <= threads; ++n) {
        Split other = split;
        other.height = std::min(most, (tile_rows + n - 1) / n);
        split = other.share(batch_, threads) < split.share(batch_, threads) ? other : split;
      }
    }
    const int64_t width = whole_samples_ ? split.panels : split.width(batch_, threads);
    for (int64_t row = 0; row < rows; row += split.height * tile) {
      for (int64_t channel = 0; channel < p.channels; channel += width * panel) {
        parts_.push_back({row, std::min(rows, row + split.height * tile), channel, std::min(p.channels, channel + width * panel)});
      }
    }
    if (whole_samples_ && parts_.size() == 1 && !alone) {
      // Half of the tiles that are transformed at a time: with all of them the state would leave the second-level cache.
      together_ = std::clamp<int64_t>(winograd::most_tiles(tile) / 2 / (tile_rows * across), 1, batch_ / threads);
    }
  }

  int64_t most_rows() const {
    return parts_.front().row_end;
  }
  // The most samples that a stage is given at once.
  int64_t together() const {
    return together_;
  }
  // Workspaces for samples under way, and that of the first of those that a stage is given; the others' follow.
  int64_t workspaces() const {
    return whole_samples_ ? slots() * together_ : batch_;
  }
  int64_t workspace(int64_t slot, const Samples& samples) const {
    return whole_samples_ ? slot * together_ : samples.begin;
  }

  void run(const std::vector<Stage>& stages) const {
    if (whole_samples_) {
      const int64_t each = (batch_ + slots() - 1) / slots();  // samples of a thread
      const int64_t groups = std::min(batch_, (each + together_ - 1) / together_ * slots());
      return spread(groups, [&](int64_t slot, int64_t group) {
        const int64_t begin = group * batch_ / groups;
        const Samples samples{begin, (group + 1) * batch_ / groups - begin};
        for (const Stage& stage : stages) {
          for (const Part& part : parts_) {
            stage(slot, samples, part);
          }
        }
      });
    }
    const auto count = static_cast<int64_t>(parts_.size());
    for (const Stage& stage : stages) {
      spread(batch_ * count, [&](int64_t slot, int64_t i) { stage(slot, {i / count, 1}, parts_[i % count]); });
    }
  }

 private:
  int64_t batch_;
  bool whole_samples_;
  int64_t together_ = 1;
  std::vector<Part> parts_;
};

// Frames (B, T, C, *S) or, without T, states: dense in either layout, read or written in rows.
template <class T>
struct Sequence {
  T* data;
  int64_t batch, step, pixel, channel;  // strides

  Sequence(const Tensor& x, int64_t channel_dim, bool channels_last)
      : data(const_cast<T*>(static_cast<const T*>(x.const_data_ptr()))),
        batch(x.stride(0)),
        step(channel_dim == 2 ? x.stride(1) : 0) {
    int64_t pixels = numel(shape(x), channel_dim + 1), channels = x.size(channel_dim);
    pixel = channels_last ? channels : 1;
    channel = channels_last ? 1 : pixels;
  }

  // The same frames from a channel on.
  Sequence from(int64_t first) const {
    Sequence rest = *this;
    rest.data += first * channel;
    return rest;
  }

  // The rows and channels of a part, to or from lanes at `to`, its pixel (0, 0) and channel 0; the rows of the lanes lie
  // in a padded frame, or in a plane without zeros.
  template <Move move, class A>
  void rows(int64_t b, int64_t t, const Problem& p, const Part& part, A* to, int64_t pitch, bool padded_rows) const {
    const int64_t width = p.frame.size.width, rows = padded_rows ? 1 : part.row_end - part.row_begin;  // in one go
    T* from = data + b * batch + t * step + part.channel_begin * channel;
    for (int64_t row = part.row_begin; row < part.row_end; row += rows) {
      A* lanes = to + (padded_rows ? p.frame.pixel(row) : row * width) * pitch + part.channel_begin;
      run<Transpose<std::remove_const_t<T>, move>>(from + row * width * pixel, pixel, channel, lanes, rows * width,
                                                   part.channels(), pitch);
    }
  }
};

// Zeros in the rows and channels of a part of a padded frame.
template <class A>
void clear(const Problem& p, const Part& part, A* frame, int64_t pitch) {
  for (int64_t row = part.row_begin; row < part.row_end; ++row) {
    A* lanes = frame + p.frame.pixel(row) * pitch + part.channel_begin;
    for (int64_t x = 0; x < p.frame.size.width; ++x, lanes += pitch) {
      std::fill_n(lanes, part.channels(), A(0));
    }
  }
}

// Steps whose work in progress fills so many bytes at most, and one at least.
inline int64_t chunk_of(int64_t bytes, int64_t step_bytes, int64_t steps) {
  return std::clamp<int64_t>(bytes / std::max<int64_t>(1, step_bytes), 1, std::max<int64_t>(1, steps));
}

// x in frames (C, *S) that are dense in either order of its dimensions.
template <class T>
Sequence<const T> sequence(Tensor& x, int64_t channel_dim) {
  const bool channels_last = is_channels_last(x, channel_dim);
  x = to_layout(x, channel_dim, channels_last);
  return {x, channel_dim, channels_last};
}

}  // namespace convrnn
