// The weights of many levels of one trace, in one more pass: the order is known, nothing is scored.
//
// A level is a prefix of each row's order; blocks of columns are eliminated one after the other,
// which is the same as all at once.

template <class T>
class Replay final : public RowSolver {
  public:
    Replay(const Layer& layer, const Start<T>& start, const int32_t* order, int64_t steps,
           int64_t width, const int64_t* counts, int64_t levels, float* weights)
        : layer_(layer), start_(start), order_(order), steps_(steps), width_(width),
          counts_(counts), levels_(levels), weights_(weights), inverse_(layer.cols, layer.lazy),
          weight_(inverse_.length), place_(layer.cols) {}

    bool run(int64_t row, Progress& progress) override {
        const int64_t cols = layer_.cols, group = layer_.group_of_row[row];
        const int32_t* order = order_ + row * steps_;
        const int64_t* counts = counts_ + row * levels_;
        inverse_.begin(start_, group, cols);
        for (int64_t c = 0; c < cols; ++c) {
            weight_[c] = T(layer_.weight[row * cols + c]);
            place_[c] = int32_t(c);
        }
        int64_t level = 0;
        const int64_t last = counts[levels_ - 1] * width_;
        for (int64_t step = 0;; ++step) {
            for (; level < levels_ && counts[level] * width_ == step; ++level) save(row, level);
            if (step == last) break;
            const int64_t c = order[step / width_] * width_ + step % width_;
            const int64_t p = place_[c];
            T amount = 0;
            const T w_p = weight_[p];
            T* weight = weight_;
            inverse_.eliminate(
                p, [&](T root) { amount = w_p / root; },
                [&](int64_t i, Vector<T> v, int) __attribute__((always_inline)) {
                    store(weight + i, load(weight + i) - amount * v);
                });
            if (inverse_.full()) {
                const int64_t before = inverse_.size;
                const Moves& moves = inverse_.compact(1);
                for (size_t m = 0; m < moves.hole.size(); ++m) {
                    weight_[moves.hole[m]] = weight_[moves.source[m]];
                    place_[inverse_.column[moves.hole[m]]] = int32_t(moves.hole[m]);
                }
                if (!progress.on(before, inverse_.size)) return false;
            }
        }
        return progress.end_row(inverse_.size);
    }

  private:
    void save(int64_t row, int64_t level) {
        float* to = weights_ + (level * layer_.rows + row) * layer_.cols;
        std::fill(to, to + layer_.cols, 0.0f);
        for (int64_t i = 0; i < inverse_.size; ++i) {
            if (inverse_.closed[i] == T(0)) to[inverse_.column[i]] = float(weight_[i]);
        }
    }

    const Layer& layer_;
    const Start<T>& start_;
    const int32_t* order_;
    int64_t steps_, width_;
    const int64_t* counts_;
    int64_t levels_;
    float* weights_;
    DowndatedInverse<T> inverse_;
    Buffer<T> weight_;
    std::vector<int32_t> place_;
};
