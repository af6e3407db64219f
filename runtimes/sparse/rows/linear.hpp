// Linear layers over block-sparse weights.

// One row, kSlice outputs at a time, each in a lane of its own: no sum over lanes is left to do.
inline void linear_row(const LinearSlices& weights, const uint8_t* row, int64_t slices, int32_t* sums) {
    constexpr int vectors = kSlice / Dot::kLanes;
    static_assert(kSlice % Dot::kLanes == 0, "a slice is whole vectors");
    for (int64_t s = 0; s < slices; ++s, sums += kSlice) {
        typename Dot::Vector sum[vectors];
        for (int v = 0; v < vectors; ++v) sum[v] = Dot::zero();
        for (int64_t place = weights.start[s]; place < weights.start[s + 1]; ++place) {
            for (int v = 0; v < vectors; ++v) {
                const int64_t at = place * kSlice + v * Dot::kLanes;
                sum[v] = Dot::add(sum[v], Dot::gather(row, weights.index + at),
                                  Dot::load(weights.values + at * kBlock));
            }
        }
        for (int v = 0; v < vectors; ++v) Dot::store(sums + v * Dot::kLanes, sum[v]);
    }
}

// kTokens rows, `vectors` of them in registers at a time.
template <int vectors>
OBC_INLINE void linear_some_tokens(const LinearBlocks& weights, const uint8_t* rows, int64_t output,
                                   int32_t* sums) {
    typename Dot::Vector sum[vectors];
    for (int v = 0; v < vectors; ++v) sum[v] = Dot::zero();
    for (int64_t i = weights.start[output]; i < weights.start[output + 1]; ++i) {
        const typename Dot::Vector four = Dot::spread(weights.values + i * kBlock);
        const uint8_t* codes = rows + int64_t(weights.index[i]) * kTokens * kBlock;
        for (int v = 0; v < vectors; ++v) {
            sum[v] = Dot::add(sum[v], Dot::load(codes + v * Dot::kLanes * kBlock), four);
        }
    }
    for (int v = 0; v < vectors; ++v) Dot::store(sums + v * Dot::kLanes, sum[v]);
}

inline void linear_tokens(const LinearBlocks& weights, const uint8_t* rows, int64_t outputs,
                          int32_t* sums) {
    constexpr int vectors = 4;
    constexpr int64_t tokens = vectors * Dot::kLanes;
    static_assert(kTokens % tokens == 0, "whole passes");
    for (int64_t o = 0; o < outputs; ++o, sums += kTokens) {
        for (int64_t t = 0; t < kTokens; t += tokens) {
            linear_some_tokens<vectors>(weights, rows + t * kBlock, o, sums + t);
        }
    }
}
