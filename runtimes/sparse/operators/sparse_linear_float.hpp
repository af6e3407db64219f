// SparseLinearFloat: float rows times unstructured sparse weights.
#pragma once

#include "../float_weights.hpp"
#include "linear_rows.hpp"

namespace obc::sparse {

class SparseLinearFloat {
  public:
    static constexpr const char* kName = "SparseLinearFloat";
    static constexpr Input kInputs[] = {{"x", ort::kFloat, Kind::kEachRun},
                                        {"values", ort::kFloat, Kind::kConstant},
                                        {"mask", ort::kUint8, Kind::kConstant},
                                        {"bias", ort::kFloat, Kind::kOptionalConstant}};
    static constexpr ort::ElementType kOutput = ort::kFloat;

    struct Options : LinearOptions {
        Clip clip;

        explicit Options(const Attributes& attributes) : LinearOptions(attributes), clip(attributes) {}

        Shape output_shape(const std::vector<Shape>& inputs) const { return rows_shape(inputs); }
    };

    SparseLinearFloat(const Options& options, const Constants& constants)
        : options_(options), set_(instruction_set()),
          entries_(read_entries(constants, options.features)),
          bias_(read_bias<float>(constants, 3, ort::kFloat, entries_.outputs)) {}

    void run(const Run& run, const Tensor& output) const {
        const int64_t rows = row_count(run.input(0));
        if (rows < kFewRows) {
            each_row(run, rows, output);
        } else {
            tiles_of_rows(run, rows, output);
        }
    }

  private:
    FloatEntries view(int64_t step) const {
        return {entries_.row_start.data(), entries_.index.data(), entries_.values.data(), step};
    }

    void each_row(const Run& run, int64_t rows, const Tensor& output) const {
        constexpr int64_t kOutputs = 64;
        const int64_t chunks = (entries_.outputs + kOutputs - 1) / kOutputs;
        run.parallel(rows * chunks, [&](int64_t part) {
            const int64_t row = part / chunks, first = part % chunks * kOutputs;
            const float* x = run.input(0).read<float>() + row * options_.features;
            float* to = output.write<float>() + row * entries_.outputs;
            for (int64_t o = first; o < std::min(first + kOutputs, entries_.outputs); ++o) {
                to[o] = options_.clip(set_.float_dot(view(1), o, x) + bias_[size_t(o)]);
            }
        });
    }

    // As many rows at a time as the loop makes numbers, side by side: [features][rows].
    void tiles_of_rows(const Run& run, int64_t rows, const Tensor& output) const {
        const int64_t width = set_.floats, tiles = (rows + width - 1) / width,
                      features = options_.features;
        const int64_t chunks = (entries_.outputs + kOutputsAtOnce - 1) / kOutputsAtOnce;
        const ScratchPool::Piece scratch =
            scratch_->borrow(size_t(tiles * features * width) * sizeof(float));
        float* packed = scratch.as<float>();
        run.parallel(tiles, [&](int64_t tile) {
            float* to = packed + tile * features * width;
            const int64_t count = std::min(width, rows - tile * width);
            const float* from = run.input(0).read<float>() + tile * width * features;
            for (int64_t f = 0; f < features; ++f, to += width) {
                for (int64_t row = 0; row < count; ++row) to[row] = from[row * features + f];
                std::fill(to + count, to + width, 0.0f);
            }
        });
        run.parallel(tiles * chunks, [&](int64_t part) {
            const int64_t tile = part / chunks, first = part % chunks * kOutputsAtOnce;
            const int64_t last = std::min(first + kOutputsAtOnce, entries_.outputs);
            const int64_t count = std::min(width, rows - tile * width);
            const ScratchPool::Piece sums =
                scratch_->borrow(size_t(kOutputsAtOnce * width) * sizeof(float));
            float* numbers = sums.as<float>();
            for (int64_t o = first; o < last; ++o) {
                float* of_output = numbers + (o - first) * width;
                set_.float_products(view(width), o, packed + tile * features * width, of_output);
                for (int64_t row = 0; row < count; ++row) {
                    of_output[row] = options_.clip(of_output[row] + bias_[size_t(o)]);
                }
            }
            store_rows(numbers, width, last - first, count, entries_.outputs,
                       output.write<float>() + tile * width * entries_.outputs + first);
        });
    }

    Options options_;
    const InstructionSet& set_;
    FloatRows entries_;
    std::vector<float> bias_;
    const std::shared_ptr<ScratchPool> scratch_ = ScratchPool::shared();
};

}  // namespace obc::sparse
