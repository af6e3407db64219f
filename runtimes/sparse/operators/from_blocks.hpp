// FromBlocks and DequantizeFromBlocks: a blocked tensor to [N, C, H, W].
#pragma once

#include "../blocked_tensor.hpp"
#include "../custom_operator.hpp"
#include "../instruction_sets.hpp"

namespace obc::sparse {

struct FromBlocksOptions {
    int64_t channels;
    Frame frame;

    explicit FromBlocksOptions(const Attributes& attributes)
        : channels(attributes.channels()), frame(read_frame(attributes, "input_")) {}

    BlockedShape blocked(const Shape& shape) const {
        return blocked_shape(shape, channels, frame, "x");
    }

    Shape output_shape(const std::vector<Shape>& inputs) const {
        const BlockedShape shape = blocked(inputs.at(0));
        return {shape.images, shape.channels, shape.height, shape.width};
    }
};

class FromBlocks {
  public:
    static constexpr const char* kName = "FromBlocks";
    static constexpr Input kInputs[] = {{"x", ort::kUint8, Kind::kEachRun}};
    static constexpr ort::ElementType kOutput = ort::kUint8;
    using Options = FromBlocksOptions;

    FromBlocks(const Options& options, const Constants&) : options_(options), set_(instruction_set()) {}

    void run(const Run& run, const Tensor& output) const {
        const BlockedShape shape = options_.blocked(run.input(0).shape);
        const int64_t area = shape.height * shape.width;
        // Without a border a plane's pixels are one row.
        const int64_t width = shape.frame.border ? shape.width : area;
        run.parallel_planes(shape.images * shape.blocks(), shape.plane_bytes(), [&](int64_t plane) {
            const int64_t image = plane / shape.blocks(), block = plane % shape.blocks();
            uint8_t* first = output.write<uint8_t>() + (image * shape.channels + block * kBlock) * area;
            for (int64_t y = 0; y * width < area; ++y) {
                uint8_t* rows[kBlock] = {};
                for (int64_t lane = 0; lane < kBlock && block * kBlock + lane < shape.channels;
                     ++lane) {
                    rows[lane] = first + lane * area + y * width;
                }
                set_.separate(pixel(run.input(0), shape, plane, y), width, rows);
            }
        });
    }

  private:
    Options options_;
    const InstructionSet& set_;
};

class DequantizeFromBlocks {
  public:
    static constexpr const char* kName = "DequantizeFromBlocks";
    static constexpr Input kInputs[] = {{"x", ort::kUint8, Kind::kEachRun}};
    static constexpr ort::ElementType kOutput = ort::kFloat;

    struct Options : FromBlocksOptions {
        Grid grid;
        explicit Options(const Attributes& attributes)
            : FromBlocksOptions(attributes), grid(read_grid(attributes, "input")) {}
    };

    DequantizeFromBlocks(const Options& options, const Constants&)
        : options_(options), set_(instruction_set()) {}

    void run(const Run& run, const Tensor& output) const {
        constexpr int64_t kStretch = 256;  // pixels at a time
        const BlockedShape shape = options_.blocked(run.input(0).shape);
        const int64_t area = shape.height * shape.width;
        run.parallel_planes(shape.images * shape.blocks(), shape.plane_bytes(), [&](int64_t plane) {
            const int64_t image = plane / shape.blocks(), block = plane % shape.blocks();
            float* first = output.write<float>() + (image * shape.channels + block * kBlock) * area;
            const int64_t used = std::min<int64_t>(kBlock, shape.channels - block * kBlock);
            uint8_t lanes[kBlock][kStretch];
            uint8_t* const rows[kBlock] = {lanes[0], lanes[1], lanes[2], lanes[3]};
            for (int64_t y = 0; y < shape.height; ++y) {
                for (int64_t x = 0; x < shape.width; x += kStretch) {
                    const int64_t count = std::min(kStretch, shape.width - x);
                    set_.separate(pixel(run.input(0), shape, plane, y, x), count, rows);
                    for (int64_t lane = 0; lane < used; ++lane) {
                        set_.dequantize(lanes[lane], count, options_.grid,
                                        first + lane * area + y * shape.width + x);
                    }
                }
            }
        });
    }

  private:
    Options options_;
    const InstructionSet& set_;
};

}  // namespace obc::sparse
