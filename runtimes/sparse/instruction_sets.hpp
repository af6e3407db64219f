// The innermost loops, compiled once for each instruction set; operators call them through this table.
#pragma once

#include <cstdint>

#include "block_convolution.hpp"
#include "grids.hpp"

namespace obc::sparse {

constexpr int64_t kTilePixels = 16;  // of a blocked row: what these loops hold at a time
constexpr int64_t kTileBytes = kTilePixels * kBlock;
constexpr int64_t kTokens = 64;  // rows of a linear layer that share each load of a weight
constexpr int64_t kSlice = 16;   // outputs side by side where rows go by themselves

// Neighbouring pixels of one block of channels of a depthwise convolution.
struct DepthwisePixels {
    const uint8_t* const* inputs;  // [taps]: what each tap meets at the first output pixel
    const int32_t* weights;        // [taps][4]: each in 16 bits, the upper ones 0
    int64_t taps;
    const int32_t* bias;  // spread over a tile's bytes, as the multiplier
    const float* multiplier;
    float low;
    float high;
    int32_t zero_point;
    int64_t pixels;
    uint8_t* output;
};

// Non-zero blocks of a linear layer: output o's are start[o] to start[o + 1] - 1.
struct LinearBlocks {
    const int32_t* start;
    const int32_t* index;  // input block
    const int8_t* values;  // [4] each
};

// The same, kSlice outputs side by side: those of slice s are places start[s] to start[s + 1] - 1, each
// of kSlice blocks, filled up with zeros to the longest of its outputs.
struct LinearSlices {
    const int32_t* start;
    const int32_t* index;  // [kSlice] each
    const int8_t* values;  // [kSlice][4] each
};

// Non-zero weights of a float layer.
struct FloatEntries {
    const int32_t* row_start;
    const int32_t* index;  // of the input, in steps of `step` elements
    const float* values;
    int64_t step;
};

struct InstructionSet {
    const char* name;
    const ConvolutionKernels* convolution;

    void (*quantize)(const float* from, int64_t count, const OutputGrid& grid, uint8_t* to);
    void (*dequantize)(const uint8_t* from, int64_t count, const Grid& grid, float* to);
    // Four rows, one a channel, to pixels of four lanes, and back; null rows are left out.
    void (*interleave)(const uint8_t* const rows[kBlock], int64_t pixels, uint8_t* to);
    void (*separate)(const uint8_t* from, int64_t pixels, uint8_t* const rows[kBlock]);
    // to = quantize(dequantize(a) + dequantize(b))
    void (*add)(const uint8_t* a, const Grid& a_grid, const uint8_t* b, const Grid& b_grid,
                int64_t bytes, const OutputGrid& grid, uint8_t* to);
    // The largest of two by two pixels.
    void (*larger_of_fours)(const uint8_t* from, int64_t from_row_bytes, int64_t pixels, int64_t rows,
                            uint8_t* to, int64_t to_row_bytes);
    // to = max(to, from)
    void (*keep_larger)(const uint8_t* from, int64_t bytes, uint8_t* to);
    // to += from
    void (*add_codes)(const uint8_t* from, int64_t bytes, int32_t* to);
    // sums[lane] += those of a row's pixels.
    void (*sum_pixels)(const uint8_t* from, int64_t pixels, int32_t sums[kBlock]);
    // Every stride-th pixel.
    void (*take_pixels)(const uint8_t* from, int64_t stride, int64_t pixels, uint8_t* to);
    void (*depthwise)(const DepthwisePixels& run);
    // sums[slice][output] over one row's blocks, and sums[o][token] over kTokens rows [input
    // blocks][kTokens][4].
    void (*linear_row)(const LinearSlices& weights, const uint8_t* row, int64_t slices, int32_t* sums);
    void (*linear_tokens)(const LinearBlocks& weights, const uint8_t* rows, int64_t outputs,
                          int32_t* sums);
    // One channel's sums to codes, and to float32: to = (sums + bias) * multiplier.
    void (*requantize)(const int32_t* sums, int64_t count, int32_t bias, float multiplier,
                       const OutputGrid& grid, uint8_t* to);
    void (*scale_sums)(const int32_t* sums, int64_t count, int32_t bias, float multiplier, float offset,
                       float* to);
    // The same of one sum a channel.
    void (*requantize_channels)(const int32_t* sums, int64_t count, const int32_t* bias,
                                const float* multiplier, const OutputGrid& grid, uint8_t* to);
    void (*scale_channels)(const int32_t* sums, int64_t count, const int32_t* bias,
                           const float* multiplier, const float* offset, float* to);
    // Sum of value * row[index], and `floats` such sums, each an element further on.
    float (*float_dot)(const FloatEntries& weights, int64_t output, const float* row);
    void (*float_products)(const FloatEntries& weights, int64_t output, const float* from, float* to);
    int64_t floats;
};

extern const InstructionSet kPortable;
#if defined(__x86_64__)
extern const InstructionSet kAvx2;
extern const InstructionSet kAvx2Vnni;
extern const InstructionSet kAvx512Vnni;
#endif

// The one in use: the best this processor has, or the one that was chosen.
const InstructionSet& instruction_set();

}  // namespace obc::sparse
