// What the pools of blocked tensors share.
#pragma once

#include "../blocked_tensor.hpp"
#include "../custom_operator.hpp"
#include "../instruction_sets.hpp"
#include "../scratch.hpp"
#include "../windows.hpp"

namespace obc::sparse {

struct PoolOptions {
    int64_t channels;
    Frame input_frame;
    Frame frame;

    explicit PoolOptions(const Attributes& attributes)
        : channels(attributes.channels()),
          input_frame(read_frame(attributes, "input_")),
          frame(read_frame(attributes, "")) {}

    BlockedShape input(const Shape& shape) const {
        return blocked_shape(shape, channels, input_frame, "x");
    }
};

struct WindowPoolOptions : PoolOptions {
    Windows windows;

    explicit WindowPoolOptions(const Attributes& attributes)
        : PoolOptions(attributes), windows(read_windows(attributes, kMostKernel)) {
        require_padding_below_kernel(windows);
    }

    BlockedShape output(const BlockedShape& x) const {
        return {x.images, channels, windows.out_height(x.height), windows.out_width(x.width), frame};
    }

    Shape output_shape(const std::vector<Shape>& inputs) const {
        return shape_of(output(input(inputs.at(0))));
    }
};

// The positions first to last - 1 of a window that lie within the image.
struct Span {
    int64_t first;
    int64_t last;

    int64_t count() const { return last - first; }
};

inline Span window_span(int64_t output, int64_t stride, int64_t padding, int64_t kernel, int64_t size) {
    const int64_t begin = output * stride - padding;
    return {std::max<int64_t>(begin, 0), std::min(begin + kernel, size)};
}

}  // namespace obc::sparse
