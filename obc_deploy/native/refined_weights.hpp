// The best weights of a row's survivors S from those that down-dating in working precision left:
// conjugate gradients on H_SS x = (H w)_S in double, preconditioned by what down-dating left of G,
// which is (H_SS)^-1 but for rounding. One step is usual. Where rounding may have left anything, and
// where steps do not converge: a factorization.

template <class T>
class RefinedWeights {
  public:
    // Whether what down-dating leaves is precise enough to try.
    RefinedWeights(const Layer& layer, bool precise)
        : layer_(layer), precise_(precise), full_(layer.cols), residual_(layer.cols),
          step_(layer.cols), direction_(layer.cols), image_(layer.cols) {}

    // A row's survivors' inverse and weights, by its places; what pruning the others lost, of which
    // the result may exceed the least by kTolerance; the result, (cols,).
    void find(int64_t row, const DowndatedInverse<T>& left, const T* found, double loss, double* to) {
        const int64_t cols = layer_.cols, group = layer_.group_of_row[row];
        const double* hessian = layer_.hessian + group * cols * cols;
        const double* weight = layer_.weight + row * cols;
        std::fill(to, to + cols, 0.0);
        for (int64_t i = 0; i < left.size; ++i) to[left.column[i]] = double(found[i]);
        if (precise_ && refine(hessian, weight, left, loss, to)) return;
        solve(hessian, weight, left, to);
    }

  private:
    static constexpr double kTolerance = 1e-10;
    static constexpr int kMostSteps = 8;

    bool refine(const double* hessian, const double* weight, const DowndatedInverse<T>& left,
                double loss, double* to) {
        const int64_t size = left.size;
        for (int64_t c = 0; c < layer_.cols; ++c) full_[c] = weight[c] - to[c];
        multiply(hessian, left, residual_);
        double before = 1.0;
        for (int turn = 0; turn < kMostSteps; ++turn) {
            precondition(left);
            const double excess = dot(residual_.data(), step_.data(), size);
            if (std::abs(excess) <= kTolerance * loss) return true;
            if (!(excess > 0.0)) return false;
            const double keep = turn ? excess / before : 0.0;
            std::fill(full_.begin(), full_.end(), 0.0);
            for (int64_t i = 0; i < size; ++i) {
                direction_[i] = step_[i] + keep * direction_[i];
                full_[left.column[i]] = direction_[i];
            }
            multiply(hessian, left, image_);
            const double length = excess / dot(direction_.data(), image_.data(), size);
            if (!(length > 0.0)) return false;
            // The diagonal tells how far the excess fell, near enough.
            double old = 0.0, now = 0.0;
            for (int64_t i = 0; i < size; ++i) {
                const double g = double(left.diagonal(i));
                old += g * residual_[i] * residual_[i];
                to[left.column[i]] += length * direction_[i];
                residual_[i] -= length * image_[i];
                now += g * residual_[i] * residual_[i];
            }
            if (now / old * excess <= kTolerance * loss) return true;
            before = excess;
        }
        return false;
    }

    void solve(const double* hessian, const double* weight, const DowndatedInverse<T>& left,
               double* to) {
        if (!factor_) factor_ = std::make_unique<NestedFactor>(left.size);
        std::copy(weight, weight + layer_.cols, full_.begin());
        multiply(hessian, left, residual_);
        chosen_.assign(left.column + 0, left.column + left.size);
        for (int64_t i = 0; i < left.size; ++i) full_[chosen_[i]] = residual_[i];
        factor_->factor(hessian, layer_.cols, chosen_, full_.data());
        const double* x = factor_->solve(left.size);
        for (int64_t i = 0; i < left.size; ++i) to[chosen_[i]] = x[i];
    }

    // (H x)_S of the full x.
    void multiply(const double* hessian, const DowndatedInverse<T>& left,
                  std::vector<double>& to) const {
        for (int64_t i = 0; i < left.size; ++i) {
            to[i] = dot(hessian + left.column[i] * layer_.cols, full_.data(), layer_.cols);
        }
    }

    // The residual times the stored triangle.
    void precondition(const DowndatedInverse<T>& left) {
        std::fill(step_.begin(), step_.end(), 0.0);
        for (int64_t i = 0; i < left.size; ++i) {
            const T* g = left.row(i);
            const double amount = residual_[i];
            for (int64_t j = 0; j < i; ++j) step_[j] += double(g[j]) * amount;
            step_[i] += dot(g, residual_.data(), i + 1);
        }
    }

    const Layer& layer_;
    bool precise_;
    std::vector<double> full_, residual_, step_, direction_, image_;
    std::vector<int64_t> chosen_;
    std::unique_ptr<NestedFactor> factor_;
};
