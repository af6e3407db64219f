// A tensor's sizes, without memory of their own: small layers run for a few microseconds, in which a
// dozen allocations would be seen.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace obc::sparse {

constexpr size_t kMostDimensions = 8;

class Shape {
  public:
    Shape() = default;
    // Zeros; at most kMostDimensions of them, which callers check.
    explicit Shape(size_t rank) : rank_(std::min(rank, kMostDimensions)) {}
    Shape(std::initializer_list<int64_t> sizes) : Shape(sizes.size()) {
        std::copy_n(sizes.begin(), rank_, sizes_);
    }

    size_t size() const { return rank_; }
    const int64_t* data() const { return sizes_; }
    int64_t* data() { return sizes_; }
    const int64_t* begin() const { return sizes_; }
    const int64_t* end() const { return sizes_ + rank_; }
    int64_t operator[](size_t index) const { return sizes_[index]; }
    int64_t& operator[](size_t index) { return sizes_[index]; }
    int64_t back() const { return sizes_[rank_ - 1]; }
    int64_t& back() { return sizes_[rank_ - 1]; }
    bool empty() const { return rank_ == 0; }
    // Whether a tensor of this shape has any.
    bool has_elements() const { return std::find(begin(), end(), int64_t{0}) == end(); }

    bool operator==(const Shape& other) const {
        return rank_ == other.rank_ && std::equal(begin(), end(), other.begin());
    }
    bool operator!=(const Shape& other) const { return !(*this == other); }

  private:
    size_t rank_ = 0;
    int64_t sizes_[kMostDimensions] = {};
};

}  // namespace obc::sparse
