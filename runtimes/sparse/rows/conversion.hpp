// Rows of numbers, codes, and pixels of four channels into one another.

inline void quantize(const float* from, int64_t count, const OutputGrid& grid, uint8_t* to) {
    const float low = grid.low(), high = grid.high(), scale = grid.grid.scale;
    const int32_t zero_point = grid.grid.zero_point;
    for (int64_t i = 0; i < count; ++i) to[i] = code_of(from[i] / scale, low, high, zero_point);
}

inline void dequantize(const uint8_t* from, int64_t count, const Grid& grid, float* to) {
    const float scale = grid.scale;
    const int32_t zero_point = grid.zero_point;
    for (int64_t i = 0; i < count; ++i) to[i] = float(from[i] - zero_point) * scale;
}

inline void interleave(const uint8_t* const rows[kBlock], int64_t pixels, uint8_t* to) {
    const uint8_t *a = rows[0], *b = rows[1], *c = rows[2], *d = rows[3];
    for (int64_t x = 0; x < pixels; ++x) {
        to[4 * x] = a[x];
        to[4 * x + 1] = b[x];
        to[4 * x + 2] = c[x];
        to[4 * x + 3] = d[x];
    }
}

inline void separate(const uint8_t* from, int64_t pixels, uint8_t* const rows[kBlock]) {
    for (int lane = 0; lane < kBlock; ++lane) {
        uint8_t* row = rows[lane];
        if (!row) continue;
        for (int64_t x = 0; x < pixels; ++x) row[x] = from[kBlock * x + lane];
    }
}

// Pairs of pixels as one number each: the even ones are low halves, and seen from the pixel before
// them high halves, so that nothing beyond the last one taken is read.
OBC_INLINE void every_second_pixel(const uint8_t* from, uint8_t* to) {
    constexpr int half = kTilePixels / 2;
    uint64_t first[half], second[half];
    uint32_t taken[kTilePixels];
    std::memcpy(first, from, sizeof first);
    std::memcpy(second, from + (kTilePixels - 1) * kBlock, sizeof second);
    for (int i = 0; i < half; ++i) taken[i] = uint32_t(first[i]);
    for (int i = 0; i < half; ++i) taken[half + i] = uint32_t(second[i] >> 32);
    std::memcpy(to, taken, sizeof taken);
}

inline void take_pixels(const uint8_t* from, int64_t stride, int64_t pixels, uint8_t* to) {
    if (stride == 1) {
        std::memcpy(to, from, size_t(pixels * kBlock));
        return;
    }
    int64_t x = 0;
    if (stride == 2) {
        for (; x + kTilePixels <= pixels; x += kTilePixels)
            every_second_pixel(from + 2 * x * kBlock, to + x * kBlock);
    }
    for (; x < pixels; ++x) std::memcpy(to + x * kBlock, from + x * stride * kBlock, kBlock);
}
