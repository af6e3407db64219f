// Codes of output channels, from channel by channel to the output (included once for each set).

struct Scratch {
    uint8_t* tile;      // packed activations of a group of input blocks
    int32_t* sums;      // of all output channels, where there is more than one group
    uint8_t* bytes;     // codes of the output channels of a chunk, channel by channel
    uint8_t* pixels;    // codes of four output channels, pixel by pixel
    uint8_t* residual;  // and of the residual's
};

// The residual's codes, in the order of the vectors.
static void read_residual(const ConvolutionPlan& plan, const BlockedTensors& tensors,
                          const Place& place, const Scratch& scratch, const TileShape& shape,
                          int64_t block) {
    const int64_t offset = block * plan.residual_shape_.plane_bytes();
    if (!plan.flat_) {
        pack_subtiles<Codes>(scratch.residual, place.subtiles.residual, place.at.present,
                             place.at.fours_residual, offset, plan.residual_shape_.row_bytes(),
                             plan.straight_.data(), shape.rows, plan.straight_.data(), shape.columns,
                             shape.columns);
        return;
    }
    for (int64_t r = 0; r < place.at.pixel_runs; ++r) {
        const PixelRun& run = place.pixel_runs[r];
        Codes::pack_run(scratch.residual + run.position * kBlock,
                        tensors.residual + offset + run.residual, run.pixels);
    }
}

static void fill_borders(const ConvolutionPlan& plan, const BlockedTensors& tensors, const Place& place,
                         int64_t block) {
    const int64_t offset = block * plan.output_.plane_bytes();
    for (int64_t r = 0; r < place.at.border_runs; ++r) {
        const BorderRun& run = place.border_runs[r];
        fill_pixels(tensors.output + offset + run.output, run.pixels, plan.zero_point_);
    }
}

static void write_codes(const ConvolutionPlan& plan, const BlockedTensors& tensors,
                        const Place& place, const Scratch& scratch, const TileShape& shape,
                        int64_t block) {
    const int64_t offset = block * plan.output_.plane_bytes();
    if (plan.flat_) {
        for (int64_t r = 0; r < place.at.pixel_runs; ++r) {
            const PixelRun& run = place.pixel_runs[r];
            Codes::unpack_run(tensors.output + offset + run.output,
                              scratch.pixels + run.position * kBlock, run.pixels);
        }
    } else {
        unpack_subtiles(place.at, place.subtiles, offset, plan.output_.row_bytes(), shape.rows, shape.columns,
                        scratch.pixels);
    }
}

// The codes of a block's four channels, a channel's vectors one after the other, to neighbouring pixels.
template <class Finish>
static OBC_INLINE void interleave_pixels(const uint8_t* codes, int64_t channel_bytes, int64_t pixels,
                                         const Finish& finish, const uint8_t* residual, uint8_t* to) {
    constexpr int64_t kVectorBytes = Lanes::kPixels * kBlock;
    int64_t at = 0;
    Arithmetic::Packed four[4];
    for (; pixels >= 4 * Lanes::kPixels; pixels -= 4 * Lanes::kPixels, codes += 4 * Lanes::kPixels) {
        Arithmetic::interleave(codes, channel_bytes, four);
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v, at += kVectorBytes) Arithmetic::store(to + at, finish(four[v], residual, at));
    }
    if (pixels == 0) return;
    Arithmetic::interleave(codes, channel_bytes, four);
    // The vector that is next goes to the first one's place: an index not known to the compiler costs memory.
#pragma GCC unroll 3
    for (int v = 0; v < 3 && pixels >= Lanes::kPixels; ++v, at += kVectorBytes, pixels -= Lanes::kPixels) {
        Arithmetic::store(to + at, finish(four[v], residual, at));
        four[0] = four[v + 1];
    }
    if (pixels > 0) Arithmetic::store_first(to + at, four[0], pixels);
}

// The same without the first `skipped` vectors, all whole; `to` and `residual` are for the one after them.
template <class Finish>
static void interleave_after(const uint8_t* codes, int64_t channel_bytes, int64_t skipped, int64_t pixels,
                             const Finish& finish, const uint8_t* residual, uint8_t* to) {
    constexpr int64_t kVectorBytes = Lanes::kPixels * kBlock;
    codes += skipped / 4 * 4 * Lanes::kPixels;
    int64_t at = 0;
    if (skipped % 4 != 0) {
        Arithmetic::Packed four[4];
        Arithmetic::interleave(codes, channel_bytes, four);
        for (int64_t v = skipped % 4; v < 4 && pixels >= Lanes::kPixels; ++v, pixels -= Lanes::kPixels) {
            Arithmetic::store(to + at, finish(four[v], residual, at));
            at += kVectorBytes;
        }
        codes += 4 * Lanes::kPixels;
    }
    interleave_pixels(codes, channel_bytes, pixels, finish, residual + (Finish::kReadsResidual ? at : 0), to + at);
}

