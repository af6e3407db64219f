// The sums of output channels over one group of input blocks (included once for each set).
//
// VNNI takes the unsigned operand from a register: so each product needs a load of its own, aligned
// because of how tiles are packed, and four instructions a cycle leave little room for others. Hence
// many vectors for each load of a weight, and sums that become codes before they leave the registers.

struct RowsOfBlocks {
    const uint8_t* tile;
    int64_t pitch;            // bytes from a row of vectors to the next
    const uint16_t* offset;   // of the rows' blocks, one after the other
    const int8_t* weights;
    const ChannelRow* rows;
    int64_t count;
    const int32_t* bias;      // of all output channels; null: go on from the sums
    int32_t* sums;            // of all output channels
    const float* multiplier;  // of all output channels
    CodeRange range;
    uint8_t* codes;           // of the output channels from first_channel on
    int64_t first_channel;
};

enum class Ending { kSums, kExact, kRectified, kRectifiedWholeRange };

template <int kRows, int kColumns>
static OBC_INLINE void add_block(Lanes::Sums* sum, const uint8_t* tile, int64_t pitch, uint16_t offset,
                                 const int8_t* block) {
    constexpr int kVectorBytes = Lanes::kPixels * Lanes::kPixelBytes;
    const uint8_t* pixels = tile + static_cast<int64_t>(offset) * kOffsetUnit;
    const Lanes::Weights weights = Lanes::weights(block);
#pragma GCC unroll 8
    for (int y = 0; y < kRows; ++y, pixels += pitch) {
#pragma GCC unroll 64
        for (int x = 0; x < kColumns; ++x) {
            Lanes::Sums& s = sum[y * kColumns + x];
            s = Lanes::add_products(s, pixels + x * kVectorBytes, weights);
        }
    }
}

template <int kRows, int kColumns, Ending kEnding>
static void accumulate(const RowsOfBlocks& work) {
    constexpr int kVectors = kRows * kColumns;
    constexpr int kChains = kVectors <= 2 ? 4 : kVectors <= 4 ? 2 : 1;
    constexpr int kSumVectorBytes = Lanes::kPixels * Lanes::kSumBytes;
    constexpr int kCodesBytes = (kVectors + 3) / 4 * 4 * Lanes::kPixels;
    const int64_t pitch = work.pitch;
    const uint8_t* const tile = work.tile;
    const uint16_t* offset = work.offset;
    const int8_t* block = work.weights;
    const ChannelRow* const end = work.rows + work.count;
    for (const ChannelRow* row = work.rows; row != end; ++row) {
        const int64_t channel = row->channel;
        uint8_t* const sums = reinterpret_cast<uint8_t*>(work.sums) + channel * kVectors * kSumVectorBytes;
        Lanes::Sums sum[kVectors];
        if (work.bias) {
            const Lanes::Sums bias = Lanes::start(work.bias[channel]);
#pragma GCC unroll 64
            for (int v = 0; v < kVectors; ++v) sum[v] = bias;
        } else {
#pragma GCC unroll 64
            for (int v = 0; v < kVectors; ++v) sum[v] = Lanes::load(sums + v * kSumVectorBytes);
        }
        // Counted up to zero from the row's end: one register for both streams, and no comparison.
        offset += row->blocks;
        block += row->blocks * int64_t{Lanes::kWeightBytes};
        int64_t left = -int64_t{row->blocks};
        if (kChains > 1) {
            // Too few vectors to hide an instruction's latency: sums of their own for every kChains-th block.
            Lanes::Sums others[kChains > 1 ? kChains - 1 : 1][kVectors];
#pragma GCC unroll 64
            for (int v = 0; v < (kChains - 1) * kVectors; ++v) others[v / kVectors][v % kVectors] = Lanes::zero();
            for (; left <= -kChains; left += kChains) {
                add_block<kRows, kColumns>(sum, tile, pitch, offset[left], block + left * Lanes::kWeightBytes);
#pragma GCC unroll 4
                for (int c = 1; c < kChains; ++c) {
                    add_block<kRows, kColumns>(others[c - 1], tile, pitch, offset[left + c],
                                               block + (left + c) * Lanes::kWeightBytes);
                }
            }
#pragma GCC unroll 64
            for (int v = 0; v < (kChains - 1) * kVectors; ++v) {
                sum[v % kVectors] = Lanes::add(sum[v % kVectors], others[v / kVectors][v % kVectors]);
            }
        }
        for (; left; ++left) {
            add_block<kRows, kColumns>(sum, tile, pitch, offset[left], block + left * Lanes::kWeightBytes);
        }
        if (kEnding == Ending::kSums) {
#pragma GCC unroll 64
            for (int v = 0; v < kVectors; ++v) Lanes::store(sums + v * kSumVectorBytes, sum[v]);
            continue;
        }
        requantize<kVectors, kEnding != Ending::kExact, kEnding == Ending::kRectifiedWholeRange>(
            sum, work.multiplier[channel], work.range, work.codes + (channel - work.first_channel) * kCodesBytes);
    }
}
