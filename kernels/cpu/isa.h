// Instruction sets, chosen at run time: the library is compiled for the plain target of its platform, and every kernel
// body is compiled again for the wider sets, so that one binary runs on any machine at that machine's width.
#pragma once

#include <string>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define CONVRNN_X86 1
#define CONVRNN_AVX2 __attribute__((target("avx2,fma")))
#ifdef __clang__
#define CONVRNN_VECTOR_WIDTH ""
#else
#define CONVRNN_VECTOR_WIDTH ",prefer-vector-width=512"  // else GCC stops at 256 bits
#endif
#define CONVRNN_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma" CONVRNN_VECTOR_WIDTH)))
#define CONVRNN_AVX512BF16 \
  __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma" CONVRNN_VECTOR_WIDTH)))
#endif

#if defined(__GNUC__) || defined(__clang__)
#define CONVRNN_INLINE inline __attribute__((always_inline))
#else
#define CONVRNN_INLINE __forceinline
#endif

// The iterations of the next loop are independent: the pointers of a kernel never overlap except lane for lane.
#if defined(__clang__)
#define CONVRNN_LANES _Pragma("clang loop vectorize(assume_safety)")
#define CONVRNN_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define CONVRNN_LANES _Pragma("GCC ivdep")
#define CONVRNN_UNROLL _Pragma("GCC unroll 16")
#else
#define CONVRNN_LANES
#define CONVRNN_UNROLL
#endif

namespace convrnn {

enum class Isa { plain, avx2, avx512, avx512bf16 };  // the last is avx512 but for products of bfloat16

// The widest set this machine has, or the one named by the environment variable CONVRNN_ISA (plain, avx2, avx512,
// avx512bf16), read once. Throws where the variable names no set or one that this machine lacks.
Isa isa();
std::string isa_report();

#ifdef CONVRNN_X86
template <class Kernel, class... Args>
CONVRNN_AVX512 void run_avx512(Args... args) {
  Kernel::run(args...);
}
template <class Kernel, class... Args>
CONVRNN_AVX2 void run_avx2(Args... args) {
  Kernel::run(args...);
}
#endif

// Runs Kernel::run, a CONVRNN_INLINE static function, compiled for the chosen instruction set.
template <class Kernel, class... Args>
void run(Args... args) {
#ifdef CONVRNN_X86
  switch (isa()) {
    case Isa::avx512bf16:
    case Isa::avx512:
      return run_avx512<Kernel>(args...);
    case Isa::avx2:
      return run_avx2<Kernel>(args...);
    case Isa::plain:
      break;
  }
#endif
  Kernel::run(args...);
}

}  // namespace convrnn
