// Memory of devices and pinned memory, both on the host; copies on streams.
#include <sys/mman.h>

#include <cstring>
#include <map>

#include "streams.h"

namespace fakecuda {

namespace {

struct Block {
  size_t nbytes;
  int device;
  bool is_ours;  // mapped here, by cudaHostAlloc
};

// Blocks by address, with the question which one holds a range.
class Blocks {
 public:
  const Block* find(const void* pointer, size_t nbytes = 1) const {
    auto address = reinterpret_cast<uintptr_t>(pointer);
    auto next = blocks_.upper_bound(address);
    if (next == blocks_.begin()) return nullptr;
    const auto& [start, block] = *std::prev(next);
    return address + nbytes <= start + block.nbytes ? &block : nullptr;
  }
  const Block* at(const void* pointer) const {
    auto found = blocks_.find(reinterpret_cast<uintptr_t>(pointer));
    return found == blocks_.end() ? nullptr : &found->second;
  }
  void add(const void* pointer, Block block) {
    blocks_[reinterpret_cast<uintptr_t>(pointer)] = block;
  }
  void remove(const void* pointer) { blocks_.erase(reinterpret_cast<uintptr_t>(pointer)); }

 private:
  std::map<uintptr_t, Block> blocks_;
};

struct Memory {
  std::mutex mutex;
  Blocks device, pinned;
  size_t used[kMaxDevices] = {};
  size_t pinned_nbytes = 0;
};
Memory& memory() {
  static auto* all = new Memory();
  return *all;
}

size_t round_up(size_t nbytes, size_t unit) { return (nbytes + unit - 1) / unit * unit; }

void* map_pages(size_t nbytes) {
  void* found = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return found == MAP_FAILED ? nullptr : found;
}

// Bytes of a device that are not taken, by anybody.
size_t free_nbytes(int device) {
  size_t taken = memory().used[device] + settings().context + others_nbytes();
  return taken > total_nbytes() ? 0 : total_nbytes() - taken;
}

struct Route {
  Call call;
  bool from_pageable = false, to_pageable = false;
};

Route route_of(const void* to, const void* from, size_t nbytes) {
  std::lock_guard<std::mutex> lock(memory().mutex);
  const auto *target = memory().device.find(to), *source = memory().device.find(from);
  if (target && source)
    return {target->device == source->device ? Call::CopyWithin : Call::CopyPeer};
  if (target) return {Call::CopyIn, !memory().pinned.find(from, nbytes), false};
  if (source) return {Call::CopyOut, false, !memory().pinned.find(to, nbytes)};
  return {Call::CopyWithin, true, true};
}

// Pageable memory is left out: its copies block, and its addresses are reused in an order that the
// trace cannot see.
Accesses accesses_of(const Route& route, const void* to, const void* from, size_t nbytes) {
  Accesses accesses;
  if (!route.from_pageable) accesses.push_back(access(from, nbytes, false));
  if (!route.to_pageable) accesses.push_back(access(to, nbytes, true));
  return accesses;
}

const char* name_of(Call copy) {
  return copy == Call::CopyIn    ? "copy h2d"
         : copy == Call::CopyOut ? "copy d2h"
         : copy == Call::CopyPeer ? "copy p2p"
                                  : "copy";
}

// A lost device moves nothing any more: what waits for it keeps what it had.
void move_bytes(void* to, const void* from, size_t nbytes) {
  if (!is_lost()) memcpy(to, from, nbytes);
}

cudaError_t copy(void* to, const void* from, size_t nbytes, cudaStream_t handle, bool waits) {
  auto* stream = find_stream(handle);
  if (!stream) return misuse("a copy on an unknown stream");
  if (nbytes == 0) return report(cudaSuccess);
  auto route = route_of(to, from, nbytes);
  if (auto error = begin(route.call, nbytes)) return report(error);
  if (route.from_pageable && !waits) count(Call::PageableIn, nbytes);
  if (route.to_pageable && !waits) count(Call::PageableOut, nbytes);
  auto accesses = accesses_of(route, to, from, nbytes);
  const char* what = name_of(route.call);
  if (route.from_pageable && !waits) {
    // From pageable memory the runtime first copies to pages of its own, before it returns.
    auto staged = std::make_shared<std::vector<char>>(nbytes);
    memcpy(staged->data(), from, nbytes);
    stream->enqueue([=] { move_bytes(to, staged->data(), nbytes); }, what, accesses);
  } else {
    stream->enqueue([=] { move_bytes(to, from, nbytes); }, what, accesses);
  }
  if (waits || route.to_pageable) stream->synchronize();
  return report(cudaSuccess);
}

}  // namespace

}  // namespace fakecuda

