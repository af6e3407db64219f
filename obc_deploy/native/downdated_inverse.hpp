// One row's G = H^-1 while indices are eliminated: G <- G - G_:p G_p: / G_pp.
//
// That is a pivoted Cholesky factorization whose pivot rule the caller owns: with v = G_:p / sqrt(
// G_pp), G <- G - v v^T. The last few v are kept aside, so that the stored matrix changes once in
// `lazy` eliminations; then what no longer matters is dropped and its place taken from the end.
// The lower triangle alone is stored.

// What rows start from, in working precision, one for each group; without the inverses where rows
// make matrices of their own.
template <class T>
struct Start {
    explicit Start(const Layer& layer, bool with_matrices = true)
        : length(row_length<T>(layer.cols)),
          matrices(with_matrices ? layer.groups * layer.cols * length : 0),
          floors(layer.groups * length) {
        const int64_t cols = layer.cols;
        for (int64_t group = 0; group < layer.groups; ++group) {
            for (int64_t i = 0; i < cols; ++i) {
                floors[group * length + i] = T(1.0 / layer.hessian[(group * cols + i) * cols + i]);
                if (!with_matrices) continue;
                const double* from = layer.inverse + (group * cols + i) * cols;
                T* to = matrices + (group * cols + i) * length;
                for (int64_t j = 0; j < cols; ++j) to[j] = T(from[j]);
                for (int64_t j = cols; j < length; ++j) to[j] = T(0);
            }
        }
    }

    int64_t length;
    Buffer<T> matrices;  // empty where they were not wanted
    Buffer<T> floors;    // 1 / H_ii: G_ii never falls below it, whatever has been eliminated
};

// Which place each hole is filled from; both ascending within their own.
struct Moves {
    std::vector<int64_t> hole, source;
    int64_t size = 0;  // places left afterwards
};

template <class T>
class DowndatedInverse {
  public:
    static constexpr T kShut = std::numeric_limits<T>::max() / 4;

    DowndatedInverse(int64_t cols, int64_t lazy)
        : length(row_length<T>(cols)),
          column(length),
          closed(length),
          floor(length),
          stored_((cols + kTileRows) * length),
          vectors_(lazy * length),
          fetched_(length),
          weights_(lazy),
          update_(cols, lazy),
          lazy_(lazy) {}

    // Start from a group's inverse, which is read until the first update and never written to.
    void begin(const Start<T>& start, int64_t group, int64_t cols) {
        begin(start.matrices + group * cols * start.length, start.length,
              start.floors + group * start.length, cols);
    }

    // Start from a matrix written to `room()`.
    void begin_own(const T* floors, int64_t cols) { begin(stored_, length, floors, cols); }
    T* room() { return stored_; }

    // The stored matrix's lower triangle, up to date right after `compact`.
    const T* row(int64_t i) const { return source_ + i * source_length_; }
    void pack(T* to) const {
        for (int64_t i = 0; i < size; to += ++i) std::memcpy(to, row(i), size_t(i + 1) * sizeof(T));
    }
    void unpack(const T* from, int64_t cols) {
        for (int64_t i = 0; i < cols; from += ++i) {
            std::memcpy(stored_ + i * length, from, size_t(i + 1) * sizeof(T));
        }
    }

    bool full(int64_t more = 1) const { return kept_ + more > lazy_; }
    int64_t kept() const { return kept_; }
    T* vector(int64_t k) { return vectors_ + k * length; }

    T diagonal(int64_t i) const {
        const T value = source_[i * source_length_ + i];
        return value > floor[i] ? value : T(floor[i]);
    }

    T entry(int64_t i, int64_t j) const {
        return i >= j ? source_[i * source_length_ + j] : source_[j * source_length_ + i];
    }

    // A place that may be picked, where numbers that are not numbers left none to prefer.
    int64_t some_place(int64_t p) const {
        for (int64_t i = 0; p < 0 && i < size; ++i) p = closed[i] == T(0) ? i : p;
        return p < 0 ? 0 : p;
    }

    // Column p of the stored matrix, without what is kept aside.
    void fetch(int64_t p, T* to) const {
        const T* row = source_ + p * source_length_;
        for (int64_t i = 0; i <= p; ++i) to[i] = row[i];
        const T* down = source_ + p;
        for (int64_t i = p + 1; i < size; ++i) {
            __builtin_prefetch(down + (i + kAhead) * source_length_);
            to[i] = down[i * source_length_];
        }
        for (int64_t i = size; i < whole_vectors<T>(size); ++i) to[i] = T(0);
    }

