// The C functions of the access trace, which harmony/vgpu/access_trace.py calls through ctypes.
#include "capi.h"
#include "trace.h"

using namespace vgpu;

VGPU_API void vgpu_trace_enable(int on) { trace::enable(on != 0); }
VGPU_API int vgpu_trace_enabled() { return trace::enabled(); }
VGPU_API void vgpu_trace_drain(const void** records, uint64_t* num_records, const void** accesses,
                               uint64_t* num_accesses, const char** names) {
  auto drained = trace::drain();
  *records = drained.records;
  *num_records = drained.num_records;
  *accesses = drained.accesses;
  *num_accesses = drained.num_accesses;
  *names = drained.names;
}
VGPU_API void vgpu_host_access(const char* what, uint64_t pointer, uint64_t nbytes, int write) {
  trace::add(Kind::HostAccess, -1, -1, 0, what, {{pointer, nbytes, write != 0}});
}
VGPU_API void vgpu_host_release(int64_t token) {
  trace::add(Kind::HostRelease, -1, -1, token);
}
VGPU_API void vgpu_host_acquire(int64_t token) {
  trace::add(Kind::HostAcquire, -1, -1, token);
}
