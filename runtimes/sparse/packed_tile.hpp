// A tile's pixels between blocked tensors and aligned vectors (included once for each set).
//
// Two ways to give pixels to lanes. Flat (1x1 kernels): the output's pixels are one list, a vector the
// next kPixels of it. Subtiles: each lane has a small rectangle of the output of its own, and a vector
// holds the same position of all lanes' rectangles; so a shift by a kernel position is another
// vector, and no load is ever unaligned.

struct Subtiles {  // where each lane's starts
    const uint8_t* input[Lanes::kPixels];
    const uint8_t* residual[Lanes::kPixels];
    uint8_t* output[Lanes::kPixels];
};

// One position of a vector, where the rows are too short for four.
template <class Pixels>
static OBC_INLINE void pack_position(uint8_t* to, const uint8_t* const* lanes, int64_t offset, int present,
                                     bool fours) {
    if (fours && Pixels::kBytes == kBlock) {
#pragma GCC unroll 4
        for (int lane = 0; lane < Lanes::kPixels; lane += 4) {
            __builtin_memcpy(to + lane * kBlock, lanes[lane] + offset, 4 * kBlock);
        }
        return;
    }
    for (int lane = 0; lane < present; ++lane) {
        Pixels::pack_one(to + lane * Pixels::kBytes, lanes[lane] + offset);
    }
}

template <class Pixels>
static void pack_subtiles(uint8_t* to, const uint8_t* const* lanes, int present, bool fours, int64_t offset,
                          int64_t row_bytes, const int32_t* row_slot, int64_t rows,
                          const int32_t* column_slot, int64_t columns, int64_t slots) {
    constexpr int kBytes = Lanes::kPixels * Pixels::kBytes;
    for (int64_t row = 0; row < rows; ++row, offset += row_bytes) {
        uint8_t* const start = to + row_slot[row] * slots * kBytes;
        if (columns < 4) {
            for (int64_t column = 0; column < columns; ++column) {
                pack_position<Pixels>(start + column_slot[column] * kBytes, lanes, offset + column * kBlock,
                                      present, fours);
            }
            continue;
        }
        for (int64_t column = 0;;) {
            uint8_t* const vectors[4] = {
                start + column_slot[column] * kBytes, start + column_slot[column + 1] * kBytes,
                start + column_slot[column + 2] * kBytes, start + column_slot[column + 3] * kBytes};
            Pixels::pack_four(vectors, lanes, offset + column * kBlock);
            if (column == columns - 4) break;
            column = column + 8 <= columns ? column + 4 : columns - 4;
        }
    }
}

// A row's columns four at a time; the last four may overlap those before.
static OBC_INLINE int next_four(int column, int columns) { return column + 8 <= columns ? column + 4 : columns - 4; }

static void unpack_subtiles(const TilePlace& place, const Subtiles& subtiles, int64_t offset, int64_t row_bytes, int rows,
                            int columns, const uint8_t* from) {
    constexpr int kCodeBytes = Lanes::kPixels * kBlock;
    for (int row = 0; row < rows; ++row, offset += row_bytes, from += columns * kCodeBytes) {
        for (int column = 0; columns >= 4 && place.whole; column = next_four(column, columns)) {
            Codes::unpack_four(subtiles.output, offset + column * kBlock, from + column * kCodeBytes);
            if (column == columns - 4) break;
        }
        if (columns >= 4 && place.whole) continue;
        if (columns == 1 && place.whole && place.fours_out) {
#pragma GCC unroll 4
            for (int lane = 0; lane < Lanes::kPixels; lane += 4) {
                __builtin_memcpy(subtiles.output[lane] + offset, from + lane * kBlock, 4 * kBlock);
            }
            continue;
        }
        for (int lane = 0; lane < place.present; ++lane) {
            if (row < place.rows_before[lane]) continue;
            const int first = place.columns_before[lane];
            const uint8_t* const pixels = from + lane * kBlock;
            uint8_t* const to = subtiles.output[lane] + offset;
            for (int column = first; column < columns; ++column) {
                __builtin_memcpy(to + column * kBlock, pixels + column * kCodeBytes, kBlock);
            }
        }
    }
}
