// MaxPool of a blocked tensor: rows of a window first, then its columns.
#pragma once

#include "pooling.hpp"

namespace obc::sparse {

class MaxPool {
  public:
    static constexpr const char* kName = "MaxPool";
    static constexpr Input kInputs[] = {{"x", ort::kUint8, Kind::kEachRun}};
    static constexpr ort::ElementType kOutput = ort::kUint8;

    struct Options : WindowPoolOptions {
        int32_t zero_point;
        explicit Options(const Attributes& attributes)
            : WindowPoolOptions(attributes),
              zero_point(int32_t(attributes.integer("zero_point", kCodes))) {}
    };

    MaxPool(const Options& options, const Constants&) : options_(options), set_(instruction_set()) {}

    void run(const Run& run, const Tensor& output) const {
        const BlockedShape x = options_.input(run.input(0).shape), y = options_.output(x);
        const Windows& windows = options_.windows;
        // A row of column maxima, with padding that is smaller than all; and the maxima of windows
        // that begin at each pixel, of which the strides take some.
        const int64_t positions = (y.width - 1) * windows.horizontal + 1;
        const int64_t padded = positions + windows.width - 1;
        const auto any_windows = [&](int64_t plane, uint8_t* columns) {
            uint8_t* maxima = columns + padded * kBlock;
            const int64_t inside = std::min(x.width, padded - windows.left);
            for (int64_t row = 0; row < y.height; ++row) {
                const Span span =
                    window_span(row, windows.vertical, windows.top, windows.height, x.height);
                std::memset(columns, 0, size_t(padded * kBlock));
                for (int64_t from = span.first; from < span.last; ++from) {
                    set_.keep_larger(pixel(run.input(0), x, plane, from), inside * kBlock,
                                     columns + windows.left * kBlock);
                }
                std::memcpy(maxima, columns, size_t(positions * kBlock));
                for (int64_t kx = 1; kx < windows.width; ++kx) {
                    set_.keep_larger(columns + kx * kBlock, positions * kBlock, maxima);
                }
                set_.take_pixels(maxima, windows.horizontal, y.width,
                                 writable_pixel(output, y, plane, row));
            }
        };
        const bool halves = windows.halve();
        const size_t scratch_bytes = halves ? 0 : size_t((padded + positions) * kBlock);
        run.parallel_ranges(y.images * y.blocks(), x.plane_bytes(), [&](int64_t first, int64_t last) {
            const ScratchPool::Piece scratch = scratch_->borrow(scratch_bytes);
            for (int64_t plane = first; plane < last; ++plane) {
                fill_border(output.write<uint8_t>() + plane * y.plane_bytes(), y, options_.zero_point);
                if (halves) {
                    set_.larger_of_fours(pixel(run.input(0), x, plane), x.row_bytes(), y.width, y.height,
                                         writable_pixel(output, y, plane), y.row_bytes());
                } else {
                    any_windows(plane, scratch.as<uint8_t>());
                }
                fill_spare_lanes(writable_pixel(output, y, plane), y, plane % y.blocks(),
                                 options_.zero_point);
            }
        });
    }

  private:
    Options options_;
    const InstructionSet& set_;
    const std::shared_ptr<ScratchPool> scratch_ = ScratchPool::shared();
};

}  // namespace obc::sparse
