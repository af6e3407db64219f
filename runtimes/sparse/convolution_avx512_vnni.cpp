// Block-sparse convolution for AVX512-VNNI.
#include "block_convolution.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512vnni,avx2"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512vnni,avx2,prefer-vector-width=512")
#endif

#define OBC_INLINE inline __attribute__((always_inline))
#define OBC_TILE_SHAPES(WHOLE, HALVED)                                                       \
    WHOLE(1, 1) WHOLE(1, 2) HALVED(1, 4) WHOLE(1, 4) HALVED(1, 7) WHOLE(1, 7) HALVED(1, 13)  \
    WHOLE(1, 14) WHOLE(1, 28) WHOLE(2, 4) WHOLE(2, 7) WHOLE(4, 4) WHOLE(4, 7)

namespace obc {
namespace sparse {
namespace avx512_vnni {
#include "lanes_avx512_vnni.hpp"
#include "convolution_kernels.hpp"
}  // namespace avx512_vnni

const ConvolutionKernels kAvx512VnniConvolution = avx512_vnni::kKernels;
}  // namespace sparse
}  // namespace obc

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
