// x_S = (M_SS)^-1 b_S for each row's own selection S of a shared matrix, by Cholesky factorization.
//
// Right-looking: a block of columns is factored, the rest changed by the rank update. In double.

class SelectedSolve final : public RowSolver {
  public:
    SelectedSolve(const Layer& layer, const double* matrices, const uint8_t* mask,
                  const double* right, double* solution)
        : layer_(layer), matrices_(matrices), mask_(mask), right_(right), solution_(solution),
          length_(row_length<double>(layer.cols)), chosen_(layer.cols), x_(length_),
          update_(layer.cols, kBlock) {
        int64_t most = 1;
        for (int64_t row = 0; row < layer.rows; ++row) {
            int64_t count = 0;
            for (int64_t c = 0; c < layer.cols; ++c) count += mask[row * layer.cols + c] != 0;
            most = count > most ? count : most;
        }
        length_ = row_length<double>(most);
        matrix_ = std::make_unique<Buffer<double>>((most + kTileRows) * length_);
        factor_ = std::make_unique<Buffer<double>>((most + kBlock) * length_);
    }

    bool run(int64_t row, Progress& progress) override {
        const int64_t cols = layer_.cols;
        const double* full = matrices_ + layer_.group_of_row[row] * cols * cols;
        int64_t count = 0;
        for (int64_t c = 0; c < cols; ++c) {
            if (mask_[row * cols + c]) chosen_[count++] = c;
        }
        double* matrix = *matrix_;
        for (int64_t i = 0; i < count; ++i) {
            const double* from = full + chosen_[i] * cols;
            double* to = matrix + i * length_;
            for (int64_t j = 0; j <= i; ++j) to[j] = from[chosen_[j]];
            x_[i] = right_[row * cols + chosen_[i]];
        }
        for (int64_t start = 0; start < count; start += kBlock) {
            eliminate(start, count - start < kBlock ? count - start : kBlock, count);
            if (progress.stopped()) return false;
        }
        for (int64_t k = count; k-- > 0;) {
            const double* f = *factor_ + k * length_;
            double sum = x_[k];
            for (int64_t j = k + 1; j < count; ++j) sum -= f[j] * x_[j];
            x_[k] = sum / f[k];
        }
        double* to = solution_ + row * cols;
        std::fill(to, to + cols, 0.0);
        for (int64_t i = 0; i < count; ++i) to[chosen_[i]] = x_[i];
        return progress.end_row(cols);
    }

  private:
    static constexpr int64_t kBlock = 32;

    void eliminate(int64_t start, int64_t width, int64_t count) {
        const int64_t end = start + width;
        double* matrix = *matrix_;
        double* factor = *factor_ + start * length_;  // row k holds column start + k of L
        for (int64_t j = start; j < count; ++j) {
            const double* row = matrix + j * length_ + start;
            const int64_t last = j - start + 1 < width ? j - start + 1 : width;
            for (int64_t k = 0; k < last; ++k) factor[k * length_ + j] = row[k];
        }
        for (int64_t k = 0; k < width; ++k) {
            double* v = factor + k * length_;
            for (int64_t m = 0; m < k; ++m) {
                const double* u = factor + m * length_;
                subtract(v + start + k, u[start + k], u + start + k, count - start - k);
            }
            const double pivot = v[start + k] > 1e-300 ? v[start + k] : 1e-300;
            const double root = 1.0 / std::sqrt(pivot);
            for (int64_t j = start + k; j < count; ++j) v[j] *= root;
            x_[start + k] /= v[start + k];
            subtract(x_ + start + k + 1, x_[start + k], v + start + k + 1, count - start - k - 1);
        }
        if (end < count) {
            double* rest = matrix + end * length_ + end;
            update_.apply(rest, length_, rest, length_, factor + end, length_, width, count - end);
        }
    }

    static void subtract(double* __restrict__ to, double amount, const double* __restrict__ from,
                         int64_t count) {
        for (int64_t j = 0; j < count; ++j) to[j] -= amount * from[j];
    }

    const Layer& layer_;
    const double* matrices_;
    const uint8_t* mask_;
    const double* right_;
    double* solution_;
    int64_t length_;
    std::vector<int64_t> chosen_;
    Buffer<double> x_;
    RankUpdate<double> update_;
    std::unique_ptr<Buffer<double>> matrix_, factor_;
};
