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
        for (int64_t i = count; i < whole_vectors<double>(count); ++i) x_[i] = 0.0;
        for (int64_t k = count; k-- > 0;) {
            const double* f = *factor_ + k * length_;
            x_[k] = (x_[k] - product(f, k + 1, count)) / f[k];
        }
        double* to = solution_ + row * cols;
        std::fill(to, to + cols, 0.0);
        for (int64_t i = 0; i < count; ++i) to[chosen_[i]] = x_[i];
        return progress.end_row(cols);
    }

  private:
    static constexpr int64_t kBlock = 32;
    static constexpr double kTiny = 1e-300;

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
            const int64_t at = start + k, left = count - at;
            int64_t m = 0;
            for (; m + 4 <= k; m += 4) subtract_four(v + at, factor + m * length_ + at, left);
            for (; m < k; ++m) subtract(v + at, factor[m * length_ + at], factor + m * length_ + at, left);
            const double root = 1.0 / std::sqrt(v[at] > kTiny ? v[at] : kTiny);
            for (int64_t j = at; j < count; ++j) v[j] *= root;
            for (int64_t j = count; j < whole_vectors<double>(count); ++j) v[j] = 0.0;
            x_[at] /= v[at];
            subtract(x_ + at + 1, x_[at], v + at + 1, left - 1);
        }
        if (end < count) {
            double* rest = matrix + end * length_ + end;
            update_.apply(rest, length_, rest, length_, factor + end, length_, width, count - end);
        }
    }

    // Four rows at once, each as often as its first number says.
    void subtract_four(double* __restrict__ to, const double* __restrict__ from, int64_t count) const {
        const double a = from[0], b = from[length_], c = from[2 * length_], d = from[3 * length_];
        const double *second = from + length_, *third = from + 2 * length_, *last = from + 3 * length_;
        for (int64_t j = 0; j < count; ++j) {
            to[j] -= a * from[j] + b * second[j] + (c * third[j] + d * last[j]);
        }
    }

    // Sum of f_j x_j for j from `begin` on; both are zero beyond `count` to a whole vector.
    double product(const double* f, int64_t begin, int64_t count) const {
        const double* x = x_;
        const int64_t end = whole_vectors<double>(count);
        int64_t j = begin;
        double sum = 0.0;
        for (; j % kLanes<double> && j < end; ++j) sum += f[j] * x[j];
        Vector<double> sums[4] = {};
        for (; j + 4 * kLanes<double> <= end; j += 4 * kLanes<double>) {
#pragma GCC unroll 4
            for (int u = 0; u < 4; ++u) {
                sums[u] += load<double>(f + j + u * kLanes<double>) * load<double>(x + j + u * kLanes<double>);
            }
        }
        for (; j < end; j += kLanes<double>) sums[0] += load<double>(f + j) * load<double>(x + j);
        sums[0] += sums[1] + (sums[2] + sums[3]);
        for (int lane = 0; lane < kLanes<double>; ++lane) sum += sums[0][lane];
        return sum;
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
