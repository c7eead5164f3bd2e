#include "memory.h"

#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/util/Exception.h>
#include <sys/mman.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <set>

#include "marks.h"

namespace vgpu {

using c10::CachingAllocator::StatArray;
using c10::CachingDeviceAllocator::DeviceStats;

namespace {

constexpr size_t kAlignment = 512;

// Addresses are reserved for this many times the capacity: then a fitting range is found whatever
// the fragmentation, and running out of memory depends on live bytes alone, as it must to be the
// same in every run. Addresses cost nothing; only touched pages do.
constexpr size_t kReserveFactor = 8;

void change(StatArray& stat, int64_t by) {
  if (by >= 0)
    stat[0].increase(by);
  else
    stat[0].decrease(-by);
}

struct Block {
  size_t nbytes;
  size_t requested_nbytes;
  VStream* stream;
  std::set<VStream*> other_users;
};

struct FreeRange {
  size_t nbytes;
  Marks marks;
};

// Bytes that are free in program order but that a stream may still be using.
struct Pending {
  size_t nbytes;
  VStream* owner;
  Marks marks;
};

// A reserved range of addresses and what is where in it.
class Region {
 public:
  explicit Region(size_t nbytes) : nbytes_(nbytes) {
    base_ = static_cast<char*>(mmap(nullptr, nbytes, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    TORCH_CHECK(base_ != MAP_FAILED, "vgpu: cannot reserve ", nbytes, " bytes of addresses: ",
                strerror(errno), "; lower the memory of the virtual GPUs or raise ulimit -v");
  }
  ~Region() { munmap(base_, nbytes_); }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  bool contains(const void* p) const { return p >= base_ && p < base_ + nbytes_; }

  // Best fit among the free ranges that `stream` may use, else untouched addresses, else null.
  char* take(size_t nbytes, VStream* stream) {
    if (char* p = take_free(nbytes, stream)) return p;
    if (merge_all() > 0)
      if (char* p = take_free(nbytes, stream)) return p;
    if (nbytes_ - frontier_ < nbytes) return nullptr;
    frontier_ += nbytes;
    if (frontier_ > next_trim_) {
      trim();  // touched pages should stay near the capacity, not the reserved range
      next_trim_ = frontier_ + nbytes_ / kReserveFactor;
    }
    return base_ + frontier_ - nbytes;
  }

  void give(char* p, size_t nbytes, const Marks& marks) {
    auto it = insert(p - base_, {nbytes, marks});
    it = try_merge(it);
    if (it != free_.begin()) try_merge(std::prev(it));
  }

  // Hands the pages of completed free ranges back to the system.
  void trim() {
    for (auto& [offset, range] : free_) {
      size_t begin = (offset + 4095) / 4096 * 4096, end = (offset + range.nbytes) / 4096 * 4096;
      if (begin < end && range.marks.is_complete())
        madvise(base_ + begin, end - begin, MADV_DONTNEED);
    }
  }

 private:
  using FreeMap = std::map<size_t, FreeRange>;  // by offset

  FreeMap::iterator insert(size_t offset, FreeRange range) {
    by_size_.insert({range.nbytes, offset});
    return free_.insert_or_assign(offset, std::move(range)).first;
  }
  FreeMap::iterator remove(FreeMap::iterator it) {
    by_size_.erase({it->second.nbytes, it->first});
    return free_.erase(it);
  }

  char* take_free(size_t nbytes, VStream* stream) {
    for (auto it = by_size_.lower_bound({nbytes, 0}); it != by_size_.end(); ++it) {
      size_t offset = it->second;
      auto found = free_.find(offset);
      FreeRange range = found->second;
      if (!range.marks.allow(stream)) continue;
      range.marks.trace_acquired(stream);
      remove(found);
      if (range.nbytes > nbytes) insert(offset + nbytes, {range.nbytes - nbytes, range.marks});
      return base_ + offset;
    }
    return nullptr;
  }

  // Merges a range with its right neighbour if the same streams hold both back. (Merging a
  // pending range with a completed one would hold back the completed one too.)
  FreeMap::iterator try_merge(FreeMap::iterator it, int* num_merged = nullptr) {
    auto next = std::next(it);
    if (next == free_.end() || it->first + it->second.nbytes != next->first) return it;
    if (!it->second.marks.has_same_pending(next->second.marks)) return it;
    FreeRange merged{it->second.nbytes + next->second.nbytes, it->second.marks};
    merged.marks.add(next->second.marks);
    size_t offset = it->first;
    remove(next);
    remove(it);
    if (num_merged) ++*num_merged;
    return insert(offset, std::move(merged));
  }
  int merge_all() {
    int num_merged = 0;
    for (auto it = free_.begin(); it != free_.end();) {
      int before = num_merged;
      it = try_merge(it, &num_merged);
      if (num_merged == before) ++it;
    }
    return num_merged;
  }

  char* base_;
  size_t nbytes_;
  size_t frontier_ = 0;  // addresses beyond have never been used
  size_t next_trim_ = nbytes_ / kReserveFactor;
  FreeMap free_;
  std::set<std::pair<size_t, size_t>> by_size_;  // (nbytes, offset)
};

class DeviceMemory {
 public:
  void* allocate(int device, size_t requested_nbytes, VStream* stream) {
    size_t nbytes = (requested_nbytes + kAlignment - 1) / kAlignment * kAlignment;
    std::unique_lock<std::mutex> lock(mutex_);
    make_room(lock, device, requested_nbytes, nbytes, stream);
    char* p = take_range(nbytes, stream);
    blocks_[p] = {nbytes, requested_nbytes, stream, {}};
    live_nbytes_ += nbytes;
    count(nbytes, requested_nbytes, 1);
    ++stats_.num_device_alloc;
    trace::add(Kind::Alloc, device, stream->id, 0, {}, {{to_int(p), nbytes, true}});
    return p;
  }

  void free(int device, void* pointer) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto it = blocks_.find(static_cast<char*>(pointer));
    if (it == blocks_.end()) return;
    Block block = std::move(it->second);
    char* p = it->first;
    blocks_.erase(it);
    Marks marks;
    marks.add(mark_now(*block.stream));
    for (VStream* user : block.other_users) marks.add(mark_now(*user));
    trace::add(Kind::Free, device, block.stream->id, 0, {}, {{to_int(p), block.nbytes, true}});
    live_nbytes_ -= block.nbytes;
    count(-static_cast<int64_t>(block.nbytes), -static_cast<int64_t>(block.requested_nbytes), -1);
    ++stats_.num_device_free;
    if (!marks.is_complete()) {
      VStream* owner = block.other_users.empty() ? block.stream : nullptr;
      pending_.push_back({block.nbytes, owner, marks});
      pending_nbytes_ += block.nbytes;
    }
    drop_completed();
    for (auto& region : regions_)
      if (region->contains(p)) region->give(p, block.nbytes, marks);
  }

  void record_use(const void* pointer, VStream* stream) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto it = blocks_.upper_bound(static_cast<char*>(const_cast<void*>(pointer)));
    if (it == blocks_.begin()) return;
    Block& block = std::prev(it)->second;
    if (stream != block.stream) block.other_users.insert(stream);
  }

