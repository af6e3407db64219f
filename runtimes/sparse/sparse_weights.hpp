// Sparse weights as a file holds them: checked once, when the kernel is made.
#pragma once

#include <cstdlib>
#include <limits>

#include "grids.hpp"

namespace obc::sparse {

inline void require_shape(const Tensor& tensor, const char* name, const Shape& shape) {
    if (tensor.shape != shape)
        refuse("input '", name, "' has shape ", tensor.shape, ", expected ", shape);
}

// The outputs that `mask` [O, ceil(places / 8)] has the rows of.
inline int64_t outputs_of(const Shape& mask) {
    if (mask.size() != 2 || mask[0] < 1 || mask[0] > kMostChannels) {
        refuse("input 'mask' has shape ", mask, ", expected [O, bytes]");
    }
    return mask[0];
}

// Rows of entries: those of output o are row_start[o] to row_start[o + 1] - 1, index ascending.
struct SparseRows {
    int64_t outputs;
    std::vector<int32_t> row_start;
    std::vector<int32_t> index;
};

// Input `mask`, number `place`: which of `columns` places of each output hold one of the entries.
inline SparseRows read_rows(const Constants& constants, size_t place, int64_t entries,
                            int64_t columns) {
    const Tensor mask = constants.get(place, "mask");
    require_type(mask, "mask", ort::kUint8);
    if (entries > std::numeric_limits<int32_t>::max())
        refuse("input 'values' has ", entries, " rows, too many");
    SparseRows rows;
    rows.outputs = outputs_of(mask.shape);
    const int64_t bytes = (columns + 7) / 8;
    require_shape(mask, "mask", {rows.outputs, bytes});
    rows.row_start.reserve(size_t(rows.outputs) + 1);
    rows.row_start.push_back(0);
    rows.index.reserve(size_t(entries));
    const uint8_t* byte = mask.read<uint8_t>();
    for (int64_t o = 0; o < rows.outputs; ++o) {
        for (int64_t b = 0; b < bytes; ++b, ++byte) {
            for (unsigned left = *byte; left != 0; left &= left - 1) {
                rows.index.push_back(int32_t(b * 8 + __builtin_ctz(left)));
            }
        }
        if (!rows.index.empty() && rows.index.back() >= columns) {
            refuse("input 'mask' has place ", rows.index.back(), " of output channel ", o,
                   ", expected places from 0 to ", columns - 1);
        }
        if (int64_t(rows.index.size()) > entries) break;
        rows.row_start.push_back(int32_t(rows.index.size()));
    }
    if (int64_t(rows.index.size()) != entries) {
        refuse("input 'mask' has ", rows.index.size(),
               int64_t(rows.index.size()) > entries ? " or more" : "", " places, expected ", entries,
               ", the rows of 'values'");
    }
    return rows;
}

struct BlockRows : SparseRows {
    std::vector<int8_t> values;  // [blocks][4]

    BlockWeights view() const { return {row_start.data(), index.data(), values.data()}; }
};

// Inputs `values` and `mask`, from input `first` on.
inline BlockRows read_blocks(const Constants& constants, size_t first, int64_t channels,
                             int64_t positions) {
    const Tensor values = constants.get(first, "values");
    require_type(values, "values", ort::kInt8);
    if (values.shape.size() != 2 || values.shape[1] != 4) {
        refuse("input 'values' has shape ", values.shape, ", expected [blocks, 4]");
    }
    const int64_t blocks = (channels + 3) / 4;
    if (positions * blocks > std::numeric_limits<int32_t>::max()) {
        refuse("a kernel of ", positions, " positions over ", channels,
               " channels has too many blocks");
    }
    BlockRows rows;
    static_cast<SparseRows&>(rows) =
        read_rows(constants, first + 1, values.shape[0], positions * blocks);
    rows.values.assign(values.read<int8_t>(), values.read<int8_t>() + values.shape[0] * 4);
    const int64_t in_last = channels - (blocks - 1) * 4;
    for (size_t i = 0; i < rows.index.size(); ++i) {
        if (rows.index[i] % blocks != blocks - 1) continue;
        for (int64_t lane = in_last; lane < 4; ++lane) {
            if (rows.values[i * 4 + size_t(lane)] != 0) {
                refuse("input 'values' has a weight of ", int(rows.values[i * 4 + size_t(lane)]),
                       " in row ", i, " for a channel beyond the last, expected 0");
            }
        }
    }
    return rows;
}

// Input `weight_scale` [O] or [1], spread to [O].
inline std::vector<float> read_weight_scale(const Constants& constants, size_t index, int64_t outputs) {
    const Tensor scale = constants.get(index, "weight_scale");
    require_type(scale, "weight_scale", ort::kFloat);
    if (scale.shape != Shape{1} && scale.shape != Shape{outputs}) {
        refuse("input 'weight_scale' has shape ", scale.shape, ", expected [", outputs, "] or [1]");
    }
    std::vector<float> scales(static_cast<size_t>(outputs));
    for (int64_t o = 0; o < outputs; ++o) {
        const float value = scale.read<float>()[scale.shape[0] == 1 ? 0 : o];
        if (!(value > 0) || std::isinf(value)) {
            refuse("input 'weight_scale' holds ", value, " for output channel ", o,
                   ", expected a finite number above 0");
        }
        scales[size_t(o)] = value;
    }
    return scales;
}

// An optional constant input [O]; zeros without it.
template <class T>
std::vector<T> read_bias(const Constants& constants, size_t index, ort::ElementType type,
                         int64_t outputs) {
    const std::optional<Tensor> bias = constants.find(index);
    if (!bias) return std::vector<T>(static_cast<size_t>(outputs));
    require_type(*bias, "bias", type);
    require_shape(*bias, "bias", {outputs});
    return std::vector<T>(bias->read<T>(), bias->read<T>() + outputs);
}

// bias - zero point * sum of weights, which must keep every possible sum within an int32.
inline int32_t folded_bias(int32_t bias, int64_t weights, int64_t magnitude, int32_t zero_point,
                           int64_t output) {
    const int64_t folded = bias - zero_point * weights;
    if (255 * magnitude + std::abs(folded) > std::numeric_limits<int32_t>::max()) {
        refuse("the sums of output channel ", output, " reach ", 255 * magnitude + std::abs(folded),
               ", which an int32 does not hold: weights or bias are too large");
    }
    return int32_t(folded);
}

inline std::vector<int32_t> folded_biases(const BlockRows& rows, const std::vector<int32_t>& bias,
                                          int32_t zero_point) {
    std::vector<int32_t> folded(bias.size());
    for (size_t o = 0; o < bias.size(); ++o) {
        int64_t sum = 0, magnitude = 0;
        for (int64_t i = int64_t(rows.row_start[o]) * 4; i < int64_t(rows.row_start[o + 1]) * 4; ++i) {
            sum += rows.values[size_t(i)];
            magnitude += std::abs(int(rows.values[size_t(i)]));
        }
        folded[o] = folded_bias(bias[o], sum, magnitude, zero_point, int64_t(o));
    }
    return folded;
}

inline std::vector<float> multipliers(float input_scale, const std::vector<float>& weight_scale,
                                      float output_scale) {
    std::vector<float> result(weight_scale.size());
    for (size_t o = 0; o < result.size(); ++o) {
        result[o] = input_scale * weight_scale[o] / output_scale;
        if (std::isinf(result[o])) {
            refuse("the scales of output channel ", o, " (input ", input_scale, ", weight ",
                   weight_scale[o], ", output ", output_scale, ") give an infinite multiplier");
        }
    }
    return result;
}

}  // namespace obc::sparse
