// A^-1 of a selected submatrix, by sweeping out blocks of indices, in double precision.
//
// Sweeping K: A_KK <- -A_KK^-1, A_Kj <- A_KK^-1 A_Kj, A_ij <- A_ij - A_iK A_KK^-1 A_Kj; after all
// indices A has become -A^-1. The last part is the rank update that everything else uses too.
// Members of a team share all phases of it, with the same numbers as one alone.

class SweptInverse {
  public:
    // For as many members of a team as there may be.
    explicit SweptInverse(int64_t cols, int64_t members = 1)
        : length_(row_length<double>(cols)), matrix_((cols + kTileRows) * length_),
          panel_(kBlock * length_), vectors_(kBlock * length_) {
        // Vectors are read whole; beyond the end there must be numbers.
        std::fill(panel(0), panel(kBlock), 0.0);
        for (int64_t i = 0; i < members; ++i) {
            updates_.push_back(std::make_unique<RankUpdate<double>>(cols, kBlock));
        }
    }

    // The inverse of the (count, count) submatrix of a symmetric positive definite matrix; its
    // lower triangle goes to `to`, whose rows are `to_length` apart. `pivots` gets the squares of its
    // Cholesky factor's diagonal. False once the caller wants to stop.
    template <class T>
    bool invert(const double* full, int64_t full_length, const int32_t* chosen, int64_t count,
                T* to, int64_t to_length, double* pivots = nullptr,
                const Progress* progress = nullptr) {
        Barrier alone;
        return invert(Member{0, 1, alone}, full, full_length, chosen, count, to, to_length, pivots,
                      progress);
    }

    // One member's part of it; all of `to` is there once every member has passed the barrier.
    template <class T>
    bool invert(const Member& member, const double* full, int64_t full_length,
                const int32_t* chosen, int64_t count, T* to, int64_t to_length, double* pivots,
                const Progress* progress) {
        const Span rows = member.triangle_rows(count, kTileRows);
        for (int64_t i = rows.begin; i < rows.end; ++i) {
            const double* from = full + chosen[i] * full_length;
            double* row = matrix_ + i * length_;
            for (int64_t j = 0; j <= i; ++j) row[j] = from[chosen[j]];
            for (int64_t j = i + 1; j < length_; ++j) row[j] = 0.0;
        }
        member.barrier.wait();
        for (int64_t start = 0; start < count; start += kBlock) {
            sweep(member, start, count - start < kBlock ? count - start : kBlock, count, pivots);
            if (member.index == 0 && progress) stopped_ = progress->stopped();
            member.barrier.wait();
            if (stopped_) return false;
        }
        for (int64_t i = rows.begin; i < rows.end; ++i) {
            const double* row = matrix_ + i * length_;
            for (int64_t j = 0; j <= i; ++j) to[i * to_length + j] = T(-row[j]);
        }
        return true;
    }

  private:
    static constexpr int64_t kBlock = 32;

    double* panel(int64_t k) { return panel_ + k * length_; }

