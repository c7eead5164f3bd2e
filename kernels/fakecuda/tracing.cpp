#include "tracing.h"

#include "state.h"

namespace fakecuda {

namespace {
std::atomic<TraceHook> g_hook{nullptr};
}  // namespace

void trace(Kind kind, int device, int64_t stream, int64_t aux, const char* what,
           const Accesses& accesses) {
  if (auto hook = g_hook.load()) hook(kind, device, stream, aux, what, accesses);
}

void trace_turn(int64_t token) {
  trace(Kind::HostAcquire, -1, -1, token);
  trace(Kind::HostRelease, -1, -1, token);
}

}  // namespace fakecuda

// From now on what happens is handed to this (see kernels.cpp).
FAKECUDA_API void fakecuda_trace_with(fakecuda::TraceHook hook) { fakecuda::g_hook = hook; }
