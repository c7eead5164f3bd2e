#include "pinned.h"

#include <c10/core/Allocator.h>
#include <c10/util/Exception.h>

#include <cstdlib>
#include <cstring>
#include <map>

#include "marks.h"

namespace vgpu {

namespace {

struct PinnedRange {
  size_t nbytes;
  bool is_registered;  // by the user, who also owns it
  Marks marks;
};

// Freed blocks are kept for a request of the same size, up to this many bytes in all.
constexpr size_t kMaxCachedNbytes = size_t{256} << 20;

class PinnedMemory {
 public:
  char* allocate(size_t nbytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    trace::adopt_host_thread();
    char* p = take_cached(nbytes);
    if (!p) {
      release(kMaxCachedNbytes);
      void* fresh = nullptr;
      TORCH_CHECK_WITH(OutOfMemoryError, posix_memalign(&fresh, 4096, nbytes) == 0,
                       "vgpu: no host memory for ", nbytes, " pinned bytes");
      p = static_cast<char*>(fresh);
    }
    ranges_[p] = {nbytes, false, {}};
    trace::add(Kind::Alloc, -1, -1, 0, {}, {{reinterpret_cast<uint64_t>(p), nbytes, true}});
    return p;
  }

  void free(void* pointer) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto it = ranges_.find(static_cast<char*>(pointer));
    if (it == ranges_.end()) return;
    // Negative: the positive tokens of host threads are the user's.
    int64_t token = trace::enabled() ? -trace::new_token() : 0;
    trace::add(Kind::HostRelease, -1, -1, token);
    trace::add(Kind::Free, -1, -1, 0, {},
               {{reinterpret_cast<uint64_t>(pointer), it->second.nbytes, true}});
    cached_nbytes_ += it->second.nbytes;
    cached_.insert({it->second.nbytes, {it->first, it->second.marks, token}});
    ranges_.erase(it);
  }

  bool record_use(const void* pointer, VStream& stream) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto* range = find(pointer);
    if (!range) return false;
    range->second.marks.add(mark_now(stream));
    return true;
  }

  bool contains(const void* pointer) {
    std::lock_guard<std::mutex> lock(mutex_);
    return find(pointer) != nullptr;
  }

  std::string add_registered(char* pointer, size_t nbytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto next = ranges_.lower_bound(pointer);
    if (find(pointer) || (next != ranges_.end() && next->first < pointer + nbytes))
      return "the range overlaps memory that is pinned already";
    ranges_[pointer] = {nbytes, true, {}};
    return {};
  }

  std::string remove_registered(char* pointer) {
    Marks marks;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      auto it = ranges_.find(pointer);
      if (it == ranges_.end() || !it->second.is_registered)
        return "no range was registered at this address";
      marks = it->second.marks;
      ranges_.erase(it);
    }
    marks.wait();  // the caller is free to unmap the range now
    marks.trace_acquired(nullptr);
    return {};
  }

  void release(size_t keep_nbytes) {
    for (auto it = cached_.begin(); it != cached_.end() && cached_nbytes_ > keep_nbytes;) {
      if (!it->second.marks.is_complete()) {
        ++it;
        continue;
      }
      cached_nbytes_ -= it->first;
      std::free(it->second.pointer);
      it = cached_.erase(it);
    }
  }
  void release_all() {
    std::lock_guard<std::mutex> lock(mutex_);
    release(0);
  }

 private:
  struct Cached {
    char* pointer;
    Marks marks;
    int64_t token;
  };

  char* take_cached(size_t nbytes) {
    auto [begin, end] = cached_.equal_range(nbytes);
    for (auto it = begin; it != end; ++it) {
      if (!it->second.marks.is_complete()) continue;
      it->second.marks.trace_acquired(nullptr);
      if (it->second.token) trace::add(Kind::HostAcquire, -1, -1, it->second.token);
      char* p = it->second.pointer;
      cached_nbytes_ -= nbytes;
      cached_.erase(it);
      return p;
    }
    return nullptr;
  }

  std::pair<char* const, PinnedRange>* find(const void* pointer) {
    char* p = static_cast<char*>(const_cast<void*>(pointer));
    auto it = ranges_.upper_bound(p);
    if (it == ranges_.begin()) return nullptr;
    --it;
    return p < it->first + it->second.nbytes ? &*it : nullptr;
  }

  std::mutex mutex_;
  std::map<char*, PinnedRange> ranges_;
  std::multimap<size_t, Cached> cached_;
  size_t cached_nbytes_ = 0;
};

PinnedMemory& pinned_memory() {
  static auto* instance = new PinnedMemory();
  return *instance;
}

class PinnedAllocator final : public at::HostAllocator {
 public:
  static void free_pointer(void* p) {
    if (p && !in_forked_child()) pinned_memory().free(p);
  }
  c10::DataPtr allocate(size_t nbytes) override {
    check_not_forked();
    void* p = nbytes ? pinned_memory().allocate(nbytes) : nullptr;
    return {p, p, &free_pointer, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pointer; }
  void copy_data(void* dst, const void* src, size_t nbytes) const override {
    memcpy(dst, src, nbytes);
  }
  bool record_event(void* pointer, void* /*context*/, c10::Stream stream) override {
    return record_pinned_use(pointer, get_stream(stream.device_index(), stream.id()));
  }
  void empty_cache() override { pinned_memory().release_all(); }
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};

PinnedAllocator& the_pinned_allocator() {
  static auto* instance = new PinnedAllocator();
  return *instance;
}

const int g_pinned_registered = [] {
  at::setHostAllocator(c10::kPrivateUse1, &the_pinned_allocator());
  return 0;
}();

}  // namespace

at::HostAllocator& pinned_allocator() { return the_pinned_allocator(); }
bool is_pinned(const void* pointer) { return pinned_memory().contains(pointer); }
bool record_pinned_use(const void* pointer, VStream& stream) {
  return pinned_memory().record_use(pointer, stream);
}
std::string host_register(char* pointer, size_t nbytes) {
  return pinned_memory().add_registered(pointer, nbytes);
}
std::string host_unregister(char* pointer) { return pinned_memory().remove_registered(pointer); }

}  // namespace vgpu
