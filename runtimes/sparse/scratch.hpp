// Memory that runs borrow and give back, so that it is allocated only once.
#pragma once

#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <utility>
#include <vector>

namespace obc::sparse {

// All operators share one: what a layer packs its pixels into is then in the caches still from the layer
// before. With memory of its own, each layer of a network would find its own far away.
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
            std::thread::id last;  // who had it
        };

        ScratchPool& pool_;
        Memory memory_;
    };

    // The pool of all operators that there are; its memory goes with the last one.
    static std::shared_ptr<ScratchPool> shared() {
        static std::mutex mutex;
        static std::weak_ptr<ScratchPool> pool;
        std::lock_guard<std::mutex> lock(mutex);
        std::shared_ptr<ScratchPool> found = pool.lock();
        if (!found) pool = found = std::make_shared<ScratchPool>();
        return found;
    }

    Piece borrow(size_t bytes) { return Piece(*this, bytes); }

  private:
    static constexpr size_t kAligned = 64;

    // Pieces that this thread had last are in its own caches. Of these the smallest that is large enough,
    // else the largest: it is let grow.
    static bool suits_better(const Piece::Memory& a, const Piece::Memory& b, size_t bytes, std::thread::id self) {
        if ((a.last == self) != (b.last == self)) return a.last == self;
        const bool enough = a.bytes >= bytes;
        if (enough != (b.bytes >= bytes)) return enough;
        return enough ? a.bytes < b.bytes : a.bytes > b.bytes;
    }

    Piece::Memory take(size_t bytes) {
        const std::thread::id self = std::this_thread::get_id();
        Piece::Memory memory;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            if (!free_.empty()) {
                size_t best = 0;
                for (size_t i = 1; i < free_.size(); ++i) {
                    if (suits_better(free_[i], free_[best], bytes, self)) best = i;
                }
                std::swap(free_[best], free_.back());
                memory = std::move(free_.back());
                free_.pop_back();
            } else {
                free_.reserve(++pieces_);  // so that giving back allocates nothing
            }
        }
        memory.last = self;
        if (memory.bytes < bytes || !memory.data) {
            memory.data.reset();
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
