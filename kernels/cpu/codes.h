// Codes of frames, (B, T) uint8: what masks over time tell a recurrence, the same for all lanes of a sample.
#pragma once

#include "tensor.h"

namespace convrnn {

// Bits of a code.
constexpr uint8_t kRestart = 1;  // the state before this frame is forgotten: it begins anew
constexpr uint8_t kHold = 2;     // the state, restarted or not, passes this frame as it is

class Codes {
 public:
  // For frames (B, T, ...) of an op; without codes each is 0.
  Codes(const char* op, const std::optional<Tensor>& codes, const Tensor& frames) : steps_(frames.size(1)) {
    if (codes.has_value()) {
      STD_TORCH_CHECK(codes->scalar_type() == ScalarType::Byte && shape(*codes) == Shape({frames.size(0), steps_}), op,
                      ": expected codes of shape (B, T) and dtype uint8");
      dense_ = dense(*codes);
      first_ = data<uint8_t>(*dense_);
    }
  }
  bool any() const {
    return first_ != nullptr;
  }
  // The code of a frame, others of its sample beside it; null without codes.
  const uint8_t* row(int64_t b, int64_t t) const {
    return first_ == nullptr ? nullptr : first_ + b * steps_ + t;
  }
  bool restart(int64_t b, int64_t t) const {
    return first_ != nullptr && (first_[b * steps_ + t] & kRestart);
  }
  bool hold(int64_t b, int64_t t) const {
    return first_ != nullptr && (first_[b * steps_ + t] & kHold);
  }

 private:
  int64_t steps_;
  std::optional<Tensor> dense_;
  const uint8_t* first_ = nullptr;
};

}  // namespace convrnn
