// Memory for work in progress: aligned to cache lines, uninitialised. Freed blocks are kept, up to kKept bytes, for the next
// call: fresh pages from the system would cost small problems more than their arithmetic. Nobody waits for the cache: who
// finds it locked, by another thread or by one that a fork left behind, does without.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

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
      const auto best = std::min_element(blocks_.begin(), blocks_.end(), [&](const Block& a, const Block& b) {
        return std::make_pair(a.bytes < bytes, a.bytes) < std::make_pair(b.bytes < bytes, b.bytes);
      });
      if (best != blocks_.end() && best->bytes >= bytes && best->bytes / 2 <= bytes) {
        const Block found = *best;
        kept_ -= found.bytes;
        blocks_.erase(best);
        return found;
      }
    }
    constexpr size_t line = 64;
    bytes = (bytes + line - 1) / line * line;
    void* data = std::aligned_alloc(line, bytes);
    if (data == nullptr) {
      throw std::bad_alloc();
    }
    return {data, bytes};
  }

  void give(Block block) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) {
      return std::free(block.data);
    }
    blocks_.push_back(block);
    kept_ += block.bytes;
    for (; kept_ > kKept; blocks_.erase(blocks_.begin())) {  // the oldest go first
      kept_ -= blocks_.front().bytes;
      std::free(blocks_.front().data);
    }
  }

 private:
  static constexpr size_t kKept = 64 << 20;
  std::mutex mutex_;
  std::vector<Block> blocks_;
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
