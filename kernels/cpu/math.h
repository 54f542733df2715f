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
CONVRNN_INLINE int64_t bits(double x) {
  int64_t i;
  std::memcpy(&i, &x, sizeof(i));
  return i;
}
CONVRNN_INLINE float from_bits(int32_t i) {
  float x;
  std::memcpy(&x, &i, sizeof(x));
  return x;
}
CONVRNN_INLINE double from_bits(int64_t i) {
  double x;
  std::memcpy(&x, &i, sizeof(x));
  return x;
}

// Elements to and from acc_t by arithmetic on bits that every instruction set vectorises. To 16 bits rounds to nearest
// even, keeps NaN a NaN, and overflows to infinity.
CONVRNN_INLINE float load(float x) {
  return x;
}
CONVRNN_INLINE double load(double x) {
  return x;
}
CONVRNN_INLINE float load(c10::BFloat16 x) {
  return from_bits(static_cast<int32_t>(static_cast<uint32_t>(x.x) << 16));
}
CONVRNN_INLINE float load(c10::Half x) {
  const uint32_t h = x.x, sign = (h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  // the exponent's bias grows from 15 to 127; a denormal is a number of units of 2^-24
  const uint32_t normal = (magnitude << 13) + (magnitude < 0x7c00u ? 112u << 23 : 224u << 23);
  const auto denormal = static_cast<uint32_t>(bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f));
  return from_bits(static_cast<int32_t>(sign | (magnitude < 0x400u ? denormal : normal)));
}

CONVRNN_INLINE void store(float& to, float x) {
  to = x;
}
CONVRNN_INLINE void store(double& to, double x) {
  to = x;
}
CONVRNN_INLINE void store(c10::BFloat16& to, float x) {
  const auto i = static_cast<uint32_t>(bits(x));
  const uint32_t rounded = (i + 0x7fffu + ((i >> 16) & 1u)) >> 16;
  to.x = static_cast<uint16_t>(x == x ? rounded : (i >> 16) | 0x40u);
}
CONVRNN_INLINE void store(c10::Half& to, float x) {
  const auto i = static_cast<uint32_t>(bits(x));
  const uint32_t magnitude = i & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // below 2^-14: adding 1/2, whose unit in the last place is a denormal's, rounds
  const auto denormal = static_cast<uint32_t>(bits(std::fabs(x) + 0.5f)) - 0x3f000000u;
  uint32_t h = magnitude < 0x38800000u ? denormal : normal;
  h = magnitude < 0x477ff000u ? h : 0x7c00u;  // 65520 and above
  h = x == x ? h : 0x7e00u;
  to.x = static_cast<uint16_t>(h | (i >> 16 & 0x8000u));
}

// A constant that the compiler may not look into: from a clamp to one that it knows it derives a second path with all
// that follows computed in advance, and selects between the two in the end, for five instructions instead of one. Not weak:
// the address of a weak one may be null, so that reading it where a lane's turn is conditional could not be done in advance.
extern const float kLeastExponent;  // -87.3

// e^x for x in [-87.3, 88.3], and NaN for NaN: within 4 units in the last place with fused multiply-adds, else |x| / 2.
// x = n ln 2 + r with |r| <= ln 2 / 2; e^r by a polynomial fitted to its relative error (1e-7), in short chains.
CONVRNN_INLINE float exp_in_range(float x) {
  const float round = 12582912.f + 127.f;  // adding 1.5 * 2^23 rounds to an integer, in the low bits: n + 127
  const float shifted = x * 1.44269504f + round;
  const float r = x - (shifted - round) * 0.693147181f;
  const float r2 = r * r;
  const float p = (1.f + r) + r2 * ((4.99992281e-1f + 1.66671157e-1f * r) + r2 * (4.18905504e-2f + 8.31247773e-3f * r));
  return p * from_bits(static_cast<int32_t>(static_cast<uint32_t>(bits(shifted)) << 23));
}
// e^x for x <= 88.3, clamped below -87.3: so never 0 or a denormal.
CONVRNN_INLINE float exp_(float x) {
  return exp_in_range(x < kLeastExponent ? kLeastExponent : x);
}
CONVRNN_INLINE double exp_(double x) {
  return std::exp(x);
}

// log(1 + x) for x in [0, 1], to full relative accuracy also where x is tiny: 2 atanh(u) with u = x / (2 + x) <= 1/3,
// by a polynomial in u^2 fitted to its relative error (5e-9).
CONVRNN_INLINE float log1p_(float x) {
  const float u = x / (2.f + x);
  const float v = u * u;
  float p = 0.280119866f;
  p = p * v + 0.280018061f;
  p = p * v + 0.400215268f;
  p = p * v + 0.666664183f;
  return u * 2.f + u * (v * p);
}
CONVRNN_INLINE double log1p_(double x) {
  return std::log1p(x);
}

// e^-|x|, clamped like exp_.
CONVRNN_INLINE float exp_minus_abs(float x) {
  return exp_(from_bits(bits(x) | std::numeric_limits<int32_t>::min()));  // one instruction where -fabs(x) takes two
}
CONVRNN_INLINE double exp_minus_abs(double x) {
  return std::exp(-std::fabs(x));
}

// sigmoid(-|x|), the smaller of sigmoid(x) and 1 - sigmoid(x), to full relative accuracy and without overflow.
template <class A>
CONVRNN_INLINE A sigmoid_tail(A x) {
  const A e = exp_minus_abs(x);
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

// minGRU's candidate g(x) = x + 1/2 for x >= 0, sigmoid(x) otherwise, and its derivative. Alone, its NaN comes from
// x + 1/2, so that integers may clamp the exponent, in one instruction where floats take two.
CONVRNN_INLINE float g(float x) {
  const uint32_t minus = static_cast<uint32_t>(bits(x)) | 0x80000000u, least = 0xc2ae999au;  // -|x|, -87.3
  const float e = exp_in_range(from_bits(static_cast<int32_t>(minus < least ? minus : least)));
  return x < 0.f ? e / (1.f + e) : x + 0.5f;
}
CONVRNN_INLINE double g(double x) {
  return x >= 0. ? x + 0.5 : sigmoid_tail(x);
}
template <class A>
CONVRNN_INLINE A g(A x, A& derivative) {
  const A tail = sigmoid_tail(x);
  derivative = x >= A(0) ? A(1) : tail * (A(1) - tail);
  return x >= A(0) ? x + A(0.5) : tail;
}

}  // namespace convrnn
