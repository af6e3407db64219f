// SparseConvolutionFloat: [N, C, H, W] float tensors, unstructured sparse weights.
//
// The input is copied with its padding; with stride 2 even and odd rows and columns lie apart. Then
// what a weight meets at neighbouring output pixels lies side by side, over the ends of rows too.
#pragma once

#include <memory>
#include <mutex>

#include "../custom_operator.hpp"
#include "../float_weights.hpp"
#include "../instruction_sets.hpp"
#include "../scratch.hpp"
#include "../windows.hpp"

namespace obc::sparse {

class SparseConvolutionFloat {
  public:
    static constexpr const char* kName = "SparseConvolutionFloat";
    static constexpr Input kInputs[] = {{"x", ort::kFloat, Kind::kEachRun},
                                        {"values", ort::kFloat, Kind::kConstant},
                                        {"mask", ort::kUint8, Kind::kConstant},
                                        {"bias", ort::kFloat, Kind::kOptionalConstant},
                                        {"residual", ort::kFloat, Kind::kOptional}};
    static constexpr ort::ElementType kOutput = ort::kFloat;
    static constexpr size_t kResidual = 4;

    struct Options {
        int64_t channels;
        Windows windows;
        Clip clip;

        explicit Options(const Attributes& attributes)
            : channels(attributes.channels()), windows(read_windows(attributes, 2)), clip(attributes) {
            require_equal_strides(windows);
            require_padding_below_kernel(windows);
        }

        Shape output_shape(const std::vector<Shape>& inputs) const {
            const Shape& x = inputs.at(0);
            if (x.size() != 4 || x[1] != channels || x[2] < 1 || x[3] < 1) {
                refuse("input 'x' has shape ", x, ", expected [N, ", channels, ", H, W]");
            }
            return {x[0], outputs_of(inputs.at(2)), windows.out_height(x[2]), windows.out_width(x[3])};
        }
    };

    SparseConvolutionFloat(const Options& options, const Constants& constants)
        : options_(options), set_(instruction_set()),
          entries_(read_entries(constants,
                                options.windows.height * options.windows.width * options.channels)),
          bias_(read_bias<float>(constants, 3, ort::kFloat, entries_.outputs)) {}

    void run(const Run& run, const Tensor& output) const {
        const Tensor& x = run.input(0);
        const float* residual = nullptr;
        if (run.has(kResidual)) {
            require_shape(run.input(kResidual), "residual", output.shape);
            residual = run.input(kResidual).read<float>();
        }
        const Padded padded(options_, x.shape);
        const std::shared_ptr<const std::vector<int32_t>> offsets = offsets_for(padded);
        const int64_t images = x.shape[0], out_height = output.shape[2], out_width = output.shape[3];

        const ScratchPool::Piece scratch =
            scratch_->borrow(size_t(images * padded.image() + set_.floats) * sizeof(float));
        float* copies = scratch.as<float>();
        std::fill_n(copies + images * padded.image(), set_.floats, 0.0f);
        run.parallel(images * options_.channels, [&](int64_t channel) {
            padded.copy(x.read<float>() + channel * x.shape[2] * x.shape[3],
                        copies + channel * padded.channel());
        });

        constexpr int64_t kOutputs = 32;
        const int64_t pixels =
            (out_height - 1) * padded.width + out_width;  // with the ends of rows between
        const int64_t tiles = (pixels + set_.floats - 1) / set_.floats;
        const int64_t chunks = (entries_.outputs + kOutputs - 1) / kOutputs;
        const FloatEntries weights{entries_.row_start.data(), offsets->data(), entries_.values.data(),
                                   1};
        run.parallel(images * tiles * chunks, [&](int64_t part) {
            const int64_t chunk = part % chunks, tile = part / chunks % tiles,
                          image = part / chunks / tiles;
            const int64_t first = tile * set_.floats, last = std::min(first + set_.floats, pixels);
            const ScratchPool::Piece piece = scratch_->borrow(size_t(set_.floats) * sizeof(float));
            float* sums = piece.as<float>();
            for (int64_t o = chunk * kOutputs; o < std::min((chunk + 1) * kOutputs, entries_.outputs);
                 ++o) {
                set_.float_products(weights, o, copies + image * padded.image() + first, sums);
                const int64_t plane = (image * entries_.outputs + o) * out_height * out_width;
                for (int64_t y = first / padded.width; y * padded.width < last; ++y) {
                    const int64_t begin = std::max(first, y * padded.width);
                    const int64_t end = std::min(last, y * padded.width + out_width);
                    for (int64_t at = begin; at < end; ++at) {
                        const int64_t pixel = plane + y * out_width + (at - y * padded.width);
                        const float sum = sums[at - first] + bias_[size_t(o)];
                        output.write<float>()[pixel] =
                            options_.clip(residual ? sum + residual[pixel] : sum);
                    }
                }
            }
        });
    }

  private:
    // The padded copy of an image: [channels][stride][stride][height][width].
    struct Padded {
        int64_t channels, in_height, in_width, stride, top, left, height, width;

        Padded(const Options& options, const Shape& x)
            : channels(options.channels), in_height(x[2]), in_width(x[3]),
              stride(options.windows.vertical), top(options.windows.top), left(options.windows.left),
              height((in_height + top + options.windows.bottom + stride - 1) / stride),
              width((in_width + left + options.windows.right + stride - 1) / stride) {
            if (image() > std::numeric_limits<int32_t>::max())
                refuse("input 'x' of shape ", x, " is too large");
        }

        int64_t channel() const { return stride * stride * height * width; }
        int64_t image() const { return channels * channel(); }
        int64_t offset(int64_t y, int64_t x) const {
            return ((y % stride * stride + x % stride) * height + y / stride) * width + x / stride;
        }

        void copy(const float* from, float* to) const {
            std::fill_n(to, channel(), 0.0f);
            for (int64_t y = 0; y < in_height; ++y, from += in_width) {
                if (stride == 1) {
                    std::copy_n(from, in_width, to + offset(y + top, left));
                    continue;
                }
                for (int64_t phase = 0; phase < std::min<int64_t>(2, in_width); ++phase) {
                    float* row = to + offset(y + top, left + phase);
                    for (int64_t x = phase; x < in_width; x += 2) *row++ = from[x];
                }
            }
        }
    };

    // Where each weight's first input lies; kept for the last size of image.
    std::shared_ptr<const std::vector<int32_t>> offsets_for(const Padded& padded) const {
        std::lock_guard<std::mutex> lock(mutex_);
        if (offsets_ && known_height_ == padded.in_height && known_width_ == padded.in_width)
            return offsets_;
        std::vector<int32_t> offsets;
        offsets.reserve(entries_.index.size());
        for (int64_t column : entries_.index) {
            const int64_t channel = column % padded.channels, position = column / padded.channels;
            const int64_t ky = position / options_.windows.width,
                          kx = position % options_.windows.width;
            offsets.push_back(int32_t(channel * padded.channel() + padded.offset(ky, kx)));
        }
        offsets_ = std::make_shared<const std::vector<int32_t>>(std::move(offsets));
        known_height_ = padded.in_height;
        known_width_ = padded.in_width;
        return offsets_;
    }

    Options options_;
    const InstructionSet& set_;
    FloatRows entries_;
    std::vector<float> bias_;
    mutable std::mutex mutex_;
    mutable std::shared_ptr<const std::vector<int32_t>> offsets_;
    mutable int64_t known_height_ = 0;
    mutable int64_t known_width_ = 0;
    const std::shared_ptr<ScratchPool> scratch_ = ScratchPool::shared();
};

}  // namespace obc::sparse