  bool contains(const void* p) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& region : regions_)
      if (region->contains(p)) return true;
    return false;
  }

  size_t live_nbytes() {
    std::lock_guard<std::mutex> lock(mutex_);
    return live_nbytes_;
  }
  DeviceStats stats() {
    std::lock_guard<std::mutex> lock(mutex_);
    return stats_;
  }
  void reset_peak() {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto* stat : all_stats()) (*stat)[0].reset_peak();
  }
  void reset_accumulated() {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto* stat : all_stats()) (*stat)[0].reset_accumulated();
    stats_.num_ooms = stats_.num_alloc_retries = 0;
    stats_.num_device_alloc = stats_.num_device_free = 0;
  }
  void trim() {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& region : regions_) region->trim();
  }
  void reset() {
    std::lock_guard<std::mutex> lock(mutex_);
    regions_.clear();
    pending_.clear();
    pending_nbytes_ = 0;
    stats_ = {};
  }

 private:
  static uint64_t to_int(const void* p) { return reinterpret_cast<uint64_t>(p); }

  std::array<StatArray*, 5> all_stats() {
    return {&stats_.allocation, &stats_.active, &stats_.allocated_bytes, &stats_.active_bytes,
            &stats_.requested_bytes};
  }

  void count(int64_t nbytes, int64_t requested_nbytes, int blocks) {
    change(stats_.allocation, blocks);
    change(stats_.active, blocks);
    change(stats_.allocated_bytes, nbytes);
    change(stats_.reserved_bytes, nbytes);
    change(stats_.active_bytes, nbytes);
    change(stats_.requested_bytes, requested_nbytes);
  }

  void drop_completed() {
    while (!pending_.empty() && pending_.front().marks.is_complete()) {
      pending_nbytes_ -= pending_.front().nbytes;
      pending_.pop_front();
    }
  }

  // Bytes that must be given back before `stream` can have them. What the stream itself freed
  // does not count: its earlier kernels are over when its later ones run.
  const Pending* first_pending_of_others(const VStream* stream, size_t* nbytes) const {
    const Pending* first = nullptr;
    *nbytes = 0;
    for (const auto& entry : pending_) {
      if (entry.owner == stream || entry.marks.is_complete()) continue;
      *nbytes += entry.nbytes;
      if (!first) first = &entry;
    }
    return first;
  }

  // Returns when `nbytes` may be allocated, waiting for streams only as far as it must.
  void make_room(std::unique_lock<std::mutex>& lock, int device, size_t requested_nbytes,
                 size_t nbytes, const VStream* stream) {
    size_t capacity = config().memory_nbytes;
    while (live_nbytes_ + pending_nbytes_ + nbytes > capacity) {
      drop_completed();
      size_t held_nbytes = 0;
      const Pending* oldest = first_pending_of_others(stream, &held_nbytes);
      if (live_nbytes_ + held_nbytes + nbytes <= capacity) return;
      if (!oldest || live_nbytes_ + nbytes > capacity) {
        ++stats_.num_ooms;
        size_t live = live_nbytes_;
        lock.unlock();
        TORCH_CHECK_WITH(
            OutOfMemoryError, false, "vgpu:", device, " out of memory: tried to allocate ",
            requested_nbytes, " bytes; capacity ", capacity, " bytes, of which ", live,
            " are live and ", capacity - live, " free.");
      }
      ++stats_.num_alloc_retries;
      Marks marks = oldest->marks;
      lock.unlock();  // the streams waited for may free memory meanwhile
      marks.wait(stream);
      lock.lock();
    }
  }

  char* take_range(size_t nbytes, VStream* stream) {
    for (auto& region : regions_)
      if (char* p = region->take(nbytes, stream)) return p;
    size_t size = std::max(kReserveFactor * config().memory_nbytes, nbytes);
    regions_.push_back(std::make_unique<Region>(size));
    return regions_.back()->take(nbytes, stream);
  }

  std::mutex mutex_;
  std::vector<std::unique_ptr<Region>> regions_;
  std::map<char*, Block> blocks_;
  std::deque<Pending> pending_;
  size_t live_nbytes_ = 0;
  size_t pending_nbytes_ = 0;
  DeviceStats stats_;
};

