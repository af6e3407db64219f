// All row solvers of one instruction set: included once for each, in a namespace of its own.

#include "lanes.hpp"
#include "rank_update.hpp"
#include "threads.hpp"
#include "rows.hpp"
#include "team.hpp"
#include "swept_inverse.hpp"
#include "downdated_inverse.hpp"
#include "nested_factor.hpp"
#include "refined_weights.hpp"
#include "prune_columns.hpp"
#include "prune_blocks.hpp"
#include "quantize.hpp"
#include "best_weights.hpp"
#include "find_grid.hpp"
#include "invert_hessians.hpp"
#include "output_energy.hpp"

template <class T>
Outcome prune_columns(const Layer& layer, const GroupZeros& zeros, int32_t* order, void* increase) {
    const Start<T> start(layer);
    return over_rows(layer, [&] {
        return std::make_unique<PruneColumns<T>>(layer, start, zeros, order,
                                                 static_cast<T*>(increase));
    });
}

template <class T>
Outcome prune_and_weigh(const Layer& layer, const GroupZeros& zeros, bool precise, int32_t* order,
                        double* weights, const LeftInverses* left) {
    const Start<T> start(layer);
    return over_rows(layer, [&] {
        return std::make_unique<PruneColumns<T>>(layer, start, zeros, order, nullptr, precise,
                                                 weights, left);
    });
}

template <class T, int width, int together = 1>
Outcome prune_blocks_of(const Layer& layer, int32_t* order, void* increase) {
    const Start<T> start(layer);
    return over_rows(layer, [&] {
        return std::make_unique<PruneBlocks<T, width, together>>(layer, start, order,
                                                                 static_cast<T*>(increase));
    });
}

template <class T>
Outcome prune_blocks(const Layer& layer, int64_t width, int64_t together, int32_t* order,
                     void* increase) {
    if (together == 2 && width == 4) return prune_blocks_of<T, 4, 2>(layer, order, increase);
    if (together != 1) return kUnknown;
    switch (width) {
        case 2: return prune_blocks_of<T, 2>(layer, order, increase);
        case 4: return prune_blocks_of<T, 4>(layer, order, increase);
        case 8: return prune_blocks_of<T, 8>(layer, order, increase);
        case 16: return prune_blocks_of<T, 16>(layer, order, increase);
        default: return kUnknown;
    }
}

template <class T>
Outcome quantize(const Layer& layer, const WeightGrid& grid, const uint8_t* mask,
                 const LeftInverses* left, int8_t* codes) {
    const Start<T> start(layer, !left);
    bool one_grid = true;
    for (int64_t row = 0; row < layer.rows && one_grid; ++row) {
        const double* scale = grid.scale + row * layer.cols;
        const double* zero = grid.zero_point + row * layer.cols;
        for (int64_t c = 1; c < layer.cols && one_grid; ++c) {
            one_grid = scale[c] == scale[0] && zero[c] == zero[0];
        }
    }
    return over_rows(layer, [&]() -> std::unique_ptr<RowSolver> {
        if (one_grid) {
            return std::make_unique<Quantize<T, true>>(layer, start, grid, mask, left, codes);
        }
        return std::make_unique<Quantize<T, false>>(layer, start, grid, mask, left, codes);
    });
}

template <class T>
Outcome best_weights(const Layer& layer, const int32_t* order, const int64_t* counts,
                     int64_t levels, const double* target, void* weights) {
    return over_rows(layer, [&] {
        return std::make_unique<BestWeights<T>>(layer, order, counts, levels, target,
                                                static_cast<T*>(weights));
    });
}

inline Outcome find_grid(const GridSearch& search, int64_t threads, Control* control) {
    return over_rows(search.rows, threads, control,
                     [&] { return std::make_unique<FindGrid>(search); });
}

// Columns from which threads share one Hessian's inverse, half a millisecond of work.
constexpr int64_t kShared = 256;

inline Outcome invert_hessians(const Hessians& given, double* inverse, double* pivots) {
    if (given.groups < given.threads && given.cols >= kShared) {
        InvertHessians solver(given.matrices, given.cols, inverse, pivots, given.threads);
        std::atomic<bool> solved{true};
        together(given.threads, [&](const Member& member) {
            Progress progress(given.control);
            for (int64_t group = 0; group < given.groups; ++group) {
                if (!solver.part(member, group, progress)) {
                    solved = false;
                    return;
                }
                member.barrier.wait();
            }
        });
        return solved ? kSolved : kStopped;
    }
    return over_rows(given.groups, given.threads, given.control, [&] {
        return std::make_unique<InvertHessians>(given.matrices, given.cols, inverse, pivots);
    });
}

inline Outcome output_energy(const Hessians& given, const double* rows, int64_t rows_of_group,
                             double* energy) {
    std::vector<double> of_part(size_t(given.groups * OutputEnergy::parts_of(rows_of_group)));
    const Outcome outcome = over_rows(int64_t(of_part.size()), given.threads, given.control, [&] {
        return std::make_unique<OutputEnergy>(rows, given.matrices, rows_of_group, given.cols,
                                              of_part.data());
    });
    *energy = 0.0;
    for (double each : of_part) *energy += each;
    return outcome;
}

// Floating-point operations a second of the rank update alone.
template <class T>
double update_rate(int64_t size, int64_t depth, int64_t repeats) {
    const int64_t length = row_length<T>(size);
    Buffer<T> matrix((size + kTileRows) * length), vectors(depth * length);
    T* m = matrix;
    T* v = vectors;
    std::fill(m, m + (size + kTileRows) * length, T(1));
    std::fill(v, v + depth * length, T(1e-3));
    RankUpdate<T> update(size, depth);
    update.apply(m, length, m, length, v, length, depth, size);
    const auto begin = std::chrono::steady_clock::now();
    for (int64_t i = 0; i < repeats; ++i) update.apply(m, length, m, length, v, length, depth, size);
    const std::chrono::duration<double> time = std::chrono::steady_clock::now() - begin;
    return double(repeats) * double(depth) * double(size) * double(size + 1) / time.count();
}

template <class T>
constexpr RowSolvers solvers() {
    return {prune_columns<T>, prune_and_weigh<T>, prune_blocks<T>,
            quantize<T>,      best_weights<T>,    update_rate<T>};
}
