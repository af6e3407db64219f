// Block-sparse int8 convolution of blocked uint8 tensors: what a caller needs to know.
//
// A block is four consecutive input channels of one output channel at one kernel position: the four
// products that one VNNI instruction adds up. Only blocks with a non-zero weight are stored.
//
//     plan = ConvolutionPlan(shape, weights, requantization, residual, set, threads, waiting)   allocates
//     for each task, on any thread: plan.run(tensors, task, scratch)                      does not
//
// A plan belongs to one shape of the input (it holds the weights in the order in which this shape
// wants them); make a new one where the shape changes. Fully connected layers and MatMul are 1x1
// convolutions of planes whose pixels are the rows: images = 1, height = 1, width = rows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace obc {
namespace sparse {

constexpr int kBlock = 4;  // input channels of a block, and bytes of a blocked tensor's pixel
constexpr int64_t kMostPositions = 8192;  // of a kernel: more than any network has

// What lies around each plane of a blocked tensor: `border` pixels on all sides, which hold the zero point,
// and below those `margin` rows that hold nothing, so that planes begin with a cache line.
struct Frame {
    int64_t border;
    int64_t margin;
};

// A blocked tensor: uint8 [images, blocks, height + 2 border + margin, width + 2 border, 4], contiguous. The
// border and the spare lanes of the last block hold the zero point.
struct BlockedShape {
    int64_t images;
    int64_t channels;
    int64_t height;
    int64_t width;
    Frame frame;

    int64_t blocks() const { return (channels + kBlock - 1) / kBlock; }
    int64_t row_bytes() const { return (width + 2 * frame.border) * kBlock; }
    int64_t bordered_bytes() const { return (height + 2 * frame.border) * row_bytes(); }  // of a plane
    int64_t plane_bytes() const { return bordered_bytes() + frame.margin * row_bytes(); }
    int64_t image_bytes() const { return blocks() * plane_bytes(); }
    int64_t bytes() const { return images * image_bytes(); }
    int64_t offset(int64_t y, int64_t x) const {  // of a pixel within its plane
        return (y + frame.border) * row_bytes() + (x + frame.border) * kBlock;
    }
};

// Writes the zero point to pixels in a row: few at a time, which a call would take longer for.
inline void fill_pixels(uint8_t* to, int64_t pixels, int32_t zero_point) {
    const uint32_t code = 0x01010101u * static_cast<uint32_t>(zero_point);
    for (int64_t pixel = 0; pixel < pixels; ++pixel) __builtin_memcpy(to + pixel * kBlock, &code, kBlock);
}

// At least one output pixel; kernel_height * kernel_width is at most kMostPositions.
struct ConvolutionShape {
    BlockedShape input;
    int64_t out_channels;
    Frame out_frame;
    Frame residual_frame;  // of the residual, where there is one
    int64_t kernel_height;
    int64_t kernel_width;
    int64_t stride;  // 1 or 2
    int64_t top;     // padding: none above the input's border
    int64_t left;
    int64_t bottom;
    int64_t right;

    BlockedShape output() const {
        return BlockedShape{input.images, out_channels,
                            (input.height + top + bottom - kernel_height) / stride + 1,
                            (input.width + left + right - kernel_width) / stride + 1, out_frame};
    }
};

// The non-zero blocks of an output channel o are row_start[o] to row_start[o + 1] - 1; block_index
// is (ky * kernel_width + kx) * input blocks + input block, ascending within an output channel.
// Weights of channels beyond the input's last must be 0. Read by the plan's constructor alone.
struct BlockWeights {
    const int32_t* row_start;
    const int32_t* block_index;
    const int8_t* values;
};

// y = clamp(round_half_even(float(sum + bias[o]) * multiplier[o]) + zero_point, lower, upper), where
// sum is that of weight * code: the bias has taken the input's zero point into account.
// Copied by the plan's constructor.
struct Requantization {
    const int32_t* bias;
    const float* multiplier;
    int32_t zero_point;
    int32_t lower;
    int32_t upper;
};

// What is to be added to the convolution. With a residual the Requantization is the convolution's
// own (to convolution_scale, lower 0 and upper 255 as a rule), and then
// y = clamp(round_half_even(((y' - z') * convolution_scale + (r - residual_zero_point) *
// residual_scale) / scale) + zero_point, lower, upper), each step rounded to float.
struct ResidualAdd {
    bool present;
    float convolution_scale;
    float residual_scale;
    int32_t residual_zero_point;
    float scale;
    int32_t zero_point;
    int32_t lower;
    int32_t upper;
};

// Codes are rounded values plus the zero point, kept within lower and upper.
struct CodeRange {
    int32_t zero_point;
    int32_t lower;
    int32_t upper;
};

inline CodeRange range_of(const ResidualAdd& residual) {
    return CodeRange{residual.zero_point, residual.lower, residual.upper};
}

// What a range spares.
enum class CodesAre {
    kAny,
    kWhole,          // all that a byte can be: no bounds
    kWholeFromZero,  // and the zero point is 0
};

inline CodesAre codes_of(const CodeRange& range) {
    if (range.lower > 0 || range.upper < 255) return CodesAre::kAny;
    return range.zero_point == 0 ? CodesAre::kWholeFromZero : CodesAre::kWhole;
}

struct BlockedTensors {
    const uint8_t* input;
    const uint8_t* residual;  // with the output's shape but its own frame; null without
    uint8_t* output;          // every byte but the margins' is written, borders and spare lanes too
};

// Output channels that are computed together: 1, 2 or 4 (bands.hpp).
constexpr int kMostBandChannels = 4;
constexpr int kBandSizes = 3;
struct Band;

// The output pixels of one pass of the innermost loop: rows x columns vectors. A halved tile has one row,
// of whose last vector only the first half is there: planes of 7x7 pixels are three vectors and one pixel.
struct TileShape {
    int rows;
    int columns;
    bool halved;

