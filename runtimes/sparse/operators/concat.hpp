// Concat: blocked tensors, one after another along channels.
#pragma once

#include "../blocked_tensor.hpp"
#include "../custom_operator.hpp"
#include "../instruction_sets.hpp"

namespace obc::sparse {

class Concat {
  public:
    static constexpr const char* kName = "Concat";
    static constexpr Input kInputs[] = {{"x", ort::kUint8, Kind::kVariadic}};
    static constexpr ort::ElementType kOutput = ort::kUint8;

    struct Options {
        std::vector<int64_t> channels;
        std::vector<Frame> input_frames;
        std::vector<Grid> input_grids;
        Frame frame;
        OutputGrid grid;

        explicit Options(const Attributes& attributes)
            : channels(attributes.integers("channels", kAnyCount, {1, kMostChannels})),
              input_frames(read_input_frames(attributes, count())),
              input_grids(read_input_grids(attributes, count())),
              frame(read_frame(attributes, "")), grid(read_output_grid(attributes)) {}

        int64_t count() const { return int64_t(channels.size()); }

        BlockedShape input(const std::vector<Shape>& shapes, size_t index) const {
            return blocked_shape(shapes[index], channels[index], input_frames[index],
                                 ("x" + std::to_string(index)).c_str());
        }

        BlockedShape output(const std::vector<Shape>& shapes) const {
            if (int64_t(shapes.size()) != count()) {
                refuse("there are ", shapes.size(), " inputs, expected ", count(),
                       " as in attribute 'channels'");
            }
            BlockedShape y = input(shapes, 0);
            for (size_t i = 1; i < shapes.size(); ++i) {
                const BlockedShape x = input(shapes, i);
                if (x.images != y.images || x.height != y.height || x.width != y.width) {
                    refuse("input 'x", i, "' holds [N, H, W] = ", Shape{x.images, x.height, x.width},
                           ", expected the first's ", Shape{y.images, y.height, y.width});
                }
                y.channels += x.channels;
            }
            y.frame = frame;
            return y;
        }

        Shape output_shape(const std::vector<Shape>& shapes) const { return shape_of(output(shapes)); }
    };

    Concat(const Options& options, const Constants&) : options_(options) {
        for (const Grid& grid : options.input_grids) tables_.push_back(table(grid, options.grid));
        for (size_t i = 0; i < options.channels.size(); ++i) {
            for (int64_t channel = 0; channel < options.channels[i]; ++channel)
                sources_.push_back({i, channel});
        }
    }

    void run(const Run& run, const Tensor& output) const {
        std::vector<Shape> shapes;
        for (const Tensor& input : run.inputs()) shapes.push_back(input.shape);
        std::vector<BlockedShape> inputs;
        for (size_t i = 0; i < shapes.size(); ++i) inputs.push_back(options_.input(shapes, i));
        const BlockedShape y = options_.output(shapes);
        run.parallel_planes(y.images * y.blocks(), y.plane_bytes(), [&](int64_t plane) {
            const int64_t image = plane / y.blocks(), block = plane % y.blocks();
            fill_border(output.write<uint8_t>() + plane * y.plane_bytes(), y,
                        options_.grid.grid.zero_point);
            const Source& source = sources_[size_t(block * kBlock)];
            uint8_t* to = writable_pixel(output, y, plane);
            if (is_whole(block)) {
                const BlockedShape& x = inputs[source.input];
                const int64_t from = image * x.blocks() + source.channel / kBlock;
                copy_block(pixel(run.input(source.input), x, from), x, tables_[source.input], to, y);
            } else {
                const int64_t used = std::min<int64_t>(kBlock, y.channels - block * kBlock);
                for (int64_t lane = 0; lane < used; ++lane) {
                    const Source& mine = sources_[size_t(block * kBlock + lane)];
                    const BlockedShape& x = inputs[mine.input];
                    const int64_t from = image * x.blocks() + mine.channel / kBlock;
                    copy_lane(pixel(run.input(mine.input), x, from) + mine.channel % kBlock, x,
                              tables_[mine.input], to + lane, y);
                }
                fill_spare_lanes(to, y, block, options_.grid.grid.zero_point);
            }
        });
    }

  private:
    struct Source {
        size_t input;
        int64_t channel;
    };
    // The output's code for each of the input's; empty where they are the same.
    using Table = std::vector<uint8_t>;

    static Table table(const Grid& from, const OutputGrid& to) {
        if (from == to.grid && to.holds_all_codes()) return {};
        Table codes(256);
        for (int code = 0; code < 256; ++code) {
            const float value = float(code - from.zero_point) * from.scale;
            instruction_set().quantize(&value, 1, to, &codes[size_t(code)]);
        }
        return codes;
    }

    // Whether the output's block is a block of one input.
    bool is_whole(int64_t block) const {
        const size_t first = size_t(block * kBlock), last = first + kBlock - 1;
        return last < sources_.size() && sources_[first].channel % kBlock == 0 &&
               sources_[first].input == sources_[last].input;
    }

    static void copy_block(const uint8_t* from, const BlockedShape& x, const Table& table, uint8_t* to,
                           const BlockedShape& y) {
        const int64_t bytes = y.width * kBlock;
        for (int64_t row = 0; row < y.height; ++row, from += x.row_bytes(), to += y.row_bytes()) {
            if (table.empty()) {
                std::memcpy(to, from, size_t(bytes));
            } else {
                for (int64_t i = 0; i < bytes; ++i) to[i] = table[from[i]];
            }
        }
    }

    static void copy_lane(const uint8_t* from, const BlockedShape& x, const Table& table, uint8_t* to,
                          const BlockedShape& y) {
        for (int64_t row = 0; row < y.height; ++row, from += x.row_bytes(), to += y.row_bytes()) {
            for (int64_t i = 0; i < y.width * kBlock; i += kBlock)
                to[i] = table.empty() ? from[i] : table[from[i]];
        }
    }

    Options options_;
    std::vector<Table> tables_;
    std::vector<Source> sources_;  // of each output channel
};

}  // namespace obc::sparse
