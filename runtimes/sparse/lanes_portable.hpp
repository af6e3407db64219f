// Eight pixels at a time in plain C++, the reference of the others (see convolution_kernels.hpp).

struct Codes {
    static constexpr int kLanes = 8;
    static constexpr int kBytes = 4;

    static void pack_one(uint8_t* to, const uint8_t* from) { __builtin_memcpy(to, from, kBytes); }
    static void pack_run(uint8_t* to, const uint8_t* from, int64_t pixels) {
        __builtin_memcpy(to, from, static_cast<size_t>(pixels * kBytes));
    }
    static void pack_every_second(uint8_t* to, const uint8_t* from, int64_t pixels) {
        for (int64_t p = 0; p < pixels; ++p) pack_one(to + p * kBytes, from + 2 * p * kBytes);
    }
    static void unpack_run(uint8_t* to, const uint8_t* from, int64_t pixels) { pack_run(to, from, pixels); }
    static void pack_four(uint8_t* const* to, const uint8_t* const* lanes, int64_t offset) {
        for (int k = 0; k < 4; ++k) {
            for (int lane = 0; lane < kLanes; ++lane) {
                pack_one(to[k] + lane * kBytes, lanes[lane] + offset + k * kBytes);
            }
        }
    }
    static void unpack_four(uint8_t* const* lanes, int64_t offset, const uint8_t* from) {
        for (int k = 0; k < 4; ++k) {
            for (int lane = 0; lane < kLanes; ++lane) {
                pack_one(lanes[lane] + offset + k * kBytes, from + (k * kLanes + lane) * kBytes);
            }
        }
    }
};

typedef Codes TilePixels;

// The steps from sums to codes.
struct Arithmetic {
    struct Floats {
        float lane[Codes::kLanes];
    };
    struct Integers {
        int32_t lane[Codes::kLanes];
    };
    struct Packed {
        uint8_t code[Codes::kLanes * kBlock];
    };

    static Floats all(float value) {
        Floats result;
        for (float& lane : result.lane) lane = value;
        return result;
    }
    static Floats floats(const Integers& from) {
        Floats result;
        for (int i = 0; i < Codes::kLanes; ++i) result.lane[i] = static_cast<float>(from.lane[i]);
        return result;
    }
    static Floats product(const Floats& a, const Floats& b) {
        Floats result;
        for (int i = 0; i < Codes::kLanes; ++i) result.lane[i] = a.lane[i] * b.lane[i];
        __asm__("" : "+m"(result));  // rounded here: no fused multiply-add may be made of it
        return result;
    }
    static Floats sum(const Floats& a, const Floats& b) {
        Floats result;
        for (int i = 0; i < Codes::kLanes; ++i) result.lane[i] = a.lane[i] + b.lane[i];
        return result;
    }
    static Floats difference(const Floats& a, const Floats& b) {
        Floats result;
        for (int i = 0; i < Codes::kLanes; ++i) result.lane[i] = a.lane[i] - b.lane[i];
        return result;
    }
    static Floats quotient(const Floats& a, const Floats& b) {
        Floats result;
        for (int i = 0; i < Codes::kLanes; ++i) result.lane[i] = a.lane[i] / b.lane[i];
        return result;
    }
    static Floats at_most(const Floats& a, const Floats& b) {
        Floats result;
        for (int i = 0; i < Codes::kLanes; ++i) result.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i];
        return result;
    }
    // (sum - 2^23) * multiplier of what are the bits of a float.
    static Floats rectified(const Integers& sums, const Floats& multiplier, const Floats&) {
        Floats result;
        for (int i = 0; i < Codes::kLanes; ++i) {
            result.lane[i] = static_cast<float>(sums.lane[i] - kRectifiedBits) * multiplier.lane[i];
        }
        return result;
    }
    static Integers rounded(const Floats& value) {
        const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, half to even
        Integers result;
        for (int i = 0; i < Codes::kLanes; ++i) {
            const float raised = value.lane[i] < -65536.0f ? -65536.0f : value.lane[i];
            const float bounded = raised > 65536.0f ? 65536.0f : raised;
            result.lane[i] = static_cast<int32_t>((bounded + magic) - magic);
        }
        return result;
    }

    static Floats product_sum(const Floats& a, const Floats& b, const Floats& c) { return sum(product(a, b), c); }
    // How far values are from the integers they were rounded to, and the larger of two magnitudes.
    static Floats away(const Floats& value, const Integers& rounded) { return difference(value, floats(rounded)); }
    static Floats farther(const Floats& a, const Floats& b) {
        Floats result;
        for (int i = 0; i < Codes::kLanes; ++i) {
            const float one = a.lane[i] < 0 ? -a.lane[i] : a.lane[i];
            const float other = b.lane[i] < 0 ? -b.lane[i] : b.lane[i];
            result.lane[i] = one < other ? other : one;
        }
        return result;
    }
    static bool any_above(const Floats& magnitudes, float limit) {
        bool above = false;
        for (int i = 0; i < Codes::kLanes; ++i) above = above || magnitudes.lane[i] > limit;
        return above;
    }

    typedef CodeRange Bounds;
    static uint8_t code(int32_t value, const Bounds& bounds) {
        const int32_t moved = value + bounds.zero_point;
        const int32_t raised = moved < bounds.lower ? bounds.lower : moved;
        return static_cast<uint8_t>(raised > bounds.upper ? bounds.upper : raised);
    }
    // Codes of four vectors, one after the other.
    template <CodesAre>
    static Packed narrowed(const Integers& a, const Integers& b, const Integers& c, const Integers& d,
                           const Bounds& bounds) {
        Packed result;
        for (int i = 0; i < Codes::kLanes; ++i) {
            result.code[i] = code(a.lane[i], bounds);
            result.code[Codes::kLanes + i] = code(b.lane[i], bounds);
            result.code[2 * Codes::kLanes + i] = code(c.lane[i], bounds);
            result.code[3 * Codes::kLanes + i] = code(d.lane[i], bounds);
        }
        return result;
    }
    // Four vectors of pixels of the codes that `narrowed` left of four channels, `channel_bytes` apart.
    static void interleave(const uint8_t* from, int64_t channel_bytes, Packed* pixels) {
        for (int pixel = 0; pixel < 4 * Codes::kLanes; ++pixel) {
            uint8_t* const codes = pixels[pixel / Codes::kLanes].code + pixel % Codes::kLanes * kBlock;
            for (int channel = 0; channel < kBlock; ++channel) codes[channel] = from[channel * channel_bytes + pixel];
        }
    }
    // One channel of a vector of pixels, and back from all four.
    static Floats channel(const Packed& pixels, int channel) {
        Floats result;
        for (int i = 0; i < Codes::kLanes; ++i) result.lane[i] = pixels.code[i * kBlock + channel];
        return result;
    }
    template <CodesAre>
    static Packed pixels(const Integers* channels, const Bounds& bounds) {
        Packed result;
        for (int i = 0; i < Codes::kLanes; ++i) {
            for (int channel = 0; channel < kBlock; ++channel) {
                result.code[i * kBlock + channel] = code(channels[channel].lane[i], bounds);
            }
        }
        return result;
    }
    static Packed load(const uint8_t* from) {
        Packed result;
        __builtin_memcpy(&result, from, sizeof result);
        return result;
    }
    static void store(uint8_t* to, const Packed& packed) { __builtin_memcpy(to, &packed, sizeof packed); }
    static void store_first(uint8_t* to, const Packed& packed, int64_t pixels) {
        __builtin_memcpy(to, &packed, static_cast<size_t>(pixels * kBlock));
    }
};

