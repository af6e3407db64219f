// How a convolution is cut into tiles, and its weights in the order in which they are read.
#include <algorithm>
#include <cmath>
#include <limits>

#include "bands.hpp"
#include "block_convolution.hpp"
#include "row_order.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace obc {
namespace sparse {

namespace {

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of codes that wait, channel by channel, until their chunk is done: they share the first cache with the
// packed tile. Where that is larger anyhow, more rows leave more to choose from for their order.
constexpr int64_t kChunkBytes = 8 * 1024;
constexpr int64_t kFarChunkBytes = 64 * 1024;

// Vectors that a halved tile takes less than a whole one: half a product on processors that have two units
// of 256 bits, and everything else as much, or almost.
constexpr double kHalfSaved = 0.4;

// Of the second cache, what stays a packed tile's own beside the weights and sums that stream through.
constexpr double kOwnSecondCache = 48 * 1024;

// With so many tiles and tasks no thread is left without work for long, and how many there are need not be
// known.
constexpr int64_t kManyTiles = 64;
constexpr double kManyTasks = 64;

// What a task takes beside its tiles, and that other threads begin: those that must be called, and those that
// wait. In cycles. Tasks are long next to the first two.
constexpr double kUnitCycles = 1000;
constexpr double kCallingCycles = 8000;
constexpr double kWaitingCycles = 1500;
constexpr double kTaskCycles = 8000;

// Of a unit: what the last thread is late by, for none is as fast as another all the time.
constexpr double kUneven = 0.05;

constexpr int64_t kAnyThreads = std::numeric_limits<int64_t>::max();

// A task takes a while to begin. Of several, a thread that did not come in time to be counted finds work later.
constexpr int64_t kTasksOfOneThread = 4;

constexpr double kPageBytes = 4096;
constexpr double kPagesAtHand = 60;

// What a block's offset can address.
constexpr int64_t kMostGroupBytes = std::numeric_limits<int32_t>::max();

// Even positions first, then odd ones, where the stride is 2.
std::vector<int32_t> slots(int64_t positions, int64_t stride) {
    std::vector<int32_t> slot(static_cast<size_t>(positions));
    for (int64_t p = 0; p < positions; ++p) {
        slot[p] = static_cast<int32_t>(p % stride * ceil_divide(positions, stride) + p / stride);
    }
    return slot;
}

struct Geometry {
    bool flat;
    bool in_place;
    int64_t position_rows;
    int64_t position_columns;
    int64_t down;
    int64_t across;
    int64_t tiles;
    int64_t block_bytes;  // of one input block in a packed tile
    int64_t groups;
};

bool is_flat(const ConvolutionShape& shape) {
    return shape.kernel_height == 1 && shape.kernel_width == 1 && shape.top == 0 &&
           shape.left == 0 && shape.bottom == 0 && shape.right == 0;
}

// Of the first cache: what a set holds at least, on all processors of interest.
constexpr int kCacheSets = 64;
constexpr int kCacheWays = 8;

// Whether the vectors of a tile may be loaded from the tensor itself: where they are whole lines. Planes
// may be as far apart as to fall to the same few sets of the first cache; then a packed tile is faster.
bool can_stay_in_place(const ConvolutionShape& shape, const TileShape& tile, const ConvolutionKernels& kernels) {
    const BlockedShape& input = shape.input;
    const int64_t tile_bytes = tile.pixels(kernels.lanes) * int64_t{kBlock};
    const int64_t plane_bytes = input.plane_bytes();
    const bool whole_vectors = is_flat(shape) && shape.stride == 1 && input.frame.border == 0 &&
                               kernels.pixel_bytes == kBlock && plane_bytes % (kernels.lanes * kBlock) == 0 &&
                               tile_bytes <= plane_bytes && plane_bytes % kLineBytes == 0 &&
                               input.image_bytes() <= kMostGroupBytes;
    if (!whole_vectors) return false;
    int lines[kCacheSets] = {};
    int64_t all = 0;
    int most = 0;
    for (int64_t block = 0; block < input.blocks(); ++block) {
        for (int64_t byte = 0; byte < tile_bytes; byte += kLineBytes, ++all) {
            int& set = lines[(block * plane_bytes + byte) / kLineBytes % kCacheSets];
            most = std::max(most, ++set);
        }
    }
    return most <= std::max<int64_t>(kCacheWays, 2 * all / kCacheSets);
}

Geometry geometry_of(const ConvolutionShape& shape, const BlockedShape& output, const TileShape& tile,
                     bool in_place, const ConvolutionKernels& kernels) {
    Geometry g = {};
    g.flat = is_flat(shape);
    g.in_place = in_place;
    if (g.flat) {
        // In place a tile ends with its image, else it goes on in the next one.
        const int64_t lists = in_place ? output.images : 1;
        const int64_t pixels = output.images / lists * output.height * output.width;
        g.position_rows = 1;
        g.position_columns = tile.columns;
        g.tiles = lists * ceil_divide(pixels, tile.pixels(kernels.lanes));
    } else {
        g.position_rows = (tile.rows - 1) * shape.stride + shape.kernel_height;
        g.position_columns = (tile.columns - 1) * shape.stride + shape.kernel_width;
        g.down = ceil_divide(output.height, tile.rows);
        g.across = ceil_divide(output.width, tile.columns);
        g.tiles = ceil_divide(output.images * g.down * g.across, kernels.lanes);
    }
    const int64_t half_bytes = int64_t{kernels.lanes} / 2 * kernels.pixel_bytes;
    g.block_bytes = (g.position_rows * g.position_columns * 2 - tile.halved) * half_bytes;
    return g;
}

struct Cost {  // in cycles
    double total;
    double packing;
};

// An estimate, from the parts measured alone: a group of input blocks that stays in the first cache is
// read faster, but each further group stores and loads all sums once more.
Cost cost_of(const ConvolutionShape& shape, const TileShape& tile, const Geometry& g,
             const ConvolutionKernels& kernels, const int64_t* blocks) {
    const double vectors = tile.rows * tile.columns - (tile.halved ? kHalfSaved : 0.0);
    const double groups = static_cast<double>(g.groups);
    const double in_blocks = static_cast<double>(shape.input.blocks());
    const double channels = static_cast<double>(shape.out_channels);
    const double group_bytes = in_blocks / groups * static_cast<double>(g.block_bytes);
    const double beyond_first = std::max(0.0, 1.0 - kernels.cache_bytes / group_bytes);
    const double beyond_second = std::max(0.0, 1.0 - kOwnSecondCache / group_bytes);
    // A single channel's block, a pair's, four channels': one load serves 1, 2, 4 products.
    const double a_vector[kBandSizes] = {0.62 + 0.5 * beyond_first + 0.5 * beyond_second,
                                         0.94 + 0.4 * beyond_first + 0.6 * beyond_second,
                                         1.76 + 0.3 * beyond_first + 0.6 * beyond_second};
    double accumulating = 0;
    double block = 1.5;
    if (g.in_place) {
        // Planes are on pages of their own; beyond those that the processor has at hand, loads wait.
        const double plane_bytes = static_cast<double>(shape.input.plane_bytes());
        const double bytes = std::min(plane_bytes, static_cast<double>(g.block_bytes) + kPageBytes);
        const double pages = in_blocks / groups * bytes / kPageBytes;
        block += 4.0 * std::max(0.0, 1.0 - kPagesAtHand / pages);
    }
    for (int size = 0; size < kBandSizes; ++size) {
        accumulating += static_cast<double>(blocks[size]) * std::max(vectors * a_vector[size] + block, 3.5);
    }
    const double rows = channels * groups * (vectors + 14.0) + channels * (groups - 1.0) * vectors * 3.0;
    const double requantizing = channels * vectors * (g.flat ? 4.2 : 5.7);
    const double a_position = g.in_place ? 1.0 : !g.flat ? 5.0 : shape.stride == 1 ? 4.0 : 10.0;
    const double packing = in_blocks * static_cast<double>(g.position_rows * g.position_columns) * a_position;
    const double tiles = static_cast<double>(g.tiles);
    return Cost{tiles * (accumulating + rows + requantizing + packing), g.in_place ? 0.0 : tiles * packing};
}

// How tiles are shared out among threads.
struct Shares {
    int64_t parts;  // of a tile
    int64_t tasks;
    double cycles;  // until the last thread is done
};

int64_t tasks_of(int64_t units, double cycles, int64_t threads) {
    const double of_a_thread = cycles / static_cast<double>(threads) / kTaskCycles;
    return std::min(units, threads * std::max<int64_t>(1, static_cast<int64_t>(of_a_thread)));
}

// Few tiles leave threads without work: then the output channels of each are shared out too, in as many parts
// as end first by the estimate. Each part packs the tile for itself. Small layers end first on one thread.
Shares shares_of(const Geometry& g, const Cost& cost, int64_t out_channels, int64_t threads,
                 double sharing_cycles) {
    if (threads == 1) return Shares{1, std::min(g.tiles, kTasksOfOneThread), cost.total};
    const double tiles = static_cast<double>(g.tiles);
    const int64_t most = std::min(ceil_divide(2 * threads, g.tiles), ceil_divide(out_channels, kBandWindow));
    Shares best = {1, 1, cost.total};
    for (int64_t parts = 1; parts <= std::max<int64_t>(1, most); ++parts) {
        const int64_t units = g.tiles * parts;
        if (units == 1) continue;
        const double rounds = static_cast<double>(ceil_divide(units, threads));
        const double unit = (cost.packing + (cost.total - cost.packing) / static_cast<double>(parts)) / tiles;
        const double cycles = rounds * (unit + kUnitCycles) + kUneven * unit + sharing_cycles;
        if (cycles >= best.cycles) continue;
        best = Shares{parts, tasks_of(units, unit * static_cast<double>(units), threads), cycles};
    }
    return best;
}

// A way to cut a convolution.
struct Cut {
    int tile;  // index of its shape
    Geometry geometry;
    Shares shares;
    int64_t threads;  // as many as it is for, or fewer
};

// The one that ends first.
Cut best_cut(const ConvolutionShape& shape, const BlockedShape& output, const ConvolutionKernels& kernels,
             const int64_t* blocks, int64_t threads, double sharing_cycles) {
    const int64_t in_blocks = shape.input.blocks();
    Cut best = {0, {}, {1, 1, std::numeric_limits<double>::infinity()}, threads};
    for (int t = 0; t < kernels.shape_count; ++t) {
        const TileShape& tile = kernels.shapes[t];
        const bool fits =
            is_flat(shape) ? tile.rows == 1
                           : !tile.halved && tile.rows <= output.height && tile.columns <= output.width;
        if (!fits) continue;
        for (const bool in_place : {false, true}) {
            if (in_place && !can_stay_in_place(shape, tile, kernels)) continue;
            Geometry g = geometry_of(shape, output, tile, in_place, kernels);
            if (g.block_bytes > kMostGroupBytes) continue;
            // Input blocks of a group: as many as can be addressed, and as many as fit into the first cache.
            const int64_t most = kMostGroupBytes / g.block_bytes;
            const int64_t near = std::max<int64_t>(1, kernels.cache_bytes / g.block_bytes);
            for (int64_t in_group = std::min(in_blocks, most);; in_group = std::max(near, in_group / 2)) {
                g.groups = ceil_divide(in_blocks, in_group);
                const Cost cost = cost_of(shape, tile, g, kernels, blocks);
                const Shares shares = shares_of(g, cost, shape.out_channels, threads, sharing_cycles);
                if (shares.cycles < best.shares.cycles) best = Cut{t, g, shares, threads};
                if (in_group <= near) break;
            }
        }
    }
    return best;
}

// As above, for as many threads as there are. Where that does not matter nobody is asked.
Cut best_cut_for(const ConvolutionShape& shape, const BlockedShape& output, const ConvolutionKernels& kernels,
                 const int64_t* blocks, const std::function<int64_t()>& threads, double sharing_cycles) {
    Cut alone = best_cut(shape, output, kernels, blocks, 1, sharing_cycles);
    const double cycles = alone.shares.cycles;
    if (cycles <= sharing_cycles) {
        alone.shares.tasks = 1;
        alone.threads = kAnyThreads;
        return alone;
    }
    if (alone.geometry.tiles >= kManyTiles && cycles >= kManyTasks * kTaskCycles) {
        alone.shares.tasks = tasks_of(alone.geometry.tiles, cycles, 1);
        alone.threads = kAnyThreads;
        return alone;
    }
    const int64_t known_threads = threads();
    return known_threads == 1 ? alone : best_cut(shape, output, kernels, blocks, known_threads, sharing_cycles);
}

SumsAre known_of_sums(const BlockWeights& weights, const Requantization& how, int64_t out_channels) {
    bool bounded = true;
    bool rectified = how.lower >= how.zero_point;
    for (int64_t o = 0; o < out_channels; ++o) {
        double most = std::abs(static_cast<double>(how.bias[o]));
        const int64_t end = int64_t{weights.row_start[o + 1]} * kBlock;
        for (int64_t w = int64_t{weights.row_start[o]} * kBlock; w < end; ++w) {
            most += 255.0 * std::abs(static_cast<int>(weights.values[w]));
        }
        bounded = bounded && most * std::abs(static_cast<double>(how.multiplier[o])) < 2147483000.0;
        // The multiplier times 2^23 is exact, and times the largest sum within an int32.
        rectified = rectified && most < 8388608.0 && how.multiplier[o] >= 1e-30f && how.multiplier[o] <= 128.0f;
    }
    return rectified ? SumsAre::kRectified : bounded ? SumsAre::kBounded : SumsAre::kAny;
}

}  // namespace

#if defined(__x86_64__)
// Not every compiler's __builtin_cpu_supports knows its name: leaf 7, subleaf 1, bit 4 of eax.
static bool avx_vnni() {
#if defined(OBC_AVX_VNNI_AS_AVX512)
    return __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
#else
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 4)) != 0;
#endif
}
#endif

