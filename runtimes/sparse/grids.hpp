// The grids that codes stand for, and the range that an output's codes keep to.
#pragma once

#include <string>

#include "attributes.hpp"

namespace obc::sparse {

// code q stands for (q - zero_point) * scale
struct Grid {
    float scale;
    int32_t zero_point;

    bool operator==(const Grid& other) const {
        return scale == other.scale && zero_point == other.zero_point;
    }
};

// What an operator writes: a grid, and the least and largest code.
struct OutputGrid {
    Grid grid;
    int32_t lower;
    int32_t upper;

    // The bounds before the zero point is added.
    float low() const { return float(lower - grid.zero_point); }
    float high() const { return float(upper - grid.zero_point); }
    bool holds_all_codes() const { return lower == 0 && upper == 255; }
};

constexpr Limits kCodes{0, 255};

// Attributes `<name>_scale` and `<name>_zero_point`.
inline Grid read_grid(const Attributes& attributes, const std::string& name) {
    return {attributes.scale((name + "_scale").c_str()),
            int32_t(attributes.integer((name + "_zero_point").c_str(), kCodes))};
}

inline OutputGrid read_output_grid(const Attributes& attributes) {
    const int64_t lower = attributes.integer("lower", kCodes, 0);
    return {read_grid(attributes, "output"), int32_t(lower),
            int32_t(attributes.integer("upper", {lower, 255}, 255))};
}

// Attributes `input_scales` and `input_zero_points`, one for each input.
inline std::vector<Grid> read_input_grids(const Attributes& attributes, int64_t inputs) {
    const std::vector<float> scales = attributes.scales("input_scales", inputs);
    const auto zero_points = attributes.integers("input_zero_points", inputs, kCodes);
    std::vector<Grid> grids;
    for (size_t i = 0; i < scales.size(); ++i) grids.push_back({scales[i], int32_t(zero_points[i])});
    return grids;
}

}  // namespace obc::sparse
