// H^-1 of each group, both triangles, and the squares of its Cholesky factor's diagonal.

// The rows' lower triangle above the diagonal, square by square.
inline void mirror(double* matrix, int64_t cols, Span rows) {
    constexpr int64_t kSide = 16;
    for (int64_t i = rows.begin; i < rows.end; i += kSide) {
        const int64_t below = i + kSide < rows.end ? i + kSide : rows.end;
        for (int64_t j = 0; j < below; j += kSide) {
            for (int64_t row = i; row < below; ++row) {
                const int64_t end = j + kSide < row ? j + kSide : row;
                for (int64_t col = j; col < end; ++col) {
                    matrix[col * cols + row] = matrix[row * cols + col];
                }
            }
        }
    }
}

class InvertHessians final : public RowSolver {
  public:
    InvertHessians(const double* hessian, int64_t cols, double* inverse, double* pivots,
                   int64_t members = 1)
        : hessian_(hessian), cols_(cols), inverse_(inverse), pivots_(pivots),
          swept_(cols, members), all_(static_cast<size_t>(cols)) {
        for (int64_t i = 0; i < cols; ++i) all_[size_t(i)] = int32_t(i);
    }

    bool run(int64_t group, Progress& progress) override {
        Barrier alone;
        return part(Member{0, 1, alone}, group, progress);
    }

    // One member's part of a group's inverse.
    bool part(const Member& member, int64_t group, Progress& progress) {
        double* to = inverse_ + group * cols_ * cols_;
        if (!swept_.invert(member, hessian_ + group * cols_ * cols_, cols_, all_.data(), cols_, to,
                           cols_, pivots_ + group * cols_, &progress)) {
            return false;
        }
        // Of its own rows' triangle, which nobody reads or writes above the diagonal.
        mirror(to, cols_, member.triangle_rows(cols_, kTileRows));
        if (member.index == 0) progress.end_row(cols_);
        return true;
    }

  private:
    const double* hessian_;
    int64_t cols_;
    double* inverse_;
    double* pivots_;
    SweptInverse swept_;
    std::vector<int32_t> all_;
};
