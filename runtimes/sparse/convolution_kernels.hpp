// One instruction set's kernels (included once for each, within a namespace of its own, after the
// set's Codes, TilePixels, Arithmetic and Lanes; no include guard).

#include "packed_tile.hpp"
#include "requantize.hpp"
#include "accumulate.hpp"
#include "fetch_ahead.hpp"

typedef void (*Accumulate)(const RowsOfBlocks&);

#define OBC_WHOLE(rows, columns) {rows, columns, false},
#define OBC_HALVED(rows, columns) {rows, columns, true},
static constexpr TileShape kTileShapes[] = {OBC_TILE_SHAPES(OBC_WHOLE, OBC_HALVED)};
#undef OBC_WHOLE
#undef OBC_HALVED
template <int kRows, int kColumns, bool kHalved, int kChannels, Ending kEnding>
static constexpr Accumulate kernel() {
    if constexpr (kChannels > Lanes::kBandChannels) {
        return nullptr;
    } else {
        return &accumulate<kRows, kColumns, kHalved, kChannels, kEnding, 0>;
    }
}
#define OBC_ENDINGS(...)                                                                            \
    {kernel<__VA_ARGS__, Ending::kSums>(), kernel<__VA_ARGS__, Ending::kExact>(),                   \
     kernel<__VA_ARGS__, Ending::kBounded>(), kernel<__VA_ARGS__, Ending::kBoundedWhole>(),         \
     kernel<__VA_ARGS__, Ending::kRectified>(), kernel<__VA_ARGS__, Ending::kRectifiedWhole>()},
#define OBC_BANDS(...) {OBC_ENDINGS(__VA_ARGS__, 1) OBC_ENDINGS(__VA_ARGS__, 2) OBC_ENDINGS(__VA_ARGS__, 4)},
#define OBC_WHOLE(rows, columns) OBC_BANDS(rows, columns, false)
#define OBC_HALVED(rows, columns) OBC_BANDS(rows, columns, true)
static constexpr Accumulate kAccumulate[][kBandSizes][kEndings] = {OBC_TILE_SHAPES(OBC_WHOLE, OBC_HALVED)};
#undef OBC_WHOLE
#undef OBC_HALVED
#undef OBC_BANDS
#undef OBC_ENDINGS

#include "write_chunk.hpp"
#include "run_convolution.hpp"

// Products of one block with kPixels pixels each, all in registers: what no kernel can be faster than.
// Returns how many there were, pixel by pixel; 0 without VNNI, where compilers see through the loop.
static int64_t products_alone(int64_t rounds) {
    if (!Lanes::kOneInstruction) return 0;
    // Enough to hide an instruction's latency, and not more than there are registers.
    constexpr int kChains = Lanes::kPixels >= 16 ? 12 : 6;
    constexpr int kSteps = 16;  // compilers copy registers from round to round
    alignas(64) uint8_t pixels[Lanes::kPixels * Lanes::kPixelBytes] = {1};
    alignas(64) uint8_t block[64] = {1};
    alignas(64) uint8_t sums[Lanes::kPixels * Lanes::kSumBytes];
    __asm__ volatile("" : "+m"(pixels), "+m"(block));  // nothing is known of them
    const Lanes::Weights weights = Lanes::weights(block);
    Lanes::Sums sum[kChains];
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) sum[c] = Lanes::start(c);
    for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 16
        for (int s = 0; s < kSteps; ++s) {
#pragma GCC unroll 12
            for (int c = 0; c < kChains; ++c) sum[c] = Lanes::add_products(sum[c], pixels, weights);
        }
    }
#pragma GCC unroll 12
    for (int c = 1; c < kChains; ++c) sum[0] = Lanes::add(sum[0], sum[c]);
    Lanes::store(sums, sum[0]);
    __asm__ volatile("" : : "r"(sums) : "memory");  // somebody may read the sums
    return rounds * kSteps * kChains * Lanes::kPixels;
}

static constexpr ConvolutionKernels kKernels = {
    Lanes::kName,       Lanes::kPixels, Lanes::kPixelBytes, Lanes::kSumBytes, Lanes::kWeightBytes,
    Lanes::kCacheBytes, Lanes::kBandChannels, kTileShapes,    sizeof(kTileShapes) / sizeof(kTileShapes[0]),
    &run_convolution, &products_alone};
