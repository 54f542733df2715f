// 'Same' convolutions of GRU-RCN over frames in a padded channels-last buffer: forward, which with flipped weights is the
// data gradient too, and weight gradient. Two methods, both sums of small matrix products (product.h):
//
//   direct    a row of pixels times the weights of those rows of the kernel that lie inside the frame (ConvShape::taps);
//   Winograd  F(2x2, 3x3) and F(4x4, 3x3), on 2-D frames: tiles of 2x2 pixels, 16 products where the definition has 36,
//             or of 4x4, 36 for 144. Another kernel is cut into blocks of 3x3 taps, zeros where it ends: one of 7x7 into nine.
//             Their input lanes, each block's those of pixels further right or down, are summed like lanes of one block.
//
// Where the machine has an instruction for it and tiles cost more, the direct method multiplies bfloat16 for tensors
// that hold such: the frame, in a weight gradient both factors, is then rounded to it, sums are float32.
//
// A tile with an outlier among its pixels is computed directly (outliers.h), so that no output is rounded in proportion to a pixel
// that it does not see, and NaN and infinity reach those outputs alone that see them.
//
// A frame has three dimensions, the leading ones 1 where there are fewer; its rows run through depth and height.
// Source of Winograd's method: Lavin & Gray 2015, arXiv 1509.09308.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "buffer.h"
#include "product.h"

namespace convrnn {

constexpr int64_t padded(int64_t channels) {
  return (channels + kColumns - 1) / kColumns * kColumns;
}

struct Size {
  int64_t depth, height, width;
  int64_t rows() const {
    return depth * height;
  }
  int64_t pixels() const {
    return rows() * width;
  }
};

// A frame with zeros around its planes, as many as all kernels and both methods read.
struct Frame {
  Size size;
  int64_t frames;                    // of a call
  int64_t tile;                      // largest side of Winograd's tiles, of convolutions that take that method
  int64_t top, left, height, width;  // of a plane with its zeros

  Frame(const Size& size, int64_t frames, const std::vector<Size>& kernels);
  int64_t pixels() const {
    return size.depth * height * width;
  }
  // The pixel at the start of a row; the row may lie in the zeros above or below a plane of its depth.
  int64_t pixel(int64_t depth, int64_t row) const {
    return (depth * height + row + top) * width + left;
  }
  int64_t pixel(int64_t row) const {
    return pixel(row / size.height, row % size.height);
  }
};

// `gates` groups of `count` channels, `pitch` lanes from group to group and `pixel` lanes from pixel to pixel.
struct Channels {
  int64_t gates, count, pitch, pixel;
  int64_t lanes() const {
    return (gates - 1) * pitch + count;
  }
  int64_t total() const {
    return gates * count;
  }
};

// Weight (n, k, tap) of output channel n and input channel k, taps in row-major order. Flipped for a data gradient.
template <class T>
struct Weights {
  T* data;
  int64_t n, k, tap;  // strides
};

// Blocks of 3x3 taps that cover a kernel.
struct Blocks {
  Size kernel;
  int64_t down, across;
  explicit Blocks(const Size& kernel)
      : kernel(kernel), down((kernel.height + 2) / 3), across((kernel.width + 2) / 3) {}
  int64_t count() const {
    return down * across;
  }
  // Of a block's first tap in the kernel.
  int64_t row(int64_t block) const {
    return 3 * (block / across);
  }
  int64_t column(int64_t block) const {
    return 3 * (block % across);
  }
  // f(tap of the kernel, its place in the block) for those that a block has.
  template <class F>
  void each_tap(int64_t block, F f) const {
    for (int64_t y = row(block); y < std::min(row(block) + 3, kernel.height); ++y) {
      for (int64_t x = column(block); x < std::min(column(block) + 3, kernel.width); ++x) {
        f(y * kernel.width + x, 3 * (y - row(block)) + x - column(block));
      }
    }
  }
};

struct ConvShape {
  Frame frame;
  Size kernel;
  Size before;  // zeros before the frame: of an even kernel's zeros the odd one comes last, with flipped weights first
  Channels in, out;

  ConvShape(const Frame& frame, const Size& kernel, bool flipped, const Channels& in, const Channels& out);

  // Side of Winograd's tiles for a convolution, 0 for the direct method; `pairs`: where that multiplies bfloat16. It depends on
  // the number of frames: a step by itself may differ in its last bits from one of a sequence.
  int64_t tile(bool pairs) const;
  // The same where a product of a lane with a lane costs so much by the direct method and with tiles of 2x2 and 4x4. The numbers
  // are measured: kernels/README.md.
  struct Cost {
    double product, once;  // transforms and all; and what is done once a call, for each product of one tile
  };
  int64_t cheapest(double direct, const Cost& two, const Cost& four) const;

