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

// The bands of all output channels, of at most `most_channels` (1, 2 or 4) each. In a window come the
// single channels first, then pairs, then fours; blocks are those of all kernel positions and channels.
std::vector<Band> bands_of(const BlockWeights& weights, int64_t out_channels, int most_channels);

// All blocks that a channel of the band has, ascending.
std::vector<int32_t> blocks_of(const BlockWeights& weights, const Band& band);

}  // namespace sparse
}  // namespace obc
