// Real numbers to codes: clamp, round half to even, add the zero point.

// 1.5 * 2^23: adding it to a small float leaves no room for a fraction, so the addition rounds.
constexpr float kRounder = 12582912.0f;

OBC_INLINE uint8_t code_of(float value, float low, float high, int32_t zero_point) {
    value = value > low ? value : low;  // a NaN becomes the lowest code
    value = value < high ? value : high;
    return uint8_t(int32_t((value + kRounder) - kRounder) + zero_point);
}

inline void requantize(const int32_t* sums, int64_t count, int32_t bias, float multiplier,
                       const OutputGrid& grid, uint8_t* to) {
    const float low = grid.low(), high = grid.high();
    const int32_t zero_point = grid.grid.zero_point;
    for (int64_t i = 0; i < count; ++i) {
        to[i] = code_of(float(sums[i] + bias) * multiplier, low, high, zero_point);
    }
}

inline void requantize_channels(const int32_t* sums, int64_t count, const int32_t* bias,
                                const float* multiplier, const OutputGrid& grid, uint8_t* to) {
    const float low = grid.low(), high = grid.high();
    const int32_t zero_point = grid.grid.zero_point;
    for (int64_t i = 0; i < count; ++i) {
        to[i] = code_of(float(sums[i] + bias[i]) * multiplier[i], low, high, zero_point);
    }
}

inline void scale_channels(const int32_t* sums, int64_t count, const int32_t* bias,
                           const float* multiplier, const float* offset, float* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = float(sums[i] + bias[i]) * multiplier[i] + offset[i];
}

inline void scale_sums(const int32_t* sums, int64_t count, int32_t bias, float multiplier, float offset,
                       float* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = float(sums[i] + bias) * multiplier + offset;
}
