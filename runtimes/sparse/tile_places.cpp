// Where each tile's pixels are: worked out once for a shape, not in each run.
#include <algorithm>
#include <utility>

#include "block_convolution.hpp"

namespace obc {
namespace sparse {

// A tensor up to this size is still in the second cache, or in the third one, when the layer comes to it.
// Lines of larger ones are asked for before they are needed.
constexpr int64_t kNearBytes = 2 * 1024 * 1024;

// The border of an image that belongs to the pixels first_x to last_x - 1 of its row y: what lies
// before its first pixel, and after the row's end up to the next row's first pixel.
void ConvolutionPlan::own_border(int64_t image, int64_t y, int64_t first_x, int64_t last_x) {
    if (output_.frame.border == 0) return;
    const int64_t start = image * output_.image_bytes();
    if (y == 0 && first_x == 0) border_runs_.push_back(BorderRun{start, output_.offset(0, 0) / kBlock});
    if (last_x == output_.width) {
        const int64_t row_end = output_.offset(y, output_.width);
        const int64_t next = y + 1 == output_.height ? output_.bordered_bytes() : output_.offset(y + 1, 0);
        border_runs_.push_back(BorderRun{start + row_end, (next - row_end) / kBlock});
    }
}

// Where tiles of at most `most` pixels of a list begin, and the last one ends: all have about as many, and
// as far as that leaves room each begins with a cache line, for threads should not write to one together.
static std::vector<int64_t> tile_starts(int64_t tiles, int64_t most, int64_t pixels) {
    std::vector<int64_t> starts = {0};
    for (int64_t tile = 1; tile <= tiles; ++tile) {
        const int64_t least = pixels - (tiles - tile) * most;
        const int64_t even = std::max(tile * pixels / tiles, least);
        const int64_t start = std::min(starts.back() + most, even);
        const int64_t at_line = start - start % (kLineBytes / kBlock);
        starts.push_back(at_line >= least && at_line > starts.back() ? at_line : start);
    }
    return starts;
}

// The tile's pixels in runs that are contiguous in all tensors.
void ConvolutionPlan::place_flat(int64_t tile, const std::vector<int64_t>& starts, TilePlace& place) {
    const BlockedShape& input = shape_.input;
    const int64_t stride = shape_.stride;
    const int64_t image_pixels = output_.height * output_.width;
    const size_t tiles = starts.size() - 1;  // of the list, which in place is an image's
    const int64_t list = tile / static_cast<int64_t>(tiles);
    const int64_t first = list * image_pixels;
    const int64_t begin = first + starts[static_cast<size_t>(tile) % tiles];
    const int64_t end = first + starts[static_cast<size_t>(tile) % tiles + 1];
    int64_t start = begin;
    if (in_place_) {
        // What follows the last pixel is the plane's too; else the tile begins over the one above.
        const int64_t last = input.plane_bytes() / kBlock - kernels_->shapes[tile_].pixels(kernels_->lanes);
        start = std::min(begin, first + last);
        place.first_pixel = list * input.image_bytes() + (start - first) * kBlock;
    }
    int64_t image = begin / image_pixels;
    int64_t y = begin % image_pixels / output_.width;
    int64_t x = begin % image_pixels % output_.width;
    const size_t first_run = pixel_runs_.size();
    for (int64_t pixel = begin; pixel < end;) {
        int64_t pixels = output_.width - x;
        if (pixels > end - pixel) pixels = end - pixel;
        const PixelRun run = {image * input.image_bytes() + input.offset(y * stride, x * stride),
                              image * output_.image_bytes() + output_.offset(y, x),
                              image * residual_shape_.image_bytes() + residual_shape_.offset(y, x),
                              static_cast<int32_t>(pixel - start), static_cast<int32_t>(pixels)};
        const bool any = pixel_runs_.size() > first_run;
        const int64_t before = any ? int64_t{pixel_runs_.back().pixels} * kBlock : -1;
        if (stride == 1 && any && run.input == pixel_runs_.back().input + before &&
            run.output == pixel_runs_.back().output + before &&
            run.residual == pixel_runs_.back().residual + before) {
            pixel_runs_.back().pixels += run.pixels;
        } else {
            pixel_runs_.push_back(run);
        }
        own_border(image, y, x, x + pixels);
        pixel += pixels;
        x = 0;
        if (++y == output_.height) {
            y = 0;
            ++image;
        }
    }
    place.pixel_runs = static_cast<int64_t>(pixel_runs_.size() - first_run);
}

// Whether lanes are neighbours in memory, four at a time.
static bool are_fours(const int64_t* offsets, int lanes) {
    bool fours = true;
    for (int lane = 0; lane < lanes; ++lane) {
        fours &= lane % 4 == 0 || offsets[lane] - offsets[lane - 1] == kBlock;
    }
    return fours;
}

void ConvolutionPlan::place_subtiles(int64_t tile, TilePlace& place) {
    const BlockedShape& input = shape_.input;
    const int64_t stride = shape_.stride;
    const TileShape& shape = kernels_->shapes[tile_];
    place.whole = true;
    const int64_t begin = tile * kernels_->lanes;
    int64_t across = begin % across_;
    int64_t down = begin / across_ % down_;
    int64_t image = begin / across_ / down_;
    bool present = true;
    for (int lane = 0; lane < kernels_->lanes; ++lane) {
        const int64_t row = down * shape.rows;
        const int64_t column = across * shape.columns;
        // The last ones reach back over their neighbours, rather than over the edge.
        const int64_t y = row < output_.height - shape.rows ? row : output_.height - shape.rows;
        const int64_t x = column < output_.width - shape.columns ? column : output_.width - shape.columns;
        place.input[lane] =
            image * input.image_bytes() + input.offset(y * stride - shape_.top, x * stride - shape_.left);
        place.residual[lane] = image * residual_shape_.image_bytes() + residual_shape_.offset(y, x);
        place.output[lane] = image * output_.image_bytes() + output_.offset(y, x);
        place.rows_before[lane] = static_cast<int32_t>(row - y);
        place.columns_before[lane] = static_cast<int32_t>(column - x);
        if (row != y || column != x) place.whole = false;
        for (int64_t own_row = row; present && own_row < y + shape.rows; ++own_row) {
            own_border(image, own_row, column, x + shape.columns);
        }
        place.present += present;
        if (across + 1 < across_) {
            ++across;
        } else if (down + 1 < down_) {
            across = 0;
            ++down;
        } else if (image + 1 < output_.images) {
            across = down = 0;
            ++image;
        } else {
            present = false;
        }
    }
    place.fours_in = are_fours(place.input, kernels_->lanes);
    place.fours_out = are_fours(place.output, kernels_->lanes);
    place.fours_residual = are_fours(place.residual, kernels_->lanes);
}

// Of a tensor with the output's pixels; `run_start` and `lane_start` are its places.
LinesAhead ConvolutionPlan::add_lines(const BlockedShape& tensor, const TilePlace& place,
                                      int64_t PixelRun::*run_start, const int64_t* lane_start) {
    const int64_t first = static_cast<int64_t>(lines_.size());
    if (tensor.bytes() <= kNearBytes) return LinesAhead{first, 0};
    std::vector<std::pair<int64_t, int64_t>> runs;  // bytes, from first to last; they may overlap
    for (int64_t r = 0; r < place.pixel_runs; ++r) {
        const PixelRun& run = pixel_runs_[static_cast<size_t>(place.first_pixel_run + r)];
        runs.emplace_back(run.*run_start, run.*run_start + int64_t{run.pixels} * kBlock);
    }
    const TileShape& shape = kernels_->shapes[tile_];
    for (int lane = 0; lane < place.present; ++lane) {
        for (int64_t row = 0; row < shape.rows; ++row) {
            const int64_t begin = lane_start[lane] + row * tensor.row_bytes();
            runs.emplace_back(begin, begin + int64_t{shape.columns} * kBlock);
        }
    }
    std::sort(runs.begin(), runs.end());
    int64_t next = runs.front().first;
    for (const auto& [begin, end] : runs) {
        for (next = std::max(begin, next); next < end; next += kLineBytes) lines_.push_back(next);
    }
    return LinesAhead{first, static_cast<int64_t>(lines_.size()) - first};
}

void ConvolutionPlan::place_tiles() {
    places_.resize(static_cast<size_t>(tiles_));
    const int64_t tile_pixels = kernels_->shapes[tile_].pixels(kernels_->lanes);
    const int64_t lists = in_place_ ? output_.images : 1;
    const int64_t pixels = output_.images / lists * output_.height * output_.width;
    std::vector<int64_t> starts;
    if (flat_) starts = tile_starts(tiles_ / lists, tile_pixels, pixels);
    for (int64_t tile = 0; tile < tiles_; ++tile) {
        TilePlace& place = places_[static_cast<size_t>(tile)];
        place.first_pixel_run = static_cast<int64_t>(pixel_runs_.size());
        place.first_border_run = static_cast<int64_t>(border_runs_.size());
        if (flat_) {
            place_flat(tile, starts, place);
        } else {
            place_subtiles(tile, place);
        }
        place.output_lines = add_lines(output_, place, &PixelRun::output, place.output);
        if (residual_.present) {
            place.residual_lines = add_lines(residual_shape_, place, &PixelRun::residual, place.residual);
        }
        place.border_runs = static_cast<int64_t>(border_runs_.size()) - place.first_border_run;
    }
}

}  // namespace sparse
}  // namespace obc
