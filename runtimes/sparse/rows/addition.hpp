// Quantized addition.

inline void add(const uint8_t* a, const Grid& a_grid, const uint8_t* b, const Grid& b_grid,
                int64_t bytes, const OutputGrid& grid, uint8_t* to) {
    const float a_scale = a_grid.scale, b_scale = b_grid.scale, scale = grid.grid.scale;
    const int32_t a_zero = a_grid.zero_point, b_zero = b_grid.zero_point,
                  zero_point = grid.grid.zero_point;
    const float low = grid.low(), high = grid.high();
    for (int64_t i = 0; i < bytes; ++i) {
        const float sum = float(a[i] - a_zero) * a_scale + float(b[i] - b_zero) * b_scale;
        to[i] = code_of(sum / scale, low, high, zero_point);
    }
}
