// The units of a convolution, one after the other (included once for each set).

static Ending ending_of(const ConvolutionPlan& plan) {
    if (plan.sums_ == SumsAre::kAny) return Ending::kExact;
    const CodesAre codes = codes_of(plan.range_);
    if (plan.sums_ == SumsAre::kBounded) return codes == CodesAre::kAny ? Ending::kBounded : Ending::kBoundedWhole;
    return codes == CodesAre::kWholeFromZero ? Ending::kRectifiedWhole : Ending::kRectified;
}

template <class Finish>
static void run_units(const ConvolutionPlan& plan, const BlockedTensors& tensors, int64_t first, int64_t last,
                      void* scratch_memory, const Finish& finish) {
    const TileShape& shape = kTileShapes[plan.tile_];
    uint8_t* const memory = static_cast<uint8_t*>(scratch_memory) +
                            (kAlignment - reinterpret_cast<uintptr_t>(scratch_memory) % kAlignment) % kAlignment;
    const ScratchLayout& layout = plan.scratch_;
    const Scratch scratch = {memory,
                             reinterpret_cast<int32_t*>(memory + layout.sums),
                             memory + layout.bytes,
                             memory + layout.pixels,
                             memory + layout.residual};
    const int ending = static_cast<int>(ending_of(plan));
    const int64_t groups = plan.groups();
    const Arithmetic::Bounds bounds(plan.range_);
    RowsOfBlocks work = {};
    work.tile = scratch.tile;
    work.pitch = plan.position_columns_ * Lanes::kPixels * Lanes::kPixelBytes;
    work.sums = scratch.sums;
    work.multiplier = plan.multiplier_.data();
    work.bounds = &bounds;
    work.codes = scratch.bytes;
    const int64_t whole_bytes = work.pitch - Lanes::kPixels * Lanes::kPixelBytes;  // of a block in a halved tile
    const int64_t chunks = plan.chunks();
    for (int64_t unit = first; unit < last; ++unit) {
        const int64_t part = unit % plan.parts_;
        const int64_t first_chunk = part * chunks / plan.parts_, last_chunk = (part + 1) * chunks / plan.parts_;
        const TilePlace& at = plan.places_[static_cast<size_t>(unit / plan.parts_)];
        Place place = {at, plan.pixel_runs_.data() + at.first_pixel_run,
                       plan.border_runs_.data() + at.first_border_run, {}};
        if (!plan.flat_) find_subtiles(plan, tensors, at, place.subtiles);
        for (int64_t g = 0; g < groups; ++g) {
            const bool last_group = g + 1 == groups;
            if (plan.in_place_) {
                work.tile = tensors.input + at.first_pixel + plan.group_start_[g] * plan.shape_.input.plane_bytes();
                work.halves = work.tile + whole_bytes;
                work.wholes_apart = 1;
            } else {
                const int64_t blocks = plan.group_start_[g + 1] - plan.group_start_[g];
                uint8_t* const halves = scratch.tile + blocks * whole_bytes;
                pack_group(plan, tensors, place, scratch.tile, halves, plan.group_start_[g], plan.group_start_[g + 1]);
                work.halves = halves;
                work.wholes_apart = 2 * (plan.position_columns_ - 1);
            }
            work.bias = g == 0 ? plan.bias_.data() : nullptr;
            const BandRows* rows = plan.band_rows_.data() + (g * chunks + first_chunk) * kBandSizes;
            for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
                const int64_t channel = chunk * plan.chunk_;
                const int64_t rest = plan.shape_.out_channels - channel;
                const int64_t after = channel + (rest < plan.chunk_ ? rest : plan.chunk_);
                work.first_channel = channel;
                if (last_group) fetch_chunk(plan, tensors, at, channel, after);
                for (int size = 0; size < kBandSizes; ++size, ++rows) {
                    if (rows->count == 0) continue;
                    work.rows = plan.rows_.data() + rows->row;
                    work.count = rows->count;
                    work.blocks = plan.blocks_.data() + rows->block;
                    kAccumulate[plan.tile_][size][last_group ? ending : static_cast<int>(Ending::kSums)](work);
                }
                if (!last_group) continue;
                write_chunk(plan, tensors, place, scratch, shape, finish, channel, after);
            }
        }
    }
}

static void run_convolution(const ConvolutionPlan& plan, const BlockedTensors& tensors, int64_t first, int64_t last,
                            void* scratch) {
    const ResidualAdd& residual = plan.residual_;
    if (!residual.present) return run_units(plan, tensors, first, last, scratch, AsTheyAre());
    const QuantizedAdd add(residual, plan.range_.zero_point);
    if (codes_of(range_of(residual)) == CodesAre::kWholeFromZero) {
        run_units(plan, tensors, first, last, scratch, WithResidual<CodesAre::kWholeFromZero>{add});
    } else {
        run_units(plan, tensors, first, last, scratch, WithResidual<CodesAre::kAny>{add});
    }
}
