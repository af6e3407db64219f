// The tiles of a convolution, one after the other (included once for each set).

struct Scratch {
    uint8_t* tile;      // packed activations of a group of input blocks
    int32_t* sums;      // of all output channels, where there is more than one group
    uint8_t* bytes;     // codes of the output channels of a chunk, channel by channel
    uint8_t* spare;     // codes of a channel that does not exist
    uint8_t* pixels;    // codes of four output channels, pixel by pixel
    uint8_t* residual;  // and of the residual's
    PixelRun* pixel_runs;
    BorderRun* border_runs;
};

struct TilePlace {
    Subtiles subtiles;
    int64_t pixel_runs;
    int64_t border_runs;
};

// The border of an image that belongs to the pixels first_x to last_x - 1 of its row y: what lies
// before its first pixel, and after the row's end up to the next row's first pixel.
static int64_t own_border(const BlockedShape& output, int64_t image, int64_t y, int64_t first_x,
                          int64_t last_x, BorderRun* runs) {
    if (output.border == 0) return 0;
    const int64_t start = image * output.image_bytes();
    int64_t count = 0;
    if (y == 0 && first_x == 0) runs[count++] = BorderRun{start, output.offset(0, 0) / kBlock};
    if (last_x == output.width) {
        const int64_t row_end = output.offset(y, output.width);
        const int64_t next = y + 1 == output.height ? output.plane_bytes() : output.offset(y + 1, 0);
        runs[count++] = BorderRun{start + row_end, (next - row_end) / kBlock};
    }
    return count;
}

static void place_flat(const ConvolutionPlan& plan, int64_t tile, int64_t tile_pixels,
                       const Scratch& scratch, TilePlace& place) {
    const BlockedShape& input = plan.shape_.input;
    const BlockedShape& output = plan.output_;
    const BlockedShape& residual = plan.residual_shape_;
    const int64_t stride = plan.shape_.stride;
    const int64_t image_pixels = output.height * output.width;
    const int64_t begin = tile * tile_pixels;
    int64_t end = begin + tile_pixels;
    if (end > output.images * image_pixels) end = output.images * image_pixels;
    place.pixel_runs = place.border_runs = 0;
    int64_t image = begin / image_pixels;
    int64_t y = begin % image_pixels / output.width;
    int64_t x = begin % image_pixels % output.width;
    for (int64_t pixel = begin; pixel < end;) {
        int64_t pixels = output.width - x;
        if (pixels > end - pixel) pixels = end - pixel;
        const PixelRun run = {image * input.image_bytes() + input.offset(y * stride, x * stride),
                              image * output.image_bytes() + output.offset(y, x),
                              image * residual.image_bytes() + residual.offset(y, x),
                              static_cast<int32_t>(pixel - begin), static_cast<int32_t>(pixels)};
        PixelRun* const before = scratch.pixel_runs + place.pixel_runs - 1;
        const int64_t before_bytes = place.pixel_runs ? before->pixels * kBlock : -1;
        if (stride == 1 && place.pixel_runs && run.input == before->input + before_bytes &&
            run.output == before->output + before_bytes &&
            run.residual == before->residual + before_bytes) {
            before->pixels += run.pixels;
        } else {
            scratch.pixel_runs[place.pixel_runs++] = run;
        }
        place.border_runs += own_border(output, image, y, x, x + pixels,
                                        scratch.border_runs + place.border_runs);
        pixel += pixels;
        x = 0;
        if (++y == output.height) {
            y = 0;
            ++image;
        }
    }
}

