// All innermost loops of one instruction set: included once for each, in a namespace of its own.
//
// The includer defines OBC_DOT_PORTABLE, _AVX2, _AVX2_VNNI or _AVX512_VNNI. Most loops run over a
// fixed count and are left to the compiler, which makes vectors of them for each set.

#define OBC_INLINE inline __attribute__((always_inline))

#include "rounding.hpp"
#include "dot_lanes.hpp"
#include "wide_lanes.hpp"
#include "float_lanes.hpp"
#include "conversion.hpp"
#include "addition.hpp"
#include "pooling.hpp"
#include "depthwise.hpp"
#include "linear.hpp"
#include "float_products.hpp"

constexpr InstructionSet instruction_set(const char* name, const ConvolutionKernels& convolution) {
    return {name,       &convolution, quantize,        dequantize,          interleave,
            separate,   add,          larger_of_fours, keep_larger,         add_codes,
            sum_pixels, take_pixels,  depthwise,       linear_row,          linear_tokens,
            requantize, scale_sums,   requantize_channels, scale_channels,  float_dot,
            float_products, kFloats};
}
