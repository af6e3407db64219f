// The row solvers for AVX2 and FMA.
#include "layer.hpp"

#if defined(__x86_64__)

#define OBC_BYTES 32
#define OBC_TILE_ROWS 6
#define OBC_TILE_VECTORS 2

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

namespace obc {
namespace avx2 {
#include "row_solvers.hpp"
}  // namespace avx2

constexpr InstructionSet kAvx2 = {"avx2", avx2::solvers<float>(), avx2::solvers<double>(),
                               avx2::find_grid, avx2::invert_hessians, avx2::output_energy};
}  // namespace obc

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
