// SparseLinear and SparseLinearDequantize: rows of uint8 codes times block-sparse int8 weights.
#pragma once

#include "linear_rows.hpp"

namespace obc::sparse {

class SparseLinear {
  public:
    static constexpr const char* kName = "SparseLinear";
    static constexpr Input kInputs[] = {{"x", ort::kUint8, Kind::kEachRun},
                                        {"values", ort::kInt8, Kind::kConstant},
                                        {"mask", ort::kUint8, Kind::kConstant},
                                        {"weight_scale", ort::kFloat, Kind::kConstant},
                                        {"bias", ort::kInt32, Kind::kOptionalConstant}};
    static constexpr ort::ElementType kOutput = ort::kUint8;

    struct Options : LinearOptions {
        Grid input_grid;
        OutputGrid grid;

        explicit Options(const Attributes& attributes)
            : LinearOptions(attributes), input_grid(read_grid(attributes, "input")),
              grid(read_output_grid(attributes)) {}

        Shape output_shape(const std::vector<Shape>& inputs) const { return rows_shape(inputs); }
    };

    SparseLinear(const Options& options, const Constants& constants)
        : SparseLinear(options, constants, read_blocks(constants, 1, options.features, 1)) {}

    void run(const Run& run, const Tensor& output) const {
        weights_.run<uint8_t>(
            run, options_.features, output,
            [&](int64_t o, const int32_t* sums, int64_t count, uint8_t* to) {
                set_.requantize(sums, count, bias_[size_t(o)], multiplier_[size_t(o)], options_.grid, to);
            },
            [&](int64_t first, const int32_t* sums, int64_t count, uint8_t* to) {
                set_.requantize_channels(sums, count, bias_.data() + first, multiplier_.data() + first,
                                         options_.grid, to);
            });
    }

  private:
    SparseLinear(const Options& options, const Constants& constants, const BlockRows& blocks)
        : options_(options), set_(instruction_set()), weights_(blocks),
          bias_(folded_biases(blocks, read_bias<int32_t>(constants, 4, ort::kInt32, blocks.outputs),
                              options.input_grid.zero_point)),
          multiplier_(multipliers(options.input_grid.scale,
                                  read_weight_scale(constants, 3, blocks.outputs),
                                  options.grid.grid.scale)) {}

    Options options_;
    const InstructionSet& set_;
    LinearWeights weights_;
    std::vector<int32_t> bias_;
    std::vector<float> multiplier_;
};

class SparseLinearDequantize {
  public:
    static constexpr const char* kName = "SparseLinearDequantize";
    static constexpr Input kInputs[] = {{"x", ort::kUint8, Kind::kEachRun},
                                        {"values", ort::kInt8, Kind::kConstant},
                                        {"mask", ort::kUint8, Kind::kConstant},
                                        {"weight_scale", ort::kFloat, Kind::kConstant},
                                        {"bias", ort::kFloat, Kind::kOptionalConstant}};
    static constexpr ort::ElementType kOutput = ort::kFloat;

    struct Options : LinearOptions {
        Grid input_grid;

        explicit Options(const Attributes& attributes)
            : LinearOptions(attributes), input_grid(read_grid(attributes, "input")) {}

        Shape output_shape(const std::vector<Shape>& inputs) const { return rows_shape(inputs); }
    };

    SparseLinearDequantize(const Options& options, const Constants& constants)
        : SparseLinearDequantize(options, constants, read_blocks(constants, 1, options.features, 1)) {}

    void run(const Run& run, const Tensor& output) const {
        weights_.run<float>(
            run, options_.features, output,
            [&](int64_t o, const int32_t* sums, int64_t count, float* to) {
                set_.scale_sums(sums, count, zero_point_sums_[size_t(o)], multiplier_[size_t(o)],
                                bias_[size_t(o)], to);
            },
            [&](int64_t first, const int32_t* sums, int64_t count, float* to) {
                set_.scale_channels(sums, count, zero_point_sums_.data() + first,
                                    multiplier_.data() + first, bias_.data() + first, to);
            });
    }

  private:
    SparseLinearDequantize(const Options& options, const Constants& constants, const BlockRows& blocks)
        : options_(options), set_(instruction_set()), weights_(blocks),
          zero_point_sums_(folded_biases(blocks, std::vector<int32_t>(size_t(blocks.outputs)),
                                         options.input_grid.zero_point)),
          multiplier_(multipliers(options.input_grid.scale,
                                  read_weight_scale(constants, 3, blocks.outputs), 1.0f)),
          bias_(read_bias<float>(constants, 4, ort::kFloat, blocks.outputs)) {}

    Options options_;
    const InstructionSet& set_;
    LinearWeights weights_;
    std::vector<int32_t> zero_point_sums_;
    std::vector<float> multiplier_;
    std::vector<float> bias_;
};

}  // namespace obc::sparse
