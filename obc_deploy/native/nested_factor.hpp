// A = L L^T of a shared matrix in a row's own order: the leading part of L factors that of A.
//
// So one factorization solves A_mm x = b_m for every m. Right-looking: a block of columns is
// factored, the rest changed by the rank update. In double.

class NestedFactor {
  public:
    // Room for systems of up to `most` unknowns.
    explicit NestedFactor(int64_t most)
        : length_(row_length<double>(most)), matrix_((most + kTileRows) * length_),
          factor_((most + kBlock) * length_), half_(length_), x_(length_),
          update_(most, kBlock) {}

    // Rows and columns `chosen` of a symmetric positive definite matrix, and the right-hand side;
    // false once the caller wants to stop.
    bool factor(const double* full, int64_t full_length, const std::vector<int64_t>& chosen,
                const double* right, const Progress* progress = nullptr) {
        count_ = int64_t(chosen.size());
        for (int64_t i = 0; i < count_; ++i) {
            const double* from = full + chosen[i] * full_length;
            double* to = matrix_ + i * length_;
            for (int64_t j = 0; j <= i; ++j) to[j] = from[chosen[j]];
            half_[i] = right[chosen[i]];
        }
        for (int64_t start = 0; start < count_; start += kBlock) {
            eliminate(start, count_ - start < kBlock ? count_ - start : kBlock);
            if (progress && progress->stopped()) return false;
        }
        return true;
    }

    // x of the leading `count` unknowns; valid until the next call.
    const double* solve(int64_t count) {
        for (int64_t i = 0; i < count; ++i) x_[i] = half_[i];
        for (int64_t i = count; i < whole_vectors<double>(count); ++i) x_[i] = 0.0;
        for (int64_t k = count; k-- > 0;) {
            const double* f = factor_ + k * length_;
            x_[k] = (x_[k] - product(f, k + 1, count)) / f[k];
        }
        return x_;
    }

  private:
    static constexpr int64_t kBlock = 32;
    static constexpr double kTiny = 1e-300;

    void eliminate(int64_t start, int64_t width) {
        const int64_t end = start + width;
        double* factor = factor_ + start * length_;  // row k holds column start + k of L
        for (int64_t j = start; j < count_; ++j) {
            const double* row = matrix_ + j * length_ + start;
            const int64_t last = j - start + 1 < width ? j - start + 1 : width;
            for (int64_t k = 0; k < last; ++k) factor[k * length_ + j] = row[k];
        }
        for (int64_t k = 0; k < width; ++k) {
            double* v = factor + k * length_;
            const int64_t at = start + k, left = count_ - at;
            int64_t m = 0;
            for (; m + 4 <= k; m += 4) subtract_four(v + at, factor + m * length_ + at, left);
            for (; m < k; ++m) subtract(v + at, factor[m * length_ + at], factor + m * length_ + at, left);
            const double root = 1.0 / std::sqrt(v[at] > kTiny ? v[at] : kTiny);
            for (int64_t j = at; j < count_; ++j) v[j] *= root;
            for (int64_t j = count_; j < whole_vectors<double>(count_); ++j) v[j] = 0.0;
            half_[at] /= v[at];
            subtract(half_ + at + 1, half_[at], v + at + 1, left - 1);
        }
        if (end < count_) {
            double* rest = matrix_ + end * length_ + end;
            update_.apply(rest, length_, rest, length_, factor + end, length_, width, count_ - end);
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

    // `dot` in whole aligned vectors, which short sums need: f_j x_j from `begin` on; x is zero
    // beyond `count` to a whole vector.
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

    int64_t length_;
    int64_t count_ = 0;
    Buffer<double> matrix_, factor_;
    Buffer<double> half_;  // L^-1 b
    Buffer<double> x_;
    RankUpdate<double> update_;
};
