// Blocked tensors as ONNX tensors: [N, ceil(C/4), H + 2 border + margin, W + 2 border, 4].
#pragma once

#include <cstring>

#include "block_convolution.hpp"
#include "grids.hpp"

namespace obc::sparse {

constexpr Limits kBorders{0, 3};
constexpr Limits kMargins{0, 15};  // enough for any plane to end with a line

inline Frame read_frame(const Attributes& attributes, const std::string& whose) {
    return {attributes.integer((whose + "border").c_str(), kBorders, 0),
            attributes.integer((whose + "margin").c_str(), kMargins, 0)};
}

inline std::vector<Frame> read_input_frames(const Attributes& attributes, int64_t inputs) {
    const std::vector<int64_t> borders = attributes.integers("input_borders", inputs, kBorders, 0);
    const std::vector<int64_t> margins = attributes.integers("input_margins", inputs, kMargins, 0);
    std::vector<Frame> frames;
    for (size_t i = 0; i < borders.size(); ++i) frames.push_back({borders[i], margins[i]});
    return frames;
}

inline Shape shape_of(const BlockedShape& blocked) {
    const Frame& frame = blocked.frame;
    return {blocked.images, blocked.blocks(), blocked.height + 2 * frame.border + frame.margin,
            blocked.width + 2 * frame.border, kBlock};
}

inline BlockedShape blocked_shape(const Shape& shape, int64_t channels, const Frame& frame, const char* name) {
    const bool five = shape.size() == 5;
    const BlockedShape blocked{five ? shape[0] : 0, channels,
                               five ? shape[2] - 2 * frame.border - frame.margin : 0,
                               five ? shape[3] - 2 * frame.border : 0, frame};
    if (!five || shape[1] != blocked.blocks() || shape[4] != kBlock || blocked.height < 1 || blocked.width < 1) {
        refuse("input '", name, "' has shape ", shape, ", expected [N, ", blocked.blocks(), ", H + ",
               2 * frame.border + frame.margin, ", W + ", 2 * frame.border, ", 4] for ", channels,
               " channels, a border of ", frame.border, " and a margin of ", frame.margin);
    }
    return blocked;
}

inline const uint8_t* pixel(const Tensor& tensor, const BlockedShape& shape, int64_t plane,
                            int64_t y = 0, int64_t x = 0) {
    return tensor.read<uint8_t>() + plane * shape.plane_bytes() + shape.offset(y, x);
}

inline uint8_t* writable_pixel(const Tensor& tensor, const BlockedShape& shape, int64_t plane,
                               int64_t y = 0, int64_t x = 0) {
    return tensor.write<uint8_t>() + plane * shape.plane_bytes() + shape.offset(y, x);
}

// Writes the zero point around one plane.
inline void fill_border(uint8_t* plane, const BlockedShape& shape, int32_t zero_point) {
    if (shape.frame.border == 0) return;
    // Whole rows and the next one's left side; between rows the right side and the next one's left;
    // then the last one's right side and whole rows.
    const int64_t ends = shape.offset(0, 0) / kBlock;
    fill_pixels(plane, ends, zero_point);
    for (int64_t y = 1; y < shape.height; ++y) {
        fill_pixels(plane + shape.offset(y, 0) - 2 * shape.frame.border * kBlock, 2 * shape.frame.border, zero_point);
    }
    fill_pixels(plane + shape.bordered_bytes() - ends * kBlock, ends, zero_point);
}

// Writes the zero point into the lanes of a plane that no channel has.
inline void fill_spare_lanes(uint8_t* first_pixel, const BlockedShape& shape, int64_t block,
                             int32_t zero_point) {
    const int64_t used = shape.channels - block * kBlock;
    if (used >= kBlock) return;
    for (int64_t y = 0; y < shape.height; ++y) {
        uint8_t* row = first_pixel + y * shape.row_bytes();
        for (int64_t x = 0; x < shape.width; ++x) {
            std::memset(row + x * kBlock + used, zero_point, size_t(kBlock - used));
        }
    }
}

}  // namespace obc::sparse
