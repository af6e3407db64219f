// Linear layers over block-sparse weights.

// One row: kRun blocks at a time, each in a lane of its own.
inline void linear_row(const LinearBlocks& weights, const uint8_t* row, int64_t outputs,
                       int32_t* sums) {
    static_assert(kRun % Dot::kLanes == 0, "a run is whole vectors");
    for (int64_t o = 0; o < outputs; ++o) {
        typename Dot::Vector sum = Dot::zero();
        for (int64_t i = weights.start[o]; i < weights.end[o]; i += Dot::kLanes) {
            sum = Dot::add(sum, Dot::gather(row, weights.index + i),
                           Dot::load(weights.values + i * kBlock));
        }
        int32_t lanes[Dot::kLanes];
        Dot::store(lanes, sum);
        int32_t total = 0;
        for (int lane = 0; lane < Dot::kLanes; ++lane) total += lanes[lane];
        sums[o] = total;
    }
}

// kTokens rows, `vectors` of them in registers at a time.
template <int vectors>
OBC_INLINE void linear_some_tokens(const LinearBlocks& weights, const uint8_t* rows, int64_t output,
                                   int32_t* sums) {
    typename Dot::Vector sum[vectors];
    for (int v = 0; v < vectors; ++v) sum[v] = Dot::zero();
    for (int64_t i = weights.start[output]; i < weights.end[output]; ++i) {
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
