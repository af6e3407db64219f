// Four products of codes and weights, added to each lane of a vector of sums: exact in every set.

#if defined(OBC_DOT_AVX512_VNNI)

struct Dot {
    using Vector = __m512i;
    static constexpr int kLanes = 16;

    static OBC_INLINE Vector load(const void* from) { return _mm512_loadu_si512(from); }
    static OBC_INLINE Vector spread(const int8_t* four) {
        int32_t together;
        std::memcpy(&together, four, sizeof together);
        return _mm512_set1_epi32(together);
    }
    static OBC_INLINE Vector gather(const uint8_t* from, const int32_t* index) {
        // Masked, all lanes: GCC warns of the other's undefined source.
        return _mm512_mask_i32gather_epi32(zero(), 0xFFFF, load(index), from, kBlock);
    }
    static OBC_INLINE Vector zero() { return _mm512_setzero_si512(); }
    static OBC_INLINE Vector add(Vector sums, Vector codes, Vector weights) {
        return _mm512_dpbusd_epi32(sums, codes, weights);
    }
    static OBC_INLINE void store(int32_t* to, Vector sums) { _mm512_storeu_si512(to, sums); }
};

#elif defined(OBC_DOT_AVX2) || defined(OBC_DOT_AVX2_VNNI)

struct Dot {
    using Vector = __m256i;
    static constexpr int kLanes = 8;

    static OBC_INLINE Vector load(const void* from) {
        return _mm256_loadu_si256(static_cast<const __m256i*>(from));
    }
    static OBC_INLINE Vector spread(const int8_t* four) {
        int32_t together;
        std::memcpy(&together, four, sizeof together);
        return _mm256_set1_epi32(together);
    }
    static OBC_INLINE Vector gather(const uint8_t* from, const int32_t* index) {
        return _mm256_i32gather_epi32(reinterpret_cast<const int*>(from), load(index), kBlock);
    }
    static OBC_INLINE Vector zero() { return _mm256_setzero_si256(); }
    static OBC_INLINE Vector add(Vector sums, Vector codes, Vector weights) {
#if defined(OBC_DOT_AVX2_VNNI)
        return OBC_DPBUSD(sums, codes, weights);
#else
        // vpmaddubsw would saturate its 16-bit sums; even and odd bytes as 16-bit numbers do not.
        const Vector even = _mm256_madd_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(255)),
                                              _mm256_srai_epi16(_mm256_slli_epi16(weights, 8), 8));
        const Vector odd =
            _mm256_madd_epi16(_mm256_srli_epi16(codes, 8), _mm256_srai_epi16(weights, 8));
        return _mm256_add_epi32(sums, _mm256_add_epi32(even, odd));
#endif
    }
    static OBC_INLINE void store(int32_t* to, Vector sums) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), sums);
    }
};

#else

struct Dot {
    struct Vector {
        uint8_t bytes[16];
    };
    static constexpr int kLanes = 4;

    static OBC_INLINE Vector load(const void* from) {
        Vector result;
        std::memcpy(result.bytes, from, sizeof result.bytes);
        return result;
    }
    static OBC_INLINE Vector spread(const int8_t* four) {
        Vector result;
        for (int lane = 0; lane < kLanes; ++lane) std::memcpy(result.bytes + 4 * lane, four, 4);
        return result;
    }
    static OBC_INLINE Vector gather(const uint8_t* from, const int32_t* index) {
        Vector result;
        for (int lane = 0; lane < kLanes; ++lane) {
            std::memcpy(result.bytes + 4 * lane, from + int64_t(index[lane]) * kBlock, 4);
        }
        return result;
    }
    static OBC_INLINE Vector zero() { return Vector{}; }
    static OBC_INLINE Vector add(Vector sums, Vector codes, Vector weights) {
        for (int lane = 0; lane < kLanes; ++lane) {
            int32_t sum;
            std::memcpy(&sum, sums.bytes + 4 * lane, 4);
            for (int i = 4 * lane; i < 4 * lane + 4; ++i)
                sum += codes.bytes[i] * int8_t(weights.bytes[i]);
            std::memcpy(sums.bytes + 4 * lane, &sum, 4);
        }
        return sums;
    }
    static OBC_INLINE void store(int32_t* to, Vector sums) {
        std::memcpy(to, sums.bytes, sizeof sums.bytes);
    }
};

#endif
