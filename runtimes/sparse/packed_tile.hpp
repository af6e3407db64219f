// A tile's pixels between blocked tensors and aligned vectors (included once for each set).
//
// Two ways to give pixels to lanes. Flat (1x1 kernels): the output's pixels are one list, a vector the
// next kPixels of it. Subtiles: each lane has a small rectangle of the output of its own, and a vector
// holds the same position of all lanes' rectangles; so a shift by a kernel position is another
// vector, and no load is ever unaligned.

struct Subtiles {  // where each lane's starts
    const uint8_t* input[Lanes::kPixels];
    const uint8_t* residual[Lanes::kPixels];
    uint8_t* output[Lanes::kPixels];
};

// One position of a vector, where the rows are too short for four.
template <class Pixels>
static OBC_INLINE void pack_position(uint8_t* to, const uint8_t* const* lanes, int64_t offset, int present,
                                     bool fours) {
    if (fours && Pixels::kBytes == kBlock) {
#pragma GCC unroll 4
        for (int lane = 0; lane < Lanes::kPixels; lane += 4) {
            __builtin_memcpy(to + lane * kBlock, lanes[lane] + offset, 4 * kBlock);
        }
        return;
    }
    for (int lane = 0; lane < present; ++lane) {
        Pixels::pack_one(to + lane * Pixels::kBytes, lanes[lane] + offset);
    }
}

template <class Pixels>
static void pack_subtiles(uint8_t* to, const uint8_t* const* lanes, int present, bool fours, int64_t offset,
                          int64_t row_bytes, const int32_t* row_slot, int64_t rows,
                          const int32_t* column_slot, int64_t columns, int64_t slots) {
    constexpr int kBytes = Lanes::kPixels * Pixels::kBytes;
    for (int64_t row = 0; row < rows; ++row, offset += row_bytes) {
        uint8_t* const start = to + row_slot[row] * slots * kBytes;
        if (columns < 4) {
            for (int64_t column = 0; column < columns; ++column) {
                pack_position<Pixels>(start + column_slot[column] * kBytes, lanes, offset + column * kBlock,
                                      present, fours);
            }
            continue;
        }
        for (int64_t column = 0;;) {
            uint8_t* const vectors[4] = {
                start + column_slot[column] * kBytes, start + column_slot[column + 1] * kBytes,
                start + column_slot[column + 2] * kBytes, start + column_slot[column + 3] * kBytes};
            Pixels::pack_four(vectors, lanes, offset + column * kBlock);
            if (column == columns - 4) break;
            column = column + 8 <= columns ? column + 4 : columns - 4;
        }
    }
}

// A row's columns four at a time; the last four may overlap those before.
static OBC_INLINE int next_four(int column, int columns) { return column + 8 <= columns ? column + 4 : columns - 4; }

static void unpack_subtiles(const TilePlace& place, const Subtiles& subtiles, int64_t offset, int64_t row_bytes, int rows,
                            int columns, const uint8_t* from) {
    constexpr int kCodeBytes = Lanes::kPixels * kBlock;
    for (int row = 0; row < rows; ++row, offset += row_bytes, from += columns * kCodeBytes) {
        for (int column = 0; columns >= 4 && place.whole; column = next_four(column, columns)) {
            Codes::unpack_four(subtiles.output, offset + column * kBlock, from + column * kCodeBytes);
            if (column == columns - 4) break;
        }
        if (columns >= 4 && place.whole) continue;
        if (columns == 1 && place.whole && place.fours_out) {
#pragma GCC unroll 4
            for (int lane = 0; lane < Lanes::kPixels; lane += 4) {
                __builtin_memcpy(subtiles.output[lane] + offset, from + lane * kBlock, 4 * kBlock);
            }
            continue;
        }
        for (int lane = 0; lane < place.present; ++lane) {
            if (row < place.rows_before[lane]) continue;
            const int first = place.columns_before[lane];
            const uint8_t* const pixels = from + lane * kBlock;
            uint8_t* const to = subtiles.output[lane] + offset;
            for (int column = first; column < columns; ++column) {
                __builtin_memcpy(to + column * kBlock, pixels + column * kCodeBytes, kBlock);
            }
        }
    }
}

// Where a tile is: in the plan, and in the tensors of this run.
struct Place {
    const TilePlace& at;
    const PixelRun* pixel_runs;
    const BorderRun* border_runs;
    Subtiles subtiles;
};

static_assert(Lanes::kPixels <= kMostLanes, "a plan has no room for so many lanes");

// A tile's subtiles in the tensors of this run.
static void find_subtiles(const ConvolutionPlan& plan, const BlockedTensors& tensors, const TilePlace& place,
                          Subtiles& subtiles) {
    for (int lane = 0; lane < Lanes::kPixels; ++lane) {
        subtiles.input[lane] = tensors.input + place.input[lane];
        subtiles.output[lane] = tensors.output + place.output[lane];
    }
    if (!plan.residual_.present) return;
    for (int lane = 0; lane < Lanes::kPixels; ++lane) {
        subtiles.residual[lane] = tensors.residual + place.residual[lane];
    }
}

