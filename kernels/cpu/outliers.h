// Outliers in a frame, which Winograd's tiles must not hold. A transform mixes the pixels of a patch: every output of the tile is
// rounded in proportion to the largest pixel of the patch, whether it sees that pixel or not, so that a fill value such as
// -9999 would spoil its neighbours. A tile is computed directly unless its largest pixel is small beside what each of its
// outputs sums, or beside what a usual output of the frame sums.
//
// A pixel's sum is that of its magnitudes over the channels. Its rounding errors in a product with the weights add up as independent ones
// do, so its size is the square root of the sum of squares. Both take the weights of all channels for alike: an outlier in a channel with
// large weights may hide behind another with far larger values and far smaller weights. What costs little finds that a row of tiles is
// usual: eight sums a frame, the third smallest of which is below the median of frames that are not made to have it otherwise,
// and the sum of squares of each row of pixels. Only where that fails are sums of all pixels looked at. What a tile is found to be
// depends on its frame alone, not on the tiles and frames that are computed beside it.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "convolution.h"
#include "math.h"

namespace convrnn {

// Of an element, and of two of such.
template <class A>
struct Square {
  static CONVRNN_INLINE A of(A x) {
    return x * x;
  }
  static CONVRNN_INLINE A join(A a, A b) {
    return a + b;
  }
};

// The larger magnitude, NaN the largest of all: the order of their bits as integers.
template <class A>
struct Magnitude {
  static CONVRNN_INLINE A of(A x) {
    return std::fabs(x);
  }
  static CONVRNN_INLINE A join(A a, A b) {
    return bits(a) > bits(b) ? a : b;
  }
};

template <class A>
struct SumOfMagnitudes : Magnitude<A> {
  static CONVRNN_INLINE A join(A a, A b) {
    return a + b;
  }
};

template <class Of, class A>
CONVRNN_INLINE A join_all(A (&part)[kColumns]) {
  for (int64_t half = kColumns / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) {
      part[i] = Of::join(part[i], part[i + half]);
    }
  }
  return part[0];
}

// Joined over the lanes of all pixels.
template <class A, class Of>
struct Reduce {
  static CONVRNN_INLINE void run(const A* from, int64_t pitch, int64_t pixels, int64_t lanes, A* found) {
    A part[kColumns] = {}, rest = 0;
    if (lanes == pitch) {  // one run of lanes
      for (int64_t i = pixels * lanes / kColumns * kColumns; i < pixels * lanes; ++i) {
        rest = Of::join(rest, Of::of(from[i]));
      }
      pixels = pixels * lanes / kColumns;
      lanes = pitch = kColumns;
    }
    const int64_t whole = lanes / kColumns * kColumns;
    constexpr int kAtOnce = 8;  // pixels, which are joined before they meet what is in memory
    for (int64_t n = kAtOnce; pixels > 0; pixels -= n, from += n * pitch) {
      n = pixels < kAtOnce ? 1 : kAtOnce;
      for (int64_t first = 0; first < whole; first += kColumns) {
        const A* at = from + first;
        if (n == kAtOnce) {
          CONVRNN_LANES
          for (int64_t i = 0; i < kColumns; ++i) {
            A x[kAtOnce];
            CONVRNN_UNROLL
            for (int j = 0; j < kAtOnce; ++j) {
              x[j] = Of::of(at[j * pitch + i]);
            }
            const A low = Of::join(Of::join(x[0], x[1]), Of::join(x[2], x[3]));
            const A high = Of::join(Of::join(x[4], x[5]), Of::join(x[6], x[7]));
            part[i] = Of::join(part[i], Of::join(low, high));
          }
        } else {
          CONVRNN_LANES
          for (int64_t i = 0; i < kColumns; ++i) {
            part[i] = Of::join(part[i], Of::of(at[i]));
          }
        }
      }
      for (int64_t j = 0; j < n && whole < lanes; ++j) {
        const A* at = from + j * pitch + whole;
        const auto left = static_cast<int32_t>(lanes - whole);
        CONVRNN_LANES
        for (int32_t i = 0; i < kColumns; ++i) {
          part[i] = Of::join(part[i], i < left ? Of::of(at[i]) : A(0));
        }
      }
    }
    *found = Of::join(join_all<Of>(part), rest);
  }
};

constexpr size_t kSampled = 8;