static void place_subtiles(const ConvolutionPlan& plan, const BlockedTensors& tensors, int64_t tile,
                           const TileShape& shape, const Scratch& scratch, TilePlace& place) {
    const BlockedShape& input = plan.shape_.input;
    const BlockedShape& output = plan.output_;
    const BlockedShape& residual = plan.residual_shape_;
    const int64_t stride = plan.shape_.stride;
    Subtiles& subtiles = place.subtiles;
    subtiles.whole = true;
    place.border_runs = 0;
    // Counted on rather than divided anew: sixteen lanes of divisions would take longer than packing.
    const int64_t begin = tile * Lanes::kPixels;
    int64_t across = begin % plan.across_;
    int64_t down = begin / plan.across_ % plan.down_;
    int64_t image = begin / plan.across_ / plan.down_;
    bool present = true;
    subtiles.present = 0;
    for (int lane = 0; lane < Lanes::kPixels; ++lane) {
        const int64_t row = down * shape.rows;
        const int64_t column = across * shape.columns;
        // The last ones reach back over their neighbours, rather than over the edge.
        const int64_t y = row < output.height - shape.rows ? row : output.height - shape.rows;
        const int64_t x = column < output.width - shape.columns ? column : output.width - shape.columns;
        subtiles.input[lane] = tensors.input + image * input.image_bytes() +
                               input.offset(y * stride - plan.shape_.top, x * stride - plan.shape_.left);
        subtiles.residual[lane] =
            tensors.residual + image * residual.image_bytes() + residual.offset(y, x);
        subtiles.output[lane] = tensors.output + image * output.image_bytes() + output.offset(y, x);
        subtiles.rows_before[lane] = static_cast<int32_t>(row - y);
        subtiles.columns_before[lane] = static_cast<int32_t>(column - x);
        if (row != y || column != x) subtiles.whole = false;
        for (int64_t own_row = row; present && own_row < y + shape.rows; ++own_row) {
            place.border_runs += own_border(output, image, own_row, column, x + shape.columns,
                                            scratch.border_runs + place.border_runs);
        }
        subtiles.present += present;
        if (across + 1 < plan.across_) {
            ++across;
        } else if (down + 1 < plan.down_) {
            across = 0;
            ++down;
        } else if (image + 1 < output.images) {
            across = down = 0;
            ++image;
        } else {
            present = false;
        }
    }
    subtiles.fours_in = are_fours(subtiles.input);
    subtiles.fours_out = are_fours(subtiles.output);
    subtiles.fours_residual = plan.residual_.present && are_fours(subtiles.residual);
}

static void pack_group(const ConvolutionPlan& plan, const BlockedTensors& tensors,
                       const TilePlace& place, const Scratch& scratch, int64_t first, int64_t last) {
    const int64_t plane_bytes = plan.shape_.input.plane_bytes();
    const int64_t tile_bytes =
        plan.position_rows_ * plan.position_columns_ * Lanes::kPixels * Lanes::kPixelBytes;
    uint8_t* to = scratch.tile;
    for (int64_t block = first; block < last; ++block, to += tile_bytes) {
        if (!plan.flat_) {
            pack_subtiles<TilePixels>(to, place.subtiles.input, place.subtiles.present,
                                      place.subtiles.fours_in, block * plane_bytes,
                                      plan.shape_.input.row_bytes(), plan.row_slot_.data(),
                                      plan.position_rows_, plan.column_slot_.data(),
                                      plan.position_columns_, plan.position_columns_);
            continue;
        }
        for (int64_t r = 0; r < place.pixel_runs; ++r) {
            const PixelRun& run = scratch.pixel_runs[r];
            uint8_t* const position = to + run.position * Lanes::kPixelBytes;
            const uint8_t* const from = tensors.input + block * plane_bytes + run.input;
            if (plan.shape_.stride == 1) {
                TilePixels::pack_run(position, from, run.pixels);
            } else {
                TilePixels::pack_every_second(position, from, run.pixels);
            }
        }
    }
}

// The residual's codes, in the order of the vectors.
static void read_residual(const ConvolutionPlan& plan, const BlockedTensors& tensors,
                          const TilePlace& place, const Scratch& scratch, const TileShape& shape,
                          int64_t block) {
    const int64_t offset = block * plan.residual_shape_.plane_bytes();
    if (!plan.flat_) {
        pack_subtiles<Codes>(scratch.residual, place.subtiles.residual, place.subtiles.present,
                             place.subtiles.fours_residual, offset, plan.residual_shape_.row_bytes(),
                             plan.straight_.data(), shape.rows, plan.straight_.data(), shape.columns,
                             shape.columns);
        return;
    }
    for (int64_t r = 0; r < place.pixel_runs; ++r) {
        const PixelRun& run = scratch.pixel_runs[r];
        Codes::pack_run(scratch.residual + run.position * kBlock,
                        tensors.residual + offset + run.residual, run.pixels);
    }
}

static void write_codes(const ConvolutionPlan& plan, const BlockedTensors& tensors,
                        const TilePlace& place, const Scratch& scratch, const TileShape& shape,
                        int64_t block) {
    const int64_t offset = block * plan.output_.plane_bytes();
    if (plan.flat_) {
        for (int64_t r = 0; r < place.pixel_runs; ++r) {
            const PixelRun& run = scratch.pixel_runs[r];
            Codes::unpack_run(tensors.output + offset + run.output,
                              scratch.pixels + run.position * kBlock, run.pixels);
        }
    } else {
        unpack_subtiles(place.subtiles, offset, plan.output_.row_bytes(), shape.rows, shape.columns,
                        scratch.pixels);
    }
    for (int64_t r = 0; r < place.border_runs; ++r) {
        const BorderRun& run = scratch.border_runs[r];
        fill_pixels(tensors.output + offset + run.output, run.pixels, plan.zero_point_);
    }
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
    if (!plan.rectified_) return Ending::kExact;
    const bool whole = plan.range_.zero_point == 0 && plan.range_.lower == 0 && plan.range_.upper == 255;
    return whole ? Ending::kRectifiedWholeRange : Ending::kRectified;
}

