#include "convolution.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <type_traits>

#include "lanes.h"
#include "outliers.h"
#include "transpose.h"
#include "winograd.h"

namespace convrnn {

using winograd::most_tiles;
using winograd::plane_size;
using winograd::products;
using winograd::tiles;

namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();

// Input lanes that a product sums in one go with tiles of 4x4, which magnify the error of these sums.
constexpr int64_t kDepth = 64;

int64_t frame_tiles(const Size& size, int64_t tile) {
  return tiles(size.height, tile) * tiles(size.width, tile);
}

// Products of a lane with a lane for a plane: by the direct method, and with tiles of this side.
int64_t direct_products(const Size& size, const Size& kernel) {
  int64_t rows = 0;  // of the plane, that the rows of the kernel meet
  for (int64_t y = 0; y < kernel.height; ++y) {
    rows += std::max<int64_t>(0, size.height - std::abs(y - (kernel.height - 1) / 2));
  }
  return rows * size.width * std::min(kernel.width, 2 * size.width - 1);
}

int64_t tile_products(const Size& size, const Size& kernel, int64_t tile) {
  return products(tile) * frame_tiles(size, tile) * Blocks(kernel).count();
}

// Whether tiles save any.
bool takes_tiles(const Size& size, const Size& kernel, int64_t tile) {
  return size.depth == 1 && kernel.depth == 1 && tile_products(size, kernel, tile) < direct_products(size, kernel);
}

// The largest tile that gains anything: what a frame needs zeros for.
int64_t largest_tile(const Size& size, int64_t frames) {
  constexpr int64_t kFew = 4;  // of fewer tiles in a frame, the products have too few rows to hide their latency
  constexpr int64_t kAll = 32;  // fewer in a call do not repay the weights' transform
  const int64_t large = frame_tiles(size, 4);
  return size.depth == 1 && large >= kFew && frames * large >= kAll &&
                 4 * products(4) * large < 3 * products(2) * frame_tiles(size, 2) ? 4 : 2;
}

// To bfloat16 from some lanes of each pixel.
struct Round {
  static CONVRNN_INLINE void run(const float* from, int64_t pitch, c10::BFloat16* to, int64_t pixels, int64_t lanes) {
    if (lanes == pitch) {
      lanes *= pixels;
      pixels = 1;
    }
    for (; pixels > 0; --pixels, from += pitch, to += lanes) {
      each_lane(lanes, [=](int64_t i) __attribute__((always_inline)) { store(to[i], from[i]); });
    }
  }
};

}  // namespace

// Output lanes as panels: within one gate, or over all of them.
std::vector<Panel> make_panels(int64_t gates, int64_t lanes, int64_t most_blocks) {
  std::vector<Panel> panels;
  for (int64_t gate = 0; gate < gates; ++gate) {
    for (int64_t block = 0; block < padded(lanes) / kColumns; block += most_blocks) {
      panels.push_back({gate, block * kColumns, std::min(most_blocks, padded(lanes) / kColumns - block)});
    }
  }
  return panels;
}

Frame::Frame(const Size& size, int64_t frames, const std::vector<Size>& kernels)
    : size(size), frames(frames), tile(largest_tile(size, frames)), top(0), left(0) {
  int64_t bottom = 0, right = 0;
  for (const Size& kernel : kernels) {
    top = std::max(top, kernel.height / 2);
    left = std::max(left, kernel.width / 2);
    const Blocks blocks(kernel);
    const bool cut = takes_tiles(size, kernel, 2) || takes_tiles(size, kernel, tile);  // blocks reach beyond the kernel
    bottom = std::max(bottom, (cut ? 3 * blocks.down : kernel.height) - 1 - (kernel.height - 1) / 2);
    right = std::max(right, (cut ? 3 * blocks.across : kernel.width) - 1 - (kernel.width - 1) / 2);
  }
  // A last tile that is partly outside reads and, in a weight gradient, covers as many pixels more.
  height = top + tiles(size.height, tile) * tile + bottom;
  width = left + tiles(size.width, tile) * tile + right;
}

