// Sixteen pixels at a time, with AVX512-VNNI (see convolution_kernels.hpp).

// How codes move between blocked tensors and vectors of one pixel a lane.
struct Codes {
    static constexpr int kLanes = 16;
    static constexpr int kBytes = 4;

    static OBC_INLINE void pack_one(uint8_t* to, const uint8_t* from) { __builtin_memcpy(to, from, 4); }

    // Pixels in a row, to a packed tile and back.
    static OBC_INLINE void pack_run(uint8_t* to, const uint8_t* from, int64_t pixels) {
        for (; pixels >= kLanes; pixels -= kLanes, to += 64, from += 64) {
            _mm512_storeu_si512(to, _mm512_loadu_si512(from));
        }
        if (pixels) {
            const __mmask16 some = static_cast<__mmask16>((1u << pixels) - 1);
            _mm512_mask_storeu_epi32(to, some, _mm512_maskz_loadu_epi32(some, from));
        }
    }
    static OBC_INLINE void pack_every_second(uint8_t* to, const uint8_t* from, int64_t pixels) {
        const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
        for (; pixels > 0; pixels -= kLanes, to += 64, from += 128) {
            const int64_t here = pixels < kLanes ? pixels : kLanes;
            const uint32_t some = 0xffffffffu >> (33 - 2 * here);  // the last odd one may not be there
            const __m512i low = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(some), from);
            const __m512i high = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(some >> 16), from + 64);
            _mm512_mask_storeu_epi32(to, static_cast<__mmask16>((1u << here) - 1),
                                     _mm512_permutex2var_epi32(low, even, high));
        }
    }
    static OBC_INLINE void unpack_run(uint8_t* to, const uint8_t* from, int64_t pixels) {
        pack_run(to, from, pixels);
    }

    // Columns of lanes: four neighbouring pixels of each lane <-> four vectors, one pixel of each lane.
    static OBC_INLINE __m512i quarters(const uint8_t* const* lanes, int64_t offset) {
        __m512i all = _mm512_castsi128_si512(load_pixels(lanes[0] + offset));
        all = _mm512_inserti32x4(all, load_pixels(lanes[4] + offset), 1);
        all = _mm512_inserti32x4(all, load_pixels(lanes[8] + offset), 2);
        return _mm512_inserti32x4(all, load_pixels(lanes[12] + offset), 3);
    }
    static OBC_INLINE __m128i load_pixels(const uint8_t* from) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    }
    static OBC_INLINE void store_pixels(uint8_t* to, __m128i pixels) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), pixels);
    }
    static OBC_INLINE void transpose(__m512i& a, __m512i& b, __m512i& c, __m512i& d) {
        const __m512i ab_low = _mm512_unpacklo_epi32(a, b);
        const __m512i ab_high = _mm512_unpackhi_epi32(a, b);
        const __m512i cd_low = _mm512_unpacklo_epi32(c, d);
        const __m512i cd_high = _mm512_unpackhi_epi32(c, d);
        a = _mm512_unpacklo_epi64(ab_low, cd_low);
        b = _mm512_unpackhi_epi64(ab_low, cd_low);
        c = _mm512_unpacklo_epi64(ab_high, cd_high);
        d = _mm512_unpackhi_epi64(ab_high, cd_high);
    }
    static OBC_INLINE void pack_four(uint8_t* const* to, const uint8_t* const* lanes, int64_t offset) {
        __m512i a = quarters(lanes, offset);
        __m512i b = quarters(lanes + 1, offset);
        __m512i c = quarters(lanes + 2, offset);
        __m512i d = quarters(lanes + 3, offset);
        transpose(a, b, c, d);
        _mm512_store_si512(to[0], a);
        _mm512_store_si512(to[1], b);
        _mm512_store_si512(to[2], c);
        _mm512_store_si512(to[3], d);
    }
    static OBC_INLINE void unpack_four(uint8_t* const* lanes, int64_t offset, const uint8_t* from) {
        __m512i quarter[4] = {_mm512_load_si512(from), _mm512_load_si512(from + 64),
                              _mm512_load_si512(from + 128), _mm512_load_si512(from + 192)};
        transpose(quarter[0], quarter[1], quarter[2], quarter[3]);
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
            store_pixels(lanes[k] + offset, _mm512_castsi512_si128(quarter[k]));
            store_pixels(lanes[4 + k] + offset, _mm512_extracti32x4_epi32(quarter[k], 1));
            store_pixels(lanes[8 + k] + offset, _mm512_extracti32x4_epi32(quarter[k], 2));
            store_pixels(lanes[12 + k] + offset, _mm512_extracti32x4_epi32(quarter[k], 3));
        }
    }
};

