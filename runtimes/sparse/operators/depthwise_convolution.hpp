// DepthwiseConvolution of a blocked tensor.
//
// Neighbouring pixels are taken over the ends of rows, as one list. Strides first part the even rows
// and columns from the odd ones, so that neighbours in the output have neighbours as inputs.
#pragma once

#include "../blocked_tensor.hpp"
#include "../custom_operator.hpp"
#include "../instruction_sets.hpp"
#include "../scratch.hpp"
#include "../sparse_weights.hpp"
#include "../windows.hpp"

namespace obc::sparse {

class DepthwiseConvolution {
  public:
    static constexpr const char* kName = "DepthwiseConvolution";
    static constexpr Input kInputs[] = {{"x", ort::kUint8, Kind::kEachRun},
                                        {"weight", ort::kInt8, Kind::kConstant},
                                        {"weight_scale", ort::kFloat, Kind::kConstant},
                                        {"bias", ort::kInt32, Kind::kOptionalConstant}};
    static constexpr ort::ElementType kOutput = ort::kUint8;

    struct Options {
        int64_t channels;
        Frame input_frame;
        Frame frame;
        Windows strides_and_pads;
        Grid input_grid;
        OutputGrid grid;

        explicit Options(const Attributes& attributes)
            : channels(attributes.channels()),
              input_frame(read_frame(attributes, "input_")),
              frame(read_frame(attributes, "")),
              strides_and_pads(read_windows(attributes, 1, 1, 2)),
              input_grid(read_grid(attributes, "input")), grid(read_output_grid(attributes)) {
            require_padding_in_border(strides_and_pads, input_frame.border);
        }

        BlockedShape input(const Shape& shape) const {
            return blocked_shape(shape, channels, input_frame, "x");
        }

        Windows windows(const Shape& weight) const {
            if (weight.size() != 4 || weight[0] != channels || weight[1] != 1 || weight[2] < 1 ||
                weight[3] < 1 || weight[2] > kMostKernel || weight[3] > kMostKernel) {
                refuse("input 'weight' has shape ", weight, ", expected [", channels,
                       ", 1, height, width]");
            }
            Windows result = strides_and_pads;
            result.height = weight[2];
            result.width = weight[3];
            return result;
        }

        BlockedShape output(const BlockedShape& x, const Windows& windows) const {
            return {x.images, channels, windows.out_height(x.height), windows.out_width(x.width), frame};
        }

        Shape output_shape(const std::vector<Shape>& inputs) const {
            return shape_of(output(input(inputs.at(0)), windows(inputs.at(1))));
        }
    };

    DepthwiseConvolution(const Options& options, const Constants& constants)
        : options_(options), set_(instruction_set()) {
        const Tensor weight = constants.get(1, "weight");
        require_type(weight, "weight", ort::kInt8);
        windows_ = options.windows(weight.shape);
        const std::vector<float> scale = read_weight_scale(constants, 2, options.channels);
        const std::vector<int32_t> bias =
            read_bias<int32_t>(constants, 3, ort::kInt32, options.channels);
        pack(weight.read<int8_t>(), bias,
             multipliers(options.input_grid.scale, scale, options.grid.grid.scale));
    }

    void run(const Run& run, const Tensor& output) const {
        const BlockedShape x = options_.input(run.input(0).shape), y = options_.output(x, windows_);
        const Parted parted(windows_, x, y);
        const int64_t taps = windows_.height * windows_.width;
        run.parallel_planes(y.images * y.blocks(), y.plane_bytes(), [&](int64_t plane) {
            const ScratchPool::Piece tap_inputs = scratch_->borrow(size_t(taps) * sizeof(uint8_t*));
            const ScratchPool::Piece copies = scratch_->borrow(size_t(parted.bytes()));
            const ScratchPool::Piece codes = scratch_->borrow(size_t(parted.pixels * kBlock));
            const uint8_t* pixels = run.input(0).read<uint8_t>() + plane * x.plane_bytes();
            if (parted.phases() > 1) {
                parted.copy(set_, pixels, copies.as<uint8_t>());
                pixels = copies.as<uint8_t>();
            }
            const uint8_t** inputs = tap_inputs.as<const uint8_t*>();
            for (int64_t tap = 0; tap < taps; ++tap) {
                inputs[tap] = pixels + parted.offset(tap / windows_.width, tap % windows_.width);
            }
            const int64_t block = plane % y.blocks();
            const size_t lanes = size_t(block * kTileBytes);
            set_.depthwise({inputs, weights_.data() + block * taps * kBlock, taps, bias_.data() + lanes,
                            multiplier_.data() + lanes, options_.grid.low(), options_.grid.high(),
                            options_.grid.grid.zero_point, parted.pixels, codes.as<uint8_t>()});
            fill_border(output.write<uint8_t>() + plane * y.plane_bytes(), y,
                        options_.grid.grid.zero_point);
            for (int64_t row = 0; row < y.height; ++row) {
                std::memcpy(writable_pixel(output, y, plane, row),
                            codes.as<uint8_t>() + row * parted.width * kBlock,
                            size_t(y.width * kBlock));
            }
            fill_spare_lanes(writable_pixel(output, y, plane), y, block, options_.grid.grid.zero_point);
        });
    }

