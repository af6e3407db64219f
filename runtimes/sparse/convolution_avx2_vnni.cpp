// Block-sparse convolution for AVX2 and AVX-VNNI.
#include "block_convolution.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

#include "avx_vnni_target.hpp"

#define OBC_INLINE inline __attribute__((always_inline))
#define OBC_TILE_SHAPES(WHOLE, HALVED)                                                               \
    WHOLE(1, 1) WHOLE(1, 2) WHOLE(1, 4) WHOLE(1, 7) WHOLE(1, 12) WHOLE(2, 2) WHOLE(2, 4)

namespace obc {
namespace sparse {
namespace avx2_vnni {
#include "codes_avx2.hpp"
#include "lanes_avx2_vnni.hpp"
#include "convolution_kernels.hpp"
}  // namespace avx2_vnni

const ConvolutionKernels kAvx2VnniConvolution = avx2_vnni::kKernels;
}  // namespace sparse
}  // namespace obc

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
