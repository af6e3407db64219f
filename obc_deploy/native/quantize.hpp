// One row's OBQ: the index p with the least (q(w_p) - w_p)^2 / G_pp is rounded, the rest updated.
//
// While the rounding error of some remaining weight exceeds half its step (it lies beyond the
// grid's end), the worst of those goes first (OBC, arXiv 2208.11580, section 5). Where a pattern came
// first only survivors take part, from the inverse of H restricted to them: what pruning left, or made
// anew from a mask, by eliminating what is pruned or by inverting the rest, whichever is less. The rest
// keeps its zero point.
//
// Where a row has one grid, weights count in its steps (u = w / s), which drops the scale from the
// comparison of costs; where its columns have grids of their own the scale is read with each weight.

template <class T, bool one_grid>
class Quantize final : public RowSolver {
  public:
    Quantize(const Layer& layer, const Start<T>& start, WeightGrid grid, const uint8_t* mask,
             const LeftInverses* left, int8_t* codes)
        : layer_(layer), start_(start), grid_(grid), mask_(mask), left_(left), codes_(codes),
          inverse_(layer.cols, layer.lazy), weight_(inverse_.length), diagonal_(inverse_.length),
          scale_(inverse_.length), low_(inverse_.length), high_(inverse_.length),
          floors_(inverse_.length), survivors_(layer.cols), place_(mask ? layer.cols : 0),
          restricted_(mask ? new SweptInverse(layer.cols) : nullptr) {}

    bool run(int64_t row, Progress& progress) override {
        const int64_t cols = layer_.cols;
        const double* weight = layer_.weight + row * cols;
        const double* scale = grid_.scale + row * cols;
        const double* zero = grid_.zero_point + row * cols;
        int8_t* codes = codes_ + row * cols;
        for (int64_t c = 0; c < cols; ++c) codes[c] = int8_t(zero[c]);
        if (!begin(row, progress)) return false;
        const int64_t count = inverse_.size;
        if (!count) return progress.end_row(cols);
        if (!progress.on(cols, count)) return false;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t c = column(i);
            weight_[i] = T(one_grid ? weight[c] / scale[c] : weight[c]);
            scale_[i] = T(one_grid ? 1.0 : scale[c]);
            low_[i] = T(double(grid_.code_min) - zero[c]);
            high_[i] = T(double(grid_.code_max) - zero[c]);
        }

        for (int64_t i = count; one_grid && i < kLanes<T>; ++i) {
            scale_[i] = T(1);
            low_[i] = low_[0];
            high_[i] = high_[0];
        }

