// Codes of output channels, from channel by channel to the output (included once for each set).

struct Scratch {
    uint8_t* tile;      // packed activations of a group of input blocks
    int32_t* sums;      // of all output channels, where there is more than one group
    uint8_t* bytes;     // codes of the output channels of a chunk, channel by channel
    uint8_t* spare;     // codes of a channel that does not exist
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

// The codes of four channels, a channel's vectors one after the other, to neighbouring pixels.
static void interleave_pixels(const uint8_t* const* channels, uint8_t* to, int64_t pixels) {
    const uint8_t* from[kBlock] = {channels[0], channels[1], channels[2], channels[3]};
    while (pixels > 0) {
        Arithmetic::Packed four[4];
        Arithmetic::interleave(from, four);
        for (const uint8_t*& channel : from) channel += 4 * Lanes::kPixels;
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            if (pixels < Lanes::kPixels) {
                if (pixels > 0) Arithmetic::store_first(to, four[v], pixels);
                return;
            }
            Arithmetic::store(to, four[v]);
            to += Lanes::kPixels * kBlock;
            pixels -= Lanes::kPixels;
        }
    }
}

// The same without the first `skipped` vectors, all whole; `to` is for the one after them.
static void interleave_after(const uint8_t* const* channels, int64_t skipped, uint8_t* to, int64_t pixels) {
    const uint8_t* from[kBlock];
    for (int c = 0; c < kBlock; ++c) from[c] = channels[c] + skipped / 4 * 4 * Lanes::kPixels;
    if (skipped % 4 != 0) {
        Arithmetic::Packed four[4];
        Arithmetic::interleave(from, four);
        for (int64_t v = skipped % 4; v < 4 && pixels >= Lanes::kPixels; ++v, pixels -= Lanes::kPixels) {
            Arithmetic::store(to, four[v]);
            to += Lanes::kPixels * kBlock;
        }
        for (const uint8_t*& channel : from) channel += 4 * Lanes::kPixels;
    }
    interleave_pixels(from, to, pixels);
}

// Lanes of channels that do not exist get the zero point.
static void clear_spare_channels(uint8_t* codes, int64_t pixels, int64_t channels, int32_t zero_point) {
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
        for (int64_t channel = channels; channel < kBlock; ++channel) {
            codes[pixel * kBlock + channel] = static_cast<uint8_t>(zero_point);
        }
    }
}

// Whether a tile's pixels are neighbours in all tensors, and need no place between them and the codes.
static bool is_straight(const ConvolutionPlan& plan, const Place& place) {
    if (!plan.flat_ || place.at.pixel_runs != 1) return false;
    const PixelRun& run = *place.pixel_runs;
    return run.position % Lanes::kPixels == 0 && (!plan.residual_.present || run.pixels % Lanes::kPixels == 0);
}

// The codes of a chunk of output channels, from channel by channel to the output.
static void write_chunk(const ConvolutionPlan& plan, const BlockedTensors& tensors, const Place& place,
                        const Scratch& scratch, const TileShape& shape, const QuantizedAdd& add, int64_t first,
                        int64_t last) {
    const int vectors = shape.rows * shape.columns;
    const int64_t channel_bytes = (vectors + 3) / 4 * 4 * Lanes::kPixels;
    const bool straight = is_straight(plan, place);
    for (int64_t channel = first; channel < last; channel += kBlock) {
        const uint8_t* channels[kBlock];
        for (int64_t c = 0; c < kBlock; ++c) {
            channels[c] = channel + c < last ? scratch.bytes + (channel + c - first) * channel_bytes : scratch.spare;
        }
        const int64_t block = channel / kBlock;
        uint8_t* pixels = scratch.pixels;
        int64_t count = vectors * Lanes::kPixels;
        if (straight) {
            const PixelRun& run = *place.pixel_runs;
            pixels = tensors.output + block * plan.output_.plane_bytes() + run.output;
            count = run.pixels;
            if (run.position > 0) {
                interleave_after(channels, run.position / Lanes::kPixels, pixels, count);
            } else {
                interleave_pixels(channels, pixels, count);
            }
        } else {
            interleave_pixels(channels, pixels, count);
        }
        if (plan.residual_.present) {
            const uint8_t* other = scratch.residual;
            if (straight) {
                other = tensors.residual + block * plan.residual_shape_.plane_bytes() + place.pixel_runs->residual;
            } else {
                read_residual(plan, tensors, place, scratch, shape, block);
            }
            const int whole = static_cast<int>(count / Lanes::kPixels);
            add_residual(add, whole, other, pixels);
            if (channel + kBlock > last) clear_spare_channels(pixels, count, last - channel, plan.zero_point_);
        }
        if (!straight) write_codes(plan, tensors, place, scratch, shape, block);
        fill_borders(plan, tensors, place, block);
    }
}