bool supported(const ConvolutionKernels& kernels) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (&kernels == &kAvx512VnniConvolution) {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512vnni");
    }
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (&kernels == &kAvx2Convolution) return avx2;
    if (&kernels == &kAvx2VnniConvolution) return avx2 && avx_vnni();
#endif
    return true;
}

ConvolutionPlan::ConvolutionPlan(const ConvolutionShape& shape, const BlockWeights& weights,
                                 const Requantization& requantization, const ResidualAdd& residual,
                                 const ConvolutionKernels& kernels, const std::function<int64_t()>& threads,
                                 bool waiting)
    : shape_(shape),
      output_(shape.output()),
      residual_shape_(output_),
      kernels_(&kernels),
      range_{requantization.zero_point, requantization.lower, requantization.upper},
      residual_(residual),
      zero_point_(residual.present ? residual.zero_point : requantization.zero_point) {
    residual_shape_.frame = shape.residual_frame;
    const int64_t out_channels = shape.out_channels;
    const int64_t in_blocks = shape.input.blocks();
    const std::vector<Band> bands = bands_of(weights, out_channels, kernels.band_channels);
    int64_t blocks[kBandSizes] = {};
    for (const Band& band : bands) blocks[band.size()] += static_cast<int64_t>(band.blocks.size());
    const Cut cut = best_cut_for(shape, output_, kernels, blocks, threads, waiting ? kWaitingCycles : kCallingCycles);
    const Geometry& best = cut.geometry;
    const TileShape& tile = kernels.shapes[cut.tile];
    tile_ = cut.tile;
    flat_ = best.flat;
    in_place_ = best.in_place;
    tiles_ = best.tiles;
    parts_ = cut.shares.parts;
    tasks_ = cut.shares.tasks;
    threads_ = cut.threads;
    down_ = best.down;
    across_ = best.across;
    position_rows_ = best.position_rows;
    position_columns_ = best.position_columns;
    block_bytes_ = best.block_bytes;
    row_slot_ = slots(position_rows_, flat_ ? 1 : shape.stride);
    column_slot_ = slots(position_columns_, flat_ ? 1 : shape.stride);
    straight_ = slots(std::max(tile.rows, tile.columns), 1);
    for (int64_t g = 0; g <= best.groups; ++g) {
        group_start_.push_back(static_cast<int32_t>(g * in_blocks / best.groups));
    }

    const int64_t vectors = static_cast<int64_t>(tile.rows) * tile.columns;
    const int64_t pixels = vectors * kernels.lanes;
    const int64_t channel_bytes = ceil_divide(vectors, 4) * 4 * kernels.lanes;
    const int64_t part_windows = ceil_divide(out_channels, parts_ * kBandWindow);
    const int64_t chunk_windows = (is_far(0) ? kFarChunkBytes : kChunkBytes) / channel_bytes / kBandWindow;
    chunk_ = std::min(std::max<int64_t>(1, chunk_windows), part_windows) * kBandWindow;
    order_blocks(weights, bands);
    place_tiles();

    bias_.assign(requantization.bias, requantization.bias + out_channels);
    multiplier_.assign(requantization.multiplier, requantization.multiplier + out_channels);
    sums_ = known_of_sums(weights, requantization, out_channels);
    if (sums_ == SumsAre::kRectified) {
        for (int32_t& bias : bias_) bias += kRectifiedBits;
    }

    int64_t widest = 0;
    for (int64_t g = 0; g < groups(); ++g) {
        widest = std::max<int64_t>(widest, group_start_[g + 1] - group_start_[g]);
    }
    int64_t bytes = 0;
    const auto reserve = [&bytes](int64_t wanted) {
        const int64_t start = bytes;
        bytes += ceil_divide(wanted, kAlignment) * kAlignment;
        return start;
    };
    if (!in_place_) reserve(widest * position_rows_ * position_columns_ * kernels.lanes * kernels.pixel_bytes);
    scratch_.sums = reserve(groups() == 1 ? 0 : out_channels * pixels * kernels.sum_bytes);
    scratch_.bytes = reserve(std::min(chunk_, ceil_divide(out_channels, kBlock) * kBlock) * channel_bytes);
    scratch_.pixels = reserve(channel_bytes * kBlock);
    scratch_.residual = reserve(residual.present ? channel_bytes * kBlock : 0);
    scratch_.bytes_in_all = bytes + kAlignment;
}

