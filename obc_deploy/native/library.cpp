// The C functions that Python calls, and the choice of instruction set.
#include "layer.hpp"

namespace obc {

namespace {

const InstructionSet* chosen = nullptr;

const InstructionSet& best() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
        return kAvx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
    return kPortable;
}

const InstructionSet& now() { return chosen ? *chosen : best(); }

const RowSolvers& solvers(int64_t bits) { return bits == 64 ? now().float64 : now().float32; }

// What is thrown before any row is begun must not reach the caller, who is no C++.
template <class Solve>
int64_t outcome_of(Solve solve) {
    try {
        return solve();
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    } catch (...) {
        return kUnknown;
    }
}

}  // namespace

extern "C" {
#pragma GCC visibility push(default)

const char* obc_instruction_set() { return now().name; }

// Use this set from now on, "" for the best; 0 where the processor or the build lacks it.
int64_t obc_use_instruction_set(const char* name) {
    const std::string wanted(name);
    if (wanted.empty()) {
        chosen = nullptr;
        return 1;
    }
    const InstructionSet* sets[] = {
        &kPortable,
#if defined(__x86_64__)
        &kAvx2, &kAvx512,
#endif
    };
    const std::string most(best().name);
    for (const InstructionSet* set : sets) {
        if (wanted == set->name) {
            chosen = set;
            return 1;
        }
        if (most == set->name) return 0;  // the sets that follow are beyond this processor
    }
    return 0;
}

int64_t obc_prune_columns(const Layer* layer, int64_t bits, int64_t group, int64_t zeros,
                          int32_t* order, void* increase) {
    return outcome_of([&] {
        return solvers(bits).prune_columns(*layer, GroupZeros{group, zeros}, order, increase);
    });
}

// Inverses are left where there is memory for them.
int64_t obc_prune_and_weigh(const Layer* layer, int64_t bits, int64_t group, int64_t zeros,
                            int64_t precise, int32_t* order, double* weights, int64_t size,
                            int32_t* columns, void* triangles) {
    return outcome_of([&] {
        const LeftInverses left{size, columns, triangles};
        return solvers(bits).prune_and_weigh(*layer, GroupZeros{group, zeros}, precise != 0, order,
                                             weights, triangles ? &left : nullptr);
    });
}

// Of layers whose rows are `together` neighbouring rows of weights each, with one mask.
int64_t obc_prune_blocks(const Layer* layer, int64_t bits, int64_t width, int64_t together,
                         int32_t* order, void* increase) {
    return outcome_of([&] {
        return solvers(bits).prune_blocks(*layer, width, together, order, increase);
    });
}

// From a mask of the survivors, or from the inverses that pruning left, or with neither from all.
int64_t obc_quantize(const Layer* layer, int64_t bits, const double* scale,
                     const double* zero_point, int64_t code_min, int64_t code_max,
                     const uint8_t* mask, int64_t size, int32_t* columns, void* triangles,
                     int8_t* codes) {
    const WeightGrid grid{scale, zero_point, code_min, code_max};
    return outcome_of([&] {
        const LeftInverses left{size, columns, triangles};
        return solvers(bits).quantize(*layer, grid, mask, triangles ? &left : nullptr, codes);
    });
}

int64_t obc_best_weights(const Layer* layer, int64_t bits, const int32_t* order,
                         const int64_t* counts, int64_t levels, const double* target,
                         void* weights) {
    return outcome_of([&] {
        return solvers(bits).best_weights(*layer, order, counts, levels, target, weights);
    });
}

int64_t obc_find_grid(const GridSearch* search, int64_t threads, Control* control) {
    return outcome_of([&] { return now().find_grid(*search, threads, control); });
}

int64_t obc_invert_hessians(const Hessians* given, double* inverse, double* pivots) {
    return outcome_of([&] { return now().invert_hessians(*given, inverse, pivots); });
}

int64_t obc_output_energy(const Hessians* given, const double* rows, int64_t rows_of_group,
                          double* energy) {
    return outcome_of([&] { return now().output_energy(*given, rows, rows_of_group, energy); });
}

double obc_update_rate(int64_t bits, int64_t size, int64_t depth, int64_t repeats) {
    return solvers(bits).update_rate(size, depth, repeats);
}

#pragma GCC visibility pop
}  // extern "C"

}  // namespace obc
