// The row solvers for AVX-512.
#include "layer.hpp"

#if defined(__x86_64__)

#define OBC_BYTES 64
#define OBC_TILE_ROWS 8
#define OBC_TILE_VECTORS 3

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,prefer-vector-width=512")
#endif

namespace obc {
namespace avx512 {
#include "row_solvers.hpp"
}  // namespace avx512

constexpr InstructionSet kAvx512 = {"avx512", avx512::solvers<float>(), avx512::solvers<double>(),
                               avx512::find_grid, avx512::invert_hessians, avx512::output_energy};
}  // namespace obc

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