  private:
    // A plane with its border, as [vertical][horizontal stride][height][width] pixels.
    struct Parted {
        int64_t vertical, horizontal, padded_height, padded_width;
        int64_t first_row, first_column;  // of the first window, in the padded plane
        int64_t height, width;
        int64_t pixels;  // from the first output pixel to the last, with the ends of rows between

        Parted(const Windows& windows, const BlockedShape& x, const BlockedShape& y)
            : vertical(windows.vertical), horizontal(windows.horizontal),
              padded_height(x.height + 2 * x.frame.border), padded_width(x.width + 2 * x.frame.border),
              first_row(x.frame.border - windows.top), first_column(x.frame.border - windows.left),
              height((padded_height + vertical - 1) / vertical),
              width((padded_width + horizontal - 1) / horizontal),
              pixels((y.height - 1) * width + y.width) {}

        int64_t phases() const { return vertical * horizontal; }
        int64_t bytes() const { return phases() > 1 ? phases() * height * width * kBlock : 0; }

        // Of what a tap meets at the first output pixel.
        int64_t offset(int64_t ky, int64_t kx) const {
            const int64_t row = first_row + ky, column = first_column + kx;
            const int64_t phase = row % vertical * horizontal + column % horizontal;
            return ((phase * height + row / vertical) * width + column / horizontal) * kBlock;
        }

        void copy(const InstructionSet& set, const uint8_t* from, uint8_t* to) const {
            // The last row or column of a phase that has one less is never used, but read.
            std::memset(to, 0, size_t(bytes()));
            for (int64_t row = 0; row < padded_height; ++row, from += padded_width * kBlock) {
                for (int64_t column = 0; column < std::min(horizontal, padded_width); ++column) {
                    const int64_t phase = row % vertical * horizontal + column;
                    set.take_pixels(from + column * kBlock, horizontal,
                                    (padded_width - column - 1) / horizontal + 1,
                                    to + (phase * height + row / vertical) * width * kBlock);
                }
            }
        }
    };

    // Weights block by block; bias and multiplier spread over a tile. Spare lanes get zeros.
    void pack(const int8_t* weight, const std::vector<int32_t>& bias,
              const std::vector<float>& multiplier) {
        const int64_t taps = windows_.height * windows_.width,
                      blocks = (options_.channels + kBlock - 1) / kBlock;
        weights_.assign(size_t(blocks * taps * kBlock), 0);
        bias_.assign(size_t(blocks * kTileBytes), 0);
        multiplier_.assign(size_t(blocks * kTileBytes), 0.0f);
        for (int64_t channel = 0; channel < options_.channels; ++channel) {
            const int64_t block = channel / kBlock, lane = channel % kBlock;
            int64_t sum = 0, magnitude = 0;
            for (int64_t tap = 0; tap < taps; ++tap) {
                const int8_t value = weight[channel * taps + tap];
                sum += value;
                magnitude += std::abs(int(value));
                weights_[size_t((block * taps + tap) * kBlock + lane)] = uint16_t(value);
            }
            const int32_t folded = folded_bias(bias[size_t(channel)], sum, magnitude,
                                               options_.input_grid.zero_point, channel);
            for (int64_t i = lane; i < kTileBytes; i += kBlock) {
                bias_[size_t(block * kTileBytes + i)] = folded;
                multiplier_[size_t(block * kTileBytes + i)] = multiplier[size_t(channel)];
            }
        }
    }

    Options options_;
    const InstructionSet& set_;
    Windows windows_;
    std::vector<int32_t> weights_;  // [blocks][taps][4]
    std::vector<int32_t> bias_;     // [blocks][kTileBytes]
    std::vector<float> multiplier_;
    const std::shared_ptr<ScratchPool> scratch_ = ScratchPool::shared();
};

}  // namespace obc::sparse
