// The sums of output channels over one group of input blocks (included once for each set).
//
// VNNI takes the unsigned operand from a register: so each product needs a load of its own, aligned
// because of how tiles are packed or where tensors lie, or one that serves several channels
// (bands.hpp). Four instructions a cycle leave little room for others: hence many vectors for each load
// of a weight, and sums that become codes before they leave the registers.

struct RowsOfBlocks {
    const uint8_t* tile;
    int64_t pitch;            // bytes from a row of vectors to the next
    // Of a halved tile: the last vectors of all blocks, which are at the blocks' offsets, and how many times as
    // far apart the others are.
    const uint8_t* halves;
    int64_t wholes_apart;
    const uint8_t* blocks;    // of the rows, one after the other: see ConvolutionPlan::blocks_
    const BandRow* rows;
    int64_t count;
    const int32_t* bias;      // of all output channels; null: go on from the sums
    int32_t* sums;            // of all output channels
    const float* multiplier;  // of all output channels
    const Arithmetic::Bounds* bounds;
    uint8_t* codes;           // of the output channels from first_channel on
    int64_t first_channel;
};

// A dependent name: sets without halved tiles need not have it.
template <class AnyLanes>
static OBC_INLINE typename AnyLanes::Sums add_half(typename AnyLanes::Sums sums, const uint8_t* pixels,
                                                   typename AnyLanes::Weights weights) {
    return AnyLanes::add_half_products(sums, pixels, weights);
}

// The vectors kFirst to kFirst + kCount - 1 of a tile; `tile` is where the first one's row starts.
template <int kColumns, bool kHalved, int kChannels, int kFirst, int kCount>
static OBC_INLINE void add_block(Lanes::Sums (*sum)[kCount], const uint8_t* tile, int64_t pitch,
                                 const uint8_t* halves, int64_t wholes_apart, const uint8_t* block) {
    constexpr int kVectorBytes = Lanes::kPixels * Lanes::kPixelBytes;
    constexpr int kFirstRow = kFirst / kColumns;
    constexpr int kLastRow = (kFirst + kCount - 1) / kColumns;
    int32_t offset;
    __builtin_memcpy(&offset, block, kOffsetBytes);
    const uint8_t* pixels = tile + (kHalved ? offset * wholes_apart : offset);
    Lanes::Weights weights[kChannels];
#pragma GCC unroll 4
    for (int c = 0; c < kChannels; ++c) weights[c] = Lanes::weights(block + kOffsetBytes + c * Lanes::kWeightBytes);
#pragma GCC unroll 28
    for (int y = kFirstRow; y <= kLastRow; ++y, pixels += pitch) {
#pragma GCC unroll 28
        for (int x = 0; x < kColumns; ++x) {
            const int v = y * kColumns + x - kFirst;
            if (v < 0 || v >= kCount) continue;
#pragma GCC unroll 4
            for (int c = 0; c < kChannels; ++c) {
                Lanes::Sums& s = sum[c][v];
                if constexpr (kHalved) {
                    if (x == kColumns - 1) {
                        s = add_half<Lanes>(s, halves + offset, weights[c]);
                        continue;
                    }
                }
                s = Lanes::add_products(s, pixels + x * kVectorBytes, weights[c]);
            }
        }
    }
}