typedef Codes TilePixels;

// The steps from sums to codes.
struct Arithmetic {
    typedef __m512 Floats;
    typedef __m512i Integers;
    typedef __m512i Packed;  // bytes

    static OBC_INLINE Floats all(float value) { return _mm512_set1_ps(value); }
    static OBC_INLINE Floats floats(Integers from) { return _mm512_cvtepi32_ps(from); }
    static OBC_INLINE Floats product(Floats a, Floats b) {
        Floats value = _mm512_mul_ps(a, b);
        __asm__("" : "+v"(value));  // rounded here: no fused multiply-add may be made of it
        return value;
    }
    static OBC_INLINE Floats sum(Floats a, Floats b) { return _mm512_add_ps(a, b); }
    static OBC_INLINE Floats difference(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
    static OBC_INLINE Floats quotient(Floats a, Floats b) { return _mm512_div_ps(a, b); }
    static OBC_INLINE Floats at_most(Floats a, Floats b) { return _mm512_min_ps(a, b); }
    // (sum - 2^23) * multiplier of what are the bits of a float; offset is -2^23 * multiplier.
    static OBC_INLINE Floats rectified(Integers sums, Floats multiplier, Floats offset) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(sums), multiplier, offset);
    }
    static OBC_INLINE Integers rounded(Floats value) { return _mm512_cvtps_epi32(value); }

    static OBC_INLINE Floats product_sum(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    // How far values are from the integers they were rounded to, and the larger of two magnitudes.
    static OBC_INLINE Floats away(Floats value, Integers) { return _mm512_reduce_ps(value, 0); }
    static OBC_INLINE Floats farther(Floats a, Floats b) { return _mm512_range_ps(a, b, 11); }
    static OBC_INLINE bool any_above(Floats magnitudes, float limit) {
        return _mm512_cmp_ps_mask(magnitudes, _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
    }

    // A CodeRange, in memory as vectors: to broadcast a byte takes longer than to load a vector.
    struct Bounds {
        Packed zero_point;  // 16 bits each
        Packed lower;
        Packed upper;

        explicit Bounds(const CodeRange& range)
            : zero_point(_mm512_set1_epi16(static_cast<int16_t>(range.zero_point))),
              lower(_mm512_set1_epi8(static_cast<char>(range.lower))),
              upper(_mm512_set1_epi8(static_cast<char>(range.upper))) {}
    };
    // Codes of four vectors: in each 16 bytes four of a, four of b, four of c, four of d.
    template <CodesAre kCodes>
    static OBC_INLINE Packed narrowed(Integers a, Integers b, Integers c, Integers d, const Bounds& bounds) {
        __m512i ab = _mm512_packs_epi32(a, b);
        __m512i cd = _mm512_packs_epi32(c, d);
        if (kCodes != CodesAre::kWholeFromZero) {
            ab = _mm512_adds_epi16(ab, bounds.zero_point);
            cd = _mm512_adds_epi16(cd, bounds.zero_point);
        }
        const Packed codes = _mm512_packus_epi16(ab, cd);
        if (kCodes != CodesAre::kAny) return codes;
        return _mm512_min_epu8(_mm512_max_epu8(codes, bounds.lower), bounds.upper);
    }
    // Four vectors of pixels of the codes that `narrowed` left of four channels, `channel_bytes` apart.
    static OBC_INLINE void interleave(const uint8_t* codes, int64_t channel_bytes, Packed* pixels) {
        const Packed a = load(codes), b = load(codes + channel_bytes);
        const Packed c = load(codes + 2 * channel_bytes), d = load(codes + 3 * channel_bytes);
        const Packed ab_low = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
        const Packed cd_low = _mm512_unpacklo_epi8(c, d), cd_high = _mm512_unpackhi_epi8(c, d);
        pixels[0] = _mm512_unpacklo_epi16(ab_low, cd_low);
        pixels[1] = _mm512_unpackhi_epi16(ab_low, cd_low);
        pixels[2] = _mm512_unpacklo_epi16(ab_high, cd_high);
        pixels[3] = _mm512_unpackhi_epi16(ab_high, cd_high);
    }
    // One channel of a vector of pixels, and back from all four.
    static OBC_INLINE Floats channel(Packed pixels, int channel) {
        // A byte of each pixel, and zeros: 128 and more give one.
        const int32_t order = static_cast<int32_t>(0x80808000u) + channel;
        const __m512i bytes = _mm512_set4_epi32(order + 12, order + 8, order + 4, order);
        return floats(_mm512_shuffle_epi8(pixels, bytes));
    }
    template <CodesAre kCodes>
    static OBC_INLINE Packed pixels(const Integers* channels, const Bounds& bounds) {
        const Packed by_channel = narrowed<kCodes>(channels[0], channels[1], channels[2], channels[3], bounds);
        return _mm512_shuffle_epi8(by_channel, _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400));
    }
    static OBC_INLINE Packed load(const uint8_t* from) { return _mm512_loadu_si512(from); }
    static OBC_INLINE void store(uint8_t* to, Packed packed) { _mm512_storeu_si512(to, packed); }
    static OBC_INLINE void store_first(uint8_t* to, Packed packed, int64_t pixels) {
        _mm512_mask_storeu_epi32(to, static_cast<__mmask16>((1u << pixels) - 1), packed);
    }
};

