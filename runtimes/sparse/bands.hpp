// Bands: output channels that are computed together, each load of pixels serving all of them.
//
// Products with VNNI need their pixels in a register, so a channel on its own is bound by loads. A band
// multiplies what it has loaded by the weights of each of its channels. Its blocks are all that any of
// its channels has, with weights of zero where a channel has none: channels with the same blocks gain
// most, dense ones too, and sparse ones that have little in common stay alone.
#pragma once

#include <cstdint>
#include <vector>

#include "block_convolution.hpp"

namespace obc {
namespace sparse {

// Channels of a band are of one window of output channels: its codes wait in the first cache together.
constexpr int64_t kBandWindow = 16;

struct Band {
    int32_t channel[kMostBandChannels];
    int32_t channels;             // 1, 2 or 4
    std::vector<int32_t> blocks;  // all that any of its channels has, ascending

    int size() const { return channels / 2; }  // its place among the kBandSizes
};

// The bands of all output channels, of at most `most_channels` (1, 2 or 4) each; those of a window are
// next to one another, and windows in their order.
std::vector<Band> bands_of(const BlockWeights& weights, int64_t out_channels, int most_channels);

}  // namespace sparse
}  // namespace obc