  int64_t block_lanes() const {  // input lanes of all blocks, side by side
    return Blocks(kernel).count() * in.lanes();
  }
  // f(block, channel, lanes, offset) for the runs of some of these, of one block each; `offset` from the first.
  template <class F>
  void each_run(int64_t first_lane, int64_t lanes, F f) const {
    for (int64_t offset = 0, n = 0; offset < lanes; offset += n) {
      const int64_t block = (first_lane + offset) / in.lanes(), channel = (first_lane + offset) % in.lanes();
      n = std::min(in.lanes() - channel, lanes - offset);
      f(block, channel, n, offset);
    }
  }
  // Transforms some of these for the row of tiles that begins at this row of the frame; writes
  // out[product * plane + tile * lanes + lane].
  template <class A, int M>
  void transform_inputs(const A* frame, int64_t row, int64_t first_lane, int64_t lanes, A* out, int64_t plane) const;

  // Taps along the width that meet the frame at all: a frame narrower than the kernel misses some everywhere.
  int64_t first_tap() const;
  int64_t last_tap() const;

  // Those as products over the pixels of a row: all in one go, zeros included, or each over the pixels where it meets the frame,
  // where that saves more than it costs to read and write the sums again. `depth`: of a product for one tap.
  struct Taps {
    int64_t first, count, begin, end;  // taps, and pixels
  };
  std::vector<Taps> taps(int64_t depth) const;
};

// Columns of `multiply`: blocks of output lanes that begin at `channel` of `gate`.
struct Panel {
  int64_t gate, channel, blocks;
};

// Rows and output channels of every gate that one task computes; row_begin is a multiple of the frame's tile, channel_begin of
// the panel's width.
struct Part {
  int64_t row_begin, row_end, channel_begin, channel_end;
  int64_t channels() const {
    return channel_end - channel_begin;
  }
};

// Frames that are convolved at once: so many, and the elements from one to the next, before and behind the convolution.
struct Batch {
  int64_t frames, in_step, out_step;
};

std::vector<Panel> make_panels(int64_t gates, int64_t lanes, int64_t most_blocks);

template <class A>
class Outliers;

template <class A>
class Convolution {
 public:
  // Packs the weights, which is done once for all frames. They must outlive the convolution: for tiles with outliers they are
  // packed again when the first is met, `exactly`: by the direct method, with nothing rounded.
  template <class T>
  Convolution(const ConvShape& shape, const Weights<const T>& weights, bool exactly = false);

  // Writes out[gate * gate_step + (pixel - first pixel of part) * out.pixel + channel], channels padded to kColumns, of every
  // frame. `in` is the first of the padded frames, `scratch` has scratch_size() elements. Frames that are given together
  // share the reading of weights, and fill tiles of products that one alone would not; the results are the same.
  void operator()(const A* in, const Batch& batch, const Part& part, A* out, int64_t gate_step, A* scratch) const;
  int64_t scratch_size() const;
  int64_t panel_width() const {
    return panel_blocks<A>() * kColumns;
  }
  int64_t packed_bytes() const {
    return packed_size_ * static_cast<int64_t>(sizeof(A));
  }

 private:
  // Pixels [begin, end) of the part's rows.
  void direct(const A* frame, const Part& part, int64_t begin, int64_t end, const Panel& panel, const A* weights, A* out) const;
  void pairs(const A* in, const Batch& batch, const Part& part, A* out, int64_t gate_step, A* scratch) const;
  template <int M>
  void winograd(const A* in, const Batch& batch, const Part& part, A* out, int64_t gate_step, A* scratch) const;

  // Pixels [begin, end) of the part's rows in a frame, exactly.
  void exactly(const A* frame, const Part& part, int64_t begin, int64_t end, A* out, int64_t gate_step) const;
  struct Exact {
    std::once_flag once;
    std::function<std::unique_ptr<Convolution>()> make;
    std::unique_ptr<Convolution> found;
  };

  ConvShape shape_;
  bool pairs_;    // products of bfloat16
  int64_t tile_;  // of Winograd's method, or 0
  std::unique_ptr<Exact> exact_;
  std::shared_ptr<const Outliers<A>> outliers_;  // that has looked at no frame yet
  std::vector<ConvShape::Taps> taps_;  // of the direct method
  int64_t panel_size_;  // packed elements of a panel of one block
  std::vector<Panel> panels_;
  int64_t packed_size_ = 0;
  Buffer<A> packed_;
};

}  // namespace convrnn