struct Lanes {
    static constexpr const char* kName = "avx512-vnni";
    static constexpr int kPixels = 16;
    static constexpr int kPixelBytes = TilePixels::kBytes;
    static constexpr int kWeightBytes = 4;
    static constexpr bool kOneInstruction = true;  // add_products
    static constexpr int kSumBytes = 4;
    static constexpr int kCacheBytes = 24 * 1024;
    static constexpr int kBandChannels = 4;

    typedef __m512i Sums;
    typedef __m512i Weights;

    static OBC_INLINE Sums start(int32_t bias) { return _mm512_set1_epi32(bias); }
    // From a zero that it knows, GCC copies registers in every round of a loop.
    static OBC_INLINE Sums zero() {
        __m512i sums = _mm512_setzero_si512();
        __asm__("" : "+v"(sums));
        return sums;
    }
    static OBC_INLINE Sums load(const void* from) { return _mm512_load_si512(from); }
    static OBC_INLINE void store(void* to, Sums sums) { _mm512_store_si512(to, sums); }
    static OBC_INLINE Weights weights(const uint8_t* block) {
        int32_t four;
        __builtin_memcpy(&four, block, 4);
        return _mm512_set1_epi32(four);
    }
    static OBC_INLINE Sums add_products(Sums sums, const uint8_t* pixels, Weights weights) {
        return _mm512_dpbusd_epi32(sums, _mm512_loadu_si512(pixels), weights);
    }
    static OBC_INLINE Sums add_half_products(Sums sums, const uint8_t* pixels, Weights weights) {
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pixels));
        return _mm512_castsi256_si512(
            _mm256_dpbusd_epi32(_mm512_castsi512_si256(sums), half, _mm512_castsi512_si256(weights)));
    }
    static OBC_INLINE Sums add(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
    // GCC may not look through to a bias that no block was added to: it would then convert bias and
    // sums on two ways, and find no registers for both.
    static OBC_INLINE Arithmetic::Integers whole(Sums sums) {
        __asm__("" : "+v"(sums));
        return sums;
    }
};