ConvShape::ConvShape(const Frame& frame, const Size& kernel, bool flipped, const Channels& in, const Channels& out)
    : frame(frame), kernel(kernel), in(in), out(out) {
  const int64_t odd = flipped ? 0 : 1;
  before = {(kernel.depth - odd) / 2, (kernel.height - odd) / 2, (kernel.width - odd) / 2};
}

int64_t ConvShape::cheapest(double direct, const Cost& two, const Cost& four) const {
  const auto cost = [&](int64_t tile, const Cost& of) {
    const auto count = static_cast<double>(frame.frames * frame_tiles(frame.size, tile));
    const auto all = static_cast<double>(tile_products(frame.size, kernel, tile));
    return takes_tiles(frame.size, kernel, tile) ? all * (of.product + of.once / count) : kNever;
  };
  // More transformed weights than the last-level cache holds are read from memory for every frame, which takes longer than
  // the products that they save; but 16 planes for 9 taps do not matter.
  constexpr int64_t kMost = 4 << 20;
  const auto fits = [&](int64_t tile) { return products(tile) * block_lanes() * out.lanes() <= kMost; };
  const double of_two = fits(2) || kernel.pixels() == 9 ? cost(2, two) : kNever;
  const double of_four = fits(4) && frame.tile == 4 ? cost(4, four) : kNever;
  // The direct method makes a product for each row of pixels, and of few pixels its register tiles are less than full.
  const double narrow = 1 + 1 / static_cast<double>(frame.size.width);
  if (std::min(of_two, of_four) > direct * narrow * static_cast<double>(direct_products(frame.size, kernel))) {
    return 0;
  }
  return of_two < of_four ? 2 : 4;
}

int64_t ConvShape::tile(bool pairs) const {
  // An input's transform, made in whole vectors of lanes, is shared by all output lanes, an output's by all input lanes.
  const auto of = [](int64_t lanes) { return static_cast<double>(lanes); };
  const double input = of(padded(in.count)) / of(in.count) / of(out.gates * padded(out.count)), output = 1 / of(block_lanes());
  constexpr int64_t kLarge = 1 << 20;  // transformed weights, in elements, whose reading shows
  const double four = products(4) * block_lanes() * out.lanes() > kLarge ? 1.4 : 1.15;
  // The direct method leaves some products out. It is charged a little less than its time, for tiles are less exact.
  int64_t kept = 0;
  for (const Taps& found : taps(pairs ? in.lanes() / 2 : in.lanes())) {
    kept += found.count * (found.end - found.begin);
  }
  const double share = of(kept) / of((last_tap() - first_tap() + 1) * frame.size.width);
  return cheapest(share * (pairs ? 0.5 : 0.95), {1.1 + 4 * input + 5 * output, 15}, {four + 10 * input + 8 * output, 12});
}

template <class A, int M>
void ConvShape::transform_inputs(const A* from, int64_t row, int64_t first_lane, int64_t lanes, A* out, int64_t plane) const {
  const Blocks blocks(kernel);
  each_run(first_lane, lanes, [&](int64_t block, int64_t channel, int64_t n, int64_t offset) {
    const int64_t pixel = frame.pixel(0, row + blocks.row(block) - before.height) + blocks.column(block) - before.width;
    run<winograd::Input<A, M>>(from + pixel * in.pixel + channel, frame.width * in.pixel, in.pixel, out + offset, plane, lanes,
                               tiles(frame.size.width, M), n);
  });
}

int64_t ConvShape::first_tap() const {
  return std::max<int64_t>(0, before.width - (frame.size.width - 1));
}

int64_t ConvShape::last_tap() const {
  return std::min(kernel.width - 1, before.width + frame.size.width - 1);
}

