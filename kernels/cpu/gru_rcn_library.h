// GRU-RCN with the convolutions of PyTorch's library and the gates of this one, for shapes at which that is faster.
#pragma once

#include "gru_rcn_backward.h"

namespace convrnn {

template <class T>
constexpr bool kHasLibrary = std::is_same_v<T, float> || std::is_same_v<T, c10::BFloat16>;

// Whether the library's convolutions should be faster at this shape, or CONVRNN_CPU_CONV (auto, own, library) says so. Forward and
// backward choose for themselves.
bool takes_library(const Problem& problem, const Tensor& x, bool projects, const Codes& codes, bool backward);

// As `forward` of gru_rcn.cpp; h_n holds h0, or zeros.
template <class T>
void library_forward(const Problem& problem, const Tensor& x, bool has_h0, const std::optional<Tensor>& W, const Tensor& U,
                     const Tensor& C, const std::optional<Tensor>& bias, const Tensor& out, const Tensor& h_n,
                     const Tensor& gates);

// As `backward`, where `gates` were kept.
template <class T>
void library_backward(const Problem& problem, const Operands& operands, const Tensor& gates, Tensor& dh, Gradients& wanted);

}  // namespace convrnn
