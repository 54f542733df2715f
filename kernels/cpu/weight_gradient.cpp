#include "weight_gradient.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <type_traits>

#include "lanes.h"
#include "transpose.h"
#include "winograd.h"

namespace convrnn {

using winograd::most_tiles;
using winograd::plane_size;
using winograd::products;
using winograd::tiles;

namespace {

// Winograd's sums of a weight gradient come in squares of so many input and output lanes: with the tiles of some rows they
// take half a megabyte, or 1.2 with tiles of 4x4.
constexpr int64_t kSquare = 64;
constexpr int64_t kExact = 9 * kSquare * kSquare;  // weights of a square, by taps of a block

// Tiles cost more than in a convolution: their sums are read and written for most_tiles at a time, or as few as come at once, and
// are zeroed and transformed once a call.
int64_t tile_of(const ConvShape& shape, int64_t frames, bool pairs) {
  const Size& size = shape.frame.size;
  const auto cost = [&](int64_t tile, double many) {
    const int64_t at_once = frames * tiles(size.height, tile) * tiles(size.width, tile);
    return ConvShape::Cost{many + 16 / static_cast<double>(at_once), 34};
  };
  return shape.in.total() < kColumns / 2 ? 0 : shape.cheapest(pairs ? 0.75 : 1, cost(2, 1.4), cost(4, 1.75));
}

int64_t squares(int64_t lanes) {
  return (lanes + kSquare - 1) / kSquare;
}

// Whether factors of these magnitudes put no weight's gradient off by more than 1e-5 of what it sums over the frames, in float32.
template <class A>
bool small(A x, A dy, A usual) {
  constexpr A kRatio = 4;  // measured: kernels/README.md
  return x <= kMost<A> && dy <= kMost<A> && x * dy <= kRatio * usual;
}

// Frames that a task rounds to pairs at once, for a panel: as many as stay in the second-level cache, one of up to kMost bytes.
struct PairRows {
  int64_t taps, phases;  // of the kernel's width; of a pair's first pixel, even and odd
  int64_t pairs, out_pairs;  // of a row of a phase, and of the gradients
  int64_t size, frames;  // elements of a row of both, and frames at once

