// Scalar functions that a compiler can vectorise: no branches, no calls, no errno. fp64 uses libm: it serves checks of
// gradients, not speed.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "isa.h"

namespace convrnn {

// State and arithmetic are fp32, fp64 for fp64 tensors.
template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

CONVRNN_INLINE int32_t bits(float x) {
  int32_t i;
  std::memcpy(&i, &x, sizeof(i));
  return i;
}
CONVRNN_INLINE float from_bits(int32_t i) {
  float x;
  std::memcpy(&x, &i, sizeof(x));
  return x;
}

// e^x to about 1 ulp on [-87.3, 88.3]; clamped outside (so never 0, inf or a denormal), NaN stays NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2; e^r by its Taylor polynomial of degree 7 (truncation 5e-9).
CONVRNN_INLINE float exp_(float x) {
  x = x < -87.3f ? -87.3f : x;
  x = x > 88.3f ? 88.3f : x;
  const float round = 12582912.f;  // 1.5 * 2^23: adding it rounds to the nearest integer, in the low bits
  const float shifted = x * 1.44269504f + round;
  const float n = shifted - round;
  float r = x - n * 0.693359375f;  // ln 2 in two parts, the first exact in 9 bits
  r = r + n * 2.12194440e-4f;
  float p = 1.98412698e-4f;
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  const auto exponent = static_cast<int32_t>((static_cast<uint32_t>(bits(shifted)) << 23) + (127u << 23));
  return p * from_bits(exponent);
}
CONVRNN_INLINE double exp_(double x) {
  return std::exp(x);
}

// log x for x in [1, inf): x = 2^n m with m in [1/sqrt 2, sqrt 2), log m = 2 atanh((m - 1) / (m + 1)).
CONVRNN_INLINE float log_(float x) {
  const int32_t n = (bits(x) - 0x3f3504f3) >> 23;  // 0x3f3504f3 is 1/sqrt 2
  const float m = from_bits(bits(x) - static_cast<int32_t>(static_cast<uint32_t>(n) << 23));
  const float u = (m - 1.f) / (m + 1.f);
  const float v = u * u;
  float p = 2.f / 9.f;
  p = p * v + 2.f / 7.f;
  p = p * v + 2.f / 5.f;
  p = p * v + 2.f / 3.f;
  const float log_m = u * 2.f + u * (v * p);
  const float y = static_cast<float>(n) * 0.693147181f + log_m;
  return x <= std::numeric_limits<float>::max() ? y : x;  // inf and NaN stay
}
CONVRNN_INLINE double log_(double x) {
  return std::log(x);
}

// sigmoid(-|x|), the smaller of sigmoid(x) and 1 - sigmoid(x), to full relative accuracy and without overflow.
template <class A>
CONVRNN_INLINE A sigmoid_tail(A x) {
  const A e = exp_(-std::fabs(x));
  return e / (A(1) + e);
}

// sigmoid(x) and 1 - sigmoid(x).
template <class A>
CONVRNN_INLINE A sigmoid(A x, A& complement) {
  const A tail = sigmoid_tail(x);
  complement = x >= A(0) ? tail : A(1) - tail;
  return x >= A(0) ? A(1) - tail : tail;
}
template <class A>
CONVRNN_INLINE A sigmoid(A x) {
  const A tail = sigmoid_tail(x);
  return x >= A(0) ? A(1) - tail : tail;
}

// tanh x = (1 - e) / (1 + e) with e = e^(-2|x|); below 1/4, where 1 - e cancels, the odd Taylor polynomial.
CONVRNN_INLINE float tanh_(float x) {
  const float a = std::fabs(x);
  const float e = exp_(-2.f * a);
  const float large = (1.f - e) / (1.f + e);
  const float v = x * x;
  float p = 62.f / 2835.f;
  p = p * v - 17.f / 315.f;
  p = p * v + 2.f / 15.f;
  p = p * v - 1.f / 3.f;
  const float small = a + a * (v * p);
  return std::copysign(a < 0.25f ? small : large, x);
}
CONVRNN_INLINE double tanh_(double x) {
  return std::tanh(x);
}

// minGRU's candidate g(x) = x + 1/2 for x >= 0, sigmoid(x) otherwise, and its derivative.
template <class A>
CONVRNN_INLINE A g(A x) {
  const A tail = sigmoid_tail(x);
  return x >= A(0) ? x + A(0.5) : tail;
}
template <class A>
CONVRNN_INLINE A g(A x, A& derivative) {
  const A tail = sigmoid_tail(x);
  derivative = x >= A(0) ? A(1) : tail * (A(1) - tail);
  return x >= A(0) ? x + A(0.5) : tail;
}

}  // namespace convrnn
