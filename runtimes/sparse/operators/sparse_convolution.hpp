// SparseConvolution of a blocked tensor.
#pragma once

#include <memory>
#include <mutex>

#include "../blocked_tensor.hpp"
#include "../custom_operator.hpp"
#include "../instruction_sets.hpp"
#include "../scratch.hpp"
#include "../sparse_weights.hpp"
#include "../windows.hpp"

namespace obc::sparse {

class SparseConvolution {
  public:
    static constexpr const char* kName = "SparseConvolution";
    static constexpr Input kInputs[] = {{"x", ort::kUint8, Kind::kEachRun},
                                        {"values", ort::kInt8, Kind::kConstant},
                                        {"mask", ort::kUint8, Kind::kConstant},
                                        {"weight_scale", ort::kFloat, Kind::kConstant},
                                        {"bias", ort::kInt32, Kind::kOptionalConstant},
                                        {"residual", ort::kUint8, Kind::kOptional}};
    static constexpr ort::ElementType kOutput = ort::kUint8;
    static constexpr size_t kResidual = 5;

    struct Options {
        int64_t channels;
        Frame input_frame;
        Frame frame;
        Windows windows;
        Grid input_grid;
        OutputGrid grid;
        // Of the residual, where the node has these attributes.
        bool takes_residual;
        Frame residual_frame;
        Grid residual_grid{};
        Grid convolution_grid{};

        explicit Options(const Attributes& attributes)
            : channels(attributes.channels()),
              input_frame(read_frame(attributes, "input_")),
              frame(read_frame(attributes, "")), windows(read_windows(attributes, 2)),
              input_grid(read_grid(attributes, "input")), grid(read_output_grid(attributes)),
              takes_residual(attributes.has_float("residual_scale")),
              residual_frame(read_frame(attributes, "residual_")) {
            require_equal_strides(windows);
            require_padding_in_border(windows, input_frame.border);
            if (windows.height * windows.width > kMostPositions) {
                refuse("attribute 'kernel_shape' has ", windows.height * windows.width,
                       " positions, expected at most ", kMostPositions);
            }
            if (takes_residual) {
                residual_grid = read_grid(attributes, "residual");
                convolution_grid = read_grid(attributes, "convolution");
            }
        }

        BlockedShape input(const Shape& shape) const {
            return blocked_shape(shape, channels, input_frame, "x");
        }

        BlockedShape output(const BlockedShape& x, int64_t outputs) const {
            return {x.images, outputs, windows.out_height(x.height), windows.out_width(x.width), frame};
        }

        Shape output_shape(const std::vector<Shape>& inputs) const {
            return shape_of(output(input(inputs.at(0)), outputs_of(inputs.at(2))));
        }

        // The grid that the sums are rounded to.
        OutputGrid sums_grid() const {
            return takes_residual ? OutputGrid{convolution_grid, 0, 255} : grid;
        }
    };

    SparseConvolution(const Options& options, const Constants& constants)
        : options_(options), set_(instruction_set()),
          blocks_(read_blocks(constants, 1, options.channels,
                              options.windows.height * options.windows.width)) {
        const std::vector<float> scale = read_weight_scale(constants, 3, blocks_.outputs);
        bias_ = folded_biases(blocks_, read_bias<int32_t>(constants, 4, ort::kInt32, blocks_.outputs),
                              options.input_grid.zero_point);
        multiplier_ = multipliers(options.input_grid.scale, scale, options.sums_grid().grid.scale);
    }

    void run(const Run& run, const Tensor& output) const {
        const BlockedShape x = options_.input(run.input(0).shape);
        const uint8_t* residual = checked_residual(run, options_.output(x, blocks_.outputs));
        const std::shared_ptr<const ConvolutionPlan> plan = plan_for(x, run);
        const BlockedTensors tensors{run.input(0).read<uint8_t>(), residual, output.write<uint8_t>()};
        run.parallel(plan->tasks(), [&](int64_t task) {
            const ScratchPool::Piece scratch = scratch_->borrow(plan->scratch_bytes());
            plan->run(tensors, task, scratch.as<void>());
        });
    }

  private:
    const uint8_t* checked_residual(const Run& run, const BlockedShape& y) const {
        if (run.has(kResidual) != options_.takes_residual) {
            if (options_.takes_residual)
                refuse("attribute 'residual_scale' is there, but input 'residual' is missing");
            refuse("input 'residual' is there, but attribute 'residual_scale' is missing");
        }
        if (!options_.takes_residual) return nullptr;
        const Tensor& residual = run.input(kResidual);
        BlockedShape expected = y;
        expected.frame = options_.residual_frame;
        require_shape(residual, "residual", shape_of(expected));
        return residual.read<uint8_t>();
    }

    // The last few shapes' plans are kept: making one takes longer than running it.
    std::shared_ptr<const ConvolutionPlan> plan_for(const BlockedShape& x, const Run& run) const {
        constexpr size_t kKept = 4;
        std::lock_guard<std::mutex> lock(mutex_);
        const int64_t present = run.threads().present();
        for (auto plan = plans_.begin(); plan != plans_.end(); ++plan) {
            const BlockedShape& known = (*plan)->shape_.input;
            if (known.images != x.images || known.height != x.height || known.width != x.width) continue;
            if ((*plan)->threads_ >= present) return *plan;
            plans_.erase(plan);  // made for fewer threads
            break;
        }
        const Windows& windows = options_.windows;
        const ConvolutionShape shape{x,
                                     blocks_.outputs,
                                     options_.frame,
                                     options_.residual_frame,
                                     windows.height,
                                     windows.width,
                                     windows.vertical,
                                     windows.top,
                                     windows.left,
                                     windows.bottom,
                                     windows.right};
        const OutputGrid sums = options_.sums_grid();
        const Requantization requantization{bias_.data(), multiplier_.data(), sums.grid.zero_point,
                                            sums.lower, sums.upper};
        const ResidualAdd residual{options_.takes_residual,      options_.convolution_grid.scale,
                                   options_.residual_grid.scale, options_.residual_grid.zero_point,
                                   options_.grid.grid.scale,     options_.grid.grid.zero_point,
                                   options_.grid.lower,          options_.grid.upper};
        if (plans_.size() == kKept) plans_.erase(plans_.begin());
        plans_.push_back(std::make_shared<const ConvolutionPlan>(shape, blocks_.view(), requantization,
                                                                 residual, *set_.convolution,
                                                                 [&run] { return run.threads().count(); },
                                                                 run.threads().waiting()));
        return plans_.back();
    }

    Options options_;
    const InstructionSet& set_;
    BlockRows blocks_;
    std::vector<int32_t> bias_;
    std::vector<float> multiplier_;
    mutable std::mutex mutex_;
    mutable std::vector<std::shared_ptr<const ConvolutionPlan>> plans_;
    const std::shared_ptr<ScratchPool> scratch_ = ScratchPool::shared();
};

}  // namespace obc::sparse
