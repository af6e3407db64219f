// From sums to codes (included once for each set).
//
// In the order of ONNX Runtime's QLinearConv: the sum as float, times the multiplier, rounded half to
// even, plus the zero point, clamped.

// Beyond any code, and within an int32: a conversion that overflows gives a negative number.
constexpr float kBeyondCodes = 65536.0f;

// What becomes of sums: they are kept for the next group of input blocks, or made codes in the shortest
// way that SumsAre allows.
enum class Ending { kSums, kExact, kBounded, kRectified, kRectifiedWholeRange };
constexpr int kEndings = 5;

// The sums of one output channel, a vector each, to bytes: four vectors in the place of one.
template <int kVectors, Ending kEnding>
static OBC_INLINE void requantize(const Lanes::Sums* sums, float channel_multiplier, const Arithmetic::Bounds& bounds,
                                  uint8_t* codes) {
    constexpr bool kRectified = kEnding == Ending::kRectified || kEnding == Ending::kRectifiedWholeRange;
    constexpr bool kWholeRange = kEnding == Ending::kRectifiedWholeRange;
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
            value[v] = Arithmetic::rounded(kEnding == Ending::kBounded ? product : Arithmetic::at_most(product, most));
        }
        Arithmetic::store(codes, Arithmetic::narrowed<kWholeRange>(value[0], value[1], value[2], value[3], bounds));
    }
}

// The sum of two dequantized codes, quantized. A division takes as long as all the rest: so the sum is
// multiplied by the reciprocal, which is off by less than 2^-12 where codes do not saturate anyway, and
// divided only where that could round to the other side.
struct QuantizedAdd {
    Arithmetic::Floats own_zero;
    Arithmetic::Floats own_scale;
    Arithmetic::Floats other_zero;
    Arithmetic::Floats other_scale;
    Arithmetic::Floats scale;
    Arithmetic::Floats reciprocal;
    Arithmetic::Floats most;

    // One channel of a vector of pixels.
    OBC_INLINE Arithmetic::Floats real(Arithmetic::Packed own, Arithmetic::Packed other, int channel) const {
        const Arithmetic::Floats a = Arithmetic::product(
            Arithmetic::difference(Arithmetic::channel(own, channel), own_zero), own_scale);
        const Arithmetic::Floats b = Arithmetic::product(
            Arithmetic::difference(Arithmetic::channel(other, channel), other_zero), other_scale);
        return Arithmetic::sum(a, b);
    }
};

// Adds the residual's codes to the convolution's, `vectors` vectors of pixels.
static void add_residual(const ResidualAdd& residual, int32_t convolution_zero_point, int vectors,
                         const uint8_t* other, uint8_t* codes) {
    QuantizedAdd add;
    add.own_zero = Arithmetic::all(static_cast<float>(convolution_zero_point));
    add.own_scale = Arithmetic::all(residual.convolution_scale);
    add.other_zero = Arithmetic::all(static_cast<float>(residual.residual_zero_point));
    add.other_scale = Arithmetic::all(residual.residual_scale);
    add.scale = Arithmetic::all(residual.scale);
    add.reciprocal = Arithmetic::all(1.0f / residual.scale);
    add.most = Arithmetic::all(kBeyondCodes);
    const Arithmetic::Bounds bounds(CodeRange{residual.zero_point, residual.lower, residual.upper});
    constexpr int kBytes = Lanes::kPixels * kBlock;
    for (int v = 0; v < vectors; ++v, codes += kBytes, other += kBytes) {
        const Arithmetic::Packed own_pixels = Arithmetic::load(codes);
        const Arithmetic::Packed other_pixels = Arithmetic::load(other);
        Arithmetic::Floats real[kBlock];
        Arithmetic::Integers value[kBlock];
        bool doubtful = false;
#pragma GCC unroll 4
        for (int c = 0; c < kBlock; ++c) {
            real[c] = add.real(own_pixels, other_pixels, c);
            const Arithmetic::Floats about =
                Arithmetic::at_most(Arithmetic::product(real[c], add.reciprocal), add.most);
            value[c] = Arithmetic::rounded(about);
            doubtful |= Arithmetic::any_near_half(about, value[c]);
        }
        for (int c = 0; doubtful && c < kBlock; ++c) {
            value[c] = Arithmetic::rounded(Arithmetic::at_most(Arithmetic::quotient(real[c], add.scale), add.most));
        }
        Arithmetic::store(codes, Arithmetic::pixels(value, bounds));
    }
}
