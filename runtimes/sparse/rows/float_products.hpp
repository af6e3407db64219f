// Sums of products over unstructured float weights.

constexpr int kFloatVectors = 8;
constexpr int64_t kFloats = kFloatVectors * FloatLanes::kLanes;

inline float float_dot(const FloatEntries& weights, int64_t output, const float* row) {
    constexpr int kLanes = FloatLanes::kLanes;
    typename FloatLanes::Vector sums = FloatLanes::spread(0);
    int32_t i = weights.row_start[output];
    const int32_t end = weights.row_start[output + 1];
    for (; i + kLanes <= end; i += kLanes) {
        sums = FloatLanes::add(sums, FloatLanes::load(weights.values + i),
                               FloatLanes::gather(row, weights.index + i));
    }
    float lanes[kLanes];
    FloatLanes::store(lanes, sums);
    float total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += lanes[lane];
    for (; i < end; ++i) total += weights.values[i] * row[weights.index[i]];
    return total;
}

inline void float_products(const FloatEntries& weights, int64_t output, const float* from, float* to) {
    typename FloatLanes::Vector sums[kFloatVectors];
    for (int v = 0; v < kFloatVectors; ++v) sums[v] = FloatLanes::spread(0);
    for (int32_t i = weights.row_start[output]; i < weights.row_start[output + 1]; ++i) {
        const typename FloatLanes::Vector value = FloatLanes::spread(weights.values[i]);
        const float* row = from + weights.index[i] * weights.step;
        for (int v = 0; v < kFloatVectors; ++v) {
            sums[v] = FloatLanes::add(sums[v], value, FloatLanes::load(row + v * FloatLanes::kLanes));
        }
    }
    for (int v = 0; v < kFloatVectors; ++v) FloatLanes::store(to + v * FloatLanes::kLanes, sums[v]);
}