std::vector<ConvShape::Taps> ConvShape::taps(int64_t depth) const {
  constexpr int64_t kAgain = 6;  // so many products of a sum take as long as reading and writing it again
  const int64_t first = first_tap(), last = last_tap(), center = before.width, width = frame.size.width;
  int64_t outside = 0;
  for (int64_t tap = first; tap <= last; ++tap) {
    outside += std::abs(tap - center);
  }
  if (outside * kernel.rows() * depth <= (last - first) * kAgain * width) {
    return {{first, last - first + 1, 0, width}};
  }
  std::vector<Taps> found{{center, 1, 0, width}};
  for (int64_t tap = first; tap <= last; ++tap) {
    if (tap != center) {
      found.push_back({tap, 1, std::max<int64_t>(0, center - tap), std::min(width, width + center - tap)});
    }
  }
  return found;
}

template <class A>
template <class T>
Convolution<A>::Convolution(const ConvShape& shape, const Weights<const T>& weights, bool exactly)
    : shape_(shape),
      pairs_(!exactly && std::is_same_v<T, c10::BFloat16> && multiplies_pairs() && shape.in.lanes() % 2 == 0 &&
             shape.frame.size.depth == 1),  // of a volume each part would round most, again and again
      tile_(exactly ? 0 : shape.tile(pairs_)) {
  pairs_ = pairs_ && tile_ == 0;
  if (tile_ > 0) {
    outliers_ = std::make_shared<Outliers<A>>(shape, tile_);
    exact_ = std::make_unique<Exact>();
    exact_->make = [shape, weights] { return std::make_unique<Convolution>(shape, weights, true); };
  }
  const int64_t taps = shape.kernel.pixels(), lanes = shape.in.lanes();
  taps_ = shape.taps(pairs_ ? lanes / 2 : lanes);
  panels_ = make_panels(shape.out.gates, shape.out.count, panel_blocks<A>());
  const Blocks blocks(shape.kernel);
  const int64_t plane = shape.block_lanes();  // rows of weights of one of a tile's products
  panel_size_ = (tile_ > 0 ? products(tile_) * plane : taps * lanes) * kColumns / (pairs_ ? 2 : 1);
  std::vector<int64_t> offsets;
  for (const Panel& panel : panels_) {
    offsets.push_back(packed_size_);
    packed_size_ += panel.blocks * panel_size_;
  }
  packed_ = Buffer<A>(packed_size_);
  torch::stable::parallel_for(0, static_cast<int64_t>(panels_.size()), 1, [&](int64_t begin, int64_t end) {
    std::vector<A> w(taps * panel_width()), of_block(tile_ > 0 ? 9 * panel_width() : 0);
    for (int64_t index = begin; index < end; ++index) {
      const Panel& panel = panels_[index];
      const int64_t width = panel.blocks * kColumns;
      const int64_t first = panel.gate * shape.out.count + panel.channel;
      const int64_t count = std::min(width, shape.out.count - panel.channel);
      A* packed = packed_.data() + offsets[index];
      auto* const halves = reinterpret_cast<c10::BFloat16*>(packed);
      for (int64_t lane = 0; lane < lanes; ++lane, packed += width) {
        const int64_t gate = lane / shape.in.pitch, channel = lane % shape.in.pitch;
        std::fill(w.begin(), w.end(), A(0));
        if (channel < shape.in.count) {
          const T* from = weights.data + first * weights.n + (gate * shape.in.count + channel) * weights.k;
          const int64_t last = taps - 1;
          if (weights.tap > 0) {
            run<Transpose<T, Move::in>>(from, int64_t{1}, weights.n, w.data(), taps, count, width);
          } else {  // taps in reverse
            run<Transpose<T, Move::in>>(from - last, int64_t{1}, weights.n, w.data() + last * width, taps, count, -width);
          }
        }
        if (tile_ > 0) {
          for (int64_t block = 0; block < blocks.count(); ++block) {
            const A* from = w.data();  // of 3x3
            if (taps != 9 || blocks.count() > 1) {
              std::fill(of_block.begin(), of_block.end(), A(0));
              blocks.each_tap(block, [&](int64_t tap, int64_t place) {
                std::copy_n(&w[tap * width], width, &of_block[place * width]);
              });
              from = of_block.data();
            }
            A* to = packed + block * lanes * width;
            if (tile_ == 2) {
              run<winograd::Weight<A, 2>>(from, to, plane * width, width);
            } else {
              run<winograd::Weight<A, 4>>(from, to, plane * width, width);
            }
          }
        } else if (pairs_) {
          for (int64_t tap = 0; tap < taps; ++tap) {
            c10::BFloat16* to = halves + (tap * lanes + lane) / 2 * 2 * width + lane % 2;
            for (int64_t n = 0; n < width; ++n) {
              store(to[2 * n], static_cast<float>(w[tap * width + n]));
            }
          }
        } else {
          for (int64_t tap = 0; tap < taps; ++tap) {
            std::copy_n(w.data() + tap * width, width, packed + tap * lanes * width);
          }
        }
      }
    }
  });
}