// Offsets of the first lanes of some pixels, spread over the frame as the points of the sequence R2 are.
inline std::array<int64_t, kSampled> sampled_pixels(const Frame& frame, int64_t pitch) {
  std::array<int64_t, kSampled> offsets;
  for (size_t i = 0; i < offsets.size(); ++i) {
    const auto along = [&](double step, int64_t size) {
      const double at = 0.5 + step * static_cast<double>(i + 1);
      return static_cast<int64_t>((at - std::floor(at)) * static_cast<double>(size));
    };
    const int64_t row = along(0.7548776662466927, frame.size.rows());
    offsets[i] = (frame.pixel(row) + along(0.5698402909980532, frame.size.width)) * pitch;
  }
  return offsets;
}

template <class A>
struct SampledSums {
  static CONVRNN_INLINE void run(const A* frame, const int64_t* offsets, int64_t lanes, A* sums) {
    for (size_t i = 0; i < kSampled; ++i) {
      Reduce<A, SumOfMagnitudes<A>>::run(frame + offsets[i], lanes, 1, lanes, sums + i);
      sums[i] = sums[i] >= 0 ? sums[i] : std::numeric_limits<A>::infinity();
    }
  }
};

// The sums of magnitudes of those pixels, the smallest first; infinity for NaN.
template <class A>
std::array<A, kSampled> sampled_sums(const A* frame, const std::array<int64_t, kSampled>& offsets, int64_t lanes) {
  std::array<A, kSampled> sums;
  run<SampledSums<A>>(frame, offsets.data(), lanes, sums.data());
  std::sort(sums.begin(), sums.end());
  return sums;
}

// Beyond, a transform might overflow where the definition does not.
template <class A>
constexpr A kMost = std::numeric_limits<A>::max() * A(1e-8);

// Looks for outliers in frames, one after the other, from the first row of a part on.
template <class A>
class Outliers {
 public:
  Outliers(const ConvShape& shape, int64_t tile)
      : shape_(shape),
        tile_(tile),
        rows_(tile + 3 * Blocks(shape.kernel).down - 1),
        columns_(tile + 3 * Blocks(shape.kernel).across - 1),
        sampled_(sampled_pixels(shape.frame, shape.in.pixel)) {
    const int64_t depth = tile == 4 ? std::min<int64_t>(64, shape.block_lanes()) : shape.block_lanes();
    ratio_ = (tile == 4 ? kRatio : 6 * kRatio) / std::sqrt(static_cast<A>(depth));
  }

  // The frame to look at, and the first row of its tiles.
  void begin(const A* frame, int64_t row) {
    frame_ = frame;
    const A usual = sampled_sums(frame, sampled_, shape_.in.lanes())[kSampled / 4];
    usual_ = usual <= kMost<A> ? usual * static_cast<A>(shape_.kernel.pixels()) : A(0);
    first_ = row - shape_.before.height;
    squares_.clear();
    squares_.reserve(shape_.frame.height);
    constexpr int64_t kSmall = 256;  // pixels of a frame that may be usual as a whole
    const Size& size = shape_.frame.size;
    none_ = false;
    if (size.pixels() <= kSmall && comparable()) {
      A squares;  // of the zeros between rows too
      run<Reduce<A, Square<A>>>(pixel(0, 0), shape_.in.pixel, (size.height - 1) * shape_.frame.width + size.width, shape_.in.lanes(),
                                &squares);
      none_ = squares <= limit();
    }
  }

  // Whether the tiles of a row are surely without. Rows must come in order.
  bool none(int64_t row) {
    if (none_ || !comparable()) {
      return none_;
    }
    const int64_t begin = row - shape_.before.height - first_;
    while (static_cast<int64_t>(squares_.size()) < begin + rows_) {
      squares_.push_back(squares_of(first_ + static_cast<int64_t>(squares_.size())));
    }
    const A most = limit();
    return std::all_of(squares_.begin() + begin, squares_.begin() + begin + rows_, [&](A squares) { return squares <= most; });
  }

