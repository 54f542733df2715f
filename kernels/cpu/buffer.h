// Memory for work in progress: aligned to cache lines, uninitialised. Freed blocks are kept, up to kKept bytes, for the next
// call: fresh pages from the system would cost small problems more than their arithmetic. Nobody waits for the cache: who
// finds it locked, by another thread or by one that a fork left behind, does without.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <utility>

namespace convrnn {

class BlockCache {
 public:
  struct Block {
    void* data = nullptr;
    size_t bytes = 0;
  };

  static BlockCache& instance() {
    static auto* const cache = new BlockCache;  // never destroyed: buffers may outlive static objects
    return *cache;
  }

  // A block of at least so many bytes, and no more than twice as many.
  Block take(size_t bytes) {
    if (const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock); lock) {
      const Block* best = std::min_element(blocks_, blocks_ + count_, [&](const Block& a, const Block& b) {
        return std::make_pair(a.bytes < bytes, a.bytes) < std::make_pair(b.bytes < bytes, b.bytes);
      });
      if (best != blocks_ + count_ && best->bytes >= bytes && best->bytes / 2 <= bytes) {
        return remove(best - blocks_);
      }
    }
    constexpr size_t line = 64;
    bytes = (bytes + line - 1) / line * line;
    void* data = std::aligned_alloc(line, bytes);
    if (data == nullptr) {
      throw std::bad_alloc();
    }
#ifdef __SANITIZE_ADDRESS__
    std::memset(data, 0xff, bytes);  // NaN: what is read before it is written shows
#endif
    return {data, bytes};
  }

  void give(Block block) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock || block.bytes > kKept || count_ == kBlocks) {
      return std::free(block.data);
    }
    blocks_[count_++] = block;
    for (kept_ += block.bytes; kept_ > kKept;) {  // the oldest go first
      std::free(remove(0).data);
    }
  }

 private:
  Block remove(int64_t i) {
    const Block found = blocks_[i];
    kept_ -= found.bytes;
    std::copy(blocks_ + i + 1, blocks_ + count_, blocks_ + i);
    --count_;
    return found;
  }

#ifdef __SANITIZE_ADDRESS__
  static constexpr size_t kKept = 0;  // a block that is used again hides what lies behind its end
#else
  static constexpr size_t kKept = 64 << 20;
#endif
  static constexpr int64_t kBlocks = 64;
  std::mutex mutex_;
  Block blocks_[kBlocks];
  int64_t count_ = 0;
  size_t kept_ = 0;
};

template <class A>
class Buffer {
 public:
  explicit Buffer(int64_t elements = 0) {
    if (elements > 0) {
      block_ = BlockCache::instance().take(static_cast<size_t>(elements) * sizeof(A));
    }
  }
  Buffer(Buffer&& other) noexcept : block_(std::exchange(other.block_, {})) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(block_, other.block_);
    return *this;
  }
  ~Buffer() {
    if (block_.data != nullptr) {
      BlockCache::instance().give(block_);
    }
  }
  A* data() {
    return static_cast<A*>(block_.data);
  }
  const A* data() const {
    return static_cast<const A*>(block_.data);
  }

 private:
  BlockCache::Block block_;
};

}  // namespace convrnn
