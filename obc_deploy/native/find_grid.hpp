// Grids: minimise over shrunk ranges the sum of |(clamp(round(w/s) + z) - z) s - w|^2.4, row by row.
//
// x^2.4 = (a r^2)^2 with a = x^2 and r = a^(-1/5), which Newton's method finds without a division.
// A range whose loss has passed the best one's is given up.

class FindGrid final : public RowSolver {
  public:
    explicit FindGrid(const GridSearch& search)
        : search_(search), weight_(whole_vectors<double>(search.cols)) {}

    bool run(int64_t row, Progress& progress) override {
        const int64_t cols = search_.cols, end = whole_vectors<double>(cols);
        const double* weight = search_.weight + row * cols;
        double low = 0.0, high = 0.0;
        for (int64_t c = 0; c < cols; ++c) {
            weight_[c] = weight[c];
            low = weight[c] < low ? weight[c] : low;
            high = weight[c] > high ? weight[c] : high;
        }
        for (int64_t c = cols; c < end; ++c) weight_[c] = 0.0;  // a grid point: no loss
        if (low == 0.0 && high == 0.0) low = -1.0, high = 1.0;
        if (!search_.asymmetric) {
            high = -low > high ? -low : high;
            low = -high;
        }
        const double codes = double(search_.code_max - search_.code_min);
        double best = std::numeric_limits<double>::infinity(), best_scale = 1.0, best_zero = 0.0;
        for (int64_t step = 0; step < search_.steps; ++step) {
            const double share = 1.0 - double(step) * search_.shrink;
            double scale = share * (high - low) / codes;
            scale = double(float(scale > search_.least_scale ? scale : search_.least_scale));
            double zero = 0.0;
            if (search_.asymmetric) {
                zero = std::nearbyint(-share * low / scale);
                zero = double(search_.code_min) + (zero < codes ? zero : codes);
            }
            const double loss = loss_of(scale, double(search_.code_min) - zero,
                                        double(search_.code_max) - zero, end, best);
            if (loss < best) {
                best = loss;
                best_scale = scale;
                best_zero = zero;
            }
        }
        search_.scale[row] = float(best_scale);
        search_.zero_point[row] = int8_t(best_zero);
        return !progress.stopped();
    }

  private:
    typedef Vector<double> V;
    typedef Index<double> I;

    static constexpr int64_t kChunk = 64;

    double loss_of(double scale, double low, double high, int64_t end, double enough) const {
        double loss = 0.0;
        for (int64_t start = 0; start < end; start += kChunk * kLanes<double>) {
            const int64_t rest = end - start, whole = kChunk * kLanes<double>;
            const int64_t stop = start + (rest < whole ? rest : whole);
            V sum = {};
            for (int64_t i = start; i < stop; i += kLanes<double>) {
                const V w = load<double>(weight_ + i);
                V x = larger<double>(smaller<double>(w / scale, all(high)), all(low));
                x = ((x + Lanes<double>::kMagic) - Lanes<double>::kMagic) * scale - w;
                sum += power(x * x);
            }
            for (int lane = 0; lane < kLanes<double>; ++lane) loss += sum[lane];
            if (loss > enough) break;
        }
        return loss;
    }

    // a^1.2
    static OBC_INLINE V power(V a) {
        I bits;
        std::memcpy(&bits, &a, sizeof(a));
        I fifth = (bits >> 3) + (bits >> 4);  // a fifth, by the binary fraction 0.00110011...
        fifth += fifth >> 4;
        fifth += fifth >> 8;
        bits = 5528375456338851840 - fifth;  // 6/5 of the exponent's bias, less what a line misses
        V r;
        std::memcpy(&r, &bits, sizeof(r));
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const V square = r * r;
            r *= 1.2 - 0.2 * (a * r) * (square * square);
        }
        const V root = a * (r * r);
        return root * root;
    }

    const GridSearch& search_;
    Buffer<double> weight_;
};
