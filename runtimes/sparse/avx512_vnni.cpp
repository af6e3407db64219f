// The innermost loops for AVX-512 with VNNI.
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <cstring>

#include "instruction_sets.hpp"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,prefer-vector-width=512")
#endif

#define OBC_DOT_AVX512_VNNI

namespace obc::sparse {
namespace avx512_vnni_rows {
#include "rows/rows.hpp"
}  // namespace avx512_vnni_rows

const InstructionSet kAvx512Vnni = avx512_vnni_rows::instruction_set("avx512_vnni", kAvx512VnniConvolution);
}  // namespace obc::sparse

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
