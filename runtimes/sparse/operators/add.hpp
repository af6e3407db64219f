// Add: two blocked tensors.
#pragma once

#include "../blocked_tensor.hpp"
#include "../custom_operator.hpp"
#include "../instruction_sets.hpp"

namespace obc::sparse {

class Add {
  public:
    static constexpr const char* kName = "Add";
    static constexpr Input kInputs[] = {{"a", ort::kUint8, Kind::kEachRun},
                                        {"b", ort::kUint8, Kind::kEachRun}};
    static constexpr ort::ElementType kOutput = ort::kUint8;

    struct Options {
        int64_t channels;
        std::vector<Frame> input_frames;
        std::vector<Grid> input_grids;
        Frame frame;
        OutputGrid grid;

        explicit Options(const Attributes& attributes)
            : channels(attributes.channels()),
              input_frames(read_input_frames(attributes, 2)),
              input_grids(read_input_grids(attributes, 2)),
              frame(read_frame(attributes, "")), grid(read_output_grid(attributes)) {}

        BlockedShape input(const Shape& shape, size_t index) const {
            return blocked_shape(shape, channels, input_frames[index], kInputs[index].name);
        }

        BlockedShape output(const Shape& first, const Shape& second) const {
            BlockedShape a = input(first, 0);
            const BlockedShape b = input(second, 1);
            if (a.images != b.images || a.height != b.height || a.width != b.width) {
                refuse("input 'b' holds [N, H, W] = ", Shape{b.images, b.height, b.width},
                       ", expected 'a''s ", Shape{a.images, a.height, a.width});
            }
            a.frame = frame;
            return a;
        }

        Shape output_shape(const std::vector<Shape>& inputs) const {
            return shape_of(output(inputs.at(0), inputs.at(1)));
        }
    };

    Add(const Options& options, const Constants&) : options_(options), set_(instruction_set()) {}

    void run(const Run& run, const Tensor& output) const {
        const Tensor &first = run.input(0), &second = run.input(1);
        const BlockedShape a = options_.input(first.shape, 0), b = options_.input(second.shape, 1);
        const BlockedShape y = options_.output(first.shape, second.shape);
        // Rows that lie at the same places everywhere are added with what is between them.
        const bool aligned = a.frame.border == y.frame.border && b.frame.border == y.frame.border;
        const int64_t rows = aligned ? 1 : y.height;
        const int64_t bytes = aligned ? y.bordered_bytes() - 2 * y.offset(0, 0) : y.width * kBlock;
        run.parallel_planes(y.images * y.blocks(), y.plane_bytes(), [&](int64_t plane) {
            for (int64_t row = 0; row < rows; ++row) {
                set_.add(pixel(first, a, plane, row), options_.input_grids[0],
                         pixel(second, b, plane, row), options_.input_grids[1], bytes, options_.grid,
                         writable_pixel(output, y, plane, row));
            }
            fill_border(output.write<uint8_t>() + plane * y.plane_bytes(), y,
                        options_.grid.grid.zero_point);
            fill_spare_lanes(writable_pixel(output, y, plane), y, plane % y.blocks(),
                             options_.grid.grid.zero_point);
        });
    }

  private:
    Options options_;
    const InstructionSet& set_;
};

}  // namespace obc::sparse
