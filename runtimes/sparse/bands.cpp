// Which output channels share their loads: the pairs that save most first, then pairs of pairs.
#include "bands.hpp"

#include <algorithm>
#include <iterator>

namespace obc {
namespace sparse {

namespace {

// What a block of a band takes, next to one of a single channel, as measured from the first cache.
constexpr double kBlockCost[] = {0, 1.0, 1.5, 0, 2.8};

struct Candidate {
    Band band;
    std::vector<int32_t> blocks;

    double cost() const { return kBlockCost[band.channels] * static_cast<double>(blocks.size()); }
};

struct Merge {
    double saved;
    size_t one;
    size_t other;
};

Candidate merged(const Candidate& a, const Candidate& b) {
    Candidate both = a;
    for (int32_t c = 0; c < b.band.channels; ++c) {
        both.band.channel[both.band.channels++] = b.band.channel[c];
    }
    both.blocks.clear();
    std::set_union(a.blocks.begin(), a.blocks.end(), b.blocks.begin(), b.blocks.end(),
                   std::back_inserter(both.blocks));
    return both;
}

// Twice as many channels in each band, where that takes less time; those that save most first.
void merge_twos(std::vector<Candidate>& bands, int32_t channels) {
    std::vector<Merge> merges;
    for (size_t one = 0; one < bands.size(); ++one) {
        for (size_t other = one + 1; other < bands.size(); ++other) {
            const Candidate &a = bands[one], &b = bands[other];
            if (a.band.channels != channels || b.band.channels != channels) continue;
            const double saved = a.cost() + b.cost() - merged(a, b).cost();
            if (saved > 0) merges.push_back(Merge{saved, one, other});
        }
    }
    std::stable_sort(merges.begin(), merges.end(), [](const Merge& a, const Merge& b) { return a.saved > b.saved; });
    std::vector<bool> gone(bands.size());
    for (const Merge& merge : merges) {
        if (gone[merge.one] || gone[merge.other]) continue;
        bands[merge.one] = merged(bands[merge.one], bands[merge.other]);
        gone[merge.one] = gone[merge.other] = true;
        bands.push_back(bands[merge.one]);
        gone.push_back(false);
    }
    size_t kept = 0;
    for (size_t b = 0; b < bands.size(); ++b) {
        if (!gone[b]) bands[kept++] = bands[b];
    }
    bands.resize(kept);
}

}  // namespace

std::vector<int32_t> blocks_of(const BlockWeights& weights, const Band& band) {
    std::vector<int32_t> all;
    for (int32_t c = 0; c < band.channels; ++c) {
        const int32_t* const first = weights.block_index + weights.row_start[band.channel[c]];
        const int32_t* const last = weights.block_index + weights.row_start[band.channel[c] + 1];
        std::vector<int32_t> both;
        std::set_union(all.begin(), all.end(), first, last, std::back_inserter(both));
        all.swap(both);
    }
    return all;
}

std::vector<Band> bands_of(const BlockWeights& weights, int64_t out_channels, int most_channels) {
    std::vector<Band> found;
    for (int64_t first = 0; first < out_channels; first += kBandWindow) {
        std::vector<Candidate> bands;
        for (int64_t o = first; o < std::min(first + kBandWindow, out_channels); ++o) {
            Band band = {{static_cast<int32_t>(o)}, 1};
            bands.push_back(Candidate{band, blocks_of(weights, band)});
        }
        for (int32_t channels = 1; channels < most_channels; channels *= 2) merge_twos(bands, channels);
        for (int32_t channels = 1; channels <= most_channels; channels *= 2) {
            for (const Candidate& each : bands) {
                if (each.band.channels == channels) found.push_back(each.band);
            }
        }
    }
    return found;
}

}  // namespace sparse
}  // namespace obc