    // Eliminate place p: v joins the kept vectors, and `visit(i, v)` sees it a vector at a time,
    // having been told sqrt(G_pp) first.
    template <class Begin, class Visit>
    OBC_INLINE void eliminate(int64_t p, Begin begin_visit, Visit visit) {
        fetch(p, fetched_);
        T pivot = fetched_[p];
        for (int64_t k = 0; k < kept_; ++k) {
            weights_[k] = vectors_[k * length + p];
            pivot -= weights_[k] * weights_[k];
        }
        pivot = pivot > floor[p] ? pivot : T(floor[p]);
        const T root = std::sqrt(pivot);
        const T inverse_root = T(1) / root;
        closed[p] = std::numeric_limits<T>::infinity();
        begin_visit(root);
        T* to = vectors_ + kept_ * length;
        const int64_t end = whole_vectors<T>(size);
        int64_t i = 0;
        for (; i + 8 * kLanes<T> <= end; i += 8 * kLanes<T>) {
            combine<8>(i, to, inverse_root, visit);
        }
        for (; i < end; i += kLanes<T>) combine<1>(i, to, inverse_root, visit);
        ++kept_;
    }

    // Take the kept vectors into the stored matrix, drop the closed places, whole runs of `width`.
    const Moves& compact(int64_t width) {
        if (kept_) {
            update_.apply(stored_, length, source_, source_length_, vectors_, length, kept_, size);
            source_ = stored_;
            source_length_ = length;
            kept_ = 0;
        }
        find_moves(width);
        if (source_ == static_cast<const T*>(stored_)) {
            close_gaps();
        }
        size = moves_.size;
        for (size_t m = 0; m < moves_.hole.size(); ++m) {
            const int64_t to = moves_.hole[m], from = moves_.source[m];
            column[to] = column[from];
            closed[to] = closed[from];
            floor[to] = floor[from];
        }
        close_end();
        return moves_;
    }

    int64_t length;
    int64_t size = 0;        // places left
    Buffer<int32_t> column;  // the layer's column at each place
    Buffer<T> closed;        // 0 where a place may be picked; `kShut` where not, though it stays;
                             // infinite where it is dropped
    Buffer<T> floor;

  private:
    static constexpr int64_t kAhead = 24;  // rows whose numbers are on their way

    void begin(const T* matrix, int64_t matrix_length, const T* floors, int64_t cols) {
        source_ = matrix;
        source_length_ = matrix_length;
        size = cols;
        kept_ = 0;
        for (int64_t i = 0; i < cols; ++i) {
            column[i] = int32_t(i);
            closed[i] = T(0);
            floor[i] = floors[i];
        }
        close_end();
    }

    template <int count, class Visit>
    OBC_INLINE void combine(int64_t i, T* to, T inverse_root, Visit visit) {
        Vector<T> v[count];
#pragma GCC unroll 8
        for (int u = 0; u < count; ++u) v[u] = load(fetched_ + i + u * kLanes<T>);
        const T* from = vectors_ + i;
        for (int64_t k = 0; k < kept_; ++k, from += length) {
            const T weight = weights_[k];
#pragma GCC unroll 8
            for (int u = 0; u < count; ++u) v[u] -= weight * load(from + u * kLanes<T>);
        }
#pragma GCC unroll 8
        for (int u = 0; u < count; ++u) {
            v[u] *= inverse_root;
            store(to + i + u * kLanes<T>, v[u]);
            visit(i + u * kLanes<T>, v[u], u & 1);
        }
    }

    bool stays(int64_t i) const { return closed[i] <= kShut; }

    void close_end() {
        for (int64_t i = size; i < whole_vectors<T>(size); ++i) {
            column[i] = 0;
            closed[i] = std::numeric_limits<T>::infinity();
            floor[i] = T(1);
        }
    }

    void find_moves(int64_t width) {
        moves_.hole.clear();
        moves_.source.clear();
        int64_t left = 0;
        for (int64_t i = 0; i < size; i += width) left += stays(i) ? width : 0;
        int64_t from = left;
        for (int64_t hole = 0; hole < left; hole += width) {
            if (stays(hole)) continue;
            while (!stays(from)) from += width;
            for (int64_t k = 0; k < width; ++k) {
                moves_.hole.push_back(hole + k);
                moves_.source.push_back(from + k);
            }
            from += width;
        }
        moves_.size = left;
    }

    // Row by row, so that only the moved places' own rows are read beside the one being written.
    void close_gaps() {
        const int64_t count = int64_t(moves_.hole.size());
        const int64_t* hole = moves_.hole.data();
        const int64_t* source = moves_.source.data();
        int64_t before = 0;  // holes above row i
        for (int64_t i = count ? hole[0] : moves_.size; i < moves_.size; ++i) {
            T* row = stored_ + i * length;
            if (before < count && hole[before] == i) {
                const int64_t from = source[before];
                std::memcpy(row, stored_ + from * length, size_t(i) * sizeof(T));
                for (int64_t m = 0; m < before; ++m) row[hole[m]] = entry(from, source[m]);
                row[i] = stored_[from * length + from];
                ++before;
            } else {
                for (int64_t m = 0; m < before; ++m) row[hole[m]] = stored_[source[m] * length + i];
            }
        }
    }

    Buffer<T> stored_, vectors_, fetched_, weights_;
    RankUpdate<T> update_;
    const T* source_ = nullptr;
    int64_t source_length_ = 0;
    int64_t kept_ = 0;
    int64_t lazy_;
    Moves moves_;
};
