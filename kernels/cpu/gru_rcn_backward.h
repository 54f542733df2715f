#pragma once

#include "codes.h"
#include "sequence.h"

namespace convrnn {

// What forward was given and gave; the weights are dense. Bias: only where the activations are computed again.
struct Operands {
  Tensor x;
  std::optional<Tensor> h0;
  std::optional<Tensor> W;
  Tensor U, C;
  std::optional<Tensor> bias;
  Tensor out;
  std::optional<Tensor> dout;
  Codes codes;
};

// The gradients that are wanted, allocated; of h0 only whether.
struct Gradients {
  std::optional<Tensor> dx, dW, dU, dC, dbias;
  bool dh0;
};

// Fills them. `gates` are the activations that forward kept, without elements if none; dh (B, C, *S) holds the gradient of
// h_n and then, if wanted, that of h0.
template <class T>
void backward(const Problem& problem, const Operands& operands, const Tensor& gates, Tensor& dh, Gradients& wanted);

}  // namespace convrnn
