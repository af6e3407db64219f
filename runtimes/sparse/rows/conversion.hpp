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

// Pixels as one number each, the first channel lowest: widened and shifted, or shifted and narrowed.
template <int count>
OBC_INLINE void interleave_some(const uint8_t* const rows[kBlock], int64_t x, uint8_t* to) {
    uint8_t codes[kBlock][count];
    uint32_t pixels[count];
    for (int lane = 0; lane < kBlock; ++lane) std::memcpy(codes[lane], rows[lane] + x, count);
    for (int i = 0; i < count; ++i) {
        pixels[i] = uint32_t(codes[0][i]) | uint32_t(codes[1][i]) << 8 | uint32_t(codes[2][i]) << 16 |
                    uint32_t(codes[3][i]) << 24;
    }
    std::memcpy(to + x * kBlock, pixels, sizeof pixels);
}

template <int count>
OBC_INLINE void separate_some(const uint8_t* from, int64_t x, uint8_t* const rows[kBlock]) {
    uint32_t pixels[count];
    std::memcpy(pixels, from + x * kBlock, sizeof pixels);
    for (int lane = 0; lane < kBlock; ++lane) {
        if (!rows[lane]) continue;
        uint8_t codes[count];
        for (int i = 0; i < count; ++i) codes[i] = uint8_t(pixels[i] >> (8 * lane));
        std::memcpy(rows[lane] + x, codes, count);
    }
}

inline void interleave(const uint8_t* const rows[kBlock], int64_t pixels, uint8_t* to) {
    int64_t x = 0;
    for (; x + kTilePixels <= pixels; x += kTilePixels) interleave_some<kTilePixels>(rows, x, to);
    for (; x + 8 <= pixels; x += 8) interleave_some<8>(rows, x, to);
    for (; x + 4 <= pixels; x += 4) interleave_some<4>(rows, x, to);
    for (; x < pixels; ++x) interleave_some<1>(rows, x, to);
}

inline void separate(const uint8_t* from, int64_t pixels, uint8_t* const rows[kBlock]) {
    int64_t x = 0;
    for (; x + kTilePixels <= pixels; x += kTilePixels) separate_some<kTilePixels>(from, x, rows);
    for (; x + 8 <= pixels; x += 8) separate_some<8>(from, x, rows);
    for (; x + 4 <= pixels; x += 4) separate_some<4>(from, x, rows);
    for (; x < pixels; ++x) separate_some<1>(from, x, rows);
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
