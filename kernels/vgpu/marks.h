// Marks: how far streams had come when they were done with a block of memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "stream.h"

namespace vgpu {

struct Mark {
  VStream* stream;
  uint64_t position;  // the block is free of this stream once `position` tasks are complete
  int64_t token;      // names the mark in the trace
  bool is_complete() const { return stream->is_complete(position); }
};

// The stream's current position, named in the trace so that a reuse can refer to it.
inline Mark mark_now(VStream& stream) {
  Mark mark{&stream, stream.position(), trace::enabled() ? trace::new_token() : 0};
  trace::add(Kind::EventRecord, stream.device, stream.id, mark.token);
  return mark;
}

// At most one mark for each stream: a later one on the same stream implies the earlier.
class Marks {
 public:
  void add(const Mark& mark) {
    for (auto& mine : marks_)
      if (mine.stream == mark.stream) {
        if (mine.position <= mark.position) mine = mark;
        return;
      }
    marks_.push_back(mark);
  }
  void add(const Marks& other) {
    for (const auto& mark : other.marks_) add(mark);
  }
  // Whether `user` may write the block now. Its own marks hold by queue order.
  bool allow(const VStream* user) const {
    return std::all_of(marks_.begin(), marks_.end(), [&](const Mark& mark) {
      return mark.stream == user || mark.is_complete();
    });
  }
  bool is_complete() const { return allow(nullptr); }
  bool has_same_pending(const Marks& other) const {
    auto covered = [](const Marks& a, const Marks& b) {
      for (const auto& mark : a.marks_) {
        if (mark.is_complete()) continue;
        bool found = false;
        for (const auto& theirs : b.marks_)
          found |= theirs.stream == mark.stream && !theirs.is_complete();
        if (!found) return false;
      }
      return true;
    };
    return covered(*this, other) && covered(other, *this);
  }
  void wait(const VStream* user = nullptr) const {
    for (const auto& mark : marks_)
      if (mark.stream != user) mark.stream->wait_complete(mark.position);
  }
  // The host saw these marks complete before it gave the block to `user`: an edge of the trace.
  void trace_acquired(const VStream* user) const {
    for (const auto& mark : marks_)
      if (mark.stream != user && mark.token) trace::add(Kind::EventSync, -1, -1, mark.token);
  }

 private:
  std::vector<Mark> marks_;
};

}  // namespace vgpu