template <class A>
int64_t Convolution<A>::scratch_size() const {
  if (pairs_) {
    return padded(shape_.frame.pixels() * shape_.in.lanes() / 2);
  }
  if (tile_ == 0) {
    return 0;
  }
  const int64_t most = std::max(most_tiles(tile_), tiles(shape_.frame.size.width, tile_));
  return products(tile_) * (plane_size(most, shape_.block_lanes()) + plane_size(most, panel_width()));
}

template <class A>
void Convolution<A>::operator()(const A* in, const Batch& batch, const Part& part, A* out, int64_t gate_step,
                                A* scratch) const {
  if (pairs_) {
    return pairs(in, batch, part, out, gate_step, scratch);
  }
  if (tile_ == 2) {
    return winograd<2>(in, batch, part, out, gate_step, scratch);
  }
  if (tile_ == 4) {
    return winograd<4>(in, batch, part, out, gate_step, scratch);
  }
  const A* weights = packed_.data();
  for (const Panel& panel : panels_) {
    for (int64_t f = 0; f < batch.frames && panel.channel >= part.channel_begin && panel.channel < part.channel_end; ++f) {
      direct(in + f * batch.in_step, part, 0, shape_.frame.size.width, panel, weights,
             out + f * batch.out_step + panel.gate * gate_step + panel.channel);
    }
    weights += panel.blocks * panel_size_;
  }
}

template <class A>
void Convolution<A>::exactly(const A* frame, const Part& part, int64_t begin, int64_t end, A* out, int64_t gate_step) const {
  std::call_once(exact_->once, [&] { exact_->found = exact_->make(); });
  const Convolution& exact = *exact_->found;
  const A* weights = exact.packed_.data();
  for (const Panel& panel : exact.panels_) {
    if (panel.channel >= part.channel_begin && panel.channel < part.channel_end) {
      exact.direct(frame, part, begin, end, panel, weights, out + panel.gate * gate_step + panel.channel);
    }
    weights += panel.blocks * exact.panel_size_;
  }
}

template <class A>
void Convolution<A>::direct(const A* frame, const Part& part, int64_t begin, int64_t end, const Panel& panel, const A* weights,
                            A* out) const {
  const Size &size = shape_.frame.size, &kernel = shape_.kernel;
  const int64_t lanes = shape_.in.lanes(), pixel = shape_.in.pixel, width = panel.blocks * kColumns;
  const bool dense = lanes == pixel;  // a row's taps follow one another as its pixels do: one long product
  std::vector<Factors<A>> factors;
  for (int64_t row = part.row_begin; row < part.row_end; ++row, out += size.width * shape_.out.pixel) {
    for (const ConvShape::Taps& taps : taps_) {
      const int64_t first = std::max(begin, taps.begin), last = std::min(end, taps.end);
      if (first >= last) {
        continue;
      }
      factors.clear();
      for (int64_t kd = 0; kd < kernel.depth; ++kd) {
        const int64_t depth = row / size.height + kd - shape_.before.depth;
        for (int64_t kh = 0; kh < kernel.height; ++kh) {
          const int64_t y = row % size.height + kh - shape_.before.height;
          if (depth < 0 || depth >= size.depth || y < 0 || y >= size.height) {
            continue;
          }
          const int64_t tap = (kd * kernel.height + kh) * kernel.width + taps.first;
          const A* from = frame + (shape_.frame.pixel(depth, y) + first + taps.first - shape_.before.width) * pixel;
          for (int64_t kw = 0; kw < (dense ? 1 : taps.count); ++kw) {
            factors.push_back({from + kw * pixel, weights + (tap + kw) * lanes * width});
          }
        }
      }
      multiply(factors.data(), static_cast<int64_t>(factors.size()), dense ? taps.count * lanes : lanes,
               last - first, panel.blocks, {pixel, 1, width, shape_.out.pixel}, out + first * shape_.out.pixel,
               &taps != taps_.data());
    }
  }
}

