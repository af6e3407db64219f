// Vectors of the instruction set this file is compiled for (no include guard: once for each set).
//
// OBC_BYTES is a vector's width, OBC_TILE_ROWS x OBC_TILE_VECTORS the tile of a matrix product that
// stays in registers. GCC's and Clang's vector extensions give the same source for all of them.

template <class T>
struct Lanes;

template <>
struct Lanes<float> {
    typedef float Vector __attribute__((vector_size(OBC_BYTES)));
    typedef int32_t Index __attribute__((vector_size(OBC_BYTES)));
    typedef int32_t Integer;
    static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
};

template <>
struct Lanes<double> {
    typedef double Vector __attribute__((vector_size(OBC_BYTES)));
    typedef int64_t Index __attribute__((vector_size(OBC_BYTES)));
    typedef int64_t Integer;
    static constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
};

template <class T>
using Vector = typename Lanes<T>::Vector;
template <class T>
using Index = typename Lanes<T>::Index;

template <class T>
constexpr int kLanes = OBC_BYTES / sizeof(T);

#define OBC_INLINE inline __attribute__((always_inline))

template <class T>
OBC_INLINE Vector<T> load(const T* from) {
    return *reinterpret_cast<const Vector<T>*>(from);
}

template <class T>
OBC_INLINE void store(T* to, Vector<T> value) {
    *reinterpret_cast<Vector<T>*>(to) = value;
}

template <class T>
OBC_INLINE Vector<T> all(T value) {
    return Vector<T>{} + value;
}

template <class T>
OBC_INLINE Vector<T> larger(Vector<T> a, Vector<T> b) {
    return a > b ? a : b;
}

template <class T>
OBC_INLINE Vector<T> smaller(Vector<T> a, Vector<T> b) {
    return a < b ? a : b;
}

// Sum of a_j b_j in double, wherever both begin.
template <class A>
inline double dot(const A* a, const double* b, int64_t count) {
    constexpr int kSums = 32;
    double sums[kSums] = {}, rest = 0.0;
    int64_t j = 0;
    for (; j + kSums <= count; j += kSums) {
        for (int u = 0; u < kSums; ++u) sums[u] += double(a[j + u]) * b[j + u];
    }
    for (; j < count; ++j) rest += double(a[j]) * b[j];
    for (int u = 0; u < kSums; ++u) rest += sums[u];
    return rest;
}

// to_j <- to_j - amount from_j
inline void subtract(double* __restrict__ to, double amount, const double* __restrict__ from,
                     int64_t count) {
    for (int64_t j = 0; j < count; ++j) to[j] -= amount * from[j];
}

// The smallest value met so far, lane by lane, with its place.
template <class T>
struct Least {
    Vector<T> value;
    Index<T> place;

    // Written out: GCC compiles constructors of its own making for another instruction set.
    OBC_INLINE Least() : value(all(std::numeric_limits<T>::infinity())), place() {}

    OBC_INLINE void meet(Vector<T> other, Index<T> at) {
        auto less = other < value;
        value = less ? other : value;
        place = less ? at : place;
    }

    // The first place of the smallest value; -1 where all are infinite.
    OBC_INLINE int64_t first(T* smallest) const {
        T best = std::numeric_limits<T>::infinity();
        int64_t found = -1;
        for (int lane = 0; lane < kLanes<T>; ++lane) {
            if (value[lane] < best || (value[lane] == best && found >= 0 && place[lane] < found)) {
                best = value[lane];
                found = place[lane];
            }
        }
        *smallest = best;
        return found;
    }

    OBC_INLINE void join(const Least& other) {
        auto less = other.value < value;
        value = less ? other.value : value;
        place = less ? other.place : place;
    }
};

template <class T>
OBC_INLINE Index<T> counting(int64_t from) {
    Index<T> result;
    for (int lane = 0; lane < kLanes<T>; ++lane) result[lane] = typename Lanes<T>::Integer(from + lane);
    return result;
}

// Memory for rows of vectors: aligned, in huge pages where there are any, freed with its owner.
template <class T>
class Buffer {
  public:
    Buffer() = default;
    explicit Buffer(int64_t count) {
        const size_t huge = size_t(1) << 21;
        const size_t alignment = count * sizeof(T) >= huge ? huge : 64;
        const size_t bytes = (size_t(count) * sizeof(T) + alignment - 1) / alignment * alignment;
        data_ = static_cast<T*>(std::aligned_alloc(alignment, bytes ? bytes : alignment));
        if (!data_) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
        if (alignment == huge) madvise(data_, bytes, MADV_HUGEPAGE);
#endif
    }
    ~Buffer() { std::free(data_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    operator T*() { return data_; }
    operator const T*() const { return data_; }

  private:
    T* data_ = nullptr;
};

// Row length, in numbers, of a matrix of `size` columns: whole tiles, and an odd count of cache
// lines, so that a column's numbers do not all fall on the same few cache sets.
template <class T>
inline int64_t row_length(int64_t size) {
    const int64_t tile = OBC_TILE_VECTORS * kLanes<T>;
    const int64_t whole = (size + tile - 1) / tile * tile;
    const int64_t line = 64 / int64_t(sizeof(T));
    return ((whole + line - 1) / line | 1) * line;
}

template <class T>
OBC_INLINE int64_t whole_vectors(int64_t size) {
    return (size + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}
