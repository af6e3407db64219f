// From sums to codes (included once for each set).
//
// In the order of ONNX Runtime's QLinearConv: the sum as float, times the multiplier, rounded half to
// even, plus the zero point, clamped.

// Beyond any code, and within an int32: a conversion that overflows gives a negative number.
constexpr float kBeyondCodes = 65536.0f;

// What becomes of sums: they are kept for the next group of input blocks, or made codes in the shortest
// way that SumsAre allows.
enum class Ending { kSums, kExact, kBounded, kBoundedWhole, kRectified, kRectifiedWhole };
constexpr int kEndings = 6;

constexpr CodesAre codes_of(Ending ending) {
    return ending == Ending::kRectifiedWhole ? CodesAre::kWholeFromZero
           : ending == Ending::kBoundedWhole ? CodesAre::kWhole
                                             : CodesAre::kAny;
}

// The sums of one output channel, a vector each, to bytes: four vectors in the place of one.
template <int kVectors, Ending kEnding>
static OBC_INLINE void requantize(const Lanes::Sums* sums, float channel_multiplier, const Arithmetic::Bounds& bounds,
                                  uint8_t* codes) {
    constexpr bool kRectified = kEnding == Ending::kRectified || kEnding == Ending::kRectifiedWhole;
    constexpr bool kBounded = kEnding == Ending::kBounded || kEnding == Ending::kBoundedWhole;
    constexpr CodesAre kCodes = codes_of(kEnding);
    const Arithmetic::Floats most = Arithmetic::all(kBeyondCodes);
    const Arithmetic::Floats multiplier = Arithmetic::all(channel_multiplier);
    const Arithmetic::Floats offset = Arithmetic::all(channel_multiplier * -8388608.0f);
#pragma GCC unroll 16
    for (int first = 0; first < kVectors; first += 4, codes += Lanes::kPixels * 4) {
        Arithmetic::Integers value[4];
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            if (first + v >= kVectors) {
                value[v] = value[0];
                continue;
            }
            const Arithmetic::Integers whole = Lanes::whole(sums[first + v]);
            if (kRectified) {
                value[v] = Arithmetic::rounded(Arithmetic::rectified(whole, multiplier, offset));
                continue;
            }
            const Arithmetic::Floats product = Arithmetic::product(Arithmetic::floats(whole), multiplier);
            value[v] = Arithmetic::rounded(kBounded ? product : Arithmetic::at_most(product, most));
        }
        Arithmetic::store(codes, Arithmetic::narrowed<kCodes>(value[0], value[1], value[2], value[3], bounds));
    }
}

// The codes of a channel that has no blocks: all its sums are the bias. Apart from the loops over blocks, whose
// registers it would cost.
template <int kVectors, Ending kEnding>
static __attribute__((noinline)) void requantize_bias(int32_t bias, float multiplier, const Arithmetic::Bounds& bounds,
                                      uint8_t* codes) {
    const Lanes::Sums sums[4] = {Lanes::start(bias), Lanes::start(bias), Lanes::start(bias), Lanes::start(bias)};
    requantize<4, kEnding>(sums, multiplier, bounds, codes);
    const Arithmetic::Packed four = Arithmetic::load(codes);
#pragma GCC unroll 7
    for (int first = 4; first < kVectors; first += 4) Arithmetic::store(codes + first * Lanes::kPixels, four);
}

// The sum of two dequantized codes, quantized: ((own - own zero) * own scale + (other - other zero) * other
// scale) / scale, each step rounded. Two fused multiply-adds of the codes come so close to it that the
// integer nearby is another one only next to where rounding changes: there alone it is computed so.
struct QuantizedAdd {
    Arithmetic::Floats own_zero;
    Arithmetic::Floats own_scale;
    Arithmetic::Floats other_zero;
    Arithmetic::Floats other_scale;
    Arithmetic::Floats scale;
    Arithmetic::Floats most;
    Arithmetic::Floats own_slope;
    Arithmetic::Floats other_slope;
    Arithmetic::Floats start;
    Arithmetic::Bounds bounds;
    bool close;       // whether they come so close with these scales
    float near_half;  // the distance from the integer nearby from which on it may be another one