DeviceMemory& memory_of(int device) {
  static auto* all = new std::array<DeviceMemory, kMaxDevices>();
  return (*all)[device];
}

class VAllocator final : public c10::DeviceAllocator {
 public:
  static void free_pointer(void* p) {
    // A forked child inherits tensors but not the threads; its locks may be held for ever.
    if (!p || in_forked_child()) return;
    int device = device_of_pointer(p);
    if (device >= 0) memory_of(device).free(device, p);
  }

  c10::DataPtr allocate(size_t nbytes) override {
    check_not_forked();
    int index = current_device();
    c10::Device device(c10::kPrivateUse1, static_cast<c10::DeviceIndex>(index));
    if (nbytes == 0) return {nullptr, nullptr, &free_pointer, device};
    void* p = memory_of(index).allocate(index, nbytes, &current_stream(index));
    return {p, p, &free_pointer, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pointer; }
  void copy_data(void* dst, const void* src, size_t nbytes) const override {
    synchronize_device(current_device());
    memcpy(dst, src, nbytes);
  }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t /*pool*/) override { memory_of(current_device()).trim(); }
  void recordStream(const c10::DataPtr& data, c10::Stream stream) override {
    int device = device_of_pointer(data.get());
    if (device < 0) return;
    memory_of(device).record_use(data.get(), &get_stream(stream.device_index(), stream.id()));
  }
  DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    return memory_of(device).stats();
  }
  void resetAccumulatedStats(c10::DeviceIndex device) override {
    memory_of(device).reset_accumulated();
  }
  void resetPeakStats(c10::DeviceIndex device) override { memory_of(device).reset_peak(); }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override {
    size_t capacity = config().memory_nbytes;
    return {capacity - memory_of(device).live_nbytes(), capacity};
  }
};

VAllocator& the_allocator() {
  static auto* instance = new VAllocator();
  return *instance;
}

const int g_memory_registered = [] {
  c10::SetAllocator(c10::kPrivateUse1, &the_allocator());
  return 0;
}();

}  // namespace

c10::DeviceAllocator& device_allocator() { return the_allocator(); }

int device_of_pointer(const void* pointer) {
  for (int device = 0; device < kMaxDevices; ++device)
    if (memory_of(device).contains(pointer)) return device;
  return -1;
}

size_t live_nbytes() {
  size_t total = 0;
  for (int device = 0; device < kMaxDevices; ++device) total += memory_of(device).live_nbytes();
  return total;
}

void reset_memory() {
  for (int device = 0; device < kMaxDevices; ++device) memory_of(device).reset();
}

}  // namespace vgpu
