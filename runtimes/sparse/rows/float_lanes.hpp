// Vectors of floats: what sums of products need of an instruction set.

#if defined(OBC_DOT_AVX512_VNNI)

struct FloatLanes {
    using Vector = __m512;
    static constexpr int kLanes = 16;

    static OBC_INLINE Vector load(const float* from) { return _mm512_loadu_ps(from); }
    static OBC_INLINE Vector spread(float value) { return _mm512_set1_ps(value); }
    static OBC_INLINE Vector gather(const float* from, const int32_t* index) {
        return _mm512_mask_i32gather_ps(spread(0), 0xFFFF, _mm512_loadu_si512(index), from,
                                        sizeof(float));
    }
    static OBC_INLINE Vector add(Vector sums, Vector a, Vector b) {
        return _mm512_fmadd_ps(a, b, sums);
    }
    static OBC_INLINE void store(float* to, Vector sums) { _mm512_storeu_ps(to, sums); }
};

#elif defined(OBC_DOT_AVX2) || defined(OBC_DOT_AVX2_VNNI)

struct FloatLanes {
    using Vector = __m256;
    static constexpr int kLanes = 8;

    static OBC_INLINE Vector load(const float* from) { return _mm256_loadu_ps(from); }
    static OBC_INLINE Vector spread(float value) { return _mm256_set1_ps(value); }
    static OBC_INLINE Vector gather(const float* from, const int32_t* index) {
        const __m256i places = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index));
        return _mm256_i32gather_ps(from, places, sizeof(float));
    }
    static OBC_INLINE Vector add(Vector sums, Vector a, Vector b) {
        return _mm256_fmadd_ps(a, b, sums);
    }
    static OBC_INLINE void store(float* to, Vector sums) { _mm256_storeu_ps(to, sums); }
};

#else

struct FloatLanes {
    typedef float Vector __attribute__((vector_size(16)));
    static constexpr int kLanes = 4;

    static OBC_INLINE Vector load(const float* from) {
        Vector result;
        std::memcpy(&result, from, sizeof result);
        return result;
    }
    static OBC_INLINE Vector spread(float value) { return Vector{value, value, value, value}; }
    static OBC_INLINE Vector gather(const float* from, const int32_t* index) {
        return Vector{from[index[0]], from[index[1]], from[index[2]], from[index[3]]};
    }
    static OBC_INLINE Vector add(Vector sums, Vector a, Vector b) { return sums + a * b; }
    static OBC_INLINE void store(float* to, Vector sums) { std::memcpy(to, &sums, sizeof sums); }
};

#endif