// Neighbouring pixels of the output.
static OBC_INLINE void pack_pixels(uint8_t* to, const uint8_t* from, int64_t stride, int64_t pixels) {
    if (stride == 1) {
        TilePixels::pack_run(to, from, pixels);
    } else {
        TilePixels::pack_every_second(to, from, pixels);
    }
}

// Whole vectors of all blocks first, then the halves.
static void pack_halved(const ConvolutionPlan& plan, const BlockedTensors& tensors, const Place& place,
                        uint8_t* wholes, uint8_t* halves, int64_t first, int64_t last) {
    const int64_t stride = plan.shape_.stride;
    const int64_t whole_pixels = (plan.position_columns_ - 1) * Lanes::kPixels;
    for (int64_t block = first; block < last; ++block) {
        for (int64_t r = 0; r < place.at.pixel_runs; ++r) {
            const PixelRun& run = place.pixel_runs[r];
            const uint8_t* from = tensors.input + block * plan.shape_.input.plane_bytes() + run.input;
            const int64_t before = run.position < whole_pixels ? whole_pixels - run.position : 0;
            const int64_t whole = before < run.pixels ? before : run.pixels;
            if (whole > 0) pack_pixels(wholes + run.position * Lanes::kPixelBytes, from, stride, whole);
            if (whole == run.pixels) continue;
            from += whole * stride * kBlock;
            const int64_t position = run.position + whole - whole_pixels;
            pack_pixels(halves + position * Lanes::kPixelBytes, from, stride, run.pixels - whole);
        }
        wholes += whole_pixels * Lanes::kPixelBytes;
        halves += Lanes::kPixels / 2 * Lanes::kPixelBytes;
    }
}

// The same of pixels that are neighbours in the tensor too. Vectors are filled up with what comes after the last
// pixel, where that is still the tensor's: nobody asks for those lanes' sums.
static void pack_straight(const ConvolutionPlan& plan, const BlockedTensors& tensors, const PixelRun& run,
                          uint8_t* wholes, uint8_t* halves, int64_t first, int64_t last) {
    const int64_t half_pixels = Lanes::kPixels / 2;
    const int64_t plane_bytes = plan.shape_.input.plane_bytes();
    const bool halved = plan.kernels_->shapes[plan.tile_].halved;
    const int64_t tile_pixels = (plan.position_columns_ - halved) * Lanes::kPixels;
    const int64_t pixels = run.pixels < tile_pixels ? run.pixels : tile_pixels;
    const int64_t rest = run.pixels - pixels;
    const int64_t tensor_bytes = plan.shape_.input.bytes();
    const int64_t filled = (pixels + Lanes::kPixels - 1) / Lanes::kPixels * Lanes::kPixels;
    const int64_t end = run.input + (filled + (rest > 0 ? half_pixels : 0)) * kBlock;
    for (int64_t block = first; block < last; ++block) {
        const uint8_t* const from = tensors.input + block * plane_bytes + run.input;
        const bool whole = block * plane_bytes + end <= tensor_bytes;
        TilePixels::pack_run(wholes, from, whole ? filled : pixels);
        if (rest > 0) TilePixels::pack_run(halves, from + tile_pixels * kBlock, whole ? half_pixels : rest);
        wholes += tile_pixels * Lanes::kPixelBytes;
        halves += half_pixels * Lanes::kPixelBytes;
    }
}

// The input blocks first to last - 1.
static void pack_group(const ConvolutionPlan& plan, const BlockedTensors& tensors, const Place& place, uint8_t* to,
                       uint8_t* halves, int64_t first, int64_t last) {
    const int64_t plane_bytes = plan.shape_.input.plane_bytes();
    const int64_t tile_bytes =
        plan.position_rows_ * plan.position_columns_ * Lanes::kPixels * Lanes::kPixelBytes;
    if (plan.flat_ && plan.shape_.stride == 1 && place.at.pixel_runs == 1) {
        return pack_straight(plan, tensors, *place.pixel_runs, to, halves, first, last);
    }
    if (plan.kernels_->shapes[plan.tile_].halved) return pack_halved(plan, tensors, place, to, halves, first, last);
    for (int64_t block = first; block < last; ++block, to += tile_bytes) {
        if (!plan.flat_) {
            pack_subtiles<TilePixels>(to, place.subtiles.input, place.at.present,
                                      place.at.fours_in, block * plane_bytes,
                                      plan.shape_.input.row_bytes(), plan.row_slot_.data(),
                                      plan.position_rows_, plan.column_slot_.data(),
                                      plan.position_columns_, plan.position_columns_);
            continue;
        }
        for (int64_t r = 0; r < place.at.pixel_runs; ++r) {
            const PixelRun& run = place.pixel_runs[r];
            uint8_t* const position = to + run.position * Lanes::kPixelBytes;
            const uint8_t* const from = tensors.input + block * plane_bytes + run.input;
            pack_pixels(position, from, plan.shape_.stride, run.pixels);
        }
    }
}