// Whether a group's tile is larger than the first cache.
bool ConvolutionPlan::is_far(int64_t group) const {
    const int64_t blocks = group_start_[group + 1] - group_start_[group];
    return blocks * block_bytes_ > kernels_->cache_bytes;
}

// Where a block's first pixels are in a packed tile of its group.
int64_t ConvolutionPlan::first_vector(int32_t index, int64_t group) const {
    const int64_t in_blocks = shape_.input.blocks();
    const int64_t position = index / in_blocks;
    return ((index % in_blocks - group_start_[group]) * position_rows_ + row_slot_[position / shape_.kernel_width]) *
               position_columns_ + column_slot_[position % shape_.kernel_width];
}

// The places of a tile that a row loads: vectors, or blocks where no two have vectors in common.
std::vector<int32_t> ConvolutionPlan::loads_of(const std::vector<int32_t>& blocks, int64_t group) const {
    const TileShape& tile = kernels_->shapes[tile_];
    std::vector<int32_t> places;
    for (const int32_t index : blocks) {
        const int64_t first = first_vector(index, group);
        if (flat_) {
            places.push_back(static_cast<int32_t>(first / position_columns_));
            continue;
        }
        for (int64_t v = 0; v < int64_t{tile.rows} * tile.columns; ++v) {
            places.push_back(static_cast<int32_t>(first + v / tile.columns * position_columns_ + v % tile.columns));
        }
    }
    return places;
}

