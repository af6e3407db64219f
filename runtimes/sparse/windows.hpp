// Where the windows of convolutions and pools lie on their input.
#pragma once

#include <algorithm>

#include "attributes.hpp"

namespace obc::sparse {

struct Windows {
    int64_t height;
    int64_t width;
    int64_t vertical;  // strides
    int64_t horizontal;
    int64_t top;
    int64_t left;
    int64_t bottom;
    int64_t right;

    // Two by two, side by side: what most networks pool.
    bool halve() const {
        return height == 2 && width == 2 && vertical == 2 && horizontal == 2 && most_padding() == 0;
    }
    int64_t most_padding() const { return std::max(std::max(top, left), std::max(bottom, right)); }
    int64_t out_height(int64_t in) const {
        return outputs(in + top + bottom, height, vertical, "height");
    }
    int64_t out_width(int64_t in) const {
        return outputs(in + left + right, width, horizontal, "width");
    }

  private:
    static int64_t outputs(int64_t padded, int64_t kernel, int64_t stride, const char* side) {
        if (padded < kernel) {
            refuse("input 'x' has a padded ", side, " of ", padded, ", expected at least the kernel's ",
                   kernel);
        }
        return (padded - kernel) / stride + 1;
    }
};

constexpr int64_t kMostKernel = 1024;

inline Windows read_windows(const Attributes& attributes, int64_t height, int64_t width,
                            int64_t most_stride) {
    const auto strides = attributes.integers("strides", 2, {1, most_stride}, 1);
    const auto pads = attributes.integers("pads", 4, {0, kMostKernel}, 0);
    return {height, width, strides[0], strides[1], pads[0], pads[1], pads[2], pads[3]};
}

inline Windows read_windows(const Attributes& attributes, int64_t most_stride) {
    const auto kernel = attributes.integers("kernel_shape", 2, {1, kMostKernel});
    return read_windows(attributes, kernel[0], kernel[1], most_stride);
}

inline void require_padding_in_border(const Windows& windows, int64_t border) {
    if (windows.most_padding() > border) {
        refuse("attribute 'pads' holds ", windows.most_padding(),
               ", expected at most the input's border of ", border,
               ": the operator that makes the input must give it a larger border");
    }
}

// No window lies wholly in the padding.
inline void require_padding_below_kernel(const Windows& windows) {
    if (windows.top >= windows.height || windows.bottom >= windows.height ||
        windows.left >= windows.width || windows.right >= windows.width) {
        refuse("attribute 'pads' is ", Shape{windows.top, windows.left, windows.bottom, windows.right},
               ", expected each below the kernel's size ", Shape{windows.height, windows.width});
    }
}

inline void require_equal_strides(const Windows& windows) {
    if (windows.vertical != windows.horizontal) {
        refuse("attribute 'strides' is ", Shape{windows.vertical, windows.horizontal},
               ", expected [1, 1] or [2, 2]");
    }
}

}  // namespace obc::sparse
