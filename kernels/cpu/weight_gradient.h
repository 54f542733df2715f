// Gradients of a convolution's weights and bias. As in convolutions, what an outlier of a frame would spoil is computed directly:
// a tile whose largest factors are large beside what a usual weight's gradient sums; and a frame with NaN or infinity,
// whose zeros around it would make NaN of taps that do not see it.
#pragma once

#include "convolution.h"
#include "outliers.h"

namespace convrnn {

// Gradient of the weights, summed over any number of frames. The sums are split by the shape alone, so that threads change
// no bit: into blocks of weights, each worked on where tiles and sums stay in the second-level cache, and, where these are
// few, into groups of frames.
template <class A>
class WeightGradient {
 public:
  // Of the output's gradient, lanes [first_lane, first_lane + out.gates * out.pitch) belong to this convolution.
  // `frames` is the number that `add` is given at once; `bfloat16` whether the tensors hold that.
  WeightGradient(const ConvShape& shape, int64_t first_lane, int64_t frames, bool bfloat16);

  // Adds frames in independent tasks. `scratch` has scratch_size() elements.
  int64_t tasks() const {
    return groups_ * units_;
  }
  int64_t scratch_size() const;
  struct Factor {  // of the products of a frame: its lanes, and their magnitudes
    const A* frame;
    Magnitudes<A> magnitudes;
    bool finite_with(const Factor& other) const {
      return magnitudes.finite() && other.magnitudes.finite();
    }
  };
  void add(int64_t task, const Factor* inputs, const Factor* gradients, int64_t frames, A* scratch);

  // Writes the sums as weights of any dtype.
  template <class T>
  void write(const Weights<T>& weights);

 private:
  void add_groups();
  void direct(int64_t unit, const Factor* inputs, const Factor* gradients, int64_t frames, A* sums) const;
  void pairs(int64_t panel, const Factor* inputs, const Factor* gradients, int64_t frames, A* sums, A* scratch) const;
  template <int M>
  void winograd(int64_t task, const Factor* inputs, const Factor* gradients, int64_t frames, A usual, A* sums, A* scratch);
  // A row of the kernel and a panel, of a frame with NaN or infinity: no tap reads the zeros around it.
  void exactly(int64_t kernel_row, const Panel& panel, const A* input, const A* gradient, A* sums) const;
  // Of Winograd's sums, those of a task: so many lanes of the blocks and columns of the output.
  struct Square {
    int64_t lane, lanes, column, columns;
  };
  Square square_of(int64_t task) const;
  // Whether a tile that begins at this pixel has factors whose product is large beside the sum of usual ones, and what it gives
  // to the task's weights then.
  bool has_outlier(const Square& square, const A* input, const A* gradient, int64_t row, int64_t column, A usual) const;
  void exactly(int64_t task, const A* input, const A* gradient, int64_t row, int64_t column);
  void add_exact(int64_t lane, int64_t column, A* of_block) const;
  // Sums of weights of input lane k and kColumns output lanes from `column` on, and the distance from tap to tap (direct) or
  // from product to product.
  const A* sums_at(int64_t k, int64_t column, int64_t& plane) const;

  ConvShape shape_;
  int64_t first_lane_, columns_, units_, groups_, size_;  // size_: sums of a group
  bool pairs_;    // products of bfloat16, pairs of pixels
  int64_t tile_;  // of Winograd's method, or 0
  std::vector<Panel> panels_;
  Buffer<A> sums_;
  std::vector<Buffer<A>> exact_;  // of tasks that met tiles with outliers: the square's weights, by taps of the block
};

// Adds to kColumns sums those lanes of all pixels of a padded frame, `pitch` lanes from pixel to pixel.
template <class A>
void add_pixels(const Frame& frame, const A* lanes, int64_t pitch, double* sums);

}  // namespace convrnn
