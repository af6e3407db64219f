// Memory that runs borrow and give back, so that it is allocated only once.
#pragma once

#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

namespace obc::sparse {

class ScratchPool {
  public:
    // One piece of memory, 64-byte aligned, of at least the bytes asked for; it goes back to the pool
    // when its owner ends.
    class Piece {
      public:
        Piece(ScratchPool& pool, size_t bytes) : pool_(pool), memory_(pool.take(bytes)) {}
        ~Piece() { pool_.put_back(std::move(memory_)); }
        Piece(const Piece&) = delete;
        Piece& operator=(const Piece&) = delete;

        template <class T>
        T* as() const {
            return reinterpret_cast<T*>(memory_.data.get());
        }

      private:
        friend class ScratchPool;
        struct Free {
            void operator()(unsigned char* data) const { std::free(data); }
        };
        struct Memory {
            size_t bytes = 0;
            std::unique_ptr<unsigned char, Free> data;
        };

        ScratchPool& pool_;
        Memory memory_;
    };

    Piece borrow(size_t bytes) { return Piece(*this, bytes); }

  private:
    static constexpr size_t kAligned = 64;

    Piece::Memory take(size_t bytes) {
        Piece::Memory memory;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            if (!free_.empty()) {
                memory = std::move(free_.back());
                free_.pop_back();
            } else {
                free_.reserve(++pieces_);  // so that giving back allocates nothing
            }
        }
        if (memory.bytes < bytes || !memory.data) {
            memory.bytes = (bytes / kAligned + 1) * kAligned;
            memory.data.reset(static_cast<unsigned char*>(std::aligned_alloc(kAligned, memory.bytes)));
            if (!memory.data) throw std::bad_alloc();
        }
        return memory;
    }

    void put_back(Piece::Memory memory) {
        std::lock_guard<std::mutex> lock(mutex_);
        free_.push_back(std::move(memory));
    }

    std::mutex mutex_;
    std::vector<Piece::Memory> free_;
    size_t pieces_ = 0;
};

}  // namespace obc::sparse