  PairRows(const ConvShape& shape, int64_t columns)
      : taps(shape.last_tap() - shape.first_tap() + 1), phases(std::min<int64_t>(2, taps)) {
    constexpr int64_t kBytes = 512 << 10;
    out_pairs = (shape.frame.size.width + 1) / 2;
    pairs = out_pairs + (taps - 1) / 2;
    size = phases * pairs * shape.in.lanes() + out_pairs * columns;
    constexpr int64_t kMost = 2 << 20;
    const int64_t bytes = 4 * size * shape.frame.size.rows();
    frames = bytes > kMost ? 0 : std::max<int64_t>(1, kBytes / std::max<int64_t>(1, bytes));
  }
};

// Lanes of a row's pixels (2 i, 2 i + 1) as pairs of bfloat16, zeros behind its last pixel.
struct RoundPairs {
  static CONVRNN_INLINE void run(const float* from, int64_t pitch, int64_t pixels, uint32_t* to, int64_t pairs, int64_t lanes) {
    for (; pairs > 0; --pairs, pixels -= 2, from += 2 * pitch, to += lanes) {
      const float* second = pixels > 1 ? from + pitch : from;
      const uint32_t mask = pixels > 1 ? 0xffffffffu : pixels > 0 ? 0xffffu : 0u;
      if (mask == 0) {
        std::fill_n(to, lanes, 0u);
        continue;
      }
      each_lane(lanes, [=](int64_t i) __attribute__((always_inline)) {
        c10::BFloat16 low, high;
        store(low, from[i]);
        store(high, second[i]);
        to[i] = (static_cast<uint32_t>(high.x) << 16 | low.x) & mask;
      });
    }
  }
};

}  // namespace

template <class A>
WeightGradient<A>::WeightGradient(const ConvShape& shape, int64_t first_lane, int64_t frames, bool bfloat16)
    : shape_(shape),
      first_lane_(first_lane),
      columns_(shape.out.gates * shape.out.pitch),
      pairs_(bfloat16 && multiplies_pairs() && PairRows(shape, panel_blocks<A>() * kColumns).frames > 0),
      tile_(tile_of(shape, frames, pairs_)),
      panels_(make_panels(1, columns_, panel_blocks<A>())) {
  const int64_t lanes = shape.in.lanes();
  pairs_ = pairs_ && tile_ == 0;
  if (tile_ > 0) {
    units_ = squares(shape.block_lanes()) * squares(columns_);
    size_ = units_ * products(tile_) * kSquare * kSquare;
  } else {
    units_ = (pairs_ ? 1 : shape.kernel.rows()) * static_cast<int64_t>(panels_.size());
    size_ = shape.kernel.pixels() * lanes * columns_;
  }
  // Groups of frames: as many as make kTasks tasks, while their sums take no more than kBytes and every group gets `depth`
  // tiles at once: with fewer, reading and writing the sums costs as much as making them.
  constexpr int64_t kTasks = 16, kBytes = 16 << 20;
  const int64_t most = kBytes / (size_ * static_cast<int64_t>(sizeof(A)));
  const int64_t side = std::max<int64_t>(tile_, 2), area = side * side, depth = 2 * most_tiles(side);
  const int64_t deep = frames * (shape.frame.size.pixels() + area - 1) / area / depth;
  groups_ = std::max<int64_t>(1, std::min({(kTasks + units_ - 1) / units_, most, deep, frames}));
  exact_.resize(tile_ > 0 ? tasks() : 0);
  sums_ = Buffer<A>(groups_ * size_);
  std::fill_n(sums_.data(), groups_ * size_, A(0));
}

template <class A>
int64_t WeightGradient<A>::scratch_size() const {
  if (pairs_) {
    const PairRows rows(shape_, panel_blocks<A>() * kColumns);
    return padded(rows.frames * shape_.frame.size.rows() * rows.size);
  }
  const int64_t across = tile_ > 0 ? tiles(shape_.frame.size.width, tile_) : 0;
  return across > 0 ? 2 * products(tile_) * plane_size(std::max(most_tiles(tile_), across), kSquare) : 0;
}

template <class A>
void WeightGradient<A>::add(int64_t task, const Factor* inputs, const Factor* gradients, int64_t frames, A* scratch) {
  // What the products of usual lanes sum to over all frames.
  A usual = 0;
  for (int64_t f = 0; f < frames; ++f) {
    usual += inputs[f].magnitudes.usual * gradients[f].magnitudes.usual * static_cast<A>(shape_.frame.size.pixels());
  }
  const int64_t group = task / units_, unit = task % units_;
  const int64_t begin = group * frames / groups_, count = (group + 1) * frames / groups_ - begin;
  A* sums = sums_.data() + group * size_;
  A* square = sums + unit * products(tile_) * kSquare * kSquare;
  if (tile_ == 2) {
    winograd<2>(task, inputs + begin, gradients + begin, count, usual, square, scratch);
  } else if (tile_ == 4) {
    winograd<4>(task, inputs + begin, gradients + begin, count, usual, square, scratch);
  } else if (pairs_) {
    pairs(unit, inputs + begin, gradients + begin, count, sums, scratch);
  } else {
    direct(unit, inputs + begin, gradients + begin, count, sums);
  }
}

// A row of the kernel and a panel, over all rows of the frames.
template <class A>
void WeightGradient<A>::direct(int64_t unit, const Factor* inputs, const Factor* gradients, int64_t frames, A* sums) const {
  const Size &size = shape_.frame.size, &kernel = shape_.kernel;
  const Panel& panel = panels_[unit % panels_.size()];
  const int64_t kernel_row = unit / static_cast<int64_t>(panels_.size());
  const int64_t kd = kernel_row / kernel.height - shape_.before.depth;
  const int64_t kh = kernel_row % kernel.height - shape_.before.height;
  const int64_t first = shape_.first_tap(), taps = shape_.last_tap() - first + 1, lanes = shape_.in.lanes();
  const bool dense = lanes == shape_.in.pixel;
  std::vector<Factors<A>> factors;
  for (int64_t kw = 0; kw < (dense ? 1 : taps); ++kw) {
    factors.clear();
    for (int64_t f = 0; f < frames; ++f) {
      if (!inputs[f].finite_with(gradients[f])) {
        if (kw == 0) {
          exactly(kernel_row, panel, inputs[f].frame, gradients[f].frame, sums);
        }
        continue;
      }
      for (int64_t row = 0; row < size.rows(); ++row) {
        const int64_t depth = row / size.height + kd, y = row % size.height + kh;
        if (depth >= 0 && depth < size.depth && y >= 0 && y < size.height) {
          const int64_t from = shape_.frame.pixel(depth, y) + first + kw - shape_.before.width;
          factors.push_back({inputs[f].frame + from * shape_.in.pixel,
                             gradients[f].frame + shape_.frame.pixel(row) * shape_.out.pixel + first_lane_ + panel.channel});
        }
      }
    }
    const int64_t tap = kernel_row * kernel.width + first + kw;
    multiply(factors.data(), static_cast<int64_t>(factors.size()), size.width, dense ? taps * lanes : lanes, panel.blocks,
             {1, shape_.in.pixel, shape_.out.pixel, columns_}, sums + tap * lanes * columns_ + panel.channel, true);
  }
}

template <class A>
void WeightGradient<A>::exactly(int64_t kernel_row, const Panel& panel, const A* input, const A* gradient, A* sums) const {
  const Size &size = shape_.frame.size, &kernel = shape_.kernel;
  const int64_t kd = kernel_row / kernel.height - shape_.before.depth, lanes = shape_.in.lanes();
  const int64_t kh = kernel_row % kernel.height - shape_.before.height;
  std::vector<Factors<A>> factors;
  for (int64_t tap = shape_.first_tap(); tap <= shape_.last_tap(); ++tap) {
    const int64_t kw = tap - shape_.before.width, begin = std::max<int64_t>(0, -kw), end = std::min(size.width, size.width - kw);
    factors.clear();
    for (int64_t row = 0; row < size.rows(); ++row) {
      const int64_t depth = row / size.height + kd, y = row % size.height + kh;
      if (depth >= 0 && depth < size.depth && y >= 0 && y < size.height) {
        factors.push_back({input + (shape_.frame.pixel(depth, y) + begin + kw) * shape_.in.pixel,
                           gradient + (shape_.frame.pixel(row) + begin) * shape_.out.pixel + first_lane_ + panel.channel});
      }
    }
    multiply(factors.data(), static_cast<int64_t>(factors.size()), end - begin, lanes, panel.blocks,
             {1, shape_.in.pixel, shape_.out.pixel, columns_},
             sums + (kernel_row * kernel.width + tap) * lanes * columns_ + panel.channel, true);
  }
}

// A panel, over all rows of the kernel. A tap's pairs begin at even or at odd pixels: the frame is rounded for both.
template <class A>
void WeightGradient<A>::pairs([[maybe_unused]] int64_t unit, [[maybe_unused]] const Factor* inputs,
                              [[maybe_unused]] const Factor* gradients, [[maybe_unused]] int64_t frames,
                              [[maybe_unused]] A* sums, [[maybe_unused]] A* scratch) const {
  if constexpr (std::is_same_v<A, float>) {
    const Frame& frame = shape_.frame;
    const Size &size = frame.size, &kernel = shape_.kernel;
    const Panel& panel = panels_[unit];
    const int64_t lanes = shape_.in.lanes(), width = panel.blocks * kColumns;
    const int64_t first = shape_.first_tap(), left = first - shape_.before.width;
    const PairRows rows(shape_, panel_blocks<A>() * kColumns);
    const int64_t phase = rows.pairs * lanes, x_row = rows.phases * phase, dy_row = rows.out_pairs * width;
    auto* const x = reinterpret_cast<uint32_t*>(scratch);
    uint32_t* const dy = x + rows.frames * size.rows() * x_row;
    std::vector<PairFactors> factors;
    for (int64_t begin = 0, end; begin < frames; begin = end) {
      end = begin;
      if (!inputs[begin].finite_with(gradients[begin])) {
        for (int64_t kernel_row = 0; kernel_row < kernel.rows(); ++kernel_row) {
          exactly(kernel_row, panel, inputs[begin].frame, gradients[begin].frame, sums);
        }
        end = begin + 1;
        continue;
      }
      while (end < std::min(frames, begin + rows.frames) && inputs[end].finite_with(gradients[end])) {
        ++end;
      }
      const int64_t count = (end - begin) * size.rows();
      for (int64_t i = 0; i < count; ++i) {
        const int64_t f = begin + i / size.rows(), pixel = frame.pixel(i % size.rows());
        for (int64_t odd = 0; odd < rows.phases; ++odd) {
          const int64_t from = left + odd;
          run<RoundPairs>(inputs[f].frame + (pixel + from) * shape_.in.pixel, shape_.in.pixel, frame.width - frame.left - from,
                          x + i * x_row + odd * phase, rows.pairs, lanes);
        }
        run<RoundPairs>(gradients[f].frame + pixel * shape_.out.pixel + first_lane_ + panel.channel, shape_.out.pixel, size.width,
                        dy + i * dy_row, rows.out_pairs, width);
      }
      for (int64_t kernel_row = 0; kernel_row < kernel.rows(); ++kernel_row) {
        const int64_t kd = kernel_row / kernel.height - shape_.before.depth;
        const int64_t kh = kernel_row % kernel.height - shape_.before.height;
        for (int64_t kw = 0; kw < rows.taps; ++kw) {
          factors.clear();
          for (int64_t i = 0; i < count; ++i) {
            const int64_t row = i % size.rows(), depth = row / size.height + kd, y = row % size.height + kh;
            if (depth >= 0 && depth < size.depth && y >= 0 && y < size.height) {
              const int64_t from = i + kd * size.height + kh;  // the row of x
              factors.push_back({x + from * x_row + kw % 2 * phase + kw / 2 * lanes, dy + i * dy_row});
            }
          }
          A* to = sums + (kernel_row * kernel.width + first + kw) * lanes * columns_ + panel.channel;
          multiply_pairs(factors, rows.out_pairs, lanes, panel.blocks, {1, lanes, width, columns_}, to, true);
        }
      }
    }
  }
}

// A square of sums, some rows of tiles of a frame at a time.
template <class A>
template <int M>
void WeightGradient<A>::winograd(int64_t task, const Factor* inputs, const Factor* gradients, int64_t frames, A usual, A* sums,
                                 A* scratch) {
  const Frame& frame = shape_.frame;
  const Square square = square_of(task);
  const int64_t across = tiles(frame.size.width, M), down = tiles(frame.size.height, M), pixel = shape_.out.pixel;
  const int64_t rows = std::max<int64_t>(1, most_tiles(M) / across), blocks = panel_blocks<A>();
  for (int64_t row = 0; row < frames * down; row += rows) {  // through all frames
    const int64_t count = std::min(rows, frames * down - row) * across;
    const int64_t x_plane = plane_size(count, square.lanes), dy_plane = plane_size(count, square.columns);
    A *x = scratch, *dy = scratch + products(M) * x_plane;
    for (int64_t i = 0; i < count / across; ++i) {
      const int64_t f = (row + i) / down, y = M * ((row + i) % down);
      A *x_row = x + i * across * square.lanes, *dy_row = dy + i * across * square.columns;
      shape_.template transform_inputs<A, M>(inputs[f].frame, y, square.lane, square.lanes, x_row, x_plane);
      run<winograd::Gradient<A, M>>(gradients[f].frame + frame.pixel(0, y) * pixel + first_lane_ + square.column,
                                    frame.width * pixel, pixel, dy_row, dy_plane, across, square.columns);
      const bool none = small(inputs[f].magnitudes.largest, gradients[f].magnitudes.largest, usual);
      for (int64_t tile = 0; !none && tile < across; ++tile) {
        if (has_outlier(square, inputs[f].frame, gradients[f].frame, y, tile * M, usual)) {
          exactly(task, inputs[f].frame, gradients[f].frame, y, tile * M);
          for (int64_t product = 0; product < products(M); ++product) {
            std::fill_n(x_row + product * x_plane + tile * square.lanes, square.lanes, A(0));
            std::fill_n(dy_row + product * dy_plane + tile * square.columns, square.columns, A(0));
          }
        }
      }
    }
    for (int64_t product = 0; product < products(M); ++product) {
      for (int64_t n = 0; n < square.columns; n += blocks * kColumns) {
        const Factors<A> factors{x + product * x_plane, dy + product * dy_plane + n};
        multiply(&factors, 1, count, square.lanes, std::min(blocks, (square.columns - n) / kColumns),
                 {1, square.lanes, square.columns, kSquare}, sums + product * kSquare * kSquare + n, true);
      }
    }
  }
}

template <class A>
typename WeightGradient<A>::Square WeightGradient<A>::square_of(int64_t task) const {
  const int64_t unit = task % units_, across = squares(columns_);
  const int64_t lane = unit / across * kSquare, column = unit % across * kSquare;
  return {lane, std::min(kSquare, shape_.block_lanes() - lane), column, std::min(kSquare, columns_ - column)};
}

template <class A>
bool WeightGradient<A>::has_outlier(const Square& square, const A* input, const A* gradient, int64_t row, int64_t column,
                                    A usual) const {
  const Frame& frame = shape_.frame;
  const Blocks blocks(shape_.kernel);
  A x = 0, dy = 0;
  const auto look = [](A& largest, const A* at, int64_t pitch, int64_t pixels, int64_t lanes) {
    A found;
    run<Reduce<A, Magnitude<A>>>(at, pitch, pixels, lanes, &found);
    largest = Magnitude<A>::join(largest, found);
  };
  shape_.each_run(square.lane, square.lanes, [&](int64_t block, int64_t channel, int64_t n, int64_t) {
    for (int64_t y = 0; y < tile_ + 2; ++y) {
      const int64_t pixel = frame.pixel(0, row + y + blocks.row(block) - shape_.before.height) + column + blocks.column(block);
      look(x, input + (pixel - shape_.before.width) * shape_.in.pixel + channel, shape_.in.pixel, tile_ + 2, n);
    }
  });
  for (int64_t y = 0; y < tile_; ++y) {
    look(dy, gradient + (frame.pixel(0, row + y) + column) * shape_.out.pixel + first_lane_ + square.column,
         shape_.out.pixel, tile_, square.columns);
  }
  const bool finite = std::isfinite(x) && std::isfinite(dy);
  return !(finite && (x == 0 || dy == 0)) && !small(x, dy, usual);
}

// No tap reads the zeros around the frame.
template <class A>
void WeightGradient<A>::exactly(int64_t task, const A* input, const A* gradient, int64_t row, int64_t column) {
  const Frame& frame = shape_.frame;
  const Size& size = frame.size;
  const Blocks blocks(shape_.kernel);
  const Square square = square_of(task);
  if (exact_[task].data() == nullptr) {
    exact_[task] = Buffer<A>(kExact);
    std::fill_n(exact_[task].data(), kExact, A(0));
  }
  const int64_t last_row = std::min(size.height, row + tile_), last_column = std::min(size.width, column + tile_);
  std::vector<Factors<A>> factors;
  shape_.each_run(square.lane, square.lanes, [&](int64_t block, int64_t channel, int64_t n, int64_t offset) {
    for (int64_t place = 0; place < 9; ++place) {
      const int64_t down = blocks.row(block) + place / 3 - shape_.before.height;
      const int64_t right = blocks.column(block) + place % 3 - shape_.before.width;
      const int64_t begin = std::max(column, -right), end = std::min(last_column, size.width - right);
      factors.clear();
      for (int64_t y = std::max(row, -down); begin < end && y < std::min(last_row, size.height - down); ++y) {
        factors.push_back({input + (frame.pixel(0, y + down) + begin + right) * shape_.in.pixel + channel,
                           gradient + (frame.pixel(0, y) + begin) * shape_.out.pixel + first_lane_ + square.column});
      }
      A* to = exact_[task].data() + (place * kSquare + offset) * kSquare;
      for (int64_t panel = 0; !factors.empty() && panel < square.columns / kColumns; ++panel) {
        multiply(factors.data(), static_cast<int64_t>(factors.size()), end - begin, n, 1,
                 {1, shape_.in.pixel, shape_.out.pixel, kSquare}, to + panel * kColumns, true);
        for (Factors<A>& factor : factors) {
          factor.b += kColumns;
        }
      }
    }
  });
}

template <class A>
const A* WeightGradient<A>::sums_at(int64_t k, int64_t column, int64_t& plane) const {
  if (tile_ > 0) {
    plane = kSquare * kSquare;
    const int64_t unit = k / kSquare * squares(columns_) + column / kSquare;
    return sums_.data() + unit * products(tile_) * plane + k % kSquare * kSquare + column % kSquare;
  }
  plane = shape_.in.lanes() * columns_;
  return sums_.data() + k * columns_ + column;
}

// Adds what tiles with outliers gave to kColumns weights of a block's lane, to each tap of the block.
template <class A>
void WeightGradient<A>::add_exact(int64_t lane, int64_t column, A* of_block) const {
  const int64_t unit = lane / kSquare * squares(columns_) + column / kSquare;
  for (int64_t task = unit; task < tasks(); task += units_) {
    const A* exact = exact_[task].data();
    for (int64_t i = 0; exact != nullptr && i < 9 * kColumns; ++i) {
      of_block[i] += exact[(i / kColumns * kSquare + lane % kSquare) * kSquare + column % kSquare + i % kColumns];
    }
  }
}

// The sums of all groups, in the place of the first one's: along memory, where walking it by weights would miss the TLB.
template <class A>
void WeightGradient<A>::add_groups() {
  constexpr int64_t kPiece = 4096;
  torch::stable::parallel_for(0, groups_ > 1 ? (size_ + kPiece - 1) / kPiece : 0, 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      A* total = sums_.data() + piece * kPiece;
      const int64_t n = std::min(kPiece, size_ - piece * kPiece);
      for (int64_t group = 1; group < groups_; ++group) {
        const A* sums = total + group * size_;
        for (int64_t i = 0; i < n; ++i) {
          total[i] += sums[i];
        }
      }
    }
  });
}

