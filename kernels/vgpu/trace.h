// The access trace: which stream touched which bytes, and every edge that orders streams.
//
// Records are appended in enqueue order (a stream appends under its queue lock), which is all a
// happens-before checker needs; when a kernel really ran does not matter.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

namespace vgpu {

enum class Kind : char {
  Alloc = 'A',          // aux unused; stream owns the block from here on
  Free = 'F',           // aux: token that a later reuse by another stream acquires
  Kernel = 'K',         // kernels and copies
  EventRecord = 'R',    // aux: event id
  StreamWait = 'W',     // aux: event id
  EventSync = 'E',      // the host waited for event (or free token) aux
  StreamSync = 'S',     // the host waited for a whole stream
  DeviceSync = 'D',     // the host waited for all streams of a device
  HostAccess = 'H',     // the host thread itself reads or writes
  HostRelease = 'P',    // aux: token; publishes all the host thread has done
  HostAcquire = 'Q',    // aux: token; what the releasing thread had done happened before
};

struct Access {
  uint64_t ptr;
  uint64_t nbytes;
  bool is_write;
};
using Accesses = std::vector<Access>;

namespace trace {

// Layouts read by harmony/vgpu/access_trace.py; change both together.
struct PackedRecord {
  int64_t aux;
  uint32_t thread;
  int32_t stream;
  uint32_t what;  // index into the name table
  uint32_t num_accesses;
  int16_t device;
  char kind;
  char pad[5];
};
static_assert(sizeof(PackedRecord) == 32);
struct PackedAccess {
  uint64_t ptr;
  uint64_t nbytes_and_write;  // nbytes << 1 | is_write
};

extern std::atomic<bool> g_enabled;
inline bool enabled() { return g_enabled.load(std::memory_order_relaxed); }
void enable(bool on);

// Number of the logical host thread. Backward runs on autograd's threads, but the caller waits
// for it, so both are one thread of control: they share the number (see trace.cpp).
uint32_t host_thread();
// Lets autograd threads inherit this thread's number from now on; cheap, idempotent.
void adopt_host_thread();

int64_t new_token();

void add(Kind kind, int device, int64_t stream, int64_t aux, const std::string& what = {},
         const Accesses& accesses = {});

// Moves all records out. The pointers stay valid until the next drain.
struct Drained {
  const PackedRecord* records;
  size_t num_records;
  const PackedAccess* accesses;
  size_t num_accesses;
  const char* names;  // newline-separated
};
Drained drain();

}  // namespace trace
}  // namespace vgpu
