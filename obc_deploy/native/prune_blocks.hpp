// One row's greedy over blocks: argmin_B w_B^T (G_BB)^-1 w_B, `width` neighbouring columns at once.
// Where `together` rows have one mask, and so one inverse, they are one row here, and scores their sum.
//
// With G_BB = L L^T the score is |L^-1 w_B|^2; a block's columns are eliminated one after the other,
// which is the same as all at once (OBC, arXiv 2208.11580, section 4, "block sparsity"). Weights
// and blocks of G are kept component by component, so that a vector holds neighbouring blocks.

template <class T, int width, int together>
class PruneBlocks final : public RowSolver {
  public:
    PruneBlocks(const Layer& layer, const Start<T>& start, int32_t* order, T* increase)
        : layer_(layer), start_(start), order_(order), increase_(increase),
          inverse_(layer.cols, std::max(layer.lazy, int64_t(width))), stride_(row_length<T>(layer.cols / width)),
          weight_(together * width * stride_), floor_(width * stride_), closed_(stride_),
          gram_(kPairs * stride_), part_(width * width * stride_) {}

    bool run(int64_t row, Progress& progress) override {
        const int64_t cols = layer_.cols, group = layer_.group_of_row[row];
        const int64_t steps = cols / width;
        int32_t* order = order_ + row * steps;
        T* increase = increase_ + row * steps;
        inverse_.begin(start_, group, cols);
        for (int r = 0; r < together; ++r) {
            const double* weight = layer_.weight + (row * together + r) * cols;
            T* to = weights(r);
            for (int64_t i = 0; i < cols; ++i) to[i % width * stride_ + i / width] = T(weight[i]);
        }
        T score = 0;
        int64_t block = restart(&score);
        for (int64_t step = 0; step < steps; ++step) {
            order[step] = inverse_.column[block * width] / width;
            increase[step] = score;
            if (step + 1 == steps) break;
            block = eliminate(block, &score);
            if (inverse_.full(width)) {
                const int64_t before = inverse_.size;
                const Moves& moves = inverse_.compact(width);
                for (int r = 0; r < together; ++r) {
                    T* w = weights(r);
                    for (size_t m = 0; m < moves.hole.size(); ++m) {
                        const int64_t to = moves.hole[m], from = moves.source[m];
                        w[to % width * stride_ + to / width] =
                            w[from % width * stride_ + from / width];
                    }
                }
                block = restart(&score);
                if (!progress.on(before, inverse_.size)) return false;
            }
        }
        return progress.end_row(inverse_.size);
    }

  private:
    static constexpr int kPairs = width * (width + 1) / 2;

    static constexpr int pair(int i, int j) { return i * (i + 1) / 2 + j; }

    T* weights(int r) { return weight_ + r * width * stride_; }

    int64_t restart(T* score) {
        const int64_t blocks = inverse_.size / width, end = whole_vectors<T>(blocks);
        for (int64_t b = 0; b < end; ++b) {
            const bool real = b < blocks;
            closed_[b] = real ? T(0) : std::numeric_limits<T>::infinity();
            for (int i = 0; i < width; ++i) {
                const int64_t at = b * width + i;
                floor_[i * stride_ + b] = real ? inverse_.floor[at] : T(1);
                for (int r = 0; r < together; ++r) {
                    if (!real) weights(r)[i * stride_ + b] = T(0);
                }
                for (int j = 0; j <= i; ++j) {
                    const T off = real && i != j ? inverse_.entry(at, b * width + j) : T(0);
                    const T on = real ? inverse_.diagonal(real ? at : 0) : T(1);
                    gram_[pair(i, j) * stride_ + b] = i == j ? on : off;
                }
            }
        }
        Least<T> least;
        Index<T> place = counting<T>(0);
        for (int64_t b = 0; b < end; b += kLanes<T>, place += kLanes<T>) meet(least, b, place);
        return sane(least, score);
    }