struct Lanes {
    static constexpr const char* kName = "portable";
    static constexpr int kPixels = Codes::kLanes;
    static constexpr int kPixelBytes = TilePixels::kBytes;
    static constexpr int kWeightBytes = 4;
    static constexpr bool kOneInstruction = false;  // add_products
    static constexpr int kSumBytes = 4;
    static constexpr int kCacheBytes = 24 * 1024;
    static constexpr int kBandChannels = 1;

    struct Sums {
        int32_t lane[kPixels];
    };
    struct Weights {
        int32_t of[kBlock];
    };

    static Sums start(int32_t bias) {
        Sums sums;
        for (int32_t& lane : sums.lane) lane = bias;
        return sums;
    }
    static Sums zero() { return start(0); }
    static Sums load(const void* from) {
        Sums sums;
        __builtin_memcpy(&sums, from, sizeof sums);
        return sums;
    }
    static void store(void* to, const Sums& sums) { __builtin_memcpy(to, &sums, sizeof sums); }
    static Weights weights(const uint8_t* block) {
        int8_t four[kBlock];
        __builtin_memcpy(four, block, sizeof four);
        return Weights{{four[0], four[1], four[2], four[3]}};
    }
    static OBC_INLINE Sums add_products(const Sums& sums, const uint8_t* pixels, const Weights& weights) {
        Sums result;
        for (int i = 0; i < kPixels; ++i) {
            const uint8_t* pixel = pixels + i * kBlock;
            result.lane[i] = sums.lane[i] + (pixel[0] * weights.of[0] + pixel[1] * weights.of[1] +
                                             pixel[2] * weights.of[2] + pixel[3] * weights.of[3]);
        }
        return result;
    }
    static Sums add(const Sums& a, const Sums& b) {
        Sums result;
        for (int i = 0; i < kPixels; ++i) result.lane[i] = a.lane[i] + b.lane[i];
        return result;
    }
    static Arithmetic::Integers whole(const Sums& sums) {
        Arithmetic::Integers result;
        for (int i = 0; i < kPixels; ++i) result.lane[i] = sums.lane[i];
        return result;
    }
};
