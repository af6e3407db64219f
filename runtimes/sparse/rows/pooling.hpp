// The parts of pools: running maxima and sums of neighbouring rows and pixels.

inline void keep_larger(const uint8_t* from, int64_t bytes, uint8_t* to) {
    for (int64_t i = 0; i < bytes; ++i) to[i] = from[i] > to[i] ? from[i] : to[i];
}

inline void add_codes(const uint8_t* from, int64_t bytes, int32_t* to) {
    for (int64_t i = 0; i < bytes; ++i) to[i] += from[i];
}

inline void sum_pixels(const uint8_t* from, int64_t pixels, int32_t sums[kBlock]) {
    int32_t tile[kTileBytes] = {};
    int64_t x = 0;
    for (; x + kTilePixels <= pixels; x += kTilePixels) {
        for (int i = 0; i < kTileBytes; ++i) tile[i] += from[x * kBlock + i];
    }
    for (; x < pixels; ++x) {
        for (int lane = 0; lane < kBlock; ++lane) tile[lane] += from[x * kBlock + lane];
    }
    for (int i = 0; i < kTileBytes; ++i) sums[i % kBlock] += tile[i];
}
