// Block-sparse convolution for AVX2.
#include "block_convolution.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define OBC_INLINE inline __attribute__((always_inline))
#define OBC_TILE_SHAPES(WHOLE, HALVED) \
    WHOLE(1, 1) WHOLE(1, 2) WHOLE(1, 4) WHOLE(1, 6) WHOLE(2, 2)

namespace obc {
namespace sparse {
namespace avx2 {
#include "codes_avx2.hpp"
#include "lanes_avx2.hpp"
#include "convolution_kernels.hpp"
}  // namespace avx2

const ConvolutionKernels kAvx2Convolution = avx2::kKernels;
}  // namespace sparse
}  // namespace obc

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
