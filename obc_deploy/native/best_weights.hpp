// A row's best weights once a prefix P of its order is zero, for every level of a list:
//
//     w_S - G_SP (G_PP)^-1 w_P = (H_SS)^-1 (H w)_S,    G = H^-1, S what is left.
//
// Prefixes lie within each other, so one factorization of G in the row's order serves all levels
// that prune less than half, and one of H in the reverse order the others. In double.

template <class Out>
class BestWeights final : public RowSolver {
  public:
    BestWeights(const Layer& layer, const int32_t* order, const int64_t* counts, int64_t levels,
                const double* target, Out* weights)
        : layer_(layer), order_(order), counts_(counts), levels_(levels), target_(target),
          weights_(weights) {
        int64_t pruned = 0, left = 0, most_early = 0;
        for (int64_t row = 0; row < layer.rows; ++row) {
            const int64_t early = early_levels(counts + row * levels);
            most_early = std::max(most_early, early);
            if (early > 0) pruned = std::max(pruned, counts[row * levels + early - 1]);
            if (early < levels) left = std::max(left, layer.cols - counts[row * levels + early]);
        }
        factor_ = std::make_unique<NestedFactor>(std::max({pruned, left, int64_t(1)}));
        amounts_.resize(size_t(most_early * pruned));
        row_.resize(size_t(most_early * layer.cols));
    }

    bool run(int64_t row, Progress& progress) override {
        const int64_t early = early_levels(counts_ + row * levels_);
        if (early > 0 && !by_pruned(row, early, progress)) return false;
        if (early < levels_ && !by_survivors(row, early, progress)) return false;
        return progress.end_row(layer_.cols);
    }

  private:
    // Levels that prune less than half of the row; counts ascend.
    int64_t early_levels(const int64_t* counts) const {
        int64_t early = 0;
        while (early < levels_ && 2 * counts[early] < layer_.cols) ++early;
        return early;
    }

    bool by_pruned(int64_t row, int64_t levels, Progress& progress) {
        const int64_t cols = layer_.cols;
        const double* inverse = layer_.inverse + layer_.group_of_row[row] * cols * cols;
        const double* weight = layer_.weight + row * cols;
        const int32_t* order = order_ + row * cols;
        const int64_t* counts = counts_ + row * levels_;
        const int64_t most = counts[levels - 1];
        chosen_.assign(order, order + most);
        if (!factor_->factor(inverse, cols, chosen_, weight, &progress)) return false;
        for (int64_t level = 0; level < levels; ++level) {
            const double* x = factor_->solve(counts[level]);
            std::copy(x, x + counts[level], amounts_.begin() + level * most);
            std::copy(weight, weight + cols, row_.begin() + level * cols);
        }
        // Rows of G are long, so each is read once for all levels.
        int64_t level = 0;
        for (int64_t i = 0; i < most; ++i) {
            while (counts[level] <= i) ++level;
            const double* g = inverse + chosen_[i] * cols;
            for (int64_t l = level; l < levels; ++l) {
                subtract(row_.data() + l * cols, amounts_[l * most + i], g, cols);
            }
        }
        for (int64_t l = 0; l < levels; ++l) {
            Out* to = level_row(row, l);
            for (int64_t c = 0; c < cols; ++c) to[c] = Out(row_[l * cols + c]);
            for (int64_t i = 0; i < counts[l]; ++i) to[chosen_[i]] = Out(0);
        }
        return true;
    }

    bool by_survivors(int64_t row, int64_t first, Progress& progress) {
        const int64_t cols = layer_.cols;
        const double* hessian = layer_.hessian + layer_.group_of_row[row] * cols * cols;
        const int32_t* order = order_ + row * cols;
        const int64_t* counts = counts_ + row * levels_;
        chosen_.assign(std::make_reverse_iterator(order + cols),
                       std::make_reverse_iterator(order + counts[first]));
        if (!factor_->factor(hessian, cols, chosen_, target_ + row * cols, &progress)) return false;
        for (int64_t level = first; level < levels_; ++level) {
            const int64_t left = cols - counts[level];
            const double* x = factor_->solve(left);
            Out* to = level_row(row, level);
            std::fill(to, to + cols, Out(0));
            for (int64_t i = 0; i < left; ++i) to[chosen_[i]] = Out(x[i]);
        }
        return true;
    }

    Out* level_row(int64_t row, int64_t level) const {
        return weights_ + (level * layer_.rows + row) * layer_.cols;
    }

    const Layer& layer_;
    const int32_t* order_;
    const int64_t* counts_;
    int64_t levels_;
    const double* target_;
    Out* weights_;
    std::vector<int64_t> chosen_;
    std::vector<double> amounts_, row_;
    std::unique_ptr<NestedFactor> factor_;
};
