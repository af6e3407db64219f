// Block-sparse convolution for whatever processor the compiler was told of.
#include "block_convolution.hpp"

#define OBC_INLINE inline
#define OBC_TILE_SHAPES(WHOLE, HALVED) WHOLE(1, 1) WHOLE(1, 2) WHOLE(1, 4) WHOLE(2, 2) WHOLE(2, 4)

namespace obc {
namespace sparse {
namespace portable {
#include "lanes_portable.hpp"
#include "convolution_kernels.hpp"
}  // namespace portable

const ConvolutionKernels kPortableConvolution = portable::kKernels;
}  // namespace sparse
}  // namespace obc
