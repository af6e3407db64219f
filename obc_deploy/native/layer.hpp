// What Python hands over: one layer problem, who may stop it, and what is to be found out.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <iterator>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

namespace obc {

// Shared with the caller while the work goes on.
struct Control {
    std::atomic<int64_t> done;  // work units finished, of those that `work_of` counts
    std::atomic<int64_t> stop;  // set by the caller: give up at the next block of steps
};
static_assert(sizeof(Control) == 16, "Python reads it as two 64-bit integers");

// Rows of W with the inverse Hessians that their groups share; all matrices row-major.
struct Layer {
    int64_t rows;
    int64_t cols;
    int64_t groups;
    const double* inverse;       // (groups, cols, cols) of the damped Hessian
    const double* hessian;       // (groups, cols, cols) damped
    const int64_t* group_of_row; // (rows,)
    const double* weight;        // (rows, cols)
    int64_t lazy;                // eliminations between two updates of the stored inverse
    int64_t threads;
    Control* control;
};

enum Outcome : int64_t { kSolved = 0, kStopped = 1, kNoMemory = 2, kUnknown = 3 };

struct GroupZeros {  // N:M: `zeros` of each `group` consecutive columns; group = cols: unstructured
    int64_t group;
    int64_t zeros;
};

// What pruning leaves of each row's inverse, (H_SS)^-1 of its `size` survivors S: the rows' columns
// (rows, size) and lower triangles (rows, size (size + 1) / 2) in working precision.
struct LeftInverses {
    int64_t size;
    int32_t* columns;
    void* triangles;
};

struct WeightGrid {
    const double* scale;       // (rows, cols)
    const double* zero_point;  // (rows, cols)
    int64_t code_min;
    int64_t code_max;
};

struct GridSearch {
    const double* weight;  // (rows, cols), one grid a row
    int64_t rows, cols;
    int64_t code_min, code_max;
    int64_t asymmetric;
    int64_t steps;      // shrink steps, the first of which is the whole range
    double shrink;      // share of the range that each step takes away
    double least_scale;
    float* scale;       // (rows,)
    int8_t* zero_point; // (rows,)
};

// One symmetric matrix a group.
struct Hessians {
    const double* matrices;  // (groups, cols, cols)
    int64_t groups;
    int64_t cols;
    int64_t threads;
    Control* control;
};

// One instruction set's solvers, in one precision.
struct RowSolvers {
    Outcome (*prune_columns)(const Layer&, const GroupZeros&, int32_t* order, void* increase);
    Outcome (*prune_and_weigh)(const Layer&, const GroupZeros&, bool precise, int32_t* order,
                               double* weights, const LeftInverses*);
    Outcome (*prune_blocks)(const Layer&, int64_t width, int64_t together, int32_t* order,
                            void* increase);
    Outcome (*quantize)(const Layer&, const WeightGrid&, const uint8_t* mask, const LeftInverses*,
                        int8_t* codes);
    Outcome (*best_weights)(const Layer&, const int32_t* order, const int64_t* counts,
                            int64_t levels, const double* target, void* weights);
    double (*update_rate)(int64_t size, int64_t depth, int64_t repeats);
};

struct InstructionSet {
    const char* name;
    RowSolvers float32;
    RowSolvers float64;
    Outcome (*find_grid)(const GridSearch&, int64_t threads, Control*);
    Outcome (*invert_hessians)(const Hessians&, double* inverse, double* pivots);
    Outcome (*output_energy)(const Hessians&, const double* rows, int64_t rows_of_group,
                             double* energy);
};

extern const InstructionSet kPortable;
#if defined(__x86_64__)
extern const InstructionSet kAvx2;
extern const InstructionSet kAvx512;
#endif

}  // namespace obc
