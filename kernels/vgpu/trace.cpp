#include "trace.h"

#include <c10/util/ThreadLocalDebugInfo.h>

#include <memory>
#include <mutex>
#include <string_view>
#include <unordered_map>

namespace vgpu::trace {

std::atomic<bool> g_enabled{false};

namespace {

// Autograd copies the caller's ThreadLocalDebugInfo into the threads that run its backward. A
// thread id kept there, instead of in a plain thread_local, therefore follows the logical thread.
constexpr std::string_view kSlotName = "VGPU_HOST_THREAD";
const c10::DebugInfoKind kSlot(&kSlotName);

struct HostThread : c10::DebugInfoBase {
  explicit HostThread(uint32_t number) : number(number) {}
  uint32_t number;
};

uint32_t own_number() {
  static std::atomic<uint32_t> next{0};
  static thread_local uint32_t number = next++;  // not the OS id: those are reused
  return number;
}

struct Log {
  std::mutex mutex;
  std::vector<PackedRecord> records, drained_records;
  std::vector<PackedAccess> accesses, drained_accesses;
  std::unordered_map<std::string, uint32_t> name_index;
  std::string names;
};

Log& the_log() {
  static Log* log = new Log();
  return *log;
}

}  // namespace

uint32_t host_thread() {
  if (auto* info = c10::ThreadLocalDebugInfo::get(kSlot))
    return static_cast<HostThread*>(info)->number;
  return own_number();
}

void adopt_host_thread() {
  static thread_local bool done = false;
  if (done) return;
  // Only onto an empty stack: a profiler that is on expects to find its own entry on top.
  if (c10::ThreadLocalDebugInfo::current() == nullptr) {
    done = true;
    c10::ThreadLocalDebugInfo::_push(kSlot, std::make_shared<HostThread>(own_number()));
  }
}

void enable(bool on) {
  if (on) adopt_host_thread();
  g_enabled = on;
}

int64_t new_token() {
  static std::atomic<int64_t> next{1};
  return next++;
}

void add(Kind kind, int device, int64_t stream, int64_t aux, const std::string& what,
         const Accesses& accesses) {
  if (!enabled()) return;
  uint32_t thread = host_thread();
  Log& log = the_log();
  std::lock_guard<std::mutex> lock(log.mutex);
  auto [it, is_new] = log.name_index.try_emplace(what, log.name_index.size());
  if (is_new) log.names += what + "\n";
  uint32_t count = 0;
  for (const auto& a : accesses) {
    if (a.nbytes == 0) continue;
    log.accesses.push_back({a.ptr, a.nbytes << 1 | static_cast<uint64_t>(a.is_write)});
    ++count;
  }
  log.records.push_back({aux, thread, static_cast<int32_t>(stream), it->second, count,
                         static_cast<int16_t>(device), static_cast<char>(kind), {}});
}

Drained drain() {
  Log& log = the_log();
  std::lock_guard<std::mutex> lock(log.mutex);
  log.drained_records.swap(log.records);
  log.drained_accesses.swap(log.accesses);
  log.records.clear();
  log.accesses.clear();
  return {log.drained_records.data(), log.drained_records.size(), log.drained_accesses.data(),
          log.drained_accesses.size(), log.names.c_str()};
}

}  // namespace vgpu::trace
