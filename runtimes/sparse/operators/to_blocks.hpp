// ToBlocks and QuantizeToBlocks: [N, C, H, W] to a blocked tensor.
#pragma once

#include "../blocked_tensor.hpp"
#include "../custom_operator.hpp"
#include "../instruction_sets.hpp"

namespace obc::sparse {

struct ToBlocksOptions {
    Frame frame;

    explicit ToBlocksOptions(const Attributes& attributes)
        : frame(read_frame(attributes, "")) {}

    BlockedShape blocked(const Shape& shape) const {
        bool empty = shape.size() != 4;
        for (size_t i = 1; i < shape.size(); ++i) empty = empty || shape[i] < 1;
        if (empty) refuse("input 'x' has shape ", shape, ", expected [N, C, H, W]");
        return {shape[0], shape[1], shape[2], shape[3], frame};
    }

    Shape output_shape(const std::vector<Shape>& inputs) const {
        return shape_of(blocked(inputs.at(0)));
    }
};

// Plane by plane: `codes(from, count, room)` is where the codes of one row's numbers are, in `room`
// if need be.
template <class Number, class Codes>
void write_blocks(const Run& run, const BlockedShape& shape, int32_t zero_point, const Codes& codes,
                  const InstructionSet& set, const Tensor& output) {
    constexpr int64_t kStretch = 256;  // pixels at a time
    const Number* numbers = run.input(0).read<Number>();
    const int64_t area = shape.height * shape.width;
    // Without a border a plane's pixels are one row.
    const int64_t width = shape.frame.border ? shape.width : area;
    run.parallel_ranges(shape.images * shape.blocks(), shape.plane_bytes(), [&](int64_t begin, int64_t end) {
        uint8_t room[kBlock][kStretch], zeros[kStretch];
        std::memset(zeros, zero_point, sizeof zeros);
        for (int64_t plane = begin; plane < end; ++plane) {
            const int64_t image = plane / shape.blocks(), block = plane % shape.blocks();
            fill_border(output.write<uint8_t>() + plane * shape.plane_bytes(), shape, zero_point);
            const int64_t used = std::min<int64_t>(kBlock, shape.channels - block * kBlock);
            const Number* first = numbers + (image * shape.channels + block * kBlock) * area;
            for (int64_t y = 0; y * width < area; ++y) {
                uint8_t* to = writable_pixel(output, shape, plane, y);
                for (int64_t x = 0; x < width; x += kStretch) {
                    const int64_t count = std::min(kStretch, width - x);
                    const uint8_t* rows[kBlock] = {zeros, zeros, zeros, zeros};
                    for (int64_t lane = 0; lane < used; ++lane) {
                        rows[lane] = codes(first + lane * area + y * width + x, count, room[lane]);
                    }
                    set.interleave(rows, count, to + x * kBlock);
                }
            }
        }
    });
}

class ToBlocks {
  public:
    static constexpr const char* kName = "ToBlocks";
    static constexpr Input kInputs[] = {{"x", ort::kUint8, Kind::kEachRun}};
    static constexpr ort::ElementType kOutput = ort::kUint8;

    struct Options : ToBlocksOptions {
        int32_t zero_point;
        explicit Options(const Attributes& attributes)
            : ToBlocksOptions(attributes),
              zero_point(int32_t(attributes.integer("zero_point", kCodes))) {}
    };

    ToBlocks(const Options& options, const Constants&) : options_(options), set_(instruction_set()) {}

    void run(const Run& run, const Tensor& output) const {
        const auto themselves = [](const uint8_t* from, int64_t, uint8_t*) { return from; };
        write_blocks<uint8_t>(run, options_.blocked(run.input(0).shape), options_.zero_point,
                              themselves, set_, output);
    }

  private:
    Options options_;
    const InstructionSet& set_;
};

class QuantizeToBlocks {
  public:
    static constexpr const char* kName = "QuantizeToBlocks";
    static constexpr Input kInputs[] = {{"x", ort::kFloat, Kind::kEachRun}};
    static constexpr ort::ElementType kOutput = ort::kUint8;

    struct Options : ToBlocksOptions {
        OutputGrid grid;
        explicit Options(const Attributes& attributes)
            : ToBlocksOptions(attributes), grid(read_output_grid(attributes)) {}
    };

    QuantizeToBlocks(const Options& options, const Constants&)
        : options_(options), set_(instruction_set()) {}

    void run(const Run& run, const Tensor& output) const {
        const auto quantize = [&](const float* from, int64_t count, uint8_t* room) {
            set_.quantize(from, count, options_.grid, room);
            return const_cast<const uint8_t*>(room);
        };
        write_blocks<float>(run, options_.blocked(run.input(0).shape), options_.grid.grid.zero_point,
                            quantize, set_, output);
    }

  private:
    Options options_;
    const InstructionSet& set_;
};

}  // namespace obc::sparse