// Rows with the fewest blocks come first; where the first cache does not hold all of the tile, those that find
// most of what they load there.
void ConvolutionPlan::order_rows(std::vector<BlocksOfBand>& rows, int64_t group) const {
    std::stable_sort(rows.begin(), rows.end(), [](const BlocksOfBand& a, const BlocksOfBand& b) {
        return a.blocks.size() < b.blocks.size();
    });
    if (!is_far(group)) return;
    const int64_t of_a_block = flat_ ? 1 : position_rows_ * position_columns_;
    const int64_t kept = kernels_->cache_bytes * of_a_block / block_bytes_;
    std::vector<std::vector<int32_t>> loads;
    size_t all = 0;
    for (const BlocksOfBand& row : rows) {
        loads.push_back(loads_of(row.blocks, group));
        all += loads.back().size();
    }
    // Rows that load more than is kept leave nothing for the next one.
    if (all > static_cast<size_t>(kept) * rows.size()) return;
    const int64_t places = (group_start_[group + 1] - group_start_[group]) * of_a_block;
    std::vector<BlocksOfBand> ordered;
    for (const size_t row : order_by_loads(loads, places, kept)) ordered.push_back(std::move(rows[row]));
    rows = std::move(ordered);
}

void ConvolutionPlan::order_blocks(const BlockWeights& weights, const std::vector<Band>& bands) {
    const int64_t in_blocks = shape_.input.blocks();
    for (int64_t g = 0; g < groups(); ++g) {
        for (size_t start = 0; start < bands.size();) {
            // A window's bands are next to one another, so a chunk's are too.
            const int64_t chunk = bands[start].channel[0] / chunk_;
            std::vector<BlocksOfBand> rows[kBandSizes];
            for (; start < bands.size() && bands[start].channel[0] / chunk_ == chunk; ++start) {
                BlocksOfBand row = {&bands[start], {}};
                for (const int32_t index : row.band->blocks) {
                    const int64_t block = index % in_blocks;
                    if (block >= group_start_[g] && block < group_start_[g + 1]) row.blocks.push_back(index);
                }
                rows[row.band->size()].push_back(std::move(row));
            }
            for (std::vector<BlocksOfBand>& same : rows) {
                order_rows(same, g);
                band_rows_.push_back(BandRows{static_cast<int64_t>(rows_.size()), static_cast<int64_t>(same.size()),
                                              static_cast<int64_t>(blocks_.size())});
                for (const BlocksOfBand& row : same) add_row(weights, *row.band, row.blocks, g);
            }
        }
    }
}