    QuantizedAdd(const ResidualAdd& residual, int32_t convolution_zero_point)
        : own_zero(Arithmetic::all(static_cast<float>(convolution_zero_point))),
          own_scale(Arithmetic::all(residual.convolution_scale)),
          other_zero(Arithmetic::all(static_cast<float>(residual.residual_zero_point))),
          other_scale(Arithmetic::all(residual.residual_scale)),
          scale(Arithmetic::all(residual.scale)),
          most(Arithmetic::all(kBeyondCodes)),
          bounds(range_of(residual)) {
        const double own = static_cast<double>(residual.convolution_scale) / residual.scale;
        const double other = static_cast<double>(residual.residual_scale) / residual.scale;
        const double zeros = own * convolution_zero_point + other * residual.residual_zero_point;
        own_slope = Arithmetic::all(static_cast<float>(own));
        other_slope = Arithmetic::all(static_cast<float>(other));
        start = Arithmetic::all(static_cast<float>(-zeros));
        // No term and no sum is larger: each of the roundings, some nine in all, adds half a unit in the
        // last place of that at most.
        const double largest = 255.0 * (own + other) + zeros;
        close = largest < kLargestSum;
        near_half = static_cast<float>(0.5 - 12.0 * largest / (1 << 24));
    }

    // One channel of a vector of pixels.
    OBC_INLINE Arithmetic::Integers step_by_step(Arithmetic::Packed own, Arithmetic::Packed other, int channel) const {
        const Arithmetic::Floats a = Arithmetic::product(
            Arithmetic::difference(Arithmetic::channel(own, channel), own_zero), own_scale);
        const Arithmetic::Floats b = Arithmetic::product(
            Arithmetic::difference(Arithmetic::channel(other, channel), other_zero), other_scale);
        const Arithmetic::Floats quotient = Arithmetic::quotient(Arithmetic::sum(a, b), scale);
        return Arithmetic::rounded(Arithmetic::at_most(quotient, most));
    }
    OBC_INLINE Arithmetic::Floats about(Arithmetic::Packed own, Arithmetic::Packed other, int channel) const {
        const Arithmetic::Floats first =
            Arithmetic::product_sum(Arithmetic::channel(other, channel), other_slope, start);
        return Arithmetic::product_sum(Arithmetic::channel(own, channel), own_slope, first);
    }
};

// What becomes of a vector of the convolution's pixels before it is stored: nothing...
struct AsTheyAre {
    static constexpr bool kReadsResidual = false;

    OBC_INLINE Arithmetic::Packed operator()(Arithmetic::Packed own, const uint8_t*, int64_t) const { return own; }
};

// ... or the residual's are added to it.
template <CodesAre kCodes>
struct WithResidual {
    static constexpr bool kReadsResidual = true;
    QuantizedAdd add;

    OBC_INLINE Arithmetic::Packed operator()(Arithmetic::Packed own, const uint8_t* residual, int64_t offset) const {
        const Arithmetic::Packed other = Arithmetic::load(residual + offset);
        Arithmetic::Integers value[kBlock];
        Arithmetic::Floats away = Arithmetic::all(0.0f);
#pragma GCC unroll 4
        for (int c = 0; c < kBlock; ++c) {
            const Arithmetic::Floats about = add.about(own, other, c);
            value[c] = Arithmetic::rounded(about);
            away = Arithmetic::farther(away, Arithmetic::away(about, value[c]));
        }
        if (!add.close || Arithmetic::any_above(away, add.near_half)) {
            for (int c = 0; c < kBlock; ++c) value[c] = add.step_by_step(own, other, c);
        }
        return Arithmetic::pixels<kCodes>(value, add.bounds);
    }
};
