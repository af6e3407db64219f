// The innermost loops for AVX2 and FMA.
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <cstring>

#include "instruction_sets.hpp"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define OBC_DOT_AVX2

namespace obc::sparse {
namespace avx2_rows {
#include "rows/rows.hpp"
}  // namespace avx2_rows

const InstructionSet kAvx2 = avx2_rows::instruction_set("avx2", kAvx2Convolution);
}  // namespace obc::sparse

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
