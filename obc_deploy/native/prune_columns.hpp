// One row's greedy over single columns: argmin_p w_p^2 / G_pp, in groups with zeros to give.
//
// Unstructured pruning is the case of one group that gives all of its columns (OBC, arXiv
// 2208.11580, section 4, algorithm 1).
//
// A group with no more zeros to give is dropped whole, unless the survivors' weights are wanted: then
// their inverse is kept up to date, refines those weights, and may be left to who quantizes them.

template <class T>
class PruneColumns final : public RowSolver {
  public:
    PruneColumns(const Layer& layer, const Start<T>& start, GroupZeros zeros, int32_t* order,
                 T* increase, bool precise = false, double* weights = nullptr,
                 const LeftInverses* left = nullptr)
        : layer_(layer), start_(start), zeros_(zeros), order_(order), increase_(increase),
          weights_(weights), left_(left),
          inverse_(layer.cols, layer.lazy), weight_(inverse_.length), diagonal_(inverse_.length),
          given_(layer.cols / zeros.group), place_(layer.cols),
          refined_(weights ? new RefinedWeights<T>(layer, precise) : nullptr) {}

    bool run(int64_t row, Progress& progress) override {
        const int64_t cols = layer_.cols, group = layer_.group_of_row[row];
        const int64_t steps = cols / zeros_.group * zeros_.zeros;
        int32_t* order = order_ + row * steps;
        inverse_.begin(start_, group, cols);
        for (int64_t i = 0; i < cols; ++i) {
            weight_[i] = T(layer_.weight[row * cols + i]);
            place_[i] = int32_t(i);
        }
        std::fill(given_.begin(), given_.end(), 0);

        T score = 0;
        double loss = 0;
        int64_t p = restart(&score);
        for (int64_t step = 0; step < steps; ++step) {
            const int64_t column = inverse_.column[p];
            order[step] = int32_t(column);
            if (increase_) increase_[row * steps + step] = score;
            loss += double(score);
            if (step + 1 == steps && !weights_) break;
            close_finished_group(column);
            p = eliminate(p, &score);
            if (inverse_.full()) {
                const int64_t before = inverse_.size;
                compact();
                p = restart(&score);
                if (!progress.on(before, inverse_.size)) return false;
            }
        }
        const int64_t before = inverse_.size;
        if (weights_) leave(row, loss);
        return progress.end_row(before);
    }

  private:
    // The survivors' weights, and their inverse where it is wanted.
    void leave(int64_t row, double loss) {
        if (inverse_.kept()) compact();
        const int64_t size = inverse_.size;
        refined_->find(row, inverse_, weight_, loss, weights_ + row * layer_.cols);
        if (!left_) return;
        std::copy_n(static_cast<const int32_t*>(inverse_.column), size, left_->columns + row * size);
        inverse_.pack(static_cast<T*>(left_->triangles) + row * (size * (size + 1) / 2));
    }

    // Scores from the stored diagonal; the cheapest place.
    int64_t restart(T* score) {
        const int64_t end = whole_vectors<T>(inverse_.size);
        for (int64_t i = inverse_.size; i < end; ++i) weight_[i] = T(0);
        for (int64_t i = 0; i < inverse_.size; ++i) diagonal_[i] = inverse_.diagonal(i);
        for (int64_t i = inverse_.size; i < end; ++i) diagonal_[i] = T(1);
        Least<T> least;
        Index<T> at = counting<T>(0);
        for (int64_t i = 0; i < end; i += kLanes<T>, at += kLanes<T>) {
            const Vector<T> w = load(weight_ + i);
            least.meet(w * w / load(diagonal_ + i) + load(inverse_.closed + i), at);
        }
        return inverse_.some_place(least.first(score));
    }

    int64_t eliminate(int64_t p, T* score) {
        Least<T> least[2];
        const Index<T> lane = counting<T>(0);
        T amount = 0;
        const T w_p = weight_[p];
        T* weight = weight_;
        T* diagonal = diagonal_;
        const T* closed = inverse_.closed;
        const T* floor = inverse_.floor;
        inverse_.eliminate(
            p, [&](T root) { amount = w_p / root; },
            [&](int64_t i, Vector<T> v, int half) __attribute__((always_inline)) {
                const Vector<T> w = load(weight + i) - amount * v;
                const Vector<T> g = larger<T>(load(diagonal + i) - v * v, load(floor + i));
                store(weight + i, w);
                store(diagonal + i, g);
                least[half].meet(w * w / g + load(closed + i),
                                 lane + typename Lanes<T>::Integer(i));
            });
        least[0].join(least[1]);
        return inverse_.some_place(least[0].first(score));
    }

    void compact() {
        const Moves& moves = inverse_.compact(1);
        for (size_t m = 0; m < moves.hole.size(); ++m) {
            weight_[moves.hole[m]] = weight_[moves.source[m]];
            place_[inverse_.column[moves.hole[m]]] = int32_t(moves.hole[m]);
        }
    }

    void close_finished_group(int64_t column) {
        if (zeros_.zeros == zeros_.group) return;
        const int64_t group = column / zeros_.group;
        if (++given_[group] < zeros_.zeros) return;
        for (int64_t c = group * zeros_.group; c < (group + 1) * zeros_.group; ++c) {
            const int64_t at = place_[c];
            if (at < inverse_.size && inverse_.column[at] == c) {
                T& closed = inverse_.closed[at];
                if (!weights_) closed = std::numeric_limits<T>::infinity();
                if (closed == T(0)) closed = DowndatedInverse<T>::kShut;
            }
        }
    }

    const Layer& layer_;
    const Start<T>& start_;
    GroupZeros zeros_;
    int32_t* order_;
    T* increase_;
    double* weights_;
    const LeftInverses* left_;
    DowndatedInverse<T> inverse_;
    Buffer<T> weight_, diagonal_;
    std::vector<int64_t> given_;
    std::vector<int32_t> place_;
    std::unique_ptr<RefinedWeights<T>> refined_;
};