// Lanes of channels that do not exist get the zero point.
static void clear_spare_channels(const ConvolutionPlan& plan, int64_t block, uint8_t* pixels, int64_t count) {
    const int64_t present = plan.shape_.out_channels - block * kBlock;
    if (present >= kBlock) return;
    for (int64_t pixel = 0; pixel < count; ++pixel) {
        __builtin_memset(pixels + pixel * kBlock + present, plan.zero_point_, static_cast<size_t>(kBlock - present));
    }
}

// Whether a tile's pixels are neighbours in all tensors, and need no place between them and the codes.
static bool is_straight(const ConvolutionPlan& plan, const Place& place) {
    if (!plan.flat_ || place.at.pixel_runs != 1) return false;
    const PixelRun& run = *place.pixel_runs;
    return run.position % Lanes::kPixels == 0 && (!plan.residual_.present || run.pixels % Lanes::kPixels == 0);
}

// The codes of a chunk's blocks of output channels, to pixels that are neighbours in all tensors.
template <class Finish>
static void write_straight(const ConvolutionPlan& plan, const BlockedTensors& tensors, const Place& place,
                           const uint8_t* codes, int64_t channel_bytes, const Finish& how, int64_t first,
                           int64_t last) {
    // By value, all of it: what is behind a reference any store of codes could change.
    const Finish finish = how;
    const PixelRun run = *place.pixel_runs;
    const int64_t skipped = run.position / Lanes::kPixels;
    const bool bordered = place.at.border_runs > 0;
    const int64_t plane_bytes = plan.output_.plane_bytes();
    const int64_t residual_plane_bytes = Finish::kReadsResidual ? plan.residual_shape_.plane_bytes() : 0;
    const uint8_t* residual = tensors.residual;
    if (Finish::kReadsResidual) residual += first * residual_plane_bytes + run.residual;
    uint8_t* to = tensors.output + first * plane_bytes + run.output;
    for (int64_t block = first; block < last; ++block) {
        if (skipped > 0) {
            interleave_after(codes, channel_bytes, skipped, run.pixels, finish, residual, to);
        } else {
            interleave_pixels(codes, channel_bytes, run.pixels, finish, residual, to);
        }
        if (Finish::kReadsResidual) clear_spare_channels(plan, block, to, run.pixels);
        if (bordered) fill_borders(plan, tensors, place, block);
        codes += kBlock * channel_bytes;
        residual += residual_plane_bytes;
        to += plane_bytes;
    }
}

// The same through memory in which pixels are in the order of the vectors.
template <class Finish>
static void write_apart(const ConvolutionPlan& plan, const BlockedTensors& tensors, const Place& place,
                        const Scratch& scratch, const TileShape& shape, int64_t channel_bytes, const Finish& finish,
                        int64_t first, int64_t last) {
    const int64_t pixels = int64_t{shape.rows} * shape.columns * Lanes::kPixels;
    const uint8_t* codes = scratch.bytes;
    for (int64_t block = first; block < last; ++block, codes += kBlock * channel_bytes) {
        if (Finish::kReadsResidual) read_residual(plan, tensors, place, scratch, shape, block);
        interleave_pixels(codes, channel_bytes, pixels, finish, scratch.residual, scratch.pixels);
        if (Finish::kReadsResidual) clear_spare_channels(plan, block, scratch.pixels, pixels);
        write_codes(plan, tensors, place, scratch, shape, block);
        fill_borders(plan, tensors, place, block);
    }
}

// The codes of a chunk of output channels, from channel by channel to the output.
template <class Finish>
static void write_chunk(const ConvolutionPlan& plan, const BlockedTensors& tensors, const Place& place,
                        const Scratch& scratch, const TileShape& shape, const Finish& finish, int64_t first,
                        int64_t last) {
    const int64_t vectors = int64_t{shape.rows} * shape.columns;
    const int64_t channel_bytes = (vectors + 3) / 4 * 4 * Lanes::kPixels;
    const int64_t first_block = first / kBlock, last_block = (last + kBlock - 1) / kBlock;
    const int64_t spare = last_block * kBlock - last;
    if (spare > 0) {
        __builtin_memset(scratch.bytes + (last - first) * channel_bytes, plan.range_.zero_point,
                         static_cast<size_t>(spare * channel_bytes));
    }
    if (!is_straight(plan, place)) {
        write_apart(plan, tensors, place, scratch, shape, channel_bytes, finish, first_block, last_block);
        return;
    }
    write_straight(plan, tensors, place, scratch.bytes, channel_bytes, finish, first_block, last_block);
}