// Frame by frame: what the part reads of it is rounded, once for all panels.
template <class A>
void Convolution<A>::pairs([[maybe_unused]] const A* in, [[maybe_unused]] const Batch& batch,
                           [[maybe_unused]] const Part& part, [[maybe_unused]] A* out, [[maybe_unused]] int64_t gate_step,
                           [[maybe_unused]] A* scratch) const {
  if constexpr (std::is_same_v<A, float>) {
    const Frame& frame = shape_.frame;
    const Size &size = frame.size, &kernel = shape_.kernel;
    const int64_t lanes = shape_.in.lanes();
    // Pixels that the part reads.
    const int64_t row = part.row_begin - shape_.before.height, rows = part.row_end - part.row_begin + kernel.height - 1;
    const int64_t begin = (frame.top + std::max<int64_t>(0, row)) * frame.width;
    const int64_t end = (frame.top + std::min(size.height, row + rows)) * frame.width;
    auto* const rounded = reinterpret_cast<c10::BFloat16*>(scratch);
    std::vector<PairFactors> factors;
    for (int64_t f = 0; f < batch.frames; ++f) {
      run<Round>(in + f * batch.in_step + begin * shape_.in.pixel, shape_.in.pixel, rounded + begin * lanes, end - begin,
                 lanes);
      const A* weights = packed_.data();
      for (const Panel& panel : panels_) {
        const int64_t width = panel.blocks * kColumns;
        A* to = out + f * batch.out_step + panel.gate * gate_step + panel.channel;
        const bool wanted = panel.channel >= part.channel_begin && panel.channel < part.channel_end;
        for (int64_t row = part.row_begin; wanted && row < part.row_end; ++row, to += size.width * shape_.out.pixel) {
          for (const ConvShape::Taps& taps : taps_) {
            factors.clear();
            for (int64_t kernel_row = 0; kernel_row < kernel.rows(); ++kernel_row) {
              const int64_t depth = row / size.height + kernel_row / kernel.height - shape_.before.depth;
              const int64_t y = row % size.height + kernel_row % kernel.height - shape_.before.height;
              if (depth >= 0 && depth < size.depth && y >= 0 && y < size.height) {
                const int64_t pixel = frame.pixel(depth, y) + taps.begin + taps.first - shape_.before.width;
                factors.push_back({reinterpret_cast<const uint32_t*>(rounded + pixel * lanes),
                                   reinterpret_cast<const uint32_t*>(weights) +
                                       (kernel_row * kernel.width + taps.first) * lanes / 2 * width});
              }
            }
            multiply_pairs(factors, taps.count * lanes / 2, taps.end - taps.begin, panel.blocks,
                           {lanes / 2, 1, width, shape_.out.pixel}, to + taps.begin * shape_.out.pixel, &taps != taps_.data());
          }
        }
        weights += panel.blocks * panel_size_;
      }
    }
  }
}