        int64_t p = restart();
        for (int64_t step = 0; step < count; ++step) {
            const int64_t c = column(p);
            const int64_t at = one_grid ? 0 : p;
            const T q = rounded(all(weight_[p] / scale_[at]), all(T(low_[at])), all(T(high_[at])))[0];
            codes[c] = int8_t(int64_t(q) + int64_t(zero[c]));
            if (step + 1 == count) break;
            p = eliminate(p, q * scale_[at] - weight_[p]);
            if (inverse_.full()) {
                const int64_t before = inverse_.size;
                const Moves& moves = inverse_.compact(1);
                for (size_t m = 0; m < moves.hole.size(); ++m) {
                    const int64_t to = moves.hole[m], from = moves.source[m];
                    weight_[to] = weight_[from];
                    if (one_grid) continue;
                    scale_[to] = scale_[from];
                    low_[to] = low_[from];
                    high_[to] = high_[from];
                }
                p = restart();
                if (!progress.on(before, inverse_.size)) return false;
            }
        }
        return progress.end_row(inverse_.size);
    }

  private:
    // From one survivor in so many columns on, eliminating the others is less work than inverting: (cols³
    // - count³) / 3 operations beside count³ in double precision and by narrower updates.
    static constexpr int64_t kInverting = 2;

    // Start from the inverse of what takes part; false once the caller wants to stop.
    bool begin(int64_t row, Progress& progress) {
        const int64_t cols = layer_.cols, group = layer_.group_of_row[row];
        for (int64_t c = 0; c < cols; ++c) survivors_[c] = int32_t(c);
        if (left_) {
            const int64_t count = left_->size;
            const T* triangles = static_cast<const T*>(left_->triangles);
            std::copy_n(left_->columns + row * count, count, survivors_.begin());
            inverse_.unpack(triangles + row * (count * (count + 1) / 2), count);
            begin_own(group, count);
            return true;
        }
        const uint8_t* mask = mask_ ? mask_ + row * cols : nullptr;
        const int64_t count = mask ? std::count_if(mask, mask + cols, [](uint8_t m) { return m; }) : cols;
        if (count * kInverting >= cols) {
            inverse_.begin(start_, group, cols);
            return count == cols || eliminate_pruned(mask, progress);
        }
        int64_t filled = 0;
        for (int64_t c = 0; c < cols; ++c) {
            if (mask[c]) survivors_[filled++] = int32_t(c);
        }
        restricted_->invert(layer_.hessian + group * cols * cols, cols, survivors_.data(), count,
                            inverse_.room(), inverse_.length);
        begin_own(group, count);
        return true;
    }

    void begin_own(int64_t group, int64_t count) {
        const T* floors = start_.floors + group * start_.length;
        for (int64_t i = 0; i < count; ++i) floors_[i] = floors[survivors_[i]];
        inverse_.begin_own(floors_, count);
    }

    bool eliminate_pruned(const uint8_t* mask, Progress& progress) {
        for (int64_t c = 0; c < layer_.cols; ++c) place_[c] = int32_t(c);
        for (int64_t c = 0; c < layer_.cols; ++c) {
            if (mask[c]) continue;
            inverse_.eliminate(
                place_[c], [](T) {}, [](int64_t, Vector<T>, int) __attribute__((always_inline)) {});
            if (!inverse_.full()) continue;
            const Moves& moves = inverse_.compact(1);
            for (int64_t hole : moves.hole) place_[inverse_.column[hole]] = int32_t(hole);
            if (progress.stopped()) return false;
        }
        if (inverse_.kept()) inverse_.compact(1);
        return true;
    }

    // The layer's column at a place.
    int64_t column(int64_t place) const { return survivors_[inverse_.column[place]]; }

    struct Bounds {
        Vector<T> scale, low, high;
    };

    struct Choice {
        Least<T> cost, outlier;  // the worst outlier is the least of the negated errors

        OBC_INLINE Choice() {}

        OBC_INLINE void meet(Vector<T> w, Vector<T> g, Bounds grid, Vector<T> closed, Index<T> at) {
            const Vector<T> infinite = all(std::numeric_limits<T>::infinity());
            Vector<T> miss, half = all(T(0.5));
            if constexpr (one_grid) {
                miss = rounded(w, grid.low, grid.high) - w;
            } else {
                miss = rounded(w / grid.scale, grid.low, grid.high) * grid.scale - w;
                half = T(0.5) * grid.scale;
            }
            const Vector<T> size = (miss < T(0) ? -miss : miss) - closed;
            cost.meet(miss * miss / g + closed, at);
            outlier.meet(size > half ? -size : infinite, at);
        }

        OBC_INLINE int64_t place() const {
            T value;
            const int64_t worst = outlier.first(&value);
            return worst >= 0 ? worst : cost.first(&value);
        }
    };

    static OBC_INLINE Vector<T> rounded(Vector<T> x, Vector<T> low, Vector<T> high) {
        x = larger<T>(smaller<T>(x, high), low);
        return (x + Lanes<T>::kMagic) - Lanes<T>::kMagic;
    }

    OBC_INLINE Bounds bounds(int64_t i) const {
        const int64_t at = one_grid ? 0 : i;  // the first vector has the row's own
        return {load<T>(scale_ + at), load<T>(low_ + at), load<T>(high_ + at)};
    }

    int64_t restart() {
        const int64_t end = whole_vectors<T>(inverse_.size);
        for (int64_t i = 0; i < inverse_.size; ++i) diagonal_[i] = inverse_.diagonal(i);
        for (int64_t i = inverse_.size; i < end; ++i) {
            weight_[i] = T(0);
            diagonal_[i] = T(1);
            if (!one_grid) {
                low_[i] = high_[i] = T(0);
                scale_[i] = T(1);
            }
        }
        Choice choice;
        Index<T> at = counting<T>(0);
        for (int64_t i = 0; i < end; i += kLanes<T>, at += kLanes<T>) {
            choice.meet(load(weight_ + i), load(diagonal_ + i), bounds(i),
                        load(inverse_.closed + i), at);
        }
        return inverse_.some_place(choice.place());
    }

    int64_t eliminate(int64_t p, T miss) {
        Choice choice;
        const Index<T> lane = counting<T>(0);
        const Bounds shared = bounds(0);
        T amount = 0;
        T* weight = weight_;
        T* diagonal = diagonal_;
        const T* closed = inverse_.closed;
        const T* floor = inverse_.floor;
        inverse_.eliminate(
            p, [&](T root) { amount = miss / root; },
            [&](int64_t i, Vector<T> v, int) __attribute__((always_inline)) {
                const Vector<T> w = load(weight + i) + amount * v;
                const Vector<T> g = larger<T>(load(diagonal + i) - v * v, load(floor + i));
                store(weight + i, w);
                store(diagonal + i, g);
                choice.meet(w, g, one_grid ? shared : bounds(i), load(closed + i),
                            lane + typename Lanes<T>::Integer(i));
            });
        return inverse_.some_place(choice.place());
    }

    const Layer& layer_;
    const Start<T>& start_;
    WeightGrid grid_;
    const uint8_t* mask_;
    const LeftInverses* left_;
    int8_t* codes_;
    DowndatedInverse<T> inverse_;
    Buffer<T> weight_, diagonal_, scale_, low_, high_, floors_;
    std::vector<int32_t> survivors_;  // columns by the places that a run starts with
    std::vector<int32_t> place_;      // places of the columns while the pruned are eliminated
    std::unique_ptr<SweptInverse> restricted_;
};
