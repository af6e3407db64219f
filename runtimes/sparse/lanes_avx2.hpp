// Sums of eight pixels with AVX2 alone (after codes_avx2.hpp).
//
// AVX2's product of uint8 and int8 saturates; that of int16 does not. So a packed tile holds 16 bits
// a channel, and a sum is in two parts, of a pixel's first two channels and of its last two.

struct TilePixels {
    static constexpr int kBytes = 8;

    static OBC_INLINE void widen(uint8_t* to, __m256i pixels) {
        Codes::store(to, _mm256_cvtepu8_epi16(_mm256_castsi256_si128(pixels)));
        Codes::store(to + 32, _mm256_cvtepu8_epi16(_mm256_extracti128_si256(pixels, 1)));
    }
    static OBC_INLINE void widen_first(uint8_t* to, __m256i pixels, int64_t count) {
        alignas(32) uint8_t wide[Codes::kLanes * kBytes];
        widen(wide, pixels);
        __builtin_memcpy(to, wide, static_cast<size_t>(count * kBytes));
    }
    static OBC_INLINE void pack_one(uint8_t* to, const uint8_t* from) {
        const uint16_t wide[kBlock] = {from[0], from[1], from[2], from[3]};
        __builtin_memcpy(to, wide, sizeof wide);
    }
    static OBC_INLINE void pack_run(uint8_t* to, const uint8_t* from, int64_t pixels) {
        for (; pixels >= Codes::kLanes; pixels -= Codes::kLanes, to += 64, from += 32) {
            widen(to, Codes::load(from));
        }
        if (pixels) widen_first(to, Codes::load_first(from, Codes::first(pixels)), pixels);
    }
    static OBC_INLINE void pack_every_second(uint8_t* to, const uint8_t* from, int64_t pixels) {
        for (; pixels >= Codes::kLanes; pixels -= Codes::kLanes, to += 64, from += 64) {
            widen(to, Codes::every_second(from, Codes::kLanes));
        }
        if (pixels) widen_first(to, Codes::every_second(from, pixels), pixels);
    }
    static OBC_INLINE void pack_four(uint8_t* const* to, const uint8_t* const* lanes, int64_t offset) {
        __m256i four[4];
        Codes::gather_four(four, lanes, offset);
        for (int k = 0; k < 4; ++k) widen(to[k], four[k]);
    }
};

struct Lanes {
    static constexpr const char* kName = "avx2";
    static constexpr int kPixels = 8;
    static constexpr int kPixelBytes = TilePixels::kBytes;
    static constexpr int kWeightBytes = 8;
    static constexpr bool kOneInstruction = false;  // add_products
    static constexpr int kSumBytes = 8;
    static constexpr int kCacheBytes = 24 * 1024;
    static constexpr int kBandChannels = 1;

    struct Sums {
        __m256i low;  // of pixels 0 to 3
        __m256i high;
    };
    typedef __m256i Weights;

    static OBC_INLINE const __m256i* vector(const void* from) { return static_cast<const __m256i*>(from); }
    static OBC_INLINE Sums start(int32_t bias) {
        const __m256i first_part = _mm256_set1_epi64x(static_cast<uint32_t>(bias));
        return Sums{first_part, first_part};
    }
    static OBC_INLINE Sums zero() { return start(0); }
    static OBC_INLINE Sums load(const void* from) {
        return Sums{_mm256_load_si256(vector(from)), _mm256_load_si256(vector(from) + 1)};
    }
    static OBC_INLINE void store(void* to, const Sums& sums) {
        _mm256_store_si256(static_cast<__m256i*>(to), sums.low);
        _mm256_store_si256(static_cast<__m256i*>(to) + 1, sums.high);
    }
    static OBC_INLINE Weights weights(const uint8_t* block) {
        int64_t four;
        __builtin_memcpy(&four, block, sizeof four);
        return _mm256_set1_epi64x(four);
    }
    static OBC_INLINE Sums add_products(const Sums& sums, const uint8_t* pixels, Weights weights) {
        return Sums{
            _mm256_add_epi32(sums.low, _mm256_madd_epi16(_mm256_load_si256(vector(pixels)), weights)),
            _mm256_add_epi32(sums.high, _mm256_madd_epi16(_mm256_load_si256(vector(pixels) + 1), weights))};
    }
    static OBC_INLINE Sums add(const Sums& a, const Sums& b) {
        return Sums{_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
    }
    // The two parts of each sum added up.
    static OBC_INLINE Arithmetic::Integers whole(const Sums& sums) {
        return _mm256_permute4x64_epi64(_mm256_hadd_epi32(sums.low, sums.high), 0xd8);
    }
};
