// Codes times weights of their own lane: 8 bits times 16 bits, summed in 32.

#if defined(OBC_DOT_AVX512_VNNI)

struct WideLanes {
    using Vector = __m512i;
    static constexpr int kPixels = 4;

    static OBC_INLINE Vector load(const uint8_t* codes) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    }
    // A weight in each lane's low half, zero in its high half.
    static OBC_INLINE Vector spread(const int32_t* four) {
        return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(four)));
    }
    static OBC_INLINE Vector zero() { return _mm512_setzero_si512(); }
    static OBC_INLINE Vector add(Vector sums, Vector codes, Vector weights) {
        return _mm512_dpwssd_epi32(sums, codes, weights);
    }
    static OBC_INLINE void store(int32_t* to, Vector sums) { _mm512_storeu_si512(to, sums); }
};

#elif defined(OBC_DOT_AVX2) || defined(OBC_DOT_AVX2_VNNI)

struct WideLanes {
    using Vector = __m256i;
    static constexpr int kPixels = 2;

    static OBC_INLINE Vector load(const uint8_t* codes) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
    }
    static OBC_INLINE Vector spread(const int32_t* four) {
        return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(four)));
    }
    static OBC_INLINE Vector zero() { return _mm256_setzero_si256(); }
    static OBC_INLINE Vector add(Vector sums, Vector codes, Vector weights) {
        return _mm256_add_epi32(sums, _mm256_madd_epi16(codes, weights));
    }
    static OBC_INLINE void store(int32_t* to, Vector sums) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), sums);
    }
};

#else

struct WideLanes {
    typedef int32_t Vector __attribute__((vector_size(16)));
    static constexpr int kPixels = 1;

    static OBC_INLINE Vector load(const uint8_t* codes) {
        return Vector{codes[0], codes[1], codes[2], codes[3]};
    }
    static OBC_INLINE Vector spread(const int32_t* four) {
        return Vector{int16_t(four[0]), int16_t(four[1]), int16_t(four[2]), int16_t(four[3])};
    }
    static OBC_INLINE Vector zero() { return Vector{}; }
    static OBC_INLINE Vector add(Vector sums, Vector codes, Vector weights) {
        return sums + codes * weights;
    }
    static OBC_INLINE void store(int32_t* to, Vector sums) { std::memcpy(to, &sums, sizeof sums); }
};

#endif
