// Block-sparse convolution for whatever processor the compiler was told of.
#include "block_convolution.hpp"

#define OBC_INLINE inline
#define OBC_TILE_SHAPES(SHAPE) SHAPE(1, 1) SHAPE(1, 2) SHAPE(1, 4) SHAPE(2, 2) SHAPE(2, 4)

namespace obc {
namespace sparse {
namespace portable {
#include "lanes_portable.hpp"
#include "convolution_kernels.hpp"
}  // namespace portable

const ConvolutionKernels kPortableConvolution = portable::kKernels;
}  // namespace sparse
}  // namespace obc