void ConvolutionPlan::add_row(const BlockWeights& weights, const Band& band, const std::vector<int32_t>& blocks,
                              int64_t group) {
    const int64_t in_blocks = shape_.input.blocks();
    const int64_t vector_bytes = static_cast<int64_t>(kernels_->lanes) * kernels_->pixel_bytes;
    BandRow row = {};
    std::copy_n(band.channel, kMostBandChannels, row.channel);
    row.blocks = static_cast<int32_t>(blocks.size());
    rows_.push_back(row);
    for (const int32_t index : blocks) {
        const int64_t block = index % in_blocks - group_start_[group];
        const int64_t start = in_place_                         ? block * shape_.input.plane_bytes()
                              : kernels_->shapes[tile_].halved ? block * vector_bytes / 2
                                                               : first_vector(index, group) * vector_bytes;
        const int32_t offset = static_cast<int32_t>(start);
        const uint8_t* const bytes = reinterpret_cast<const uint8_t*>(&offset);
        blocks_.insert(blocks_.end(), bytes, bytes + kOffsetBytes);
        for (int32_t b = 0; b < band.channels; ++b) {
            const int32_t* const first = weights.block_index + weights.row_start[band.channel[b]];
            const int32_t* const last = weights.block_index + weights.row_start[band.channel[b] + 1];
            const int32_t* const found = std::lower_bound(first, last, index);
            const bool present = found != last && *found == index;
            for (int c = 0; c < kBlock; ++c) {
                const int8_t weight = present ? weights.values[(found - weights.block_index) * kBlock + c] : int8_t{0};
                blocks_.push_back(static_cast<uint8_t>(weight));
                if (kernels_->weight_bytes == 2 * kBlock) blocks_.push_back(weight < 0 ? 255 : 0);
            }
        }
    }
}

}  // namespace sparse
}  // namespace obc