// Some of the vectors of all rows: as many as leave registers for a band's sums.
template <int kRows, int kColumns, bool kHalved, int kChannels, Ending kEnding, int kFirst, int kCount>
static void accumulate_vectors(const RowsOfBlocks& work) {
    constexpr int kVectors = kRows * kColumns;
    constexpr int kSums = kCount * kChannels;
    constexpr int kChains = kSums <= 2 ? 4 : kSums <= 4 ? 2 : 1;
    constexpr int kSumVectorBytes = Lanes::kPixels * Lanes::kSumBytes;
    constexpr int kCodesBytes = (kVectors + 3) / 4 * 4 * Lanes::kPixels;
    constexpr int kBlockBytes = kOffsetBytes + kChannels * Lanes::kWeightBytes;
    const int64_t pitch = work.pitch;
    const uint8_t* const tile = work.tile + kFirst / kColumns * pitch;
    const uint8_t* const halves = work.halves;
    const int64_t wholes_apart = work.wholes_apart;
    const uint8_t* block = work.blocks;
    const BandRow* const end = work.rows + work.count;
    const BandRow* row = work.rows;
    if constexpr (kChannels == 1 && kEnding != Ending::kSums) {
        // Rows without blocks come first.
        for (; work.bias && row != end && row->blocks == 0; ++row) {
            const int64_t channel = row->channel[0];
            requantize_bias<kVectors, kEnding>(work.bias[channel], work.multiplier[channel], *work.bounds,
                                               work.codes + (channel - work.first_channel) * kCodesBytes);
        }
    }
    for (; row != end; ++row) {
        uint8_t* sums[kChannels];
        Lanes::Sums sum[kChannels][kCount];
#pragma GCC unroll 4
        for (int c = 0; c < kChannels; ++c) {
            const int64_t channel = row->channel[c];
            sums[c] = reinterpret_cast<uint8_t*>(work.sums) + (channel * kVectors + kFirst) * kSumVectorBytes;
            if (work.bias) {
                const Lanes::Sums bias = Lanes::start(work.bias[channel]);
#pragma GCC unroll 28
                for (int v = 0; v < kCount; ++v) sum[c][v] = bias;
            } else {
#pragma GCC unroll 28
                for (int v = 0; v < kCount; ++v) sum[c][v] = Lanes::load(sums[c] + v * kSumVectorBytes);
            }
        }
        // Counted up to zero from the row's end: no comparison.
        block += row->blocks * int64_t{kBlockBytes};
        int64_t left = -int64_t{row->blocks};
        if (kChains > 1) {
            // Too few sums to hide an instruction's latency: others for every kChains-th block.
            Lanes::Sums others[kChains > 1 ? kChains - 1 : 1][kChannels][kCount];
#pragma GCC unroll 28
            for (int s = 0; s < (kChains - 1) * kSums; ++s) {
                others[s / kSums][s % kSums / kCount][s % kCount] = Lanes::zero();
            }
            for (; left <= -kChains; left += kChains) {
                add_block<kColumns, kHalved, kChannels, kFirst, kCount>(sum, tile, pitch, halves, wholes_apart,
                                                                        block + left * kBlockBytes);
#pragma GCC unroll 4
                for (int c = 1; c < kChains; ++c) {
                    add_block<kColumns, kHalved, kChannels, kFirst, kCount>(
                        others[c - 1], tile, pitch, halves, wholes_apart, block + (left + c) * kBlockBytes);
                }
            }
#pragma GCC unroll 28
            for (int s = 0; s < (kChains - 1) * kSums; ++s) {
                Lanes::Sums& first = sum[s % kSums / kCount][s % kCount];
                first = Lanes::add(first, others[s / kSums][s % kSums / kCount][s % kCount]);
            }
        }
        for (; left; ++left) {
            add_block<kColumns, kHalved, kChannels, kFirst, kCount>(sum, tile, pitch, halves, wholes_apart,
                                                                    block + left * kBlockBytes);
        }
#pragma GCC unroll 4
        for (int c = 0; c < kChannels; ++c) {
            if (kEnding == Ending::kSums) {
#pragma GCC unroll 28
                for (int v = 0; v < kCount; ++v) Lanes::store(sums[c] + v * kSumVectorBytes, sum[c][v]);
                continue;
            }
            const int64_t channel = row->channel[c];
            requantize<kCount, kEnding>(
                sum[c], work.multiplier[channel], *work.bounds,
                work.codes + (channel - work.first_channel) * kCodesBytes + kFirst * Lanes::kPixels);
        }
    }
}

template <int kRows, int kColumns, bool kHalved, int kChannels, Ending kEnding, int kFirst>
static void accumulate(const RowsOfBlocks& work) {
    constexpr int kVectors = kRows * kColumns;
    // Whole fours: codes of four vectors are written together.
    constexpr int kMost = kChannels == 1 ? kVectors : 16 / kChannels;
    constexpr int kCount = kVectors - kFirst < kMost ? kVectors - kFirst : kMost;
    accumulate_vectors<kRows, kColumns, kHalved, kChannels, kEnding, kFirst, kCount>(work);
    if constexpr (kFirst + kCount < kVectors) {
        accumulate<kRows, kColumns, kHalved, kChannels, kEnding, kFirst + kCount>(work);
    }
}
