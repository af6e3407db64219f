// Which output channels share their loads: the pairs that save most first, then pairs of pairs.
#include "bands.hpp"

#include <algorithm>
#include <iterator>
#include <utility>

namespace obc {
namespace sparse {

namespace {

// What a block of a band takes, next to one of a single channel, as measured from the first cache.
constexpr double kBlockCost[] = {0, 1.0, 1.5, 0, 2.8};

// And its rows, beside those of single channels: their sums take the registers in several turns.
constexpr double kTurnsCost = 1.5;

double cost_of(const Band& band) { return kBlockCost[band.channels] * static_cast<double>(band.blocks.size()); }

struct Merge {
    double saved;
    size_t one;
    size_t other;
};

Band merged(const Band& a, const Band& b) {
    Band both = a;
    for (int32_t c = 0; c < b.channels; ++c) both.channel[both.channels++] = b.channel[c];
    both.blocks.clear();
    std::set_union(a.blocks.begin(), a.blocks.end(), b.blocks.begin(), b.blocks.end(),
                   std::back_inserter(both.blocks));
    return both;
}

// Twice as many channels in each band, where that takes less time; those that save most first.
void merge_twos(std::vector<Band>& bands, int32_t channels) {
    std::vector<Merge> merges;
    for (size_t one = 0; one < bands.size(); ++one) {
        for (size_t other = one + 1; other < bands.size(); ++other) {
            const Band &a = bands[one], &b = bands[other];
            if (a.channels != channels || b.channels != channels) continue;
            const double saved = cost_of(a) + cost_of(b) - cost_of(merged(a, b));
            if (saved > kTurnsCost) merges.push_back(Merge{saved, one, other});
        }
    }
    std::stable_sort(merges.begin(), merges.end(), [](const Merge& a, const Merge& b) { return a.saved > b.saved; });
    std::vector<bool> gone(bands.size());
    for (const Merge& merge : merges) {
        if (gone[merge.one] || gone[merge.other]) continue;
        bands.push_back(merged(bands[merge.one], bands[merge.other]));
        gone[merge.one] = gone[merge.other] = true;
        gone.push_back(false);
    }
    size_t kept = 0;
    for (size_t b = 0; b < bands.size(); ++b) {
        if (!gone[b]) std::swap(bands[kept++], bands[b]);
    }
    bands.resize(kept);
}

}  // namespace

std::vector<Band> bands_of(const BlockWeights& weights, int64_t out_channels, int most_channels) {
    std::vector<Band> found;
    for (int64_t first = 0; first < out_channels; first += kBandWindow) {
        std::vector<Band> bands;
        for (int64_t o = first; o < std::min(first + kBandWindow, out_channels); ++o) {
            bands.push_back(Band{{static_cast<int32_t>(o)}, 1,
                                 {weights.block_index + weights.row_start[o],
                                  weights.block_index + weights.row_start[o + 1]}});
        }
        for (int32_t channels = 1; channels < most_channels; channels *= 2) merge_twos(bands, channels);
        std::move(bands.begin(), bands.end(), std::back_inserter(found));
    }
    return found;
}

}  // namespace sparse
}  // namespace obc
