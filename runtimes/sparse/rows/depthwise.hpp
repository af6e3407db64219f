// Depthwise convolution: each lane times a weight of its own.

OBC_INLINE void depthwise_tile(const DepthwisePixels& run, const uint8_t* const* taps, int64_t at,
                               uint8_t* to) {
    constexpr int vectors = kTilePixels / WideLanes::kPixels;
    typename WideLanes::Vector sums[vectors];
    for (int v = 0; v < vectors; ++v) sums[v] = WideLanes::zero();
    for (int64_t tap = 0; tap < run.taps; ++tap) {
        const typename WideLanes::Vector weights = WideLanes::spread(run.weights + tap * kBlock);
        const uint8_t* codes = taps[tap] + at * kBlock;
        for (int v = 0; v < vectors; ++v) {
            sums[v] = WideLanes::add(sums[v], WideLanes::load(codes + v * WideLanes::kPixels * kBlock),
                                     weights);
        }
    }
    int32_t stored[kTileBytes];
    for (int v = 0; v < vectors; ++v)
        WideLanes::store(stored + v * WideLanes::kPixels * kBlock, sums[v]);
    const int32_t *bias = run.bias, zero_point = run.zero_point;
    const float *multiplier = run.multiplier, low = run.low, high = run.high;
    uint8_t tile[kTileBytes];  // apart from all else: bytes written through `to` might be anything's
    for (int i = 0; i < kTileBytes; ++i) {
        tile[i] = code_of(float(stored[i] + bias[i]) * multiplier[i], low, high, zero_point);
    }
    std::memcpy(to, tile, sizeof tile);
}

inline void depthwise(const DepthwisePixels& run) {
    int64_t at = 0;
    for (; at + kTilePixels <= run.pixels; at += kTilePixels) {
        depthwise_tile(run, run.inputs, at, run.output + at * kBlock);
    }
    if (at == run.pixels) return;
    if (at > 0) {  // the last whole tile again, further on
        depthwise_tile(run, run.inputs, run.pixels - kTilePixels,
                       run.output + (run.pixels - kTilePixels) * kBlock);
        return;
    }
    // Fewer pixels than a tile has: one pixel of each tap at a time.
    for (; at < run.pixels; ++at) {
        int32_t sums[kBlock] = {};
        for (int64_t tap = 0; tap < run.taps; ++tap) {
            for (int lane = 0; lane < kBlock; ++lane) {
                sums[lane] +=
                    run.inputs[tap][at * kBlock + lane] * int16_t(run.weights[tap * kBlock + lane]);
            }
        }
        for (int lane = 0; lane < kBlock; ++lane) {
            run.output[at * kBlock + lane] =
                code_of(float(sums[lane] + run.bias[lane]) * run.multiplier[lane], run.low, run.high,
                        run.zero_point);
        }
    }
}