    void sweep(const Member& member, int64_t start, int64_t width, int64_t count,
               double* pivots) {
        const int64_t end = start + width;
        const Span columns = member.columns(count, kLanes<double>);
        for (int64_t k = 0; k < width; ++k) {
            const double* row = matrix_ + (start + k) * length_;
            double* to = panel(k);
            const int64_t last = std::min(start + k + 1, columns.end);
            for (int64_t j = columns.begin; j < last; ++j) to[j] = row[j];
        }
        for (int64_t j = std::max(start, columns.begin); j < columns.end; ++j) {
            const double* row = matrix_ + j * length_ + start;
            const int64_t last = j - start < width ? j - start : width;
            for (int64_t k = 0; k < last; ++k) panel(k)[j] = row[k];
        }
        member.barrier.wait();
        // [A_KK | 1] by rows to [L^T | L^-1], whole rows at once.
        alignas(64) double upper[kBlock][kBlock] = {}, half[kBlock][kBlock] = {};
        alignas(64) double whole[kBlock][kBlock] = {};  // (L L^T)^-1 = L^-T L^-1
        alignas(64) double turned[kBlock][kBlock];      // L^-T
        for (int64_t k = 0; k < width; ++k) {
            for (int64_t j = 0; j < width; ++j) upper[k][j] = panel(k)[start + j];
            half[k][k] = 1.0;
        }
        for (int64_t k = 0; k < width; ++k) {
            if (pivots && member.index == 0) pivots[start + k] = upper[k][k];
            const double pivot = upper[k][k] > kTiny ? upper[k][k] : kTiny;
            const double root = 1.0 / std::sqrt(pivot);
            for (int64_t j = 0; j < kBlock; ++j) upper[k][j] *= root;
            for (int64_t j = 0; j < kBlock; ++j) half[k][j] *= root;
            for (int64_t i = k + 1; i < width; ++i) {
                const double factor = upper[k][i];
                for (int64_t j = 0; j < kBlock; ++j) upper[i][j] -= factor * upper[k][j];
                for (int64_t j = 0; j < kBlock; ++j) half[i][j] -= factor * half[k][j];
            }
        }
        for (int64_t i = 0; i < width; ++i) {
            for (int64_t k = 0; k <= i; ++k) {
                const double factor = half[i][k];
                for (int64_t j = 0; j < kBlock; ++j) whole[k][j] += factor * half[i][j];
            }
        }
        for (int64_t i = 0; i < kBlock; ++i) {
            for (int64_t j = 0; j < kBlock; ++j) turned[i][j] = half[j][i];
        }
        multiply<false>(half, panel_, vectors_, width, columns);
        member.barrier.wait();
        const Span rows = member.triangle_rows(count, kTileRows);
        updates_[size_t(member.index)]->apply(matrix_, length_, matrix_, length_, vectors_, length_,
                                              width, rows.end, rows.begin);
        multiply<true>(turned, vectors_, panel_, width, columns);
        member.barrier.wait();
        for (int64_t k = 0; k < width; ++k) {
            double* row = matrix_ + (start + k) * length_;
            const int64_t last = std::min(start, columns.end);
            for (int64_t j = columns.begin; j < last; ++j) row[j] = panel(k)[j];
            if (member.index) continue;
            for (int64_t j = 0; j <= k; ++j) row[start + j] = -whole[k][j];
        }
        for (int64_t j = std::max(end, columns.begin); j < columns.end; ++j) {
            double* row = matrix_ + j * length_ + start;
            for (int64_t k = 0; k < width; ++k) row[k] = panel(k)[j];
        }
    }

    // to <- factor times from; the factor is zero above its diagonal, or below it where it is `upper`.
    template <bool upper>
    void multiply(const double (*factor)[kBlock], const double* from, double* to, int64_t width,
                  Span columns) {
        constexpr int kRows = 8;
        for (int64_t j = columns.begin; j < columns.end; j += kLanes<double>) {
            for (int64_t row = 0; row < width; row += kRows) {
                const int64_t below = row + kRows < width ? row + kRows : width;
                Vector<double> sum[kRows] = {};
                for (int64_t m = upper ? row : 0; m < (upper ? width : below); ++m) {
                    const Vector<double> x = load<double>(from + m * length_ + j);
#pragma GCC unroll 8
                    for (int k = 0; k < kRows; ++k) sum[k] += factor[row + k][m] * x;
                }
#pragma GCC unroll 8
                for (int k = 0; k < kRows; ++k) store<double>(to + (row + k) * length_ + j, sum[k]);
            }
        }
    }

    static constexpr double kTiny = 1e-300;

    int64_t length_;
    Buffer<double> matrix_, panel_, vectors_;
    std::vector<std::unique_ptr<RankUpdate<double>>> updates_;
    bool stopped_ = false;
};
