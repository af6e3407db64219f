// The innermost loops for AVX2, FMA and AVX-VNNI.
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <cstring>

#include "instruction_sets.hpp"

#if defined(__x86_64__)

#include "avx_vnni_target.hpp"

#define OBC_DOT_AVX2_VNNI

namespace obc::sparse {
namespace avx2_vnni_rows {
#include "rows/rows.hpp"
}  // namespace avx2_vnni_rows

const InstructionSet kAvx2Vnni = avx2_vnni_rows::instruction_set("avx2_vnni", kAvx2VnniConvolution);
}  // namespace obc::sparse

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
