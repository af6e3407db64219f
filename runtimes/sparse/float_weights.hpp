// Unstructured float weights and the bounds of what they make.
#pragma once

#include <algorithm>

#include "sparse_weights.hpp"

namespace obc::sparse {

struct FloatRows : SparseRows {
    std::vector<float> values;
};

// Inputs `values` and `mask`, from input 1 on.
inline FloatRows read_entries(const Constants& constants, int64_t columns) {
    const Tensor values = constants.get(1, "values");
    require_type(values, "values", ort::kFloat);
    if (values.shape.size() != 1)
        refuse("input 'values' has shape ", values.shape, ", expected [entries]");
    if (columns > std::numeric_limits<int32_t>::max())
        refuse("the weights have ", columns, " columns, too many");
    FloatRows rows;
    static_cast<SparseRows&>(rows) = read_rows(constants, 2, values.shape[0], columns);
    rows.values.assign(values.read<float>(), values.read<float>() + values.shape[0]);
    return rows;
}

struct Clip {
    float lower;
    float upper;

    explicit Clip(const Attributes& attributes)
        : lower(attributes.real("lower", -std::numeric_limits<float>::infinity())),
          upper(attributes.real("upper", std::numeric_limits<float>::infinity())) {
        if (lower > upper)
            refuse("attribute 'lower' is ", lower, ", expected at most 'upper', ", upper);
    }

    float operator()(float value) const {
        return value < lower ? lower : value > upper ? upper : value;
    }
};

}  // namespace obc::sparse
