// What fully connected layers share: rows in, rows out, and their tiles of rows.
#pragma once

#include "../custom_operator.hpp"
#include "../instruction_sets.hpp"
#include "../scratch.hpp"
#include "../sparse_weights.hpp"

namespace obc::sparse {

constexpr int64_t kFewRows = 8;         // below this many, each row goes by itself
constexpr int64_t kOutputsAtOnce = 16;  // of one tile of rows: a cache line of codes

struct LinearOptions {
    int64_t features;

    explicit LinearOptions(const Attributes& attributes)
        : features(attributes.integer("features", {1, kMostChannels})) {}

    Shape rows_shape(const std::vector<Shape>& inputs, size_t row_start) const {
        Shape shape = inputs.at(0);
        if (shape.empty() || shape.back() != features) {
            refuse("input 'x' has shape ", shape, ", expected [..., ", features, "]");
        }
        shape.back() = outputs_of(inputs.at(row_start));
        return shape;
    }
};

inline int64_t row_count(const Tensor& x) {
    int64_t rows = 1;
    for (size_t i = 0; i + 1 < x.shape.size(); ++i) rows *= x.shape[i];
    return rows;
}

// Where each output's entries begin once they are filled up to whole runs, and where they end.
struct RunRows {
    std::vector<int32_t> start;  // [outputs + 1]
    std::vector<int32_t> end;    // [outputs], without what was filled up

    explicit RunRows(const SparseRows& rows) {
        int64_t place = 0;
        for (int64_t o = 0; o < rows.outputs; ++o) {
            const int64_t count = rows.row_start[size_t(o) + 1] - rows.row_start[size_t(o)];
            start.push_back(int32_t(place));
            end.push_back(int32_t(place + count));
            place += (count + kRun - 1) / kRun * kRun;
            if (place > std::numeric_limits<int32_t>::max() - kRun)
                refuse("input 'values' has too many rows");
        }
        start.push_back(int32_t(place));
    }

    size_t places() const { return size_t(start.back()); }
};

// Writes numbers[output][row] to rows of outputs.
template <class Number>
void store_rows(const Number* numbers, int64_t row_length, int64_t outputs, int64_t rows,
                int64_t all_outputs, Number* to) {
    for (int64_t row = 0; row < rows; ++row, to += all_outputs) {
        for (int64_t o = 0; o < outputs; ++o) to[o] = numbers[o * row_length + row];
    }
}

// Block-sparse weights ready for the linear loops.
class LinearWeights {
  public:
    explicit LinearWeights(const BlockRows& blocks)
        : set_(instruction_set()), outputs_(blocks.outputs), rows_(blocks), index_(rows_.places()),
          values_(rows_.places() * kBlock) {
        for (int64_t o = 0; o < outputs_; ++o) {
            const size_t from = size_t(blocks.row_start[size_t(o)]),
                         to = size_t(rows_.start[size_t(o)]);
            const size_t count = size_t(rows_.end[size_t(o)]) - to;
            std::copy_n(blocks.index.data() + from, count, index_.data() + to);
            std::copy_n(blocks.values.data() + from * kBlock, count * kBlock,
                        values_.data() + to * kBlock);
        }
    }

    int64_t outputs() const { return outputs_; }

    // For each output o, `finish(o, sums, count, to)` makes numbers of the sums of `count` rows.
    template <class Number, class Finish>
    void run(const Run& run, int64_t features, const Tensor& output, const Finish& finish) const {
        const int64_t rows = row_count(run.input(0));
        if (rows < kFewRows) {
            each_row<Number>(run, rows, features, output, finish);
        } else {
            tiles_of_rows<Number>(run, rows, features, output, finish);
        }
    }

