// Eight pixels at a time, with AVX2 (see convolution_kernels.hpp).

// How codes move between blocked tensors and vectors of one pixel a lane.
struct Codes {
    static constexpr int kLanes = 8;
    static constexpr int kBytes = 4;

    // The first `pixels` of eight lanes; more than eight are eight.
    static OBC_INLINE __m256i first(int64_t pixels) {
        const int32_t some = static_cast<int32_t>(pixels < kLanes ? pixels : kLanes);
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(some), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
    }
    static OBC_INLINE __m256i load_first(const uint8_t* from, __m256i mask) {
        return _mm256_maskload_epi32(reinterpret_cast<const int*>(from), mask);
    }
    static OBC_INLINE __m256i load(const uint8_t* from) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    }
    static OBC_INLINE void store(uint8_t* to, __m256i pixels) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), pixels);
    }
    // Pixels 0, 2, 4... of `pixels` pairs, of whose last only the first is there.
    static OBC_INLINE __m256i every_second(const uint8_t* from, int64_t pixels) {
        const __m256i low = load_first(from, first(2 * pixels - 1));
        const __m256i high = load_first(from + 32, first(2 * pixels - 1 - kLanes));
        const __m256 even = _mm256_shuffle_ps(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high), 0x88);
        return _mm256_permute4x64_epi64(_mm256_castps_si256(even), 0xd8);
    }

    static OBC_INLINE void pack_one(uint8_t* to, const uint8_t* from) { __builtin_memcpy(to, from, 4); }
    static OBC_INLINE void pack_run(uint8_t* to, const uint8_t* from, int64_t pixels) {
        for (; pixels >= kLanes; pixels -= kLanes, to += 32, from += 32) store(to, load(from));
        if (pixels) {
            const __m256i some = first(pixels);
            _mm256_maskstore_epi32(reinterpret_cast<int*>(to), some, load_first(from, some));
        }
    }
    static OBC_INLINE void pack_every_second(uint8_t* to, const uint8_t* from, int64_t pixels) {
        for (; pixels > 0; pixels -= kLanes, to += 32, from += 64) {
            const int64_t here = pixels < kLanes ? pixels : kLanes;
            _mm256_maskstore_epi32(reinterpret_cast<int*>(to), first(here), every_second(from, here));
        }
    }
    static OBC_INLINE void unpack_run(uint8_t* to, const uint8_t* from, int64_t pixels) {
        pack_run(to, from, pixels);
    }

    // Four neighbouring pixels of each lane <-> four vectors, one pixel of each lane.
    static OBC_INLINE __m256i halves(const uint8_t* const* lanes, int64_t offset) {
        return _mm256_inserti128_si256(_mm256_castsi128_si256(load_pixels(lanes[0] + offset)),
                                       load_pixels(lanes[4] + offset), 1);
    }
    static OBC_INLINE __m128i load_pixels(const uint8_t* from) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    }
    static OBC_INLINE void store_pixels(uint8_t* to, __m128i pixels) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), pixels);
    }
    static OBC_INLINE void transpose(__m256i* four) {
        const __m256i ab_low = _mm256_unpacklo_epi32(four[0], four[1]);
        const __m256i ab_high = _mm256_unpackhi_epi32(four[0], four[1]);
        const __m256i cd_low = _mm256_unpacklo_epi32(four[2], four[3]);
        const __m256i cd_high = _mm256_unpackhi_epi32(four[2], four[3]);
        four[0] = _mm256_unpacklo_epi64(ab_low, cd_low);
        four[1] = _mm256_unpackhi_epi64(ab_low, cd_low);
        four[2] = _mm256_unpacklo_epi64(ab_high, cd_high);
        four[3] = _mm256_unpackhi_epi64(ab_high, cd_high);
    }
    static OBC_INLINE void gather_four(__m256i* four, const uint8_t* const* lanes, int64_t offset) {
        for (int k = 0; k < 4; ++k) four[k] = halves(lanes + k, offset);
        transpose(four);
    }
    static OBC_INLINE void pack_four(uint8_t* const* to, const uint8_t* const* lanes, int64_t offset) {
        __m256i four[4];
        gather_four(four, lanes, offset);
        for (int k = 0; k < 4; ++k) store(to[k], four[k]);
    }
    static OBC_INLINE void unpack_four(uint8_t* const* lanes, int64_t offset, const uint8_t* from) {
        __m256i four[4] = {load(from), load(from + 32), load(from + 64), load(from + 96)};
        transpose(four);
        for (int k = 0; k < 4; ++k) {
            store_pixels(lanes[k] + offset, _mm256_castsi256_si128(four[k]));
            store_pixels(lanes[4 + k] + offset, _mm256_extracti128_si256(four[k], 1));
        }
    }
};

// The steps from sums to codes.
struct Arithmetic {
    typedef __m256 Floats;
    typedef __m256i Integers;
    typedef __m256i Packed;  // bytes