template <class A>
template <class T>
void WeightGradient<A>::write(const Weights<T>& weights) {
  add_groups();
  const Blocks blocks(shape_.kernel);
  const int64_t taps = shape_.kernel.pixels();
  torch::stable::parallel_for(0, shape_.in.count, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> found(taps * kColumns), of_block(9 * kColumns);
    for (int64_t k = begin; k < end; ++k) {
      for (int64_t column = 0; column < columns_; column += kColumns) {
        int64_t plane = 0;
        if (tile_ == 0) {
          const A* sums = sums_at(k, column, plane);
          for (int64_t tap = 0; tap < taps; ++tap) {
            std::copy_n(sums + tap * plane, kColumns, &found[tap * kColumns]);
          }
        } else {
          for (int64_t block = 0; block < blocks.count(); ++block) {
            const A* sums = sums_at(block * shape_.in.lanes() + k, column, plane);
            if (tile_ == 2) {
              run<winograd::WeightGradient<A, 2>>(sums, plane, of_block.data(), kColumns);
            } else {
              run<winograd::WeightGradient<A, 4>>(sums, plane, of_block.data(), kColumns);
            }
            add_exact(block * shape_.in.lanes() + k, column, of_block.data());
            blocks.each_tap(block, [&](int64_t tap, int64_t place) {
              std::copy_n(&of_block[place * kColumns], kColumns, &found[tap * kColumns]);
            });
          }
        }
        const int64_t gate = column / shape_.out.pitch, channel = column % shape_.out.pitch;
        T* to = weights.data + (gate * shape_.out.count + channel) * weights.n + k * weights.k;
        run<Transpose<T, Move::out>>(to, weights.tap, weights.n, found.data(), taps,
                                     std::min(kColumns, shape_.out.count - channel), kColumns);
      }
    }
  });
}

template <class A>
void add_pixels(const Frame& frame, const A* lanes, int64_t pitch, double* sums) {
  for (int64_t row = 0; row < frame.size.rows(); ++row) {
    A part[kColumns] = {};
    const A* pixel = lanes + frame.pixel(row) * pitch;
    for (int64_t x = 0; x < frame.size.width; ++x, pixel += pitch) {
      for (int64_t i = 0; i < kColumns; ++i) {
        part[i] += pixel[i];
      }
    }
    for (int64_t i = 0; i < kColumns; ++i) {
      sums[i] += part[i];
    }
  }
}

template void add_pixels(const Frame&, const float*, int64_t, double*);
template void add_pixels(const Frame&, const double*, int64_t, double*);
template void WeightGradient<float>::write(const Weights<float>&);
template void WeightGradient<float>::write(const Weights<c10::BFloat16>&);
template void WeightGradient<float>::write(const Weights<c10::Half>&);
template void WeightGradient<double>::write(const Weights<double>&);
template class WeightGradient<float>;
template class WeightGradient<double>;

}  // namespace convrnn
