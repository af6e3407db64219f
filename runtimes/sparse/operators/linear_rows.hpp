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

    Shape rows_shape(const std::vector<Shape>& inputs) const {
        Shape shape = inputs.at(0);
        if (shape.empty() || shape.back() != features) {
            refuse("input 'x' has shape ", shape, ", expected [..., ", features, "]");
        }
        shape.back() = outputs_of(inputs.at(2));
        return shape;
    }
};

inline int64_t row_count(const Tensor& x) {
    int64_t rows = 1;
    for (size_t i = 0; i + 1 < x.shape.size(); ++i) rows *= x.shape[i];
    return rows;
}

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
    explicit LinearWeights(const BlockRows& blocks) : set_(instruction_set()), blocks_(blocks) {
        for (int64_t first = 0; first < blocks.outputs; first += kOutputs) add_slices(first);
    }

    int64_t outputs() const { return blocks_.outputs; }

    // Numbers of sums: `of_output(o, sums, count, to)` of one output's in `count` rows,
    // `of_row(first, sums, count, to)` of one row's of `count` outputs.
    template <class Number, class OfOutput, class OfRow>
    void run(const Run& run, int64_t features, const Tensor& output, const OfOutput& of_output,
             const OfRow& of_row) const {
        const int64_t rows = row_count(run.input(0));
        if (rows < kFewRows) {
            each_row<Number>(run, rows, features, output, of_row);
        } else {
            tiles_of_rows<Number>(run, rows, features, output, of_output);
        }
    }

  private:
    static constexpr int64_t kOutputs = 64;  // of one row at a time

    // Slices of the outputs first to first + kOutputs - 1, those with the most blocks first: a slice
    // takes as long as its longest output.
    void add_slices(int64_t first) {
        const int64_t count = std::min(kOutputs, outputs() - first);
        const auto blocks_of = [&](int64_t o) {
            return blocks_.row_start[size_t(o) + 1] - blocks_.row_start[size_t(o)];
        };
        std::vector<int32_t> order(static_cast<size_t>(count));
        for (int64_t o = 0; o < count; ++o) order[size_t(o)] = int32_t(first + o);
        std::stable_sort(order.begin(), order.end(),
                         [&](int32_t a, int32_t b) { return blocks_of(a) > blocks_of(b); });
        order.resize(size_t((count + kSlice - 1) / kSlice * kSlice), int32_t(-1));
        for (size_t slice = 0; slice < order.size(); slice += size_t(kSlice)) {
            const int64_t places = blocks_of(order[slice]);
            const size_t begin = index_.size();
            index_.resize(begin + size_t(places * kSlice));
            values_.resize(index_.size() * kBlock);
            for (size_t lane = 0; lane < size_t(kSlice); ++lane) {
                const int32_t o = order[slice + lane];
                for (int32_t place = 0; o >= 0 && place < blocks_of(o); ++place) {
                    const size_t from = size_t(blocks_.row_start[size_t(o)] + place);
                    const size_t to = begin + size_t(place) * size_t(kSlice) + lane;
                    index_[to] = blocks_.index[from];
                    std::copy_n(blocks_.values.data() + from * kBlock, kBlock, values_.data() + to * kBlock);
                }
                slice_output_.push_back(o < 0 ? -1 : int32_t(o - first));
            }
            slice_start_.push_back(int32_t(index_.size() / size_t(kSlice)));
        }
    }

    template <class Number, class OfRow>
    void each_row(const Run& run, int64_t rows, int64_t features, const Tensor& output,
                  const OfRow& of_row) const {
        constexpr int64_t kSlices = kOutputs / kSlice;
        const int64_t blocks = (features + kBlock - 1) / kBlock,
                      chunks = (outputs() + kOutputs - 1) / kOutputs;
        const ScratchPool::Piece scratch = scratch_->borrow(size_t(rows * blocks * kBlock));
        uint8_t* copies = scratch.as<uint8_t>();  // rows of whole blocks
        for (int64_t row = 0; row < rows; ++row) {
            uint8_t* copy = copies + row * blocks * kBlock;
            std::memset(copy + (blocks - 1) * kBlock, 0, kBlock);
            std::memcpy(copy, run.input(0).read<uint8_t>() + row * features, size_t(features));
        }
        run.parallel(rows * chunks, [&](int64_t part) {
            const int64_t row = part / chunks, chunk = part % chunks, first = chunk * kOutputs;
            const int64_t count = std::min(kOutputs, outputs() - first);
            const int64_t slices = (count + kSlice - 1) / kSlice;
            const LinearSlices weights{slice_start_.data() + chunk * kSlices, index_.data(),
                                       values_.data()};
            int32_t by_slice[kOutputs], sums[kOutputs];
            set_.linear_row(weights, copies + row * blocks * kBlock, slices, by_slice);
            const int32_t* place = slice_output_.data() + first;
            for (int64_t i = 0; i < slices * kSlice; ++i) {
                if (place[i] >= 0) sums[place[i]] = by_slice[i];
            }
            of_row(first, sums, count, output.write<Number>() + row * outputs() + first);
        });
    }

    template <class Number, class OfOutput>
    void tiles_of_rows(const Run& run, int64_t rows, int64_t features, const Tensor& output,
                       const OfOutput& of_output) const {
        const int64_t blocks = (features + kBlock - 1) / kBlock, tile_bytes = blocks * kTokens * kBlock;
        const int64_t tiles = (rows + kTokens - 1) / kTokens;
        const int64_t chunks = (outputs() + kOutputsAtOnce - 1) / kOutputsAtOnce;
        const ScratchPool::Piece scratch = scratch_->borrow(size_t(tiles * tile_bytes));
        uint8_t* packed = scratch.as<uint8_t>();
        run.parallel(tiles, [&](int64_t tile) {
            const int64_t first = tile * kTokens, count = std::min(kTokens, rows - first);
            pack_tile(run.input(0).read<uint8_t>() + first * features, count, features,
                      packed + tile * tile_bytes);
        });
        run.parallel(tiles * chunks, [&](int64_t part) {
            const int64_t tile = part / chunks, first = part % chunks * kOutputsAtOnce;
            const int64_t last = std::min(first + kOutputsAtOnce, outputs());
            const int64_t count = std::min(kTokens, rows - tile * kTokens);
            int32_t sums[kOutputsAtOnce * kTokens];
            Number numbers[kOutputsAtOnce * kTokens];
            set_.linear_tokens(view(first), packed + tile * tile_bytes, last - first, sums);
            for (int64_t o = 0; o < last - first; ++o) {
                of_output(first + o, sums + o * kTokens, kTokens, numbers + o * kTokens);
            }
            store_rows(numbers, kTokens, last - first, count, outputs(),
                       output.write<Number>() + tile * kTokens * outputs() + first);
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
        return {blocks_.row_start.data() + first, blocks_.index.data(), blocks_.values.data()};
    }

    const InstructionSet& set_;
    BlockRows blocks_;
    std::vector<int32_t> slice_start_{0};
    std::vector<int32_t> slice_output_;  // within its kOutputs, -1 where there is none
    std::vector<int32_t> index_;         // by slice
    std::vector<int8_t> values_;
    const std::shared_ptr<ScratchPool> scratch_ = ScratchPool::shared();
};

}  // namespace obc::sparse