// The codes of a chunk of output channels, from channel by channel to the output.
static void write_chunk(const ConvolutionPlan& plan, const BlockedTensors& tensors, const TilePlace& place,
                        const Scratch& scratch, const TileShape& shape, int64_t first, int64_t last) {
    const int vectors = shape.rows * shape.columns;
    const int64_t channel_bytes = (vectors + 3) / 4 * 4 * Lanes::kPixels;
    for (int64_t channel = first; channel < last; channel += kBlock) {
        const uint8_t* channels[kBlock];
        for (int64_t c = 0; c < kBlock; ++c) {
            channels[c] = channel + c < last ? scratch.bytes + (channel + c - first) * channel_bytes : scratch.spare;
        }
        for (int v = 0; v < vectors; v += 4) {
            Arithmetic::interleave(channels, scratch.pixels + v * Lanes::kPixels * kBlock);
            for (int c = 0; c < kBlock; ++c) channels[c] += 4 * Lanes::kPixels;
        }
        const int64_t block = channel / kBlock;
        if (plan.residual_.present) {
            read_residual(plan, tensors, place, scratch, shape, block);
            add_residual(plan.residual_, plan.range_.zero_point, vectors, scratch.residual, scratch.pixels);
            if (channel + kBlock > last) {
                clear_spare_channels(scratch.pixels, vectors * Lanes::kPixels, last - channel, plan.zero_point_);
            }
        }
        write_codes(plan, tensors, place, scratch, shape, block);
    }
}

static void run_convolution(const ConvolutionPlan& plan, const BlockedTensors& tensors, int64_t first,
                            int64_t last, void* scratch_memory) {
    const TileShape& shape = kTileShapes[plan.tile_];
    const int64_t tile_pixels = static_cast<int64_t>(shape.rows) * shape.columns * Lanes::kPixels;
    uint8_t* const memory = static_cast<uint8_t*>(scratch_memory) +
                            (kAlignment - reinterpret_cast<uintptr_t>(scratch_memory) % kAlignment) % kAlignment;
    const ScratchLayout& layout = plan.scratch_;
    const Scratch scratch = {memory,
                             reinterpret_cast<int32_t*>(memory + layout.sums),
                             memory + layout.bytes,
                             memory + layout.spare,
                             memory + layout.pixels,
                             memory + layout.residual,
                             reinterpret_cast<PixelRun*>(memory + layout.pixel_runs),
                             reinterpret_cast<BorderRun*>(memory + layout.border_runs)};
    __builtin_memset(scratch.spare, plan.range_.zero_point, static_cast<size_t>(layout.pixels - layout.spare));
    const int ending = static_cast<int>(ending_of(plan));
    const int64_t groups = plan.groups();
    RowsOfBlocks work = {};
    work.tile = scratch.tile;
    work.pitch = plan.position_columns_ * Lanes::kPixels * Lanes::kPixelBytes;
    work.sums = scratch.sums;
    work.multiplier = plan.multiplier_.data();
    work.range = plan.range_;
    work.codes = scratch.bytes;
    TilePlace place;
    for (int64_t tile = first; tile < last; ++tile) {
        if (plan.flat_) {
            place_flat(plan, tile, tile_pixels, scratch, place);
        } else {
            place_subtiles(plan, tensors, tile, shape, scratch, place);
        }
        const BandRows* rows = plan.band_rows_.data();
        for (int64_t g = 0; g < groups; ++g) {
            const bool last_group = g + 1 == groups;
            pack_group(plan, tensors, place, scratch, plan.group_start_[g], plan.group_start_[g + 1]);
            work.bias = g == 0 ? plan.bias_.data() : nullptr;
            for (int64_t channel = 0; channel < plan.shape_.out_channels; channel += plan.chunk_) {
                work.first_channel = channel;
                for (int size = 0; size < kBandSizes; ++size, ++rows) {
                    if (rows->count == 0) continue;
                    work.rows = plan.rows_.data() + rows->row;
                    work.count = rows->count;
                    work.offset = plan.offset_.data() + rows->block;
                    work.weights = plan.weights_.data() + rows->weight;
                    kAccumulate[plan.tile_][size][last_group ? ending : static_cast<int>(Ending::kSums)](work);
                }
                if (!last_group) continue;
                const int64_t rest = plan.shape_.out_channels - channel;
                const int64_t count = rest < plan.chunk_ ? rest : plan.chunk_;
                write_chunk(plan, tensors, place, scratch, shape, channel, channel + count);
            }
        }
    }
}
