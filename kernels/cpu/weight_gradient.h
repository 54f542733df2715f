// Gradients of a convolution's weights and bias.
#pragma once

#include "convolution.h"

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
  void add(int64_t task, const A* const* inputs, const A* const* gradients, int64_t frames, A* scratch);

  // Writes the sums as weights of any dtype.
  template <class T>
  void write(const Weights<T>& weights);

 private:
  void add_groups();
  void direct(int64_t unit, const A* const* inputs, const A* const* gradients, int64_t frames, A* sums) const;
  void pairs(int64_t panel, const A* const* inputs, const A* const* gradients, int64_t frames, A* sums, A* scratch) const;
  template <int M>
  void winograd(int64_t unit, const A* const* inputs, const A* const* gradients, int64_t frames, A* sums,
                A* scratch) const;
  // Sums of weights of input lane k and kColumns output lanes from `column` on, and the distance from tap to tap (direct) or
  // from product to product.
  const A* sums_at(int64_t k, int64_t column, int64_t& plane) const;

  ConvShape shape_;
  int64_t first_lane_, columns_, units_, groups_, size_;  // size_: sums of a group
  bool pairs_;    // products of bfloat16, pairs of pixels
  int64_t tile_;  // of Winograd's method, or 0
  std::vector<Panel> panels_;
  Buffer<A> sums_;
};

// Adds to kColumns sums those lanes of all pixels of a padded frame, `pitch` lanes from pixel to pixel.
template <class A>
void add_pixels(const Frame& frame, const A* lanes, int64_t pitch, double* sums);

}  // namespace convrnn