// Some rows of tiles at a time, through all frames.
template <class A>
template <int M>
void Convolution<A>::winograd(const A* in, const Batch& batch, const Part& part, A* out, int64_t gate_step,
                              A* scratch) const {
  const Size& size = shape_.frame.size;
  const int64_t lanes = shape_.block_lanes();
  const int64_t out_row = size.width * shape_.out.pixel;
  const int64_t across = tiles(size.width, M), down = tiles(part.row_end - part.row_begin, M);
  const int64_t depth = M == 4 ? kDepth : lanes, most_rows = std::max<int64_t>(1, most_tiles(M) / across);
  Outliers<A> outliers = *outliers_;
  struct Tile {
    int64_t row, across;  // the row of tiles, through all frames, and the place in it
  };
  std::vector<Tile> with_outliers;
  for (int64_t begin = 0; begin < batch.frames * down; begin += most_rows) {
    const int64_t end = std::min(batch.frames * down, begin + most_rows), count = (end - begin) * across;
    const int64_t plane = plane_size(count, lanes);
    A *inputs = scratch, *results = scratch + products(M) * plane;
    with_outliers.clear();
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = part.row_begin + i % down * M;
      const A* frame = in + i / down * batch.in_step;
      if (row == part.row_begin) {
        outliers.begin(frame, row);
      }
      const bool none = outliers.none(row);
      for (int64_t tile = 0; !none && tile < across; ++tile) {
        if (outliers.in_tile(row, tile * M)) {
          with_outliers.push_back({i, tile});
        }
      }
      shape_.template transform_inputs<A, M>(frame, row, 0, lanes, inputs + (i - begin) * across * lanes, plane);
    }
    const A* weights = packed_.data();
    for (const Panel& panel : panels_) {
      const int64_t width = panel.blocks * kColumns, result_plane = plane_size(count, width);
      if (panel.channel >= part.channel_begin && panel.channel < part.channel_end) {
        for (int64_t product = 0; product < products(M); ++product) {
          for (int64_t k = 0; k < lanes; k += depth) {
            const Factors<A> factors{inputs + product * plane + k, weights + (product * lanes + k) * width};
            multiply(&factors, 1, std::min(depth, lanes - k), count, panel.blocks, {lanes, 1, width, width},
                     results + product * result_plane, k > 0);
          }
        }
        for (int64_t i = begin; i < end; ++i) {
          const int64_t row = i % down * M;
          run<winograd::Output<A, M>>(
              results + (i - begin) * across * width, result_plane,
              out + i / down * batch.out_step + panel.gate * gate_step + row * out_row + panel.channel, out_row,
              shape_.out.pixel, std::min<int64_t>(M, size.height - part.row_begin - row), size.width, width);
        }
      }
      weights += panel.blocks * panel_size_;
    }
    for (const Tile& tile : with_outliers) {
      const int64_t f = tile.row / down, row = tile.row % down * M, column = tile.across * M;
      exactly(in + f * batch.in_step,
              {part.row_begin + row, std::min(size.height, part.row_begin + row + M), part.channel_begin, part.channel_end},
              column, std::min(size.width, column + M), out + f * batch.out_step + row * out_row, gate_step);
    }
  }
}

template void ConvShape::transform_inputs<float, 2>(const float*, int64_t, int64_t, int64_t, float*, int64_t) const;
template void ConvShape::transform_inputs<float, 4>(const float*, int64_t, int64_t, int64_t, float*, int64_t) const;
template void ConvShape::transform_inputs<double, 2>(const double*, int64_t, int64_t, int64_t, double*, int64_t) const;
template void ConvShape::transform_inputs<double, 4>(const double*, int64_t, int64_t, int64_t, double*, int64_t) const;
template Convolution<float>::Convolution(const ConvShape&, const Weights<const float>&, bool);
template Convolution<float>::Convolution(const ConvShape&, const Weights<const c10::BFloat16>&, bool);
template Convolution<float>::Convolution(const ConvShape&, const Weights<const c10::Half>&, bool);
template Convolution<double>::Convolution(const ConvShape&, const Weights<const double>&, bool);
template class Convolution<float>;
template class Convolution<double>;

}  // namespace convrnn
