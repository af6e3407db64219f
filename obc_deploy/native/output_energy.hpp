// The sum of e H e^T over rows e of a group, in double: H is symmetric, so each tile of E^T E below the
// diagonal meets H's twice, and half of the work of E H is left.

// Rows of one group that go together.
constexpr int64_t kEnergyRows = 32;

class OutputEnergy final : public RowSolver {
  public:
    // `of_part` gets one sum for each part of `kEnergyRows` rows of a group.
    OutputEnergy(const double* rows, const double* hessian, int64_t rows_of_group, int64_t cols,
                 double* of_part)
        : rows_(rows), hessian_(hessian), rows_of_group_(rows_of_group), cols_(cols),
          of_part_(of_part), products_(cols, kEnergyRows) {}

    static int64_t parts_of(int64_t rows_of_group) {
        return (rows_of_group + kEnergyRows - 1) / kEnergyRows;
    }

    bool run(int64_t part, Progress& progress) override {
        const int64_t parts = parts_of(rows_of_group_);
        const int64_t group = part / parts, first = part % parts * kEnergyRows;
        const int64_t left = rows_of_group_ - first;
        Met ending{hessian_ + group * cols_ * cols_, cols_};
        products_.tiles(rows_ + (group * rows_of_group_ + first) * cols_, cols_,
                        left < kEnergyRows ? left : kEnergyRows, cols_, ending);
        of_part_[part] = ending.sum();
        return !progress.stopped();
    }

  private:
    struct Met {
        const double* hessian;
        int64_t cols;
        Vector<double> below[4] = {};  // none waits for the one before
        double crossed = 0.0;          // of tiles that the diagonal crosses

        double sum() const {
            const Vector<double> whole = below[0] + below[1] + (below[2] + below[3]);
            double result = crossed;
            for (int lane = 0; lane < kLanes<double>; ++lane) result += 2.0 * whole[lane];
            return result;
        }

        template <int vectors>
        OBC_INLINE void expect(int64_t row, int64_t col) const {
            fetch_tile<vectors, false>(hessian + (row + kTileRows) * cols + col, cols);
        }

        template <bool whole, int vectors>
        OBC_INLINE void meet(int64_t row, int64_t col, int rows,
                             const Vector<double> (&sum)[kTileRows][vectors]) {
            const double* at = hessian + row * cols + col;
            if (whole && col + vectors * kLanes<double> <= row) {
#pragma GCC unroll 16
                for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 16
                    for (int j = 0; j < vectors; ++j) {
                        Vector<double> h;
                        std::memcpy(&h, at + i * cols + j * kLanes<double>, sizeof h);
                        below[i % 4] += sum[i][j] * h;
                    }
                }
                return;
            }
            for (int i = 0; i < rows; ++i) {
                for (int64_t j = 0; j < vectors * kLanes<double> && col + j <= row + i; ++j) {
                    const double product = sum[i][j / kLanes<double>][j % kLanes<double>];
                    crossed += (col + j < row + i ? 2.0 : 1.0) * product * at[i * cols + j];
                }
            }
        }
    };

    const double* rows_;
    const double* hessian_;
    int64_t rows_of_group_, cols_;
    double* of_part_;
    VectorProducts<double> products_;
};
