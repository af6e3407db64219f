// A^-1 of a selected submatrix, by sweeping out blocks of indices, in double precision.
//
// Sweeping K: A_KK <- -A_KK^-1, A_Kj <- A_KK^-1 A_Kj, A_ij <- A_ij - A_iK A_KK^-1 A_Kj; after all
// indices A has become -A^-1. The last part is the rank update that everything else uses too.

class SweptInverse {
  public:
    explicit SweptInverse(int64_t cols)
        : length_(row_length<double>(cols)), matrix_((cols + kTileRows) * length_),
          panel_(kBlock * length_), vectors_(kBlock * length_), update_(cols, kBlock) {}

    // The inverse of the (count, count) submatrix of a symmetric positive definite matrix; its
    // lower triangle goes to `to`, whose rows are `to_length` apart.
    template <class T>
    void invert(const double* full, int64_t full_length, const int32_t* chosen, int64_t count,
                T* to, int64_t to_length) {
        for (int64_t i = 0; i < count; ++i) {
            const double* from = full + chosen[i] * full_length;
            double* row = matrix_ + i * length_;
            for (int64_t j = 0; j <= i; ++j) row[j] = from[chosen[j]];
            for (int64_t j = i + 1; j < length_; ++j) row[j] = 0.0;
        }
        for (int64_t start = 0; start < count; start += kBlock) {
            sweep(start, count - start < kBlock ? count - start : kBlock, count);
        }
        for (int64_t i = 0; i < count; ++i) {
            const double* row = matrix_ + i * length_;
            for (int64_t j = 0; j <= i; ++j) to[i * to_length + j] = T(-row[j]);
        }
    }

  private:
    static constexpr int64_t kBlock = 32;

    double* panel(int64_t k) { return panel_ + k * length_; }
    double* vector(int64_t k) { return vectors_ + k * length_; }

    void sweep(int64_t start, int64_t width, int64_t count) {
        const int64_t end = start + width;
        for (int64_t k = 0; k < width; ++k) {
            const double* row = matrix_ + (start + k) * length_;
            double* to = panel(k);
            for (int64_t j = 0; j <= start + k; ++j) to[j] = row[j];
        }
        for (int64_t j = start; j < count; ++j) {
            const double* row = matrix_ + j * length_ + start;
            const int64_t last = j - start < width ? j - start : width;
            for (int64_t k = 0; k < last; ++k) panel(k)[j] = row[k];
        }
        double lower[kBlock][kBlock];
        for (int64_t i = 0; i < width; ++i) {
            for (int64_t j = 0; j <= i; ++j) {
                double sum = panel(i)[start + j];
                for (int64_t k = 0; k < j; ++k) sum -= lower[i][k] * lower[j][k];
                lower[i][j] = i == j ? std::sqrt(sum > kTiny ? sum : kTiny) : sum / lower[j][j];
            }
        }
        for (int64_t k = 0; k < width; ++k) {  // V = L^-1 A_K:
            double* v = vector(k);
            std::memcpy(v, panel(k), size_t(count) * sizeof(double));
            for (int64_t m = 0; m < k; ++m) subtract(v, lower[k][m], vector(m), count);
            scale(v, 1.0 / lower[k][k], count);
        }
        update_.apply(matrix_, length_, matrix_, length_, vectors_, length_, width, count);
        for (int64_t k = width; k-- > 0;) {  // L^-T V
            double* x = vector(k);
            for (int64_t m = k + 1; m < width; ++m) subtract(x, lower[m][k], vector(m), count);
            scale(x, 1.0 / lower[k][k], count);
        }
        double inverse[kBlock][kBlock];  // of L
        for (int64_t j = 0; j < width; ++j) {
            for (int64_t i = j; i < width; ++i) {
                double sum = i == j ? 1.0 : 0.0;
                for (int64_t k = j; k < i; ++k) sum -= lower[i][k] * inverse[k][j];
                inverse[i][j] = sum / lower[i][i];
            }
        }
        for (int64_t k = 0; k < width; ++k) {
            double* row = matrix_ + (start + k) * length_;
            std::memcpy(row, vector(k), size_t(start) * sizeof(double));
            for (int64_t j = 0; j <= k; ++j) {
                double sum = 0.0;
                for (int64_t i = k; i < width; ++i) sum += inverse[i][k] * inverse[i][j];
                row[start + j] = -sum;
            }
        }
        for (int64_t j = end; j < count; ++j) {
            double* row = matrix_ + j * length_ + start;
            for (int64_t k = 0; k < width; ++k) row[k] = vector(k)[j];
        }
    }

    static void subtract(double* __restrict__ to, double factor, const double* __restrict__ from,
                         int64_t count) {
        for (int64_t j = 0; j < count; ++j) to[j] -= factor * from[j];
    }

    static void scale(double* to, double factor, int64_t count) {
        for (int64_t j = 0; j < count; ++j) to[j] *= factor;
    }

    static constexpr double kTiny = 1e-300;

    int64_t length_;
    Buffer<double> matrix_, panel_, vectors_;
    RankUpdate<double> update_;
};
