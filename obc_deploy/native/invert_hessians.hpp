// H^-1 of each group, both triangles, and the squares of its Cholesky factor's diagonal.

class InvertHessians final : public RowSolver {
  public:
    InvertHessians(const double* hessian, int64_t cols, double* inverse, double* pivots)
        : hessian_(hessian), cols_(cols), inverse_(inverse), pivots_(pivots), swept_(cols),
          all_(static_cast<size_t>(cols)) {
        for (int64_t i = 0; i < cols; ++i) all_[size_t(i)] = int32_t(i);
    }

    bool run(int64_t group, Progress& progress) override {
        double* to = inverse_ + group * cols_ * cols_;
        if (!swept_.invert(hessian_ + group * cols_ * cols_, cols_, all_.data(), cols_, to, cols_,
                           pivots_ + group * cols_, &progress)) {
            return false;
        }
        mirror(to);
        return progress.end_row(cols_);
    }

  private:
    // The lower triangle above the diagonal, square by square.
    void mirror(double* matrix) const {
        constexpr int64_t kSide = 16;
        for (int64_t i = 0; i < cols_; i += kSide) {
            const int64_t below = i + kSide < cols_ ? i + kSide : cols_;
            for (int64_t j = 0; j <= i; j += kSide) {
                for (int64_t row = i; row < below; ++row) {
                    const int64_t end = j + kSide < row ? j + kSide : row;
                    for (int64_t col = j; col < end; ++col) {
                        matrix[col * cols_ + row] = matrix[row * cols_ + col];
                    }
                }
            }
        }
    }

    const double* hessian_;
    int64_t cols_;
    double* inverse_;
    double* pivots_;
    SweptInverse swept_;
    std::vector<int32_t> all_;
};
