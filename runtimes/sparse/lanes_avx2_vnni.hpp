// Sums of eight pixels with AVX-VNNI (after codes_avx2.hpp).

typedef Codes TilePixels;

struct Lanes {
    static constexpr const char* kName = "avx2-vnni";
    static constexpr int kPixels = 8;
    static constexpr int kPixelBytes = TilePixels::kBytes;
    static constexpr int kWeightBytes = 4;
    static constexpr bool kOneInstruction = true;  // add_products
    static constexpr int kSumBytes = 4;
    static constexpr int kCacheBytes = 24 * 1024;
    static constexpr int kBandChannels = 1;

    typedef __m256i Sums;
    typedef __m256i Weights;

    static OBC_INLINE Sums start(int32_t bias) { return _mm256_set1_epi32(bias); }
    // From a zero that it knows, GCC copies registers in every round of a loop.
    static OBC_INLINE Sums zero() {
        __m256i sums = _mm256_setzero_si256();
        __asm__("" : "+x"(sums));
        return sums;
    }
    static OBC_INLINE Sums load(const void* from) {
        return _mm256_load_si256(static_cast<const __m256i*>(from));
    }
    static OBC_INLINE void store(void* to, Sums sums) {
        _mm256_store_si256(static_cast<__m256i*>(to), sums);
    }
    static OBC_INLINE Weights weights(const uint8_t* block) {
        int32_t four;
        __builtin_memcpy(&four, block, sizeof four);
        return _mm256_set1_epi32(four);
    }
    static OBC_INLINE Sums add_products(Sums sums, const uint8_t* pixels, Weights weights) {
        return OBC_DPBUSD(sums, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pixels)), weights);
    }
    static OBC_INLINE Sums add(Sums a, Sums b) { return _mm256_add_epi32(a, b); }
    static OBC_INLINE Arithmetic::Integers whole(Sums sums) { return sums; }
};