    int pixels(int lanes) const { return rows * columns * lanes - (halved ? lanes / 2 : 0); }
};

// What is known of all sums that a channel can have.
enum class SumsAre {
    kAny,
    kBounded,    // times the multiplier they are within an int32
    kRectified,  // see below
};

// Sums are rectified where all are below 2^23, and a negative one becomes the lowest code, as with a
// ReLU. They are then added up on top of these bits, and so are floats already, 2^23 too large: one
// fused multiply-add replaces conversion and product, and rounds as the product alone would.
constexpr int32_t kRectifiedBits = 0x4b000000;  // of 2^23f

// Those of a band's blocks that are in one group of input blocks.
struct BlocksOfBand {
    const Band* band;
    std::vector<int32_t> blocks;
};

class ConvolutionPlan;

// The kernels compiled for one instruction set.
struct ConvolutionKernels {
    const char* name;
    int lanes;          // pixels of a vector
    int pixel_bytes;    // of a pixel of four channels in a packed tile
    int sum_bytes;      // of a pixel's sum while it is being added up
    int weight_bytes;   // of a block
    int cache_bytes;    // of packed activations that stay close to the core
    int band_channels;  // of a band, at most
    const TileShape* shapes;
    int shape_count;
    void (*run)(const ConvolutionPlan&, const BlockedTensors&, int64_t first, int64_t last,
                void* scratch);
    int64_t (*products_alone)(int64_t rounds);  // in registers; how many: the processor's limit
};

extern const ConvolutionKernels kPortableConvolution;
#if defined(__x86_64__)
extern const ConvolutionKernels kAvx2Convolution;        // AVX2
extern const ConvolutionKernels kAvx2VnniConvolution;    // AVX2, AVX-VNNI
extern const ConvolutionKernels kAvx512VnniConvolution;  // AVX-512 F, BW, DQ, VL, VNNI
#endif

// Whether this processor can run them; the last of these is the fastest.
bool supported(const ConvolutionKernels& kernels);

constexpr int kMostLanes = 16;

struct PixelRun {  // flat: neighbouring pixels in all tensors
    int64_t input;  // bytes from the tensor's start, in its first block
    int64_t output;
    int64_t residual;
    int32_t position;  // in the tile's list
    int32_t pixels;
};

struct BorderRun {  // pixels of the output's border that fall to one tile
    int64_t output;
    int64_t pixels;
};

// Cache lines of one block that hold a tile's pixels, of a tensor that the caches near the core cannot
// be expected to hold: else none.
struct LinesAhead {
    int64_t first;  // of lines_
    int64_t count;
};

// Where a tile's pixels are (tile_places.cpp).
struct TilePlace {
    int64_t first_pixel;  // in place: of the tile, in bytes from the tensor's start
    // Subtiles, one a lane: bytes from the tensors' starts.
    int64_t input[kMostLanes];
    int64_t residual[kMostLanes];
    int64_t output[kMostLanes];
    int32_t rows_before[kMostLanes];  // that belong to the subtile above, and are not written again
    int32_t columns_before[kMostLanes];
    int32_t present;  // lanes; those beyond are as the last one, and nobody needs them
    bool whole;       // no lane leaves anything to another
    // The lanes are neighbouring pixels, four at a time.
    bool fours_in;
    bool fours_out;
    bool fours_residual;
    // Of the plan's lists.
    int64_t first_pixel_run;
    int64_t pixel_runs;
    int64_t first_border_run;
    int64_t border_runs;
    LinesAhead output_lines;
    LinesAhead residual_lines;
};

// The blocks of one band in one group of input blocks.
struct BandRow {
    int32_t channel[kMostBandChannels];
    int32_t blocks;
};

// The rows of a chunk's bands that have the same number of channels.
struct BandRows {
    int64_t row;    // the first one
    int64_t count;
    int64_t block;  // where the first one's are in blocks_
};

// Where the parts of the scratch memory start, in bytes.
struct ScratchLayout {
    int64_t sums;
    int64_t bytes;
    int64_t pixels;
    int64_t residual;
    int64_t bytes_in_all;
};

class ConvolutionPlan {
public:
    // `threads` says how many will run tasks; it is asked where that matters. Those that wait for tasks begin
    // sooner than those that must be called. Throws std::bad_alloc, what `threads` throws, and nothing else;
    // the caller has checked what is said above.
    ConvolutionPlan(const ConvolutionShape& shape, const BlockWeights& weights,
                    const Requantization& requantization, const ResidualAdd& residual,
                    const ConvolutionKernels& kernels, const std::function<int64_t()>& threads, bool waiting);