  private:
    template <class Number, class Finish>
    void each_row(const Run& run, int64_t rows, int64_t features, const Tensor& output,
                  const Finish& finish) const {
        constexpr int64_t kOutputs = 64;
        const int64_t blocks = (features + kBlock - 1) / kBlock,
                      chunks = (outputs_ + kOutputs - 1) / kOutputs;
        const ScratchPool::Piece scratch = scratch_.borrow(size_t(rows * blocks * kBlock));
        uint8_t* copies = scratch.as<uint8_t>();  // rows of whole blocks
        for (int64_t row = 0; row < rows; ++row) {
            uint8_t* copy = copies + row * blocks * kBlock;
            std::memset(copy + (blocks - 1) * kBlock, 0, kBlock);
            std::memcpy(copy, run.input(0).read<uint8_t>() + row * features, size_t(features));
        }
        run.parallel(rows * chunks, [&](int64_t part) {
            const int64_t row = part / chunks, first = part % chunks * kOutputs;
            const int64_t count = std::min(kOutputs, outputs_ - first);
            int32_t sums[kOutputs];
            set_.linear_row(view(first), copies + row * blocks * kBlock, count, sums);
            Number* to = output.write<Number>() + row * outputs_ + first;
            for (int64_t o = 0; o < count; ++o) finish(first + o, sums + o, 1, to + o);
        });
    }

    template <class Number, class Finish>
    void tiles_of_rows(const Run& run, int64_t rows, int64_t features, const Tensor& output,
                       const Finish& finish) const {
        const int64_t blocks = (features + kBlock - 1) / kBlock, tile_bytes = blocks * kTokens * kBlock;
        const int64_t tiles = (rows + kTokens - 1) / kTokens;
        const int64_t chunks = (outputs_ + kOutputsAtOnce - 1) / kOutputsAtOnce;
        const ScratchPool::Piece scratch = scratch_.borrow(size_t(tiles * tile_bytes));
        uint8_t* packed = scratch.as<uint8_t>();
        run.parallel(tiles, [&](int64_t tile) {
            const int64_t first = tile * kTokens, count = std::min(kTokens, rows - first);
            pack_tile(run.input(0).read<uint8_t>() + first * features, count, features,
                      packed + tile * tile_bytes);
        });
        run.parallel(tiles * chunks, [&](int64_t part) {
            const int64_t tile = part / chunks, first = part % chunks * kOutputsAtOnce;
            const int64_t last = std::min(first + kOutputsAtOnce, outputs_);
            const int64_t count = std::min(kTokens, rows - tile * kTokens);
            int32_t sums[kOutputsAtOnce * kTokens];
            Number numbers[kOutputsAtOnce * kTokens];
            set_.linear_tokens(view(first), packed + tile * tile_bytes, last - first, sums);
            for (int64_t o = 0; o < last - first; ++o) {
                finish(first + o, sums + o * kTokens, kTokens, numbers + o * kTokens);
            }
            store_rows(numbers, kTokens, last - first, count, outputs_,
                       output.write<Number>() + tile * kTokens * outputs_ + first);
        });
    }

    // [rows][features] to [blocks][kTokens][4], zeros where there are no rows or features.
    static void pack_tile(const uint8_t* rows, int64_t count, int64_t features, uint8_t* to) {
        const int64_t whole = features / kBlock, rest = features % kBlock;
        if (count < kTokens || rest)
            std::memset(to, 0, size_t((whole + (rest ? 1 : 0)) * kTokens * kBlock));
        for (int64_t row = 0; row < count; ++row, rows += features, to += kBlock) {
            for (int64_t b = 0; b < whole; ++b)
                std::memcpy(to + b * kTokens * kBlock, rows + b * kBlock, kBlock);
            if (rest) std::memcpy(to + whole * kTokens * kBlock, rows + whole * kBlock, size_t(rest));
        }
    }

    LinearBlocks view(int64_t first) const {
        return {rows_.start.data() + first, rows_.end.data() + first, index_.data(), values_.data()};
    }

    const InstructionSet& set_;
    int64_t outputs_;
    RunRows rows_;
    std::vector<int32_t> index_;
    std::vector<int8_t> values_;
    mutable ScratchPool scratch_;
};

}  // namespace obc::sparse