  // Whether the tile that begins at this pixel holds one.
  bool in_tile(int64_t row, int64_t column) {
    const Size &frame = shape_.frame.size, &kernel = shape_.kernel;
    sums_.resize(rows_ * columns_);
    A size = 0;  // of the largest pixel
    for (int64_t i = 0; i < rows_ * columns_; ++i) {
      const A* at = pixel(row - shape_.before.height + i / columns_, column - shape_.before.width + i % columns_);
      const int64_t lanes = shape_.in.lanes();
      A largest;
      run<Reduce<A, SumOfMagnitudes<A>>>(at, lanes, int64_t{1}, lanes, &sums_[i]);
      run<Reduce<A, Magnitude<A>>>(at, lanes, int64_t{1}, lanes, &largest);
      if (!(sums_[i] <= kMost<A>)) {
        return true;
      }
      size = std::max(size, std::sqrt(sums_[i]) * std::sqrt(largest));  // at least the root of the sum of squares, which might overflow
    }
    // Of what the outputs sum the least, without the largest third of each: the weights of a few pixels may be next to nothing.
    A least = std::numeric_limits<A>::infinity();
    window_.resize(kernel.pixels());
    const auto counted = window_.end() - kernel.pixels() / 3;
    for (int64_t y = 0; y < tile_ && row + y < frame.height; ++y) {
      for (int64_t x = 0; x < tile_ && column + x < frame.width; ++x) {
        for (int64_t tap = 0; tap < kernel.pixels(); ++tap) {
          window_[tap] = sums_[(y + tap / kernel.width) * columns_ + x + tap % kernel.width];
        }
        std::nth_element(window_.begin(), counted - 1, window_.end());
        least = std::min(least, std::accumulate(window_.begin(), counted, A(0)));
      }
    }
    return size > ratio_ * std::max(least, usual_);
  }

 private:
  // A pixel whose size is this part of what an output sums, times the root of the depth of the products' sums, was found to put an
  // output off by 1e-5 of that at the most, in float32: half of what is promised (kernels/README.md). With tiles of 2x2 eight times as large.
  static constexpr A kRatio = 4;

  // Whether the squares of usual pixels are numbers yet, and what those of a row may come to.
  bool comparable() const {
    return usual_ >= A(1e-15) && usual_ <= A(1e15);
  }
  A limit() const {
    return ratio_ * usual_ * ratio_ * usual_;
  }
  const A* pixel(int64_t row, int64_t column) const {
    return frame_ + (shape_.frame.pixel(0, row) + column) * shape_.in.pixel;
  }
  // The largest sum of squares of some pixels of a row: not of all, for a wide row sums many that are usual.
  A squares_of(int64_t row) const {
    constexpr int64_t kPixels = 64;
    const Size& size = shape_.frame.size;
    A most = 0;
    for (int64_t x = 0; row >= 0 && row < size.height && x < size.width; x += kPixels) {
      A squares;
      run<Reduce<A, Square<A>>>(pixel(row, x), shape_.in.pixel, std::min(kPixels, size.width - x), shape_.in.lanes(), &squares);
      most = squares <= most ? most : squares;
      if (!(squares >= 0)) {
        return squares;
      }
    }
    return most;
  }

  ConvShape shape_;
  int64_t tile_, rows_, columns_;  // of a patch, that of all blocks
  std::array<int64_t, kSampled> sampled_;
  A ratio_;

  const A* frame_ = nullptr;
  A usual_ = 0;
  bool none_ = false;       // in the whole frame
  int64_t first_ = 0;       // row of squares_
  std::vector<A> squares_, sums_, window_;
};

// What a weight gradient must know of the magnitudes in some lanes of a frame.
template <class A>
struct Magnitudes {
  A largest = 0;  // NaN or infinity where one is
  A usual = 0;    // the mean over the frame, but for what is unusual

  Magnitudes() = default;
  Magnitudes(const Frame& size, const A* frame, const std::array<int64_t, kSampled>& sampled, int64_t pitch, int64_t lanes) {
    const int64_t first = size.pixel(0), last = size.pixel(size.size.rows() - 1) + size.size.width;  // zeros among them
    run<Reduce<A, Magnitude<A>>>(frame + first * pitch, pitch, last - first, lanes, &largest);
    // A quarter of the way up as elsewhere, but of those that are not zero, for a sum over the frame leaves these out.
    const std::array<A, kSampled> sums = sampled_sums(frame, sampled, lanes);
    const auto some = std::upper_bound(sums.begin(), sums.end(), A(0));
    if (some != sums.end()) {
      const auto count = sums.end() - some;
      const A lane = some[count / 4] / static_cast<A>(lanes);
      usual = lane <= kMost<A> ? lane * static_cast<A>(count) / A(kSampled) : A(0);
    }
  }
  bool finite() const {
    return std::isfinite(largest);
  }
  // Of these lanes and others: usual is what is usual in either.
  void join(const Magnitudes& other) {
    usual = largest == 0 ? other.usual : other.largest == 0 ? usual : std::min(usual, other.usual);
    largest = Magnitude<A>::join(largest, other.largest);
  }
};

}  // namespace convrnn
