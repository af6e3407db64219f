// AveragePool of a blocked tensor: sums of columns first, then of windows.
#pragma once

#include "pooling.hpp"

namespace obc::sparse {

class AveragePool {
  public:
    static constexpr const char* kName = "AveragePool";
    static constexpr Input kInputs[] = {{"x", ort::kUint8, Kind::kEachRun}};
    static constexpr ort::ElementType kOutput = ort::kUint8;

    struct Options : WindowPoolOptions {
        bool count_include_pad;
        Grid input_grid;
        OutputGrid grid;

        explicit Options(const Attributes& attributes)
            : WindowPoolOptions(attributes),
              count_include_pad(attributes.integer("count_include_pad", {0, 1}, 0)),
              input_grid(read_grid(attributes, "input")), grid(read_output_grid(attributes)) {}
    };

    AveragePool(const Options& options, const Constants&)
        : options_(options), set_(instruction_set()) {}

    void run(const Run& run, const Tensor& output) const {
        const BlockedShape x = options_.input(run.input(0).shape), y = options_.output(x);
        const Windows& windows = options_.windows;
        run.parallel_planes(y.images * y.blocks(), y.plane_bytes(), [&](int64_t plane) {
            const ScratchPool::Piece scratch =
                scratch_->borrow(size_t(x.width * kBlock) * sizeof(int32_t));
            int32_t* columns = scratch.as<int32_t>();
            fill_border(output.write<uint8_t>() + plane * y.plane_bytes(), y,
                        options_.grid.grid.zero_point);
            for (int64_t row = 0; row < y.height; ++row) {
                const Span rows =
                    window_span(row, windows.vertical, windows.top, windows.height, x.height);
                std::memset(columns, 0, size_t(x.width * kBlock) * sizeof(int32_t));
                for (int64_t from = rows.first; from < rows.last; ++from) {
                    set_.add_codes(pixel(run.input(0), x, plane, from), x.width * kBlock, columns);
                }
                uint8_t* to = writable_pixel(output, y, plane, row);
                for (int64_t column = 0; column < y.width; ++column, to += kBlock) {
                    const Span across =
                        window_span(column, windows.horizontal, windows.left, windows.width, x.width);
                    average(columns, across, rows.count() * across.count(), to);
                }
            }
            fill_spare_lanes(writable_pixel(output, y, plane), y, plane % y.blocks(),
                             options_.grid.grid.zero_point);
        });
    }

  private:
    // One pixel: `pixels` of them are in the window.
    void average(const int32_t* columns, const Span& across, int64_t pixels, uint8_t* to) const {
        int32_t sums[kBlock] = {};
        for (int64_t from = across.first; from < across.last; ++from) {
            for (int lane = 0; lane < kBlock; ++lane) sums[lane] += columns[from * kBlock + lane];
        }
        const Windows& windows = options_.windows;
        const int64_t count = options_.count_include_pad ? windows.height * windows.width : pixels;
        const float multiplier = options_.input_grid.scale / (options_.grid.grid.scale * float(count));
        set_.requantize(sums, kBlock, int32_t(-pixels * options_.input_grid.zero_point), multiplier,
                        options_.grid, to);
    }

    Options options_;
    const InstructionSet& set_;
    const std::shared_ptr<ScratchPool> scratch_ = ScratchPool::shared();
};

}  // namespace obc::sparse