    // What threads take turns at: units in a row, which are parts of tiles.
    int64_t tasks() const { return tasks_; }
    int64_t units() const { return tiles_ * parts_; }
    // Of each thread, any alignment.
    size_t scratch_bytes() const { return static_cast<size_t>(scratch_.bytes_in_all); }
    // Tasks write disjoint bytes, in any order, at any time.
    void run(const BlockedTensors& tensors, int64_t task, void* scratch) const {
        kernels_->run(*this, tensors, task * units() / tasks_, (task + 1) * units() / tasks_, scratch);
    }

    // What follows is read by the kernels.
    ConvolutionShape shape_;
    BlockedShape output_;
    BlockedShape residual_shape_;
    const ConvolutionKernels* kernels_;
    bool flat_;        // pixels as one list (1x1), or a subtile of the plane for each lane
    bool in_place_;    // tiles are read where they are in the tensor, not packed
    int tile_;         // index of the tile's shape
    int64_t tiles_;
    int64_t tasks_;
    int64_t threads_;  // that it was made for, or more
    int64_t parts_;    // of a tile: as many units, with a share of the chunks of output channels each
    int64_t down_;     // subtiles of an image
    int64_t across_;
    // A packed tile of one input block: positions rows x columns, in the order of row_slot and
    // column_slot (stride 2 puts even ones first), a vector each.
    int64_t position_rows_;
    int64_t position_columns_;
    int64_t block_bytes_;  // of them
    std::vector<int32_t> row_slot_;
    std::vector<int32_t> column_slot_;
    std::vector<int32_t> straight_;  // 0, 1, 2...: the slots of a residual's rows and columns
    std::vector<TilePlace> places_;  // of each tile
    std::vector<PixelRun> pixel_runs_;
    std::vector<BorderRun> border_runs_;
    std::vector<int64_t> lines_;  // bytes from the tensor's start, in its first block
    // Input blocks group by group: group g is group_start_[g] to group_start_[g + 1] - 1.
    std::vector<int32_t> group_start_;
    int64_t groups() const { return static_cast<int64_t>(group_start_.size()) - 1; }
    // Blocks by group, then chunk of chunk_ output channels, then size of the bands, then row. Rows with the
    // fewest blocks come first, for a loop that runs as often as it did before is foreseen; or those that
    // find most of what they load in the first cache (row_order.hpp). Either way, those without any come first.
    int64_t chunk_;
    int64_t chunks() const { return (shape_.out_channels + chunk_ - 1) / chunk_; }
    std::vector<BandRow> rows_;
    std::vector<BandRows> band_rows_;   // kBandSizes for each chunk of each group
    // Of each block its offset from where its group starts in the tile, an int32 in bytes, then the
    // weights of each of the band's channels, as wide as the kernel wants them.
    std::vector<uint8_t> blocks_;
    std::vector<int32_t> bias_;         // plus kRectifiedBits where sums are kRectified
    std::vector<float> multiplier_;
    SumsAre sums_;
    CodeRange range_;
    ResidualAdd residual_;
    int32_t zero_point_;  // of the output
    ScratchLayout scratch_;

private:
    void place_tiles();
    void place_flat(int64_t tile, const std::vector<int64_t>& starts, TilePlace& place);
    void place_subtiles(int64_t tile, TilePlace& place);
    LinesAhead add_lines(const BlockedShape& tensor, const TilePlace& place, int64_t PixelRun::*run_start,
                         const int64_t* lane_start);
    void own_border(int64_t image, int64_t y, int64_t first_x, int64_t last_x);
    bool is_far(int64_t group) const;
    int64_t first_vector(int32_t index, int64_t group) const;
    std::vector<int32_t> loads_of(const std::vector<int32_t>& blocks, int64_t group) const;
    void order_rows(std::vector<BlocksOfBand>& rows, int64_t group) const;
    void order_blocks(const BlockWeights& weights, const std::vector<Band>& bands);
    void add_row(const BlockWeights& weights, const Band& band, const std::vector<int32_t>& blocks, int64_t group);
};

constexpr double kLargestSum = 2048;  // of codes that fused multiply-adds come close enough to
constexpr int kOffsetBytes = 4;
constexpr int kAlignment = 64;
constexpr int64_t kLineBytes = 64;  // of the caches, on all processors of interest

}  // namespace sparse
}  // namespace obc
