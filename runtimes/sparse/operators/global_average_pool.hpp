// GlobalAveragePool of a blocked tensor.
#pragma once

#include "pooling.hpp"

namespace obc::sparse {

class GlobalAveragePool {
  public:
    static constexpr const char* kName = "GlobalAveragePool";
    static constexpr Input kInputs[] = {{"x", ort::kUint8, Kind::kEachRun}};
    static constexpr ort::ElementType kOutput = ort::kUint8;
    static constexpr int64_t kMostPixels = int64_t(1) << 23;  // their sum fits into an int32

    struct Options : PoolOptions {
        Grid input_grid;
        OutputGrid grid;

        explicit Options(const Attributes& attributes)
            : PoolOptions(attributes), input_grid(read_grid(attributes, "input")),
              grid(read_output_grid(attributes)) {}

        BlockedShape output(const BlockedShape& x) const {
            if (x.height * x.width > kMostPixels) {
                refuse("input 'x' has planes of ", x.height * x.width, " pixels, expected at most ",
                       kMostPixels);
            }
            return {x.images, channels, 1, 1, frame};
        }

        Shape output_shape(const std::vector<Shape>& inputs) const {
            return shape_of(output(input(inputs.at(0))));
        }
    };

    GlobalAveragePool(const Options& options, const Constants&)
        : options_(options), set_(instruction_set()) {}

    void run(const Run& run, const Tensor& output) const {
        const BlockedShape x = options_.input(run.input(0).shape), y = options_.output(x);
        const int64_t pixels = x.height * x.width;
        const float multiplier = options_.input_grid.scale / (options_.grid.grid.scale * float(pixels));
        const int32_t bias = int32_t(-pixels * options_.input_grid.zero_point);
        run.parallel_planes(y.images * y.blocks(), x.plane_bytes(), [&](int64_t plane) {
            fill_border(output.write<uint8_t>() + plane * y.plane_bytes(), y,
                        options_.grid.grid.zero_point);
            int32_t sums[kBlock] = {};
            if (x.frame.border == 0) {
                set_.sum_pixels(pixel(run.input(0), x, plane), pixels, sums);
            } else {
                for (int64_t row = 0; row < x.height; ++row) {
                    set_.sum_pixels(pixel(run.input(0), x, plane, row), x.width, sums);
                }
            }
            uint8_t* to = writable_pixel(output, y, plane);
            set_.requantize(sums, kBlock, bias, multiplier, options_.grid, to);
            fill_spare_lanes(to, y, plane % y.blocks(), options_.grid.grid.zero_point);
        });
    }

  private:
    Options options_;
    const InstructionSet& set_;
};

}  // namespace obc::sparse
