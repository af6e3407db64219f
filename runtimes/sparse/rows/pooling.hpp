// The parts of pools: running maxima and sums of neighbouring rows and pixels.

inline void keep_larger(const uint8_t* from, int64_t bytes, uint8_t* to) {
    for (int64_t i = 0; i < bytes; ++i) to[i] = from[i] > to[i] ? from[i] : to[i];
}

// The largest of two by two pixels, for rows of `pixels`.
inline void larger_of_fours(const uint8_t* from, int64_t from_row_bytes, int64_t pixels, int64_t rows,
                            uint8_t* to, int64_t to_row_bytes) {
    typedef uint8_t Bytes __attribute__((vector_size(16)));  // four pixels
    typedef uint32_t Pixels __attribute__((vector_size(16)));
    for (int64_t row = 0; row < rows; ++row, from += 2 * from_row_bytes, to += to_row_bytes) {
        const uint8_t* below = from + from_row_bytes;
        int64_t x = 0;
        for (; x + 4 <= pixels; x += 4) {
            Bytes upper[2], lower[2];
            std::memcpy(upper, from + 2 * x * kBlock, sizeof upper);
            std::memcpy(lower, below + 2 * x * kBlock, sizeof lower);
            const Pixels first = Pixels(upper[0] > lower[0] ? upper[0] : lower[0]);
            const Pixels second = Pixels(upper[1] > lower[1] ? upper[1] : lower[1]);
            const Bytes even = Bytes(Pixels{first[0], first[2], second[0], second[2]});
            const Bytes odd = Bytes(Pixels{first[1], first[3], second[1], second[3]});
            const Bytes largest = even > odd ? even : odd;
            std::memcpy(to + x * kBlock, &largest, sizeof largest);
        }
        for (; x < pixels; ++x) {
            uint8_t four[4][kBlock];
            std::memcpy(four, from + 2 * x * kBlock, 2 * kBlock);
            std::memcpy(four + 2, below + 2 * x * kBlock, 2 * kBlock);
            for (int lane = 0; lane < kBlock; ++lane) {
                const uint8_t left = four[0][lane] > four[2][lane] ? four[0][lane] : four[2][lane];
                const uint8_t right = four[1][lane] > four[3][lane] ? four[1][lane] : four[3][lane];
                to[x * kBlock + lane] = left > right ? left : right;
            }
        }
    }
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
