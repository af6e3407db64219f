// Memory that is needed soon, brought to the second cache (included once for each set).

static OBC_INLINE void fetch_line(const uint8_t* line) {
#if defined(__x86_64__)
    // GCC takes functions with nothing but __builtin_prefetch in them for pure, and leaves out their calls.
    __asm__ volatile("prefetcht1 %0" : : "m"(*line));
#else
    __builtin_prefetch(line, 0, 2);
#endif
}

// Of the blocks first to last - 1 of a tensor.
static void fetch_lines(const ConvolutionPlan& plan, const LinesAhead& lines, const uint8_t* tensor,
                        int64_t plane_bytes, int64_t first, int64_t last) {
    const int64_t* const offsets = plan.lines_.data() + lines.first;
    for (int64_t block = first; lines.count > 0 && block < last; ++block) {
        for (int64_t line = 0; line < lines.count; ++line) fetch_line(tensor + block * plane_bytes + offsets[line]);
    }
}

// What a chunk's codes will be written to, and added to, comes while its products are added up: stores would
// wait for one line after the other.
static void fetch_chunk(const ConvolutionPlan& plan, const BlockedTensors& tensors, const TilePlace& place,
                        int64_t first, int64_t last) {
    const int64_t first_block = first / kBlock, last_block = (last + kBlock - 1) / kBlock;
    fetch_lines(plan, place.output_lines, tensors.output, plan.output_.plane_bytes(), first_block, last_block);
    fetch_lines(plan, place.residual_lines, tensors.residual, plan.residual_shape_.plane_bytes(), first_block,
                last_block);
}
