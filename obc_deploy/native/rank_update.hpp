// V^T V on the lower triangle, tile by tile, V of a few dozen rows; and C <- S - V^T V, where nearly
// all the time goes.
//
// The panel of V that a strip of columns needs stays in the second-level cache, a tile in registers
// until the caller's `ending` has met it. Tiles that the diagonal crosses reach above it.

constexpr int kTileRows = OBC_TILE_ROWS;
constexpr int kTileVectors = OBC_TILE_VECTORS;
constexpr int64_t kPanelBytes = 192 << 10;

template <class T>
constexpr int kTileColumns = kTileVectors * kLanes<T>;

template <class T>
inline int64_t panel_columns(int64_t depth) {
    const int64_t fits = kPanelBytes / int64_t(sizeof(T)) / depth / kTileColumns<T>;
    return (fits ? fits : 1) * kTileColumns<T>;
}

// Asks for what a tile meets, to be written to or only read.
template <int vectors, bool written, class T>
OBC_INLINE void fetch_tile(const T* from, int64_t length) {
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 16
        for (int j = 0; j < vectors; ++j) {
            __builtin_prefetch(from + i * length + j * kLanes<T>, written);
        }
    }
}

template <class T>
class VectorProducts {
  public:
    VectorProducts(int64_t size, int64_t depth)
        : left_((size + kTileRows) * depth), right_(panel_columns<T>(depth) * depth) {}

    // V is (depth, size) with rows `vector_length` apart; rows of V^T V before `first`, the first of
    // a tile, are left out.
    template <class Ending>
    void tiles(const T* v, int64_t vector_length, int64_t depth, int64_t size, Ending& ending,
               int64_t first = 0) {
        pack_left(v, vector_length, depth, size, first);
        const int64_t width = panel_columns<T>(depth);
        for (int64_t start = 0; start < size; start += width) {
            pack_right(v + start, vector_length, depth, size - start, width);
            const int64_t top = start / kTileRows * kTileRows;
            for (int64_t row = top > first ? top : first; row < size; row += kTileRows) {
                const int rows = int(size - row < kTileRows ? size - row : kTileRows);
                const int64_t last = row + rows < start + width ? row + rows : start + width;
                const T* left = left_ + row * depth;
                for (int64_t col = start; col < last; col += kTileColumns<T>) {
                    const T* right = right_ + (col - start) * depth;
                    pick<kTileVectors>(int((last - col + kLanes<T> - 1) / kLanes<T>), row, col, left,
                                       right, depth, rows, ending);
                }
            }
        }
    }

  private:
    // (size / rows of a tile, depth, rows of a tile)
    void pack_left(const T* v, int64_t length, int64_t depth, int64_t size, int64_t first) {
        T* to = left_ + first * depth;
        for (int64_t row = first; row < size; row += kTileRows) {
            const int64_t rows = size - row < kTileRows ? size - row : kTileRows;
            for (int64_t k = 0; k < depth; ++k, to += kTileRows) {
                for (int64_t i = 0; i < rows; ++i) to[i] = v[k * length + row + i];
                for (int64_t i = rows; i < kTileRows; ++i) to[i] = T(0);
            }
        }
    }

    // (columns / columns of a tile, depth, columns of a tile), zero beyond `size`
    void pack_right(const T* v, int64_t length, int64_t depth, int64_t size, int64_t width) {
        T* to = right_;
        const int64_t end = size < width ? size : width;
        for (int64_t col = 0; col < end; col += kTileColumns<T>) {
            const int64_t cols = end - col < kTileColumns<T> ? end - col : kTileColumns<T>;
            for (int64_t k = 0; k < depth; ++k, to += kTileColumns<T>) {
                for (int64_t j = 0; j < cols; ++j) to[j] = v[k * length + col + j];
                for (int64_t j = cols; j < kTileColumns<T>; ++j) to[j] = T(0);
            }
        }
    }

    // The tile that is no wider than it must be: on the diagonal less is wanted.
    template <int vectors, class Ending>
    static OBC_INLINE void pick(int wanted, int64_t row, int64_t col, const T* left, const T* right,
                                int64_t depth, int rows, Ending& ending) {
        if constexpr (vectors > 1) {
            if (wanted < vectors) {
                return pick<vectors - 1>(wanted, row, col, left, right, depth, rows, ending);
            }
        }
        if (rows == kTileRows) {
            tile<true, vectors>(row, col, left, right, depth, rows, ending);
        } else {
            tile<false, vectors>(row, col, left, right, depth, rows, ending);
        }
    }

    template <bool whole, int vectors, class Ending>
    static OBC_INLINE void tile(int64_t row, int64_t col, const T* left, const T* right,
                                int64_t depth, int rows, Ending& ending) {
        ending.template expect<vectors>(row, col);
        Vector<T> sum[kTileRows][vectors] = {};
        for (int64_t k = 0; k < depth; ++k) {
            Vector<T> b[vectors];
#pragma GCC unroll 16
            for (int j = 0; j < vectors; ++j) b[j] = load(right + j * kLanes<T>);
#pragma GCC unroll 16
            for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 16
                for (int j = 0; j < vectors; ++j) sum[i][j] += left[i] * b[j];
            }
            left += kTileRows;
            right += kTileColumns<T>;
        }
        ending.template meet<whole, vectors>(row, col, rows, sum);
    }

    Buffer<T> left_, right_;
};

// C <- S - V^T V; above the diagonal, where nobody reads, the tiles that it crosses write too.
template <class T>
class RankUpdate {
  public:
    RankUpdate(int64_t size, int64_t depth) : products_(size, depth) {}

    // V is (depth, size) with rows `vector_length` apart; C and S have rows of their own lengths.
    // Rows before `first`, the first of a tile, stay as they are.
    void apply(T* c, int64_t c_length, const T* s, int64_t s_length, const T* v,
               int64_t vector_length, int64_t depth, int64_t size, int64_t first = 0) {
        Subtracted ending{c, c_length, s, s_length};
        products_.tiles(v, vector_length, depth, size, ending, first);
    }

  private:
    struct Subtracted {
        T* c;
        int64_t c_length;
        const T* s;
        int64_t s_length;

        // What the strip's next rows read is on its way while these are computed.
        template <int vectors>
        OBC_INLINE void expect(int64_t row, int64_t col) const {
            fetch_tile<vectors, true>(s + (row + kTileRows) * s_length + col, s_length);
        }

        template <bool whole, int vectors>
        OBC_INLINE void meet(int64_t row, int64_t col, int rows,
                             const Vector<T> (&sum)[kTileRows][vectors]) const {
            T* to = c + row * c_length + col;
            const T* from = s + row * s_length + col;
#pragma GCC unroll 16
            for (int i = 0; i < kTileRows; ++i) {
                if (whole || i < rows) {
#pragma GCC unroll 16
                    for (int j = 0; j < vectors; ++j) {
                        const int64_t at = j * kLanes<T>;
                        store(to + i * c_length + at, load(from + i * s_length + at) - sum[i][j]);
                    }
                }
            }
        }
    };

    VectorProducts<T> products_;
};
