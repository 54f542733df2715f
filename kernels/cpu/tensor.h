// What the kernels need of tensors beyond LibTorch's stable ABI, reached through the dispatcher, and the memory layouts
// that they read without a copy (the rule is stated in kernels/layout.py; both sides must agree).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "isa.h"

// Not in the ABI of the floor: absent (null) in an older LibTorch.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace convrnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

// Calls an op; its error keeps its text where LibTorch hands that out (from 2.13 on).
template <size_t N>
void call_dispatcher(const char* op, std::array<StableIValue, N>& stack) {
  if (torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION) != AOTI_TORCH_SUCCESS) {
    const char* what =
        torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : "no details";
    STD_TORCH_CHECK(false, "convrnn: ", op, " failed: ", what);
  }
}

template <class... Args>
Tensor call(const char* op, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  call_dispatcher(op, stack);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Shape shape(const Tensor& x) {
  const auto sizes = x.sizes();
  return Shape(sizes.begin(), sizes.end());
}

inline int64_t numel(const Shape& sizes, size_t from = 0) {
  int64_t n = 1;
  for (size_t i = from; i < sizes.size(); ++i) {
    n *= sizes[i];
  }
  return n;
}

inline bool is_double(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double;
}

// fp32 state, fp64 for fp64.
inline ScalarType state_dtype(const Tensor& x) {
  return is_double(x) ? ScalarType::Double : ScalarType::Float;
}

inline Tensor to_dtype(const Tensor& x, ScalarType dtype) {
  return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
}

// Calls f(T{}) with the element type of x.
template <class F>
void dispatch_dtype(const char* op, const Tensor& x, F f) {
  isa();  // a wrong CONVRNN_ISA is reported here, where its text is not lost, and not from a parallel region
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(c10::BFloat16{});
    case ScalarType::Half:
      return f(c10::Half{});
    default:
      STD_TORCH_CHECK(false, op, ": expected float32, float64, bfloat16 or float16");
  }
}

// A state comes in any of the four dtypes.
inline void check_state(const char* op, const std::optional<Tensor>& h) {
  if (h.has_value()) {
    dispatch_dtype(op, *h, [](auto) {});
  }
}

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// Order of the dimensions from `channel_dim` on, slowest first: (C, *S) or, channels last, (*S, C).
inline bool has_layout(const Tensor& x, int64_t channel_dim, bool channels_last) {
  int64_t expected = 1;
  const int64_t dims = x.dim();
  const auto step = [&](int64_t d) {
    const bool ok = x.size(d) == 1 || x.stride(d) == expected;
    expected *= x.size(d);
    return ok;
  };
  if (channels_last && !step(channel_dim)) {
    return false;
  }
  for (int64_t d = dims - 1; d > channel_dim; --d) {
    if (!step(d)) {
      return false;
    }
  }
  return channels_last || channel_dim >= dims || step(channel_dim);
}

inline bool is_channels_last(const Tensor& x, int64_t channel_dim) {
  return !has_layout(x, channel_dim, false) && has_layout(x, channel_dim, true);
}

// Row-major strides, the channels fastest among the frame's dimensions if they are last.
inline Shape dense_strides(const Shape& sizes, int64_t channel_dim = 0, bool channels_last = false) {
  Shape strides(sizes.size(), 1);
  int64_t step = 1;
  const auto visit = [&](size_t d) {
    strides[d] = step;
    step *= sizes[d] > 0 ? sizes[d] : 1;
  };
  const auto channel = static_cast<size_t>(channel_dim);
  if (channels_last) {
    visit(channel);
  }
  for (size_t d = sizes.size(); d-- > 0;) {
    if (!(channels_last && d == channel)) {
      visit(d);
    }
  }
  return strides;
}

// x contiguous, with row-major strides also where a dimension of size 1 leaves them open, as the fakes have it.
inline Tensor dense(const Tensor& x) {
  const Tensor y = torch::stable::contiguous(x);
  const Shape strides = dense_strides(shape(y));
  const auto given = y.strides();
  if (std::equal(strides.begin(), strides.end(), given.begin())) {
    return y;  // and no view of anything
  }
  return call("aten::as_strided", y, shape(y), strides, std::nullopt);
}

// An uninitialised gap-free tensor on the device of `like`, its frames in the given layout.
inline Tensor empty(const Tensor& like, const Shape& sizes, ScalarType dtype, int64_t channel_dim = 0,
                    bool channels_last = false) {
  return call("aten::new_empty_strided", like, sizes, dense_strides(sizes, channel_dim, channels_last),
              std::optional<ScalarType>(dtype), std::nullopt, std::nullopt, std::nullopt);
}

inline Tensor empty(const Tensor& like, const Shape& sizes) {
  return empty(like, sizes, like.scalar_type());
}

inline Tensor to_layout(const Tensor& x, int64_t channel_dim, bool channels_last) {
  if (has_layout(x, channel_dim, channels_last)) {
    return x;
  }
  Tensor dense = empty(x, shape(x), x.scalar_type(), channel_dim, channels_last);
  torch::stable::copy_(dense, x);
  return dense;
}

// What stands for a gradient that nobody asked for.
inline Tensor nothing(const Tensor& like) {
  return empty(like, {0});
}

// Rows of a tensor: everything behind the batch dimension, dense; the batch stride is free.
template <class T>
struct Rows {
  T* base;
  int64_t step;
  T* operator[](int64_t b) const {
    return base + b * step;
  }
};
template <class T>
Rows<const T> in(const Tensor& x) {
  return {data<T>(x), x.stride(0)};
}
template <class T>
Rows<T> out(const Tensor& x) {
  return {mutable_data<T>(x), x.stride(0)};
}

// f(b) for every batch row, a row a task: rows are long (C*S lanes), and a batch is what there is to share.
template <class F>
void for_rows(int64_t batch, F f) {
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      f(b);
    }
  });
}

}  // namespace convrnn