    static OBC_INLINE Floats all(float value) { return _mm256_set1_ps(value); }
    static OBC_INLINE Floats floats(Integers from) { return _mm256_cvtepi32_ps(from); }
    static OBC_INLINE Floats product(Floats a, Floats b) {
        Floats value = _mm256_mul_ps(a, b);
        __asm__("" : "+x"(value));  // rounded here: no fused multiply-add may be made of it
        return value;
    }
    static OBC_INLINE Floats sum(Floats a, Floats b) { return _mm256_add_ps(a, b); }
    static OBC_INLINE Floats difference(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
    static OBC_INLINE Floats quotient(Floats a, Floats b) { return _mm256_div_ps(a, b); }
    static OBC_INLINE Floats at_most(Floats a, Floats b) { return _mm256_min_ps(a, b); }
    // (sum - 2^23) * multiplier of what are the bits of a float; offset is -2^23 * multiplier.
    static OBC_INLINE Floats rectified(Integers sums, Floats multiplier, Floats offset) {
        return _mm256_fmadd_ps(_mm256_castsi256_ps(sums), multiplier, offset);
    }
    static OBC_INLINE Integers rounded(Floats value) { return _mm256_cvtps_epi32(value); }

    static OBC_INLINE Floats product_sum(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    // How far values are from the integers they were rounded to, and the larger of two magnitudes.
    static OBC_INLINE Floats away(Floats value, Integers rounded) {
        return _mm256_sub_ps(value, _mm256_cvtepi32_ps(rounded));
    }
    static OBC_INLINE Floats farther(Floats a, Floats b) {
        const __m256 sign = _mm256_set1_ps(-0.0f);
        return _mm256_max_ps(_mm256_andnot_ps(sign, a), _mm256_andnot_ps(sign, b));
    }
    static OBC_INLINE bool any_above(Floats magnitudes, float limit) {
        return _mm256_movemask_ps(_mm256_cmp_ps(magnitudes, _mm256_set1_ps(limit), _CMP_GT_OQ)) != 0;
    }

    // A CodeRange, in memory as vectors: to broadcast a byte takes longer than to load a vector.
    struct Bounds {
        Packed zero_point;  // 16 bits each
        Packed lower;
        Packed upper;

        explicit Bounds(const CodeRange& range)
            : zero_point(_mm256_set1_epi16(static_cast<int16_t>(range.zero_point))),
              lower(_mm256_set1_epi8(static_cast<char>(range.lower))),
              upper(_mm256_set1_epi8(static_cast<char>(range.upper))) {}
    };
    // Codes of four vectors: in each 16 bytes four of a, four of b, four of c, four of d.
    template <CodesAre kCodes>
    static OBC_INLINE Packed narrowed(Integers a, Integers b, Integers c, Integers d, const Bounds& bounds) {
        __m256i ab = _mm256_packs_epi32(a, b);
        __m256i cd = _mm256_packs_epi32(c, d);
        if (kCodes != CodesAre::kWholeFromZero) {
            ab = _mm256_adds_epi16(ab, bounds.zero_point);
            cd = _mm256_adds_epi16(cd, bounds.zero_point);
        }
        const Packed codes = _mm256_packus_epi16(ab, cd);
        if (kCodes != CodesAre::kAny) return codes;
        return _mm256_min_epu8(_mm256_max_epu8(codes, bounds.lower), bounds.upper);
    }
    // Four vectors of pixels of the codes that `narrowed` left of four channels, `channel_bytes` apart.
    static OBC_INLINE void interleave(const uint8_t* codes, int64_t channel_bytes, Packed* pixels) {
        const Packed a = load(codes), b = load(codes + channel_bytes);
        const Packed c = load(codes + 2 * channel_bytes), d = load(codes + 3 * channel_bytes);
        const Packed ab_low = _mm256_unpacklo_epi8(a, b), ab_high = _mm256_unpackhi_epi8(a, b);
        const Packed cd_low = _mm256_unpacklo_epi8(c, d), cd_high = _mm256_unpackhi_epi8(c, d);
        pixels[0] = _mm256_unpacklo_epi16(ab_low, cd_low);
        pixels[1] = _mm256_unpackhi_epi16(ab_low, cd_low);
        pixels[2] = _mm256_unpacklo_epi16(ab_high, cd_high);
        pixels[3] = _mm256_unpackhi_epi16(ab_high, cd_high);
    }
    // One channel of a vector of pixels, and back from all four.
    static OBC_INLINE Floats channel(Packed pixels, int channel) {
        const __m256i moved = _mm256_srli_epi32(pixels, 8 * channel);
        return floats(_mm256_and_si256(moved, _mm256_set1_epi32(255)));
    }
    template <CodesAre kCodes>
    static OBC_INLINE Packed pixels(const Integers* channels, const Bounds& bounds) {
        const Packed by_channel = narrowed<kCodes>(channels[0], channels[1], channels[2], channels[3], bounds);
        const __m128i order = _mm_set_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
        return _mm256_shuffle_epi8(by_channel, _mm256_broadcastsi128_si256(order));
    }
    static OBC_INLINE Packed load(const uint8_t* from) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    }
    static OBC_INLINE void store(uint8_t* to, Packed packed) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), packed);
    }
    static OBC_INLINE void store_first(uint8_t* to, Packed packed, int64_t pixels) {
        _mm256_maskstore_epi32(reinterpret_cast<int*>(to), Codes::first(pixels), packed);
    }
};
