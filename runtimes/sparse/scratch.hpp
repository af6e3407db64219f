// Memory that runs borrow and give back, so that it is allocated only once.
#pragma once

#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>

namespace obc::sparse {

// All operators share one: what a layer packs its pixels into is then in the caches still from the layer
// before. With memory of its own, each layer of a network would find its own far away. For the same reason a
// thread gets what it had last, and threads that borrow at the same moment do not wait for each other.
class ScratchPool {
    struct Free {
        void operator()(unsigned char* data) const { std::free(data); }
    };
    struct Memory {
        size_t bytes = 0;
        std::unique_ptr<unsigned char, Free> data;
    };

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
            return reinterpret_cast<T*>(memory_->data.get());
        }

      private:
        ScratchPool& pool_;
        std::unique_ptr<Memory> memory_;
    };

    ScratchPool() = default;
    ~ScratchPool() {
        for (Shelf& shelf : shelves_) {
            for (std::atomic<Memory*>& place : shelf.places) delete place.load();
        }
    }
    ScratchPool(const ScratchPool&) = delete;
    ScratchPool& operator=(const ScratchPool&) = delete;

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
    static constexpr size_t kShelves = 64;
    static constexpr size_t kPlaces = 6;  // more than any operator borrows at a time

    // Where a thread leaves what it gives back; with more threads than shelves some have one together.
    struct alignas(kAligned) Shelf {
        std::atomic<Memory*> places[kPlaces] = {};
    };

    static size_t own_shelf() {
        static std::atomic<size_t> threads{0};
        static thread_local const size_t number = threads++;
        return number % kShelves;
    }

    std::unique_ptr<Memory> take(size_t bytes) {
        std::unique_ptr<Memory> memory;
        const size_t own = own_shelf();
        for (size_t i = 0; i < kShelves && !memory; ++i) memory = take_from(shelves_[(own + i) % kShelves]);
        if (!memory) memory = std::make_unique<Memory>();
        if (memory->bytes < bytes || !memory->data) {
            memory->data.reset();
            memory->bytes = (bytes / kAligned + 1) * kAligned;
            memory->data.reset(static_cast<unsigned char*>(std::aligned_alloc(kAligned, memory->bytes)));
            if (!memory->data) throw std::bad_alloc();
        }
        return memory;
    }

    static std::unique_ptr<Memory> take_from(Shelf& shelf) {
        for (std::atomic<Memory*>& place : shelf.places) {
            if (!place.load(std::memory_order_relaxed)) continue;
            if (Memory* found = place.exchange(nullptr, std::memory_order_acquire)) return std::unique_ptr<Memory>(found);
        }
        return nullptr;
    }

    // The place that was looked at last is filled first, so that pieces keep their sizes.
    void put_back(std::unique_ptr<Memory> memory) {
        Shelf& shelf = shelves_[own_shelf()];
        for (size_t i = kPlaces; i-- > 0;) {
            std::atomic<Memory*>& place = shelf.places[i];
            Memory* none = nullptr;
            if (place.load(std::memory_order_relaxed)) continue;
            if (place.compare_exchange_strong(none, memory.get(), std::memory_order_release)) {
                memory.release();
                return;
            }
        }
    }

    Shelf shelves_[kShelves];
};

}  // namespace obc::sparse
