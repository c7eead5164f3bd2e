// The access trace of kernels/vgpu, filled by the stand-in: which stream touched which bytes, and
// every call that orders streams and host threads. It is kept in libkernels.so, since what it
// calls a host thread is PyTorch's to say; until that is loaded nothing is traced.
#pragma once

#include "../vgpu/trace.h"

namespace fakecuda {

using vgpu::Access;
using vgpu::Accesses;
using vgpu::Kind;

using TraceHook = void (*)(Kind kind, int device, int64_t stream, int64_t aux, const char* what,
                           const Accesses& accesses);

void trace(Kind kind, int device, int64_t stream, int64_t aux = 0, const char* what = "",
           const Accesses& accesses = {});

inline Access access(const void* pointer, size_t nbytes, bool is_write) {
  return {reinterpret_cast<uint64_t>(pointer), nbytes, is_write};
}

// For calls that a mutex puts in order whichever threads make them: what the earlier caller knew,
// the later one knows. Called under the mutex, once for each call. Tokens below 0 are ours.
constexpr int64_t kMappings = -1;        // addresses are taken from the system and given back
constexpr int64_t kHostAllocator = -2;   // PyTorch's allocator of pinned memory
constexpr int64_t kDeviceAllocator = -3; // minus a device: PyTorch's allocator of its memory
void trace_turn(int64_t token);

}  // namespace fakecuda