    int64_t eliminate(int64_t block, T* score) {
        const int64_t end = whole_vectors<T>(inverse_.size / width);
        const int64_t first = inverse_.kept();
        T amount[together][width];
        for (int i = 0; i < width; ++i) {
            T left[together];
            for (int r = 0; r < together; ++r) {
                left[r] = weights(r)[i * stride_ + block];
                for (int k = 0; k < i; ++k) {
                    left[r] -= amount[r][k] * inverse_.vector(first + k)[block * width + i];
                }
            }
            inverse_.eliminate(
                block * width + i,
                [&](T root) {
                    for (int r = 0; r < together; ++r) amount[r][i] = left[r] / root;
                },
                [](int64_t, Vector<T>, int) __attribute__((always_inline)) {});
            split(inverse_.vector(first + i), part_ + i * width * stride_, end);
        }
        closed_[block] = std::numeric_limits<T>::infinity();

        Least<T> least;
        Index<T> place = counting<T>(0);
        for (int64_t b = 0; b < end; b += kLanes<T>, place += kLanes<T>) {
            for (int i = 0; i < width; ++i) {
                for (int r = 0; r < together; ++r) {
                    T* at = weights(r) + i * stride_ + b;
                    Vector<T> w = load(at);
                    for (int k = 0; k < width; ++k) w -= amount[r][k] * part(k, i, b);
                    store(at, w);
                }
                for (int j = 0; j <= i; ++j) {
                    T* at = gram_ + pair(i, j) * stride_ + b;
                    Vector<T> g = load(at);
                    for (int k = 0; k < width; ++k) g -= part(k, i, b) * part(k, j, b);
                    store(at, g);
                }
            }
            meet(least, b, place);
        }
        return sane(least, score);
    }

    OBC_INLINE Vector<T> part(int k, int i, int64_t b) const {
        return load(static_cast<const T*>(part_) + (k * width + i) * stride_ + b);
    }

    // Component i of every block, one after the other.
    void split(const T* __restrict__ v, T* __restrict__ to, int64_t blocks) const {
        const int64_t real = inverse_.size / width;
        for (int i = 0; i < width; ++i) {
            for (int64_t b = 0; b < real; ++b) to[i * stride_ + b] = v[b * width + i];
            for (int64_t b = real; b < blocks; ++b) to[i * stride_ + b] = T(0);
        }
    }

    // |L^-1 w_B|^2 of a vector of blocks, summed over the rows.
    OBC_INLINE void meet(Least<T>& least, int64_t b, Index<T> place) const {
        Vector<T> lower[width][width], result[together][width], score = load(closed_ + b);
        for (int i = 0; i < width; ++i) {
            for (int j = 0; j < i; ++j) {
                Vector<T> entry = load(gram_ + pair(i, j) * stride_ + b);
                for (int k = 0; k < j; ++k) entry -= lower[i][k] * lower[j][k];
                lower[i][j] = entry * lower[j][j];
            }
            Vector<T> pivot = load(gram_ + pair(i, i) * stride_ + b);
            for (int k = 0; k < i; ++k) pivot -= lower[i][k] * lower[i][k];
            pivot = larger<T>(pivot, load(floor_ + i * stride_ + b));
            Vector<T> root;
            for (int lane = 0; lane < kLanes<T>; ++lane) root[lane] = std::sqrt(pivot[lane]);
            lower[i][i] = T(1) / root;
            for (int r = 0; r < together; ++r) {
                Vector<T> value =
                    load(static_cast<const T*>(weight_) + (r * width + i) * stride_ + b);
                for (int k = 0; k < i; ++k) value -= lower[i][k] * result[r][k];
                result[r][i] = value * lower[i][i];
                score += result[r][i] * result[r][i];
            }
        }
        least.meet(score, place);
    }

    int64_t sane(const Least<T>& least, T* score) const {
        const int64_t block = least.first(score);
        return block >= 0 ? block : inverse_.some_place(-1) / width;
    }

    const Layer& layer_;
    const Start<T>& start_;
    int32_t* order_;
    T* increase_;
    DowndatedInverse<T> inverse_;
    int64_t stride_;
    Buffer<T> weight_, floor_, closed_, gram_, part_;
};