using namespace fakecuda;

// ---- memory of devices

FAKECUDA_API cudaError_t cudaMalloc(void** made, size_t nbytes) {
  if (auto error = begin(Call::Malloc, nbytes)) return report(error);
  if (is_lost()) return report(cudaSuccess);
  int device = current_device();
  touch_context(device);
  std::lock_guard<std::mutex> lock(memory().mutex);
  size_t size = round_up(nbytes, size_t{2} << 20);  // the granularity of a real device
  if (size > free_nbytes(device)) return report(cudaErrorMemoryAllocation);
  void* pages = map_pages(size);
  if (!pages) return report(cudaErrorMemoryAllocation);
  trace_turn(kMappings);
  memory().device.add(pages, {size, device, true});
  memory().used[device] += size;
  *made = pages;
  return report(cudaSuccess);
}

FAKECUDA_API cudaError_t cudaFree(void* pointer) {
  if (!pointer) return report(cudaSuccess);
  if (auto error = begin(Call::Free)) return report(error);
  Block block;
  {
    std::lock_guard<std::mutex> lock(memory().mutex);
    const auto* found = memory().device.at(pointer);
    if (!found) return misuse("memory is freed that no device has", cudaErrorInvalidValue);
    block = *found;
  }
  synchronize_device(block.device);  // as the real call does, for all streams
  std::lock_guard<std::mutex> lock(memory().mutex);
  memory().device.remove(pointer);
  memory().used[block.device] -= block.nbytes;
  trace_turn(kMappings);
  munmap(pointer, block.nbytes);
  return report(cudaSuccess);
}

FAKECUDA_API cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  touch_context(current_device());
  std::lock_guard<std::mutex> lock(memory().mutex);
  *total = total_nbytes();
  *free = free_nbytes(current_device());
  return report(cudaSuccess);
}

// ---- pinned memory

FAKECUDA_API cudaError_t cudaHostRegister(void* pointer, size_t nbytes, unsigned) {
  if (auto error = begin(Call::HostRegister, nbytes)) return report(error);
  touch_context(current_device());
  std::lock_guard<std::mutex> lock(memory().mutex);
  if (memory().pinned_nbytes + nbytes > settings().pin_limit)
    return report(cudaErrorMemoryAllocation);
  trace_turn(kMappings);
  memory().pinned.add(pointer, {nbytes, current_device(), false});
  memory().pinned_nbytes += nbytes;
  return report(cudaSuccess);
}

FAKECUDA_API cudaError_t cudaHostUnregister(void* pointer) {
  if (auto error = begin(Call::HostUnregister)) return report(error);
  for (int device = 0; device < settings().gpus; ++device) synchronize_device(device);
  std::lock_guard<std::mutex> lock(memory().mutex);
  const auto* found = memory().pinned.at(pointer);
  if (!found) return misuse("memory is unregistered that is not", cudaErrorInvalidValue);
  trace_turn(kMappings);
  memory().pinned_nbytes -= found->nbytes;
  memory().pinned.remove(pointer);
  return report(cudaSuccess);
}

