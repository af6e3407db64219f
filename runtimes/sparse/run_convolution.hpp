// The units of a convolution, one after the other (included once for each set).

struct Scratch {
    uint8_t* tile;      // packed activations of a group of input blocks
    int32_t* sums;      // of all output channels, where there is more than one group
    uint8_t* bytes;     // codes of the output channels of a chunk, channel by channel
    uint8_t* spare;     // codes of a channel that does not exist
    uint8_t* pixels;    // codes of four output channels, pixel by pixel
    uint8_t* residual;  // and of the residual's
};

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

static void pack_group(const ConvolutionPlan& plan, const BlockedTensors& tensors,
                       const Place& place, const Scratch& scratch, uint8_t* halves, int64_t first, int64_t last) {
    const int64_t plane_bytes = plan.shape_.input.plane_bytes();
    const int64_t tile_bytes =
        plan.position_rows_ * plan.position_columns_ * Lanes::kPixels * Lanes::kPixelBytes;
    uint8_t* to = scratch.tile;
    if (kTileShapes[plan.tile_].halved) return pack_halved(plan, tensors, place, to, halves, first, last);
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

static Ending ending_of(const ConvolutionPlan& plan) {
    if (plan.sums_ == SumsAre::kAny) return Ending::kExact;
    if (plan.sums_ == SumsAre::kBounded) return Ending::kBounded;
    const bool whole = plan.range_.zero_point == 0 && plan.range_.lower == 0 && plan.range_.upper == 255;
    return whole ? Ending::kRectifiedWholeRange : Ending::kRectified;
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

static void run_convolution(const ConvolutionPlan& plan, const BlockedTensors& tensors, int64_t first,
                            int64_t last, void* scratch_memory) {
    const TileShape& shape = kTileShapes[plan.tile_];
    uint8_t* const memory = static_cast<uint8_t*>(scratch_memory) +
                            (kAlignment - reinterpret_cast<uintptr_t>(scratch_memory) % kAlignment) % kAlignment;
    const ScratchLayout& layout = plan.scratch_;
    const Scratch scratch = {memory,
                             reinterpret_cast<int32_t*>(memory + layout.sums),
                             memory + layout.bytes,
                             memory + layout.spare,
                             memory + layout.pixels,
                             memory + layout.residual};
    __builtin_memset(scratch.spare, plan.range_.zero_point, static_cast<size_t>(layout.pixels - layout.spare));
    const int ending = static_cast<int>(ending_of(plan));
    const int64_t groups = plan.groups();
    const Arithmetic::Bounds bounds(plan.range_);
    const QuantizedAdd add(plan.residual_, plan.range_.zero_point);
    RowsOfBlocks work = {};
    work.tile = scratch.tile;
    work.pitch = plan.position_columns_ * Lanes::kPixels * Lanes::kPixelBytes;
    work.sums = scratch.sums;
    work.multiplier = plan.multiplier_.data();
    work.bounds = &bounds;
    work.codes = scratch.bytes;
    const int64_t chunks = plan.chunks();
    for (int64_t unit = first; unit < last; ++unit) {
        const int64_t part = unit % plan.parts_;
        const int64_t first_chunk = part * chunks / plan.parts_, last_chunk = (part + 1) * chunks / plan.parts_;
        const TilePlace& at = plan.places_[static_cast<size_t>(unit / plan.parts_)];
        const bool tile_ends = part + 1 == plan.parts_ && unit + 1 < last;
        const TilePlace* const next = tile_ends ? &at + 1 : nullptr;
        Place place = {at, plan.pixel_runs_.data() + at.first_pixel_run,
                       plan.border_runs_.data() + at.first_border_run, {}};
        if (!plan.flat_) find_subtiles(plan, tensors, at, place.subtiles);
        for (int64_t g = 0; g < groups; ++g) {
            const bool last_group = g + 1 == groups;
            if (plan.in_place_) {
                work.tile = tensors.input + at.first_pixel + plan.group_start_[g] * plan.shape_.input.plane_bytes();
            } else {
                const int64_t blocks = plan.group_start_[g + 1] - plan.group_start_[g];
                uint8_t* const halves = scratch.tile + blocks * (work.pitch - Lanes::kPixels * Lanes::kPixelBytes);
                pack_group(plan, tensors, place, scratch, halves, plan.group_start_[g], plan.group_start_[g + 1]);
                work.halves = halves;
            }
            work.bias = g == 0 ? plan.bias_.data() : nullptr;
            const BandRows* rows = plan.band_rows_.data() + (g * chunks + first_chunk) * kBandSizes;
            for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
                const int64_t channel = chunk * plan.chunk_;
                const int64_t rest = plan.shape_.out_channels - channel;
                const int64_t after = channel + (rest < plan.chunk_ ? rest : plan.chunk_);
                work.first_channel = channel;
                if (last_group) fetch_chunk(plan, tensors, at, channel, after);
                if (last_group && next) fetch_share(plan, tensors, *next, chunk - first_chunk, last_chunk - first_chunk);
                for (int size = 0; size < kBandSizes; ++size, ++rows) {
                    if (rows->count == 0) continue;
                    work.rows = plan.rows_.data() + rows->row;
                    work.count = rows->count;
                    work.blocks = plan.blocks_.data() + rows->block;
                    kAccumulate[plan.tile_][size][last_group ? ending : static_cast<int>(Ending::kSums)](work);
                }
                if (!last_group) continue;
                write_chunk(plan, tensors, place, scratch, shape, add, channel, after);
            }
        }
    }
}