FAKECUDA_API cudaError_t cudaHostAlloc(void** made, size_t nbytes, unsigned) {
  if (auto error = begin(Call::HostAlloc, nbytes)) return report(error);
  touch_context(current_device());
  std::lock_guard<std::mutex> lock(memory().mutex);
  size_t size = round_up(nbytes ? nbytes : 1, 4096);
  *made = map_pages(size);
  if (!*made || memory().pinned_nbytes + size > settings().pin_limit)
    return report(cudaErrorMemoryAllocation);
  trace_turn(kMappings);
  memory().pinned.add(*made, {size, current_device(), true});
  memory().pinned_nbytes += size;
  return report(cudaSuccess);
}

FAKECUDA_API cudaError_t cudaFreeHost(void* pointer) {
  for (int device = 0; device < settings().gpus; ++device) synchronize_device(device);
  std::lock_guard<std::mutex> lock(memory().mutex);
  const auto* found = memory().pinned.at(pointer);
  if (!found || !found->is_ours)
    return misuse("host memory is freed that is not pinned", cudaErrorInvalidValue);
  size_t nbytes = found->nbytes;
  trace_turn(kMappings);
  memory().pinned_nbytes -= nbytes;
  memory().pinned.remove(pointer);
  munmap(pointer, nbytes);
  return report(cudaSuccess);
}

FAKECUDA_API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found,
                                                  const void* pointer) {
  std::lock_guard<std::mutex> lock(memory().mutex);
  *found = {};
  if (const auto* block = memory().device.find(pointer)) {
    found->type = cudaMemoryTypeDevice;
    found->device = block->device;
    found->devicePointer = const_cast<void*>(pointer);
  } else if (memory().pinned.find(pointer)) {
    found->type = cudaMemoryTypeHost;
    found->devicePointer = found->hostPointer = const_cast<void*>(pointer);
  } else {
    found->type = cudaMemoryTypeUnregistered;
    found->device = cudaInvalidDeviceId;
  }
  return report(cudaSuccess);
}

// ---- copies

FAKECUDA_API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t nbytes,
                                         cudaMemcpyKind, cudaStream_t stream) {
  return copy(to, from, nbytes, stream, false);
}
FAKECUDA_API cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t nbytes,
                                             cudaStream_t stream) {
  return copy(to, from, nbytes, stream, false);
}
FAKECUDA_API cudaError_t cudaMemcpy(void* to, const void* from, size_t nbytes, cudaMemcpyKind) {
  count(Call::Synchronize);
  return copy(to, from, nbytes, nullptr, true);
}
FAKECUDA_API cudaError_t cudaMemsetAsync(void* to, int value, size_t nbytes,
                                         cudaStream_t handle) {
  if (auto error = begin(Call::Memset, nbytes)) return report(error);
  auto* stream = find_stream(handle);
  if (!stream) return misuse("memory is set on an unknown stream");
  stream->enqueue([=] { memset(to, value, nbytes); }, "memset", {access(to, nbytes, true)});
  return report(cudaSuccess);
}
FAKECUDA_API cudaError_t cudaMemset(void* to, int value, size_t nbytes) {
  return cudaMemsetAsync(to, value, nbytes, nullptr);
}
FAKECUDA_API cudaError_t cudaMemset2DAsync(void* to, size_t pitch, int value, size_t width,
                                           size_t height, cudaStream_t handle) {
  if (auto error = begin(Call::Memset, width * height)) return report(error);
  auto* stream = find_stream(handle);
  if (!stream) return misuse("memory is set on an unknown stream");
  Accesses rows;
  for (size_t row = 0; row < height; ++row)
    rows.push_back(access(static_cast<char*>(to) + row * pitch, width, true));
  stream->enqueue(
      [=] {
        for (const auto& row : rows) memset(reinterpret_cast<void*>(row.ptr), value, row.nbytes);
      },
      "memset", rows);
  return report(cudaSuccess);
}
